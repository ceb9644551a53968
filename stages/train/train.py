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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import ConfigError, InputError, Interrupted
from bytecache.schemas.files import make_folder
from bytecache.schemas.settings import BASELINES, NEUTRAL
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
from bytecache.stages.train.run import Run, backward_step, can_be_extended, kl_share, learning_rate, set_rate, start_run

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
    settings: st.Train,
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
    request = Request(
        settings, student_dir, targets_dir, out_dir, name, seed,
        settings.lambda_kl if lambda_kl is None else lambda_kl, stop, report, dump,
    )  # fmt: skip
    with joined(settings.parallel, device) as world, _deterministic():
        return _train(request, world)


@dataclass(frozen=True)
class Request:
    """One student to train: the arguments of `train`."""

    settings: st.Train
    student_dir: Path
    targets_dir: Path | Dataset
    out_dir: Path
    name: str
    seed: int
    lambda_kl: float
    """the one in force"""
    stop: Callable[[], bool]
    report: Callable[[dict[str, Any]], None]
    dump: TokenDump | None

    @property
    def teacher_tokens(self) -> TokenDump | None:
        """The teacher's tokens, where the head reads them. Raises ConfigError: it does, and they are not there."""
        head = self.settings.head
        if head not in BASELINES or not self.lambda_kl:
            return None
        if self.dump is None or (head != "uld" and not self.dump.spells):
            raise ConfigError(
                f"train.head = {head!r} reads the teacher's tokens; pass the run's token dump, and for "
                "other heads than uld the teacher's vocabulary with it"
            )
        return self.dump.with_own_ids() if head == "mapped_topk" else self.dump


def _train(request: Request, world: World) -> dict[str, Any]:
    settings = request.settings
    if settings.batch < world.size:
        raise ConfigError(
            f"train.batch = {settings.batch} windows for {world.size} processes; raise it to {world.size}"
        )
    opened = student.load(request.student_dir)
    dataset = _open_targets(request.targets_dir)
    tokens = request.teacher_tokens
    if settings.packing:
        packing.check(opened)
    reader = stream.ShardReader(
        dataset.where, dataset, "train", opened.vocabulary, opened.end_id,
        template=opened.template, max_tokens=opened.max_tokens, dump=tokens,
    )  # fmt: skip
    reader.require_text()
    run = start_run(
        opened, settings, request.seed, world.device, lambda_kl=request.lambda_kl, world=world, reader=reader
    )
    make_folder(request.out_dir)
    start = _restore(run, request, _identity(request, opened, dataset, tokens))
    world.wait()
    training = _Training(request, run, reader, start)
    with closing(prefetch(training.steps())) as steps, closing(training.log or _Silent()):
        for step in steps:
            training.take(step)
    return training.summary()


def _open_targets(targets_dir: Path | Dataset) -> Dataset:
    """Raises InputError: nothing of the training split is supervised."""
    dataset = open_dataset(targets_dir)
    if not any(entry.n_supervised for entry in dataset.split("train")):
        raise InputError(
            f"{dataset.where}: no position of split 'train' is supervised, so there is nothing to learn; convert text "
            "that has answers (corpus.kind), or name another dataset.source"
        )
    return dataset


def _identity(request: Request, opened: student.Student, dataset: Dataset, tokens: TokenDump | None) -> dict[str, Any]:
    """What a checkpoint must have been made with to be continued."""
    identity = {
        "format": 1,
        "seed": request.seed,
        "student": opened.identity,
        "dataset": dataset.content_sha256,
        "settings": {**request.settings.model_dump(exclude=set(NEUTRAL)), "lambda_kl": request.lambda_kl},
    }
    return identity if tokens is None else {**identity, "dump": tokens.fingerprint}


class _Start(NamedTuple):
    """Where a run begins or goes on."""

    identity: dict[str, Any]
    checkpoint: Path | None
    refused: list[str]
    """checkpoints that are not whole"""
    step: int
    tokens: int
    """supervised ones so far"""
    terms: dict[str, float]


def _restore(run: Run, request: Request, identity: dict[str, Any]) -> _Start:
    """Load the newest whole checkpoint. Raises ConfigError: it was made with other settings."""
    path, refused = checkpoint.latest(request.out_dir)
    if path is None:
        return _Start(identity, None, refused, 0, 0, {})
    tensors, state = checkpoint.load(path)
    if state["identity"] != identity and not _is_shorter(state["identity"], identity, request.settings):
        difference = _difference(state["identity"], identity)
        raise ConfigError(f"{request.out_dir}: {difference}; delete it or choose another run.dir")
    run.restore(tensors)
    return _Start(identity, path, refused, int(state["step"]), int(state.get("tokens", 1)), state["terms"])


class _Training:
    """A run on its way: takes steps, keeps their log, saves checkpoints."""

    def __init__(self, request: Request, run: Run, reader: stream.ShardReader, start: _Start) -> None:
        settings = request.settings
        self.request, self.settings = request, settings
        self.run, self.world, self.reader, self.start = run, run.world, reader, start
        self.order = Order(reader.dataset.content_sha256, reader.positions, settings.window_bytes, request.seed)
        self.log = Metrics(request.out_dir, start.step, settings, request.name) if run.world.main else None
        self.totals = dict.fromkeys(("n_bytes", "n_tokens", "n_real", "n_padded", "n_slots"), 0)
        self.supervised = _SupervisedTokens(request.name, settings, start.tokens, self.order.epoch_length(0))
        self.terms, self.checkpoint = start.terms, start.checkpoint
        self.began = time.perf_counter()

    def steps(self) -> Iterator[Step]:
        """The steps that are left, ready for the objective."""
        settings, world, objective = self.settings, self.world, self.run.objective
        automatic = stream.MICRO_TOKENS.get(world.device.type, stream.MICRO_TOKENS["cuda"])
        batching = stream.Batching(
            settings.batch, self.run.student.max_tokens, with_targets=objective.needs_targets,
            byte_reduction=settings.byte_reduction, micro_tokens=settings.micro_tokens or automatic,
            context_bytes=settings.context_bytes, limit=objective.term.slots,
        )  # fmt: skip
        steps = stream.steps(
            self.order, self.reader, batching, start=self.start.step, rank=world.rank, ranks=world.size
        )
        left = islice(packing.packed(steps) if settings.packing else steps, settings.steps - self.start.step)
        return map(objective.prepare, left) if world.device.type == "cpu" else left

    def take(self, step: Step) -> None:
        """Train on one step, write it down, save where it is time to. Raises Interrupted where `stop` says so."""
        record = self._advance(step)
        if self.log is not None:
            self.log.write(record)
            self.request.report(record)
        done, last = record["step"], self.settings.steps
        stopping = bool(self.world.largest([self.request.stop()])[0]) and done < last
        if stopping or done % self.settings.checkpoint_every == 0 or done == last:
            self._save(done)
        if stopping:
            raise Interrupted(f"{self.request.name}: stopped after step {done} of {last}; rerun to continue")

    def _advance(self, step: Step) -> dict[str, Any]:
        """One step of the optimiser; its line of `metrics.jsonl`."""
        run, settings = self.run, self.settings
        tick = time.perf_counter()
        run.seed_step(self.request.seed, step.number)
        rate = learning_rate(step.number, settings)
        set_rate(run, rate)
        run.objective.kl_share = kl_share(step.number, settings)
        run.optimizer.zero_grad(set_to_none=True)
        counts, done = _counts(step, self.world), step.number + 1
        self.terms = backward_step(run, step, counts["n_tokens"], counts["n_byte_tokens"], counts["n_micro"])
        self.supervised.count(counts["n_tokens"], done, self.reader)
        norm = float(whole(nn.utils.clip_grad_norm_([p for _, p in run.parameters() if p.grad is not None], CLIP)))
        if not math.isfinite(self.terms["loss"]) or not math.isfinite(norm):
            raise ConfigError(
                f"{self.request.name}: loss {self.terms['loss']} at step {done} with train.learning_rate = "
                f"{settings.learning_rate}; lower it (checkpoints up to the last whole one are kept)"
            )
        run.optimizer.step()
        seconds = time.perf_counter() - tick
        for key in self.totals:
            self.totals[key] += counts[key]
        elapsed = time.perf_counter() - self.began
        return {
            "name": self.request.name, "step": done, "steps": settings.steps, **self.terms, "grad_norm": norm,
            "lr": rate, "text_bytes": counts["n_bytes"], "tokens": counts["n_tokens"], "seconds": round(seconds, 4),
            "text_bytes_per_s": round(self.totals["n_bytes"] / elapsed),
            "tokens_per_s": round(self.totals["n_tokens"] / elapsed),
        }  # fmt: skip

    def _save(self, done: int) -> None:
        """A checkpoint behind step number `done`; every rank takes part."""
        tensors = self.run.tensors()
        if self.world.main:
            state = {"identity": self.start.identity, "terms": self.terms, "tokens": self.supervised.total}
            self.checkpoint = checkpoint.save(self.request.out_dir, done, tensors, state)
        self.world.wait()

    def summary(self) -> dict[str, Any]:
        """What `train` returns."""
        path = self.checkpoint if self.world.main else checkpoint.latest(self.request.out_dir)[0]
        assert path is not None
        elapsed, totals, objective = time.perf_counter() - self.began, self.totals, self.run.objective
        return {
            "name": self.request.name,
            "checkpoint": str(path),
            "sha256": checkpoint.verify(path),
            "step": self.settings.steps,
            "resumed_from": self.start.step,
            "refused_checkpoints": self.start.refused,
            "lambda_kl": self.request.lambda_kl,
            "processes": self.world.size,
            "seconds": elapsed,
            "text_bytes": totals["n_bytes"],
            "text_bytes_per_s": totals["n_bytes"] / elapsed,
            "tokens_per_s": totals["n_tokens"] / elapsed,
            "padding": 1 - totals["n_real"] / max(totals["n_padded"], 1),
            "head_parameters": objective.n_parameters,
            "head_flops": objective.flops(totals["n_padded"], totals["n_slots"]),
            "skipped_documents": self.reader.skipped_documents(),
            "terms": self.terms,
        }


class _SupervisedTokens:
    """Supervised tokens of a run so far; one that has none is refused, since its loss of 0 would look like success.

    Args:
        total: of the steps before this call. epoch: windows in one reading of the split.
    """

    def __init__(self, name: str, settings: st.Train, total: int, epoch: int) -> None:
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
    of_rank = {
        "n_tokens": step.n_tokens,
        "n_byte_tokens": step.n_byte_tokens,
        "n_bytes": step.n_bytes,
        "n_real": sum(m.n_real for m in step.micro),
        "n_padded": sum(m.input_ids.numel() for m in step.micro),
        "n_slots": sum(m.slot_token.numel() for m in step.micro),
    }
    summed = world.sum(list(of_rank.values()))
    counts = {name: int(value) for name, value in zip(of_rank, summed, strict=True)}
    return {**counts, "n_micro": int(world.largest([len(step.micro)])[0])}


def _is_shorter(old: dict[str, Any], new: dict[str, Any], settings: st.Train) -> bool:
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
