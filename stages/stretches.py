"""Stretches: short runs of a document evaluated alone, in the context that the document's own windows would give.

The targets of a stretch depend only on the text before them, so a stretch needs its window's tokens up to its own end,
and rows from `LEAD` tokens before its start, where tokens that straddle it begin (as at a window's start). That makes
a reference affordable: a few hundred tokens branch, not a whole document.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from schemas.byte_shard import ByteShard
from schemas.errors import InputError, IntegrityError
from schemas.token_dump import Window
from stages.engines.engine import Prompt
from stages.fidelity import Fidelity, combine, true_symbols
from stages.lattice import END, Lattice
from stages.tokens.vocab import Encoded, Misfit
from stages.windows import LEAD, WindowPlan, new_window

if TYPE_CHECKING:
    from stages.teacher import Teacher

REFERENCE = {"tau": 2e-4, "depth": 5}
"""Teacher settings of a reference: within 1e-4 nats of every cover evaluated (benchmarks/information_loss.py)."""


class Stretch(NamedTuple):
    """A stretch before evaluation."""

    plan: WindowPlan
    first: int
    """Position in the document of the first target: bytes of text before it."""
    n_targets: int
    """Targets: bytes of the stretch, and END where the document ends with it."""


def plan_stretch(
    doc_id: str, encoded: Encoded, position: int, tokens: int, *, start_id: int, context: int, overlap: int
) -> Stretch:
    """The stretch of at most `tokens` tokens from the token that holds byte `position` of the text.

    It ends early where its window or the document does. `context` and `overlap` in tokens, as in `plan_windows`.
    """
    room, total, starts = context - 2, len(encoded.ids), encoded.starts
    first = int(np.searchsorted(starts, position + encoded.synthetic, side="right")) - 1
    first = max(0, min(first, total - 1))
    lo = begin = 0
    while (hi := min(total, begin + room)) <= first:
        lo = hi
        begin = max(0, lo - overlap)
    last = min(first + tokens, hi)
    lead = max(begin, first - LEAD)
    base = int(starts[lead])
    prompt = Prompt(
        f"document {doc_id!r}, bytes from {position}",
        np.concatenate([np.array([start_id], np.int32), encoded.ids[begin:last]]),
        lead - begin,
        np.frombuffer(encoded.data, np.uint8)[base : int(starts[last])],
        starts[lead : last + 1] - base,
    )
    scored = int(starts[first]) if first else encoded.synthetic
    is_last = last == total
    plan = WindowPlan(doc_id, 0, prompt, scored - base, is_last)
    return Stretch(plan, scored - encoded.synthetic, int(starts[last]) - scored + is_last)


def evaluate(teacher: "Teacher", plans: Sequence[WindowPlan], stop: Callable[[], bool] = lambda: False) -> list[Window]:
    """Windows of the plans with the teacher's tau and depth. Raises Interrupted when `stop()` says so."""
    planned = list(plans)
    rows = teacher.engine.score([plan.prompt for plan in planned])
    windows = [new_window(plan, row) for plan, row in zip(planned, rows, strict=True)]
    for _ in range(teacher.settings.depth):
        if not teacher.branch(planned, windows, stop):
            break
    return windows


def reference_window(teacher: "Teacher", stretch: Stretch, stop: Callable[[], bool] = lambda: False) -> Window:
    """The stretch at the reference setting, with the rows of the teacher's own settings marked; ready for a dump.

    Raises Interrupted when `stop()` says so.
    """
    (asked,) = evaluate(teacher, [stretch.plan], stop)
    own = teacher.settings
    teacher.settings = own.model_copy(update=REFERENCE)
    try:
        (deep,) = evaluate(teacher, [stretch.plan], stop)
    finally:
        teacher.settings = own
    return combine(deep, asked, stretch.first)


def measure_stored(
    teacher: "Teacher",
    shard: ByteShard,
    positions: Sequence[int],
    tokens: int,
    found: Fidelity,
    stop: Callable[[], bool],
) -> None:
    """Compare what `shard` says from each of `positions` on, for `tokens` tokens, with this teacher; adds to `found`.

    Raises InputError where the teacher's tokenizer cannot spell a document, IntegrityError where the shard's text is
    not the text that was evaluated, Interrupted when `stop()` says so.
    """
    context, overlap = teacher.settings.context, teacher.settings.overlap
    for position in positions:
        document = int(np.searchsorted(shard.doc_start, position, side="right")) - 1
        name, base = shard.doc_id[document], int(shard.doc_start[document])
        where = f"{shard.path}: document {name!r}"
        try:
            (encoded,) = teacher.vocabulary.encode_batch([shard.document(document).decode()])
        except UnicodeDecodeError as error:
            raise IntegrityError(
                f"{where} is not UTF-8 at byte {error.start}; fetch or make this shard again"
            ) from None
        if isinstance(encoded, Misfit):
            raise InputError(f"{where}: this teacher's tokenizer cannot reproduce it ({encoded.reason})")
        stretch = plan_stretch(
            name, encoded, position - base, tokens,
            start_id=teacher.vocabulary.start_id, context=context, overlap=overlap,
        )  # fmt: skip
        (window,) = evaluate(teacher, [stretch.plan], stop)
        lo = base + stretch.first
        symbol, text = true_symbols(window), shard.text[lo : lo + stretch.n_targets]
        if not np.array_equal(symbol[symbol != END], text[: len(symbol)][symbol != END]):
            raise IntegrityError(f"{where}: its text changed at byte {stretch.first}; fetch or make this shard again")
        targets = Lattice(window).targets()
        stored = shard.dense(lo, lo + stretch.n_targets)
        found.add_positions(targets, stored, shard.tail[lo : lo + stretch.n_targets], symbol, (shard.path, name))
