"""Why the cache's lead over cross-entropy in tokenizer transfer is what it is: who could teach what, how noisily.

    python -m benchmarks.transfer_cause RUN --work WORK --tokenizer GPT2FOLDER
        --out benchmarks/results/transfer_cause.json [--arm ce|cache] [--at 0 20 40] [--ahead 6] [--rate 1e-3]
    python -m benchmarks.transfer_cause --report --out benchmarks/results/transfer_cause.json

The run and the student are those of `transfer_gain`. One student is trained; at the steps `--at` two things are
measured on the training text of the `--ahead` steps after the last of them, which it never sees:

    divergence   KL(teacher || student) of the choices that the teacher decides, in bits per byte of text, by how much
                 the teacher leaves open there: under 0.1 nats of entropy a target is *settled*, above 1 *free*. What is
                 settled the text says as well as the teacher: cross-entropy is divergence there. Only in the rest is
                 the text a noisy witness. Choices left to the text have no divergence.
    gradients    of the tokens' cross-entropy (`ce`), of the objective without it (`cache`), and of what the teacher
                 decides in that alone (`teacher`): `signal`, the squared norm of a step's mean gradient, unbiased, from
                 products of different steps; `noise`, the mean squared distance of a step from that mean; the cosine of
                 the first two signals. For adapters and embeddings, before clipping.

A teacher in the place of text helps as far as its gradient has less noise at equal signal: with a part f of the noise
a step is worth 1 / f steps of text. Noise that is left is of the text that happens to be read. Results are appended.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.transfer_gain import prepared
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.stages.student import student
from bytecache.stages.targets.order import Order
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import MicroBatch, SlotTargets, Step
from bytecache.stages.train.objective.loss import byte_terms
from bytecache.stages.train.objective.marginal import MarginalTerm
from bytecache.stages.train.objective.node_sums import node_logits
from bytecache.stages.train.objective.term import ByteTerm
from bytecache.stages.train.run import Run, learning_rate, micro_loss, set_rate, start_run
from bytecache.stages.train.train import CLIP

GROUPS = {"settled": (0.0, 0.1), "middling": (0.1, 1.0), "free": (1.0, math.inf)}
"""Entropy of a choice's target, nats: from, below."""


LOSSES = ("ce", "cache", "teacher")
"""Whose gradients are measured."""


def entropy(targets: SlotTargets) -> Tensor:
    """Nats of each slot's target [S], its bucket as one outcome."""
    listed: Tensor = torch.special.entr(targets.prob)
    bucket: Tensor = torch.special.entr(targets.tail)
    return bucket.index_add(0, targets.slot, listed)


@torch.no_grad()
def divergences(
    opened: student.Student, term: ByteTerm, steps: Sequence[Step], dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, float]]:
    """Choices, their cross-entropy, divergence and the target's entropy, per byte of text, bits; by group.

    term: a `MarginalTerm` that has counted the tokenizer's cuts. dtype: `train.dtype`.
    """
    assert isinstance(term, MarginalTerm)
    losses = {name: dict.fromkeys(("choices", "ce", "kl", "entropy"), 0.0) for name in (*GROUPS, "left to the text")}
    n_bytes = sum(step.n_bytes for step in steps)
    for micro in (micro for step in steps for micro in step.micro):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = opened.forward(micro.input_ids)[0]
        choices = term.marginal.choices(micro, "sum")
        assert choices.targets is not None and choices.open is not None
        scores = node_logits(logits.flatten(0, 1).float(), choices.row, choices.node, term.tables)
        ce, kl = byte_terms(scores, choices.true, choices.targets)
        doubt = entropy(choices.targets)
        masks = {name: ~choices.open & (doubt >= low) & (doubt < high) for name, (low, high) in GROUPS.items()}
        for name, mask in {**masks, "left to the text": choices.open}.items():
            values = (mask.sum() * math.log(2), ce[mask].sum(), kl[mask].sum(), doubt[mask].sum())
            for key, value in zip(losses[name], values, strict=True):
                losses[name][key] += float(value) / n_bytes / math.log(2)
    return {name: {key: round(value, 4) for key, value in group.items()} for name, group in losses.items()}


def step_gradients(run: Run, step: Step, parameters: list[nn.Parameter]) -> list[list[Tensor]]:
    """Gradients of a step, per token, of the losses that `LOSSES` names: for each a list like `parameters`."""
    sums = [[torch.zeros_like(p) for p in parameters] for _ in LOSSES]
    for micro in step.micro:
        parts = micro_loss(run, micro)
        losses = [parts.token / step.n_tokens, *(x / step.n_byte_tokens for x in (parts.kl + parts.open, parts.kl))]
        for total, loss in zip(sums, losses, strict=True):
            grads = torch.autograd.grad(loss, parameters, retain_graph=loss is not losses[-1])
            for into, grad in zip(total, grads, strict=True):
                into += grad
    return sums


def signal_and_noise(each: list[list[Tensor]]) -> tuple[list[dict[str, float]], float]:
    """For every loss signal and noise (module docstring), and the cosine of the first two signals.

    Args:
        each: flat gradients [losses][steps], two of either at least.
    """
    n = len(each[0])

    def across(a: list[Tensor], b: list[Tensor]) -> float:
        """Mean product of different steps."""
        total_a, total_b = (torch.stack(side).sum(0) for side in (a, b))
        same = sum(float(x @ y) for x, y in zip(a, b, strict=True))
        return (float(total_a @ total_b) - same) / (n * (n - 1))

    signals = [across(side, side) for side in each]
    sizes = [sum(float(x @ x) for x in side) / n for side in each]
    cosine = across(*each[:2]) / math.sqrt(signals[0] * signals[1]) if min(signals[:2]) > 0 else math.nan
    return [{"signal": s, "noise": size - s} for s, size in zip(signals, sizes, strict=True)], cosine


def gradients(run: Run, steps: Sequence[Step]) -> dict[str, Any]:
    """Signal and noise of the losses, for the adapters and for the embeddings."""
    embeddings = run.student.model.get_input_embeddings().weight
    adapters = [p for _, p in run.parameters() if p.requires_grad and p is not embeddings]
    parts: dict[str, list[list[Tensor]]] = {name: [[] for _ in LOSSES] for name in ("adapters", "embeddings")}
    for step in steps:
        for number, grads in enumerate(step_gradients(run, step, [*adapters, embeddings])):
            parts["adapters"][number].append(torch.cat([g.flatten() for g in grads[:-1]]))
            parts["embeddings"][number].append(grads[-1].flatten())
    losses = {}
    for name, each in parts.items():
        measured, cosine = signal_and_noise(each)
        losses[name] = {**dict(zip(LOSSES, measured, strict=True)), "cosine": cosine}
    return losses


def learn(run: Run, step: Step, settings: st.Train, arm: str) -> None:
    """One step of the optimiser, as `train` takes it."""
    set_rate(run, learning_rate(step.number, settings))
    run.optimizer.zero_grad(set_to_none=True)
    for micro in step.micro:
        parts = micro_loss(run, micro if arm == "cache" else _alone(micro))
        loss = parts.token / step.n_tokens if arm == "ce" else (parts.kl + parts.open) / step.n_byte_tokens
        loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for _, p in run.parameters() if p.grad is not None], CLIP)
    run.optimizer.step()


def _alone(micro: MicroBatch) -> MicroBatch:
    return replace(micro, targets=None)


def walk(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train one arm and yield what is measured on its way."""
    opened = student.load(prepared(args))
    settings = st.Train(
        steps=args.steps, learning_rate=args.rate, batch=2, window_bytes=512, warmup=5, dtype=args.dtype,
        lambda_byte=0.0, lora_rank=args.lora, lora_embeddings=True, tensorboard=False,
    )  # fmt: skip
    dataset = read_dataset(args.run / "targets")
    reader = stream.ShardReader(args.run / "targets", dataset, "train", opened.vocabulary, opened.end_id)
    order = Order(dataset.content_sha256, reader.positions, settings.window_bytes, args.seed)
    batching = stream.Batching(settings.batch, opened.max_tokens, byte_reduction="sum", limit=MarginalTerm.slots)
    steps = list(islice(stream.steps(order, reader, batching), max(args.at) + args.ahead))
    run = start_run(opened, settings, args.seed, torch.device("cpu"), reader=reader)
    ahead = steps[max(args.at) :]
    for number in range(max(args.at) + 1):
        if number in args.at:
            apart = divergences(run.student, run.objective.term, ahead, getattr(torch, args.dtype))
            yield {"step": number, "divergence": apart, "gradients": gradients(run, ahead)}
        if number < max(args.at):
            run.seed_step(args.seed, number)
            learn(run, steps[number], settings, args.arm)


def report(runs: list[dict[str, Any]]) -> str:
    """One row a point: what the text and the teacher say of the student, and the noise of the adapters' gradients."""
    lines = [
        "| trained by | after steps | bits/byte | KL | " + " | ".join(f"KL, {name}" for name in GROUPS)
        + " | noise of cache / of CE | cosine |",
        "|---|---:|" + "---:|" * (len(GROUPS) + 4),
    ]  # fmt: skip
    points = [(point["step"], run["arm"] != "ce", run["arm"], point) for run in runs for point in run["points"]]
    for step, _, arm, point in sorted(points, key=lambda p: p[:3]):
        apart, grad = point["divergence"], point["gradients"]["adapters"]
        sums = [sum(group[key] for group in apart.values()) for key in ("ce", "kl")]
        cells = [
            arm if step else "",
            str(step),
            *(f"{x:.3f}" for x in (*sums, *(apart[name]["kl"] for name in GROUPS))),
        ]
        cells += [f"{grad['cache']['noise'] / grad['ce']['noise']:.2f}", f"{grad['cosine']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder with targets/")
    parser.add_argument("--work", type=Path, help="scratch folder for the student")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arm", choices=("ce", "cache"), default="ce")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=40, help="of the schedule")
    parser.add_argument("--at", type=int, nargs="+", default=[0, 20, 40], help="steps at which to measure")
    parser.add_argument("--ahead", type=int, default=6, help="steps of text that are measured on")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--student", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--tokenizer", default="gpt2", help="see student.tokenizer")
    parser.add_argument("--lora", type=int, default=16)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    runs = json.loads(args.out.read_text()) if args.out.is_file() else []
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        chosen = {key: getattr(args, key) for key in ("arm", "seed", "rate", "dtype", "steps", "ahead")}
        runs.append({"machine": "2 cores, x86-64, one thread", **chosen, "points": []})
        for point in walk(args):
            runs[-1]["points"].append(point)
            args.out.write_text(json.dumps(runs, indent=1) + "\n")
    text = report(runs)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
