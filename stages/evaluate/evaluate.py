"""Held-out figures of a trained student, each beside the teacher's own on the same text.

Every held-out document that the student's tokenizer can align is read once in windows of `train.heldout_bytes`, or of
`train.window_bytes` where that is 0, cut at fixed places, each with one token of context before it or
`train.context_bytes`, as in training. On supervised positions:

- token bits/byte: sum of token NLL, EOS included, / text bytes / ln 2. The student as an ordinary language model.
- byte-head bits/byte: mean -log2 q(true symbol) over *covered* symbols, i.e. the first ten bytes of each token and END.
  Parallel heads do not see the earlier bytes of their token, so this is above the token figure by design. Without a
  head (`marginal`) q is the student's own choice at each byte, where its token ends included.
- KL(teacher || head), nats per covered symbol, unlisted symbols as one bucket. Without a head, of the choices that the
  teacher alone decides (`objective/projection.py`): a student that is its teacher has none.
- teacher bits/byte: the stored probability of the true symbol, END included, per text byte; an unlisted symbol gets an
  equal share of its position's tail (a floor: the truth is at most the tail). Also per covered symbol.
- oracle excess (`marginal`): bits/byte by which a student would stand above its teacher that hit every target of the
  objective (`objective/oracle.py`): what the objective itself costs, with the student's tokenizer, on this text.
- calibration error (ECE, Guo et al. 2017): |accuracy - confidence| of the most likely byte, over fifteen equal bins of
  confidence, weighted by how many bytes fall into each. 0 is a student whose 80 % is right four times in five.
- agreement: where a token of the student begins, how often its likeliest byte is the teacher's. (Within a token the
  student has already chosen among the tokens that begin with the bytes read, which the teacher has not.)

The head's price is measured in the same call: parameters, share of FLOPs, share of CPU time (forward and backward with
and without the head, alternating, median of several; not of a student that was trained without it).
Price: one forward pass over the split, and two steps of training or more.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bytecache.schemas import settings as st
from bytecache.schemas.arrays import SYMBOLS
from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import InputError
from bytecache.stages.evaluate.likeliest import Agreement, Calibration
from bytecache.stages.student import student
from bytecache.stages.targets.order import sequential
from bytecache.stages.targets.source import open_dataset
from bytecache.stages.tokens import misfits
from bytecache.stages.train import checkpoint
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import MicroBatch
from bytecache.stages.train.objective.marginal import MarginalTerm
from bytecache.stages.train.objective.oracle import oracle_excess
from bytecache.stages.train.run import Run, micro_loss, start_run


def true_nats(
    row: npt.NDArray[np.int64],
    symbol: npt.NDArray[np.int64],
    prob: npt.NDArray[np.float32],
    tail: npt.NDArray[np.float32],
    true: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """-ln of the teacher's probability of the true symbol at each of n places.

    Args:
        row, symbol, prob: [E] entries; row indexes the n places. tail, true: [n].

    Returns:
        (nats float64 [n], listed bool [n]); an unlisted truth gets tail / (257 - listed symbols), at least 2**-24.
    """
    count = np.bincount(row, minlength=true.size)
    p = tail.astype(np.float64) / np.maximum(SYMBOLS - count, 1)
    hit = symbol == true[row]
    p[row[hit]] = prob[hit]
    listed = np.zeros(true.size, np.bool_)
    listed[row[hit]] = True
    return -np.log(np.maximum(p, 2.0**-24)), listed


def _teacher(row: stream.Row) -> tuple[float, int, int]:
    """Sum of nats, supervised positions and unlisted truths among a row's positions."""
    src = row.source
    lo, hi = int(src.start[row.first]), int(src.end[row.last - 1])
    triples = src.shard.triples(lo, hi)
    nats, listed = true_nats(
        np.asarray(triples.row, np.int64), np.asarray(triples.symbol, np.int64), triples.prob,
        np.asarray(src.shard.tail[lo:hi]), src.symbol[lo:hi].astype(np.int64),
    )  # fmt: skip
    mask = np.asarray(src.shard.mask[lo:hi]) != 0
    return float(nats[mask].sum()), int(mask.sum()), int((mask & ~listed).sum())


def load_trained(student_dir: Path, checkpoint_path: Path) -> Run:
    """The student folder with a checkpoint's weights; IntegrityError for a torn or foreign checkpoint."""
    opened = student.load(student_dir)
    tensors, state = checkpoint.load(checkpoint_path)
    if state["identity"]["student"] != opened.identity:
        raise InputError(
            f"{checkpoint_path}: trained from another student than {student_dir}; pass the folder it began from"
        )
    with torch.random.fork_rng(devices=[]):
        # Whatever it was trained in, it is measured and exported in float32.
        settings = st.Train(**{**state["identity"]["settings"], "dtype": "float32"})
        run = start_run(opened, settings, 0, torch.device("cpu"))
        run.restore(tensors)
    opened.model.eval()
    return run


def _time(run: Run, micros: list[MicroBatch], *, use_head: bool) -> float:
    weights = run.objective.lambda_byte, run.objective.lambda_kl
    run.objective.lambda_byte, run.objective.lambda_kl = (1.0, 1.0) if use_head else (0.0, 0.0)
    began = time.process_time()
    for micro in micros:
        loss = run.objective.total(micro_loss(run, micro), 1, 1)
        loss.backward()  # type: ignore[no-untyped-call]
    run.objective.lambda_byte, run.objective.lambda_kl = weights
    run.optimizer.zero_grad(set_to_none=True)
    return time.process_time() - began


PATIENCE_S = 5.0
"""For the clock's further pairs of steps: one pair of a large student takes as long."""
LEAST_PAIRS = 3
"""From fewer the clock says nothing: the difference of two steps is within what one differs from the next."""


def head_cost(run: Run, micros: list[MicroBatch], repeats: int = 5) -> dict[str, float | None]:
    """Parameters of the head and its share of a training step (optimiser excluded), by FLOPs and by the clock.

    The clock is not asked for the baselines, whose targets are not at hand here, nor for a control.
    """
    weights = sum(p.numel() for p in run.student.model.parameters() if p.ndim > 1)
    embedding = run.student.model.get_input_embeddings().weight
    tied = embedding is run.student.model.get_output_embeddings().weight
    tokens = sum(m.input_ids.numel() for m in micros)
    slots = sum(m.slot_token.numel() for m in micros)
    # 2 FLOPs per weight forward, 4 backward; looking an input embedding up is free, attention scores are left out.
    body = 6 * (weights - (0 if tied else embedding.numel())) * tokens
    head = run.objective.flops(tokens, slots)
    share: float | None = None
    if run.objective.term.reads == "bytes" and run.objective.lambda_kl:
        began, ratios = time.monotonic(), list[float]()
        _time(run, micros, use_head=True)
        # Pairs run back to back and their median is taken: other work on the machine slows both halves of a pair.
        while len(ratios) < repeats and (not ratios or time.monotonic() - began < PATIENCE_S):
            ratios.append(_time(run, micros, use_head=False) / _time(run, micros, use_head=True))
        share = max(0.0, 1 - float(np.median(ratios))) if len(ratios) >= LEAST_PAIRS else None
    return {
        "head_parameters": run.objective.n_parameters,
        "model_parameters": sum(p.numel() for p in run.student.model.parameters()),
        "head_flops_share": head / (head + body),
        "head_time_share": share,
    }


def evaluate(
    settings: st.Train,
    student_dir: Path,
    targets_dir: Path | Dataset,
    checkpoint_path: Path,
    *,
    name: str,
    split: str = "heldout",
) -> dict[str, Any]:
    """Measure one checkpoint on one split (see the module's docstring for every figure).

    Raises:
        InputError: the split is empty, or no document of it can be aligned. IntegrityError: a torn checkpoint or shard.
    """
    run = load_trained(student_dir, checkpoint_path)
    measured = measure(run, settings, open_dataset(targets_dir), split)
    return {
        "name": name,
        **_oracle(run, measured.reader),
        "split": split,
        **measured.figures,
        **head_cost(run, measured.sample),
    }


class Measured(NamedTuple):
    """A split as a student reads it."""

    figures: dict[str, Any]
    reader: stream.ShardReader
    sample: list[MicroBatch]
    """one of the split's micro-batches"""


def read_split(opened: student.Student, dataset: Dataset, split: str) -> stream.ShardReader:
    """A split in a student's tokens, one shard at a time."""
    return stream.ShardReader(
        dataset.where, dataset, split, opened.vocabulary, opened.end_id, resident=1,
        template=opened.template, max_tokens=opened.max_tokens,
    )  # fmt: skip


def measure(run: Run, settings: st.Train, dataset: Dataset, split: str) -> Measured:
    """Figures of a student on a split. Raises InputError: the split is empty, or no document of it can be aligned."""
    reader = read_split(run.student, dataset, split)
    sums, sample = _Sums(), list[MicroBatch]()
    for members in _groups(reader, settings, run.student.max_tokens):
        # "sum" weighs every slot 1, so the parts are plain sums over slots.
        micro = stream.collate(members, with_targets=True, byte_reduction="sum", limit=run.objective.term.slots)
        sums.add_student(run, micro)
        sums.add_teacher(members, micro)
        sample = sample or [micro]
    skipped = reader.skipped_documents()
    if not sums.n_bytes:
        raise _nothing_to_evaluate(dataset, split, skipped)
    counted = {"skipped_documents": skipped, "n_skipped": sum(skipped.values())}
    return Measured({**sums.figures(), **counted}, reader, sample)


def _groups(reader: stream.ShardReader, settings: st.Train, max_tokens: int) -> Iterator[list[stream.Row]]:
    """Rows of the whole split, those of one micro-batch together."""
    size = settings.heldout_bytes or settings.window_bytes
    for window in sequential(reader.positions, settings.batch * size):
        source = reader[window.shard]
        rows: list[stream.Row] = []
        for lo in range(window.lo, window.hi, size):
            rows += stream.cut(source, lo, min(lo + size, window.hi), max_tokens, settings.context_bytes)
        yield from stream.group(rows)


@dataclass
class _Sums:
    """Sums over a split, nats and counts, of which `figures` are the quotients."""

    token: float = 0.0
    head: float = 0.0
    kl: float = 0.0
    teacher: float = 0.0
    teacher_covered: float = 0.0
    n_tokens: int = 0
    n_bytes: int = 0
    n_slots: int = 0
    n_positions: int = 0
    n_unlisted: int = 0
    calibration: Calibration = field(default_factory=Calibration)
    agreement: Agreement = field(default_factory=Agreement)

    def add_student(self, run: Run, micro: MicroBatch) -> None:
        """Add what the student says of a micro-batch."""
        with torch.inference_mode():
            logits, hidden = run.student.forward(micro.input_ids)
            parts = run.objective(logits, hidden, micro, measure=True)
            scores, true = run.objective.byte_scores(logits, hidden, micro)
            self.calibration.add(scores, true)
            self.agreement.add(scores, micro)
        self.token += float(parts.token)
        self.head += float(parts.byte)
        self.kl += float(parts.kl)
        self.n_tokens += micro.n_tokens
        self.n_bytes += micro.n_bytes
        self.n_slots += len(micro.slot_token)

    def add_teacher(self, members: list[stream.Row], micro: MicroBatch) -> None:
        """Add what the targets say of the same bytes."""
        assert micro.targets is not None
        slot, symbol, prob, tail = (column.numpy() for column in micro.targets)
        self.teacher_covered += float(true_nats(slot, symbol, prob, tail, micro.slot_symbol.numpy())[0].sum())
        for row in members:
            nats, n_positions, n_unlisted = _teacher(row)
            self.teacher += nats
            self.n_positions += n_positions
            self.n_unlisted += n_unlisted

    def figures(self) -> dict[str, Any]:
        """The figures of the module's docstring."""
        bits = 1 / math.log(2)
        return {
            "text_bytes": self.n_bytes,
            "tokens": self.n_tokens,
            "covered_share": self.n_slots / self.n_positions,
            "token_bits_per_byte": self.token * bits / self.n_bytes,
            "head_bits_per_byte": self.head * bits / self.n_slots,
            "kl_nats_per_byte": self.kl / self.n_slots,
            "calibration_error": self.calibration.error,
            "agreement": self.agreement.share,
            "teacher_bits_per_byte": self.teacher * bits / self.n_bytes,
            "teacher_bits_per_covered_byte": self.teacher_covered * bits / self.n_slots,
            "teacher_unlisted_share": self.n_unlisted / self.n_positions,
        }


def _nothing_to_evaluate(dataset: Dataset, split: str, skipped: dict[str, int]) -> InputError:
    why = f" because of the student: {misfits.words(skipped)}; {misfits.remedy(skipped, 'student')}" if skipped else ""
    return InputError(f"{dataset.where}: nothing in split {split!r} can be evaluated{why}")


def _oracle(run: Run, reader: stream.ShardReader) -> dict[str, float | None]:
    """The oracle excess of the run's objective, which only `marginal` has."""
    if not isinstance(run.objective.term, MarginalTerm):
        return {"oracle_excess_bits_per_byte": None, "certain_share": None}
    excess = oracle_excess(run.objective.term.marginal, reader)
    return {"oracle_excess_bits_per_byte": excess.bits_per_byte, "certain_share": excess.certain_share}


ROWS = (
    ("token_bits_per_byte", "student tokens, bits/byte", ".4f"),
    ("head_bits_per_byte", "byte head or choices, bits/covered byte", ".4f"),
    ("kl_nats_per_byte", "KL(teacher ‖ student), nats/covered byte", ".4f"),
    ("calibration_error", "calibration error of its bytes (ECE)", ".4f"),
    ("agreement", "its likeliest byte is the teacher's, where its tokens begin", ".1%"),
    ("teacher_bits_per_byte", "teacher, bits/byte", ".4f"),
    ("teacher_bits_per_covered_byte", "teacher, bits/covered byte", ".4f"),
    ("oracle_excess_bits_per_byte", "oracle excess of the objective, bits/byte", "+.4f"),
    ("certain_share", "choices that the teacher alone decides", ".1%"),
    ("covered_share", "bytes covered by the head", ".2%"),
    ("teacher_unlisted_share", "true bytes the targets do not list", ".2%"),
    ("text_bytes", "held-out text, bytes", ",d"),
    ("n_skipped", "held-out documents that the student cannot read", ",d"),
    ("model_parameters", "parameters of the student", ",d"),
    ("head_parameters", "parameters of the head (dropped at export)", ",d"),
    ("head_flops_share", "objective's share of a step, matrix FLOPs", ".1%"),
    ("head_time_share", "objective's share of a step, time", ".1%"),
)


def report_table(results: list[dict[str, Any]]) -> str:
    """The results of `evaluate`, one column each, as a Markdown table."""
    lines = ["| held out | " + " | ".join(str(r["name"]) for r in results) + " |"]
    lines.append("|---|" + "---:|" * len(results))
    for key, label, spec in ROWS:
        values = ["not measured" if r.get(key) is None else format(r[key], spec) for r in results]
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"
