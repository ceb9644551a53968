"""Train a student from byte targets: no teacher in memory, exact resume from any kill.

Algorithm: AdamW (0.9, 0.95), linear warm-up then `train.schedule`, gradient norm clipped at 1; matrices decay, norms
and biases do not. A step is `batch` windows in micro-batches of similar length whose losses are divided by the step's
own counts over all micro-batches and ranks, so the sum is exact however it is cut. The state is the trained
parameters, two moments and one integer, of which data order is a pure function. On one machine with the same number of
threads, a run killed anywhere and rerun ends with bit-identical weights (`tests/test_train.py` compares hashes);
at another number of processes it sees the same data and ends at the same loss up to the order of additions.
Price, in CPU seconds of one EPYC thread: 1.7 a step of 16 windows of 1 KiB at 2.2 M parameters, 0.30 a step of 4
windows at 1.05 M (14 kB of text/s). Two thirds are matrix products, 18 % attention, 0.5 % collating. On a
shared machine set OMP_NUM_THREADS to what is really free: waiting threads made steps 25 times slower.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import ConfigError, InputError, Interrupted
from bytecache.schemas.settings import BASELINES, NEUTRAL
from bytecache.schemas.settings import Train as TrainSettings
from bytecache.stages.student import student
from bytecache.stages.targets.order import Order
from bytecache.stages.targets.prefetch import prefetch
from bytecache.stages.targets.source import open_dataset
from bytecache.stages.train import checkpoint
from bytecache.stages.train.batches import packing, stream
from bytecache.stages.train.batches.teacher_tokens import TokenDump
from bytecache.stages.train.batches.types import Step
from bytecache.stages.train.metrics import Metrics
from bytecache.stages.train.parallel import World, joined, whole
from bytecache.stages.train.run import backward_step, can_be_extended, kl_share, learning_rate, start_run

CLIP = 1.0


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
    dump: TokenDump | None = None,
) -> dict[str, Any]:
    """Train, or continue training, one student; under torchrun every process calls this.

    Args:
        settings: the `[train]` section.
        student_dir: folder made by `student.prepare`.
        targets_dir: the data set of byte targets, split "train".
        out_dir: checkpoints and `metrics.jsonl` of this run; a rerun continues from its newest whole checkpoint.
        name: of the run ("distilled", "control"), for its records.
        seed: of the head, the data order and any dropout.
        lambda_kl: replaces `settings.lambda_kl`; 0 never reads the teacher's probabilities (the control).
            With `lambda_byte = 0` as well, plain token cross-entropy: the head is not evaluated.
        stop: asked after every step, on every rank; True anywhere saves a checkpoint and raises Interrupted.
        report: called after every step with the line of `metrics.jsonl`, on the first rank.
        device: torch device; empty = CUDA where there is one.
        dump: the teacher's tokens, for the heads of `settings.BASELINES`.

    Returns:
        name, checkpoint (path), sha256, step, step resumed from, the last step's loss terms, throughput, share of
        padding, parameters of the head and its matrix FLOPs, documents skipped by reason.

    Raises:
        Interrupted: `stop` said so. ConfigError: the folder belongs to other settings, or the loss is not finite.
        IntegrityError: a corrupt shard. InputError: nothing to train on.
    """
    with joined(settings.parallel, device) as world, _deterministic():
        return _train(
            settings, student_dir, targets_dir, out_dir, world,
            name=name, seed=seed, lambda_kl=lambda_kl, stop=stop, report=report, dump=dump,
        )  # fmt: skip


def _train(
    settings: TrainSettings, student_dir: Path, targets_dir: Path | Dataset, out_dir: Path, world: World, *,
    name: str, seed: int, lambda_kl: float | None, stop: Callable[[], bool], report: Callable[[dict[str, Any]], None],
    dump: TokenDump | None = None,
) -> dict[str, Any]:  # fmt: skip
    if settings.batch < world.size:
        raise ConfigError(
            f"train.batch = {settings.batch} windows for {world.size} processes; raise it to {world.size}"
        )
    kl = settings.lambda_kl if lambda_kl is None else lambda_kl
    opened = student.load(student_dir)
    dataset = open_dataset(targets_dir)
    if not any(entry.n_supervised for entry in dataset.split("train")):
        raise InputError(
            f"{dataset.where}: no position of split 'train' is supervised, so there is nothing to learn; convert text "
            "that has answers (corpus.kind), or name another dataset.source"
        )
    identity = {
        "format": 1,
        "seed": seed,
        "student": opened.identity,
        "dataset": dataset.content_sha256,
        "settings": {**settings.model_dump(exclude=set(NEUTRAL)), "lambda_kl": kl},
    }
    tokens = dump if settings.head in BASELINES and kl else None
    if settings.head in BASELINES and kl:
        if tokens is None or (settings.head != "uld" and not tokens.spells):
            raise ConfigError(
                f"train.head = {settings.head!r} reads the teacher's tokens; pass the run's token dump, and for "
                "other heads than uld the teacher's vocabulary with it"
            )
        identity["dump"] = tokens.fingerprint
    if settings.packing:
        packing.check(opened)
    reader = stream.ShardReader(
        dataset.where, dataset, "train", opened.vocabulary, opened.end_id,
        template=opened.template, max_tokens=opened.max_tokens, dump=tokens,
    )  # fmt: skip
    reader.require_text()
    run = start_run(opened, settings, seed, world.device, lambda_kl=kl, world=world, reader=reader)
    out_dir.mkdir(parents=True, exist_ok=True)
    path, refused = checkpoint.latest(out_dir)
    first, learned, terms = 0, 0, dict[str, float]()
    if path is not None:
        tensors, state = checkpoint.load(path)
        if state["identity"] != identity and not _is_shorter(state["identity"], identity, settings):
            difference = _difference(state["identity"], identity)
            raise ConfigError(f"{out_dir}: {difference}; delete it or choose another run.dir")
        run.restore(tensors)
        first, learned, terms = int(state["step"]), int(state.get("tokens", 1)), state["terms"]
    world.wait()
    log = Metrics(out_dir, first, settings, name) if world.main else None
    order = Order(dataset.content_sha256, reader.positions, settings.window_bytes, seed)
    automatic = stream.MICRO_TOKENS.get(world.device.type, stream.MICRO_TOKENS["cuda"])
    source = stream.steps(
        order, reader, batch=settings.batch, max_tokens=opened.max_tokens, start=first, rank=world.rank,
        ranks=world.size, with_targets=run.objective.needs_targets, byte_reduction=settings.byte_reduction,
        micro_tokens=settings.micro_tokens or automatic, context_bytes=settings.context_bytes,
        limit=run.objective.term.slots,
    )  # fmt: skip
    source = islice(packing.packed(source) if settings.packing else source, settings.steps - first)
    if world.device.type == "cpu":
        source = map(run.objective.prepare, source)
    totals = dict.fromkeys(("n_bytes", "n_tokens", "n_real", "n_padded", "n_slots"), 0)
    supervised = _SupervisedTokens(name, settings, learned, order.epoch_length(0))
    began = time.perf_counter()
    with closing(prefetch(source)) as data, closing(log or _Silent()):
        for step in data:
            tick = time.perf_counter()
            run.seed_step(seed, step.number)
            rate = learning_rate(step.number, settings)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.objective.kl_share = kl_share(step.number, settings)
            run.optimizer.zero_grad(set_to_none=True)
            counts = _counts(step, world)
            terms = backward_step(run, step, counts["n_tokens"], counts["n_byte_tokens"], counts["n_micro"])
            supervised.count(counts["n_tokens"], step.number + 1, reader)
            norm = float(whole(nn.utils.clip_grad_norm_([p for _, p in run.parameters() if p.grad is not None], CLIP)))
            if not math.isfinite(terms["loss"]) or not math.isfinite(norm):
                raise ConfigError(
                    f"{name}: loss {terms['loss']} at step {step.number + 1} with train.learning_rate = "
                    f"{settings.learning_rate}; lower it (checkpoints up to the last whole one are kept)"
                )
            run.optimizer.step()
            done, seconds = step.number + 1, time.perf_counter() - tick
            for key in totals:
                totals[key] += counts[key]
            record = {
                "name": name, "step": done, "steps": settings.steps, **terms, "grad_norm": norm, "lr": rate,
                "text_bytes": counts["n_bytes"], "tokens": counts["n_tokens"], "seconds": round(seconds, 4),
                "text_bytes_per_s": round(totals["n_bytes"] / (time.perf_counter() - began)),
                "tokens_per_s": round(totals["n_tokens"] / (time.perf_counter() - began)),
            }  # fmt: skip
            if log is not None:
                log.write(record)
                report(record)
            stopping = bool(world.largest([stop()])[0]) and done < settings.steps
            if stopping or done % settings.checkpoint_every == 0 or done == settings.steps:
                whole_tensors = run.tensors()
                if world.main:
                    state = {"identity": identity, "terms": terms, "tokens": supervised.total}
                    path = checkpoint.save(out_dir, done, whole_tensors, state)
                world.wait()
            if stopping:
                raise Interrupted(f"{name}: stopped after step {done} of {settings.steps}; rerun to continue")
    path = path if world.main else checkpoint.latest(out_dir)[0]
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
        "processes": world.size,
        "seconds": elapsed,
        "text_bytes": totals["n_bytes"],
        "text_bytes_per_s": totals["n_bytes"] / elapsed,
        "tokens_per_s": totals["n_tokens"] / elapsed,
        "padding": 1 - totals["n_real"] / max(totals["n_padded"], 1),
        "head_parameters": run.objective.n_parameters,
        "head_flops": run.objective.flops(totals["n_padded"], totals["n_slots"]),
        "skipped_documents": reader.skipped_documents(),
        "terms": terms,
    }


class _SupervisedTokens:
    """Supervised tokens of a run so far; one that has none is refused, since its loss of 0 would look like success.

    Args:
        total: of the steps before this call. epoch: windows in one reading of the split.
    """

    def __init__(self, name: str, settings: TrainSettings, total: int, epoch: int) -> None:
        self.name, self.settings, self.total, self.epoch = name, settings, total, epoch
        self._barren = 0

    def count(self, n_tokens: int, done: int, reader: stream.ShardReader) -> None:
        """Add those of step number `done` (from 1). Raises InputError: a whole reading, or the whole run, had none."""
        self.total += n_tokens
        self._barren = 0 if n_tokens else self._barren + self.settings.batch
        whole_reading = self._barren > self.epoch + 2 * self.settings.batch
        if whole_reading or (done == self.settings.steps and not self.total):
            raise InputError(
                f"{self.name}: no supervised token of {reader.folder} in {done} steps (documents skipped: "
                f"{reader.skipped_documents() or 'none'}), so nothing was learned; convert text that has answers "
                "(corpus.kind), or choose a student whose tokenizer and chat template fit it"
            )


class _Silent:
    """The log of a rank that keeps none."""

    def close(self) -> None:
        pass


def _counts(step: Step, world: World) -> dict[str, int]:
    """Counts of a step over all ranks; `n_micro` is the largest of any rank."""
    mine = {
        "n_tokens": step.n_tokens,
        "n_byte_tokens": step.n_byte_tokens,
        "n_bytes": step.n_bytes,
        "n_real": sum(m.n_real for m in step.micro),
        "n_padded": sum(m.input_ids.numel() for m in step.micro),
        "n_slots": sum(m.slot_token.numel() for m in step.micro),
    }
    summed = world.sum(list(mine.values()))
    counts = {name: int(value) for name, value in zip(mine, summed, strict=True)}
    return {**counts, "n_micro": int(world.largest([len(step.micro)])[0])}


def _is_shorter(old: dict[str, Any], new: dict[str, Any], settings: TrainSettings) -> bool:
    """Whether a checkpoint is of a run of fewer steps that this one repeats to the bit, and goes on from."""
    steps = old.get("settings", {}).get("steps", 0)
    same = {**old, "settings": {**old.get("settings", {}), "steps": settings.steps}} == new
    return same and steps < settings.steps and can_be_extended(settings)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What tells two identities apart, in words."""
    flat_old = {**old, **old.get("settings", {})}
    flat_new = {**new, **new["settings"]}
    changed = [k for k in flat_new if k != "settings" and flat_old.get(k) != flat_new[k]]
    return "its checkpoints were made with other " + ", ".join(
        f"{k} ({str(flat_old.get(k))[:12]}, now {str(flat_new[k])[:12]})" for k in changed
    )
