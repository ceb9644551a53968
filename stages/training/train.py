"""Train a student from byte targets: no teacher in memory, exact resume from any kill.

Algorithm: AdamW (0.9, 0.95), linear warm-up then cosine to 10 % of the peak, gradient norm clipped at 1; matrices
decay, norms and biases do not. A step is `batch` windows in micro-batches of similar length whose losses are divided by
the step's own counts, so the sum is exact. The state is the model, the head, two moments, the random state and one
integer, of which data order is a pure function. On one machine with the same number of threads, a run killed anywhere
and rerun ends with bit-identical weights (`tests/test_train.py` compares hashes).
Price, in CPU seconds of one EPYC thread: 1.7 a step of 16 windows of 1 KiB at 2.2 M parameters, 0.30 a step of 4
windows at 1.05 M (14 kB of text/s). Two thirds are matrix products, 18 % attention, 0.5 % collating. On a
shared machine set OMP_NUM_THREADS to what is really free: waiting threads made steps 25 times slower.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import ConfigError, Interrupted
from schemas.manifest import Dataset
from schemas.settings import Train as TrainSettings
from stages.scratch import scratch_folder
from stages.training import checkpoint, stream, student
from stages.training.loss import LossParts
from stages.training.objective import Objective
from stages.training.order import Order
from stages.training.source import open_dataset
from stages.training.student import Student

BETAS = (0.9, 0.95)
CLIP = 1.0
FINAL_LR = 0.1
"""The cosine ends at this share of the peak."""


@dataclass
class Run:
    """A student, its objective and optimiser: everything a checkpoint holds."""

    student: Student
    objective: Objective
    optimizer: torch.optim.AdamW
    pieces: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None
    """With `train.chunk`: `student.split_model`, once asked for."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter once (tied weights have one name), model first."""
        yield from self.student.model.named_parameters(prefix="model")
        yield from self.objective.named_parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Names: `model.*`, `head.*`, `adam.<parameter>/<moment>`, `rng`."""
        named: dict[str, Tensor] = {}
        for name, parameter in self.parameters():
            named[name] = parameter
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                named[f"adam.{name}/{moment}"] = value
        named["rng"] = torch.get_rng_state()
        return named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned."""
        with torch.no_grad():
            for name, parameter in self.parameters():
                parameter.copy_(tensors[name])
                prefix = f"adam.{name}/"
                moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if moments:
                    # AdamW keeps its step count beside the parameter's device, the moments on it.
                    self.optimizer.state[parameter] = {
                        k: v.clone().to(parameter.device if k != "step" else v.device) for k, v in moments.items()
                    }
        torch.set_rng_state(tensors["rng"])


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Rate of step number `step` (from 0)."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def start_run(
    opened: Student, settings: TrainSettings, seed: int, device: torch.device, *, lambda_kl: float | None = None
) -> Run:
    """A run at step 0; the global random state is seeded. `lambda_kl` replaces the setting (0: the control)."""
    torch.manual_seed(seed)
    objective = Objective(settings, opened, seed, lambda_kl=lambda_kl).to(device)
    opened.model.to(device).train()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in opened.model.parameters():
        groups[parameter.ndim > 1].append(parameter)
    for name, parameter in objective.named_parameters():
        groups[parameter.ndim > 1 and objective.decays(name)].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=BETAS,
        fused=True,
    )
    return Run(opened, objective, optimizer)


def micro_loss(run: Run, micro: stream.MicroBatch, *, measure: bool = False) -> LossParts:
    """Forward one micro-batch; `measure` asks for the byte terms even where their weights are 0."""
    if run.objective.chunk:
        trunk, to_logits = run.pieces or student.split_model(run.student)
        run.pieces = (trunk, to_logits)
        parts: LossParts = run.objective(to_logits, trunk(micro.input_ids), micro, measure=measure)
        return parts
    logits, hidden = run.student.forward(micro.input_ids)
    parts = run.objective(logits, hidden, micro, measure=measure)
    return parts


def backward_step(run: Run, step: stream.Step, device: torch.device) -> dict[str, float]:
    """Accumulate the gradients of one step; returns its loss terms in nats per token (`Objective.terms`)."""
    sums = [torch.zeros((), dtype=torch.float64)] * len(LossParts._fields)
    for micro in step.micro:
        parts = micro_loss(run, micro.to(device))
        loss = run.objective.total(parts, step.n_tokens, step.n_byte_tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        sums = [total + part.detach().double().cpu() for total, part in zip(sums, parts, strict=True)]
    return run.objective.terms(LossParts(*sums), step.n_tokens, step.n_byte_tokens)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels for the length of a run; the caller's setting comes back afterwards."""
    enabled, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class _Log:
    """`metrics.jsonl`: one line per step; lines of steps that a resume repeats are dropped first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                if json.loads(line)["step"] <= resume_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line a kill cut short
        with scratch_folder(path.parent) as scratch:
            (scratch / path.name).write_text("".join(kept))
            (scratch / path.name).replace(path)
        self.file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")


def train(
    settings: TrainSettings,
    student_dir: Path,
    targets_dir: Path | Dataset,
    out_dir: Path,
    *,
    name: str,
    seed: int = 0,
    lambda_kl: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    device: str = "",
) -> dict[str, Any]:
    """Train, or continue training, one student.

    Args:
        settings: the `[train]` section.
        student_dir: folder made by `student.prepare`.
        targets_dir: the data set of byte targets, split "train".
        out_dir: checkpoints and `metrics.jsonl` of this run; a rerun continues from its newest whole checkpoint.
        name: of the run ("distilled", "control"), for its records.
        seed: of the head, the data order and any dropout.
        lambda_kl: replaces `settings.lambda_kl`; 0 never reads the teacher's probabilities (the control).
            With `lambda_byte = 0` as well, plain token cross-entropy: the head is not evaluated.
        stop: asked after every step; True saves a checkpoint and raises Interrupted.
        report: called after every step with the line of `metrics.jsonl`.
        device: torch device; empty = CUDA where there is one.

    Returns:
        name, checkpoint (path), sha256, step, step resumed from, the last step's loss terms, throughput, share of
        padding, documents skipped by reason.

    Raises:
        Interrupted: `stop` said so. ConfigError: the folder belongs to other settings, or the loss is not finite.
        IntegrityError: a corrupt shard. InputError: nothing to train on.
    """
    kl = settings.lambda_kl if lambda_kl is None else lambda_kl
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    opened = student.load(student_dir)
    dataset = open_dataset(targets_dir)
    identity = {
        "format": 1,
        "seed": seed,
        "student": opened.identity,
        "dataset": dataset.manifest_hash,
        "settings": {**settings.model_dump(exclude={"checkpoint_every", "control"}), "lambda_kl": kl},
    }
    run = start_run(opened, settings, seed, place, lambda_kl=kl)
    out_dir.mkdir(parents=True, exist_ok=True)
    path, refused = checkpoint.latest(out_dir)
    first, terms = 0, dict[str, float]()
    if path is not None:
        tensors, state = checkpoint.load(path)
        if state["identity"] != identity:
            difference = _difference(state["identity"], identity)
            raise ConfigError(f"{out_dir}: {difference}; delete it or choose another run.dir")
        run.restore(tensors)
        first, terms = int(state["step"]), state["terms"]
    log = _Log(out_dir / "metrics.jsonl", first)
    reader = stream.ShardReader(dataset.where, dataset, "train", opened.vocabulary, opened.end_id)
    run.objective.observe(reader)
    order = Order(dataset.manifest_hash, reader.positions, settings.window_bytes, seed)
    source = stream.steps(
        order, reader, batch=settings.batch, max_tokens=opened.max_tokens, start=first,
        with_targets=run.objective.needs_targets, byte_reduction=settings.byte_reduction,
        micro_tokens=stream.MICRO_TOKENS.get(place.type, stream.MICRO_TOKENS["cuda"]),
    )  # fmt: skip
    totals = {"n_bytes": 0, "n_tokens": 0, "n_real": 0, "n_padded": 0}
    began = time.perf_counter()
    with _deterministic(), closing(stream.prefetch(islice(source, settings.steps - first))) as data, closing(log.file):
        for step in data:
            tick = time.perf_counter()
            rate = learning_rate(step.number, settings)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.optimizer.zero_grad(set_to_none=True)
            terms = backward_step(run, step, place)
            norm = nn.utils.clip_grad_norm_([p for _, p in run.parameters() if p.grad is not None], CLIP)
            if not math.isfinite(terms["loss"]) or not math.isfinite(float(norm)):
                raise ConfigError(
                    f"{name}: loss {terms['loss']} at step {step.number + 1} with train.learning_rate = "
                    f"{settings.learning_rate}; lower it (checkpoints up to the last whole one are kept)"
                )
            run.optimizer.step()
            done, seconds = step.number + 1, time.perf_counter() - tick
            totals["n_bytes"] += step.n_bytes
            totals["n_tokens"] += step.n_tokens
            totals["n_real"] += sum(m.n_real for m in step.micro)
            totals["n_padded"] += sum(m.input_ids.numel() for m in step.micro)
            record = {
                "name": name, "step": done, "steps": settings.steps, **terms, "grad_norm": float(norm), "lr": rate,
                "text_bytes": step.n_bytes, "tokens": step.n_tokens, "seconds": round(seconds, 4),
                "text_bytes_per_s": round(totals["n_bytes"] / (time.perf_counter() - began)),
                "tokens_per_s": round(totals["n_tokens"] / (time.perf_counter() - began)),
            }  # fmt: skip
            log.write(record)
            report(record)
            stopping = stop() and done < settings.steps
            if stopping or done % settings.checkpoint_every == 0 or done == settings.steps:
                path = checkpoint.save(out_dir, done, run.tensors(), {"identity": identity, "terms": terms})
            if stopping:
                raise Interrupted(f"{name}: stopped after step {done} of {settings.steps}; rerun to continue")
    assert path is not None
    elapsed = time.perf_counter() - began
    return {
        "name": name,
        "checkpoint": str(path),
        "sha256": checkpoint.verify(path),
        "step": settings.steps,
        "resumed_from": first,
        "refused_checkpoints": refused,
        "lambda_kl": kl,
        "seconds": elapsed,
        "text_bytes": totals["n_bytes"],
        "text_bytes_per_s": totals["n_bytes"] / elapsed,
        "tokens_per_s": totals["n_tokens"] / elapsed,
        "padding": 1 - totals["n_real"] / max(totals["n_padded"], 1),
        "skipped_documents": reader.skipped_documents(),
        "terms": terms,
    }


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What tells two identities apart, in words."""
    flat_old = {**old, **old.get("settings", {})}
    flat_new = {**new, **new["settings"]}
    changed = [k for k in flat_new if k != "settings" and flat_old.get(k) != flat_new[k]]
    return "its checkpoints were made with other " + ", ".join(
        f"{k} ({str(flat_old.get(k))[:12]}, now {str(flat_new[k])[:12]})" for k in changed
    )
