"""Windows: how a document is cut for a context of limited length, and how evaluated rows become a dump window.

A document longer than the context is cut into windows that overlap; the overlap is context and never scored twice.
The last `LEAD` tokens of the overlap are evaluated again, because tokens that straddle the cut begin there.
"""

from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from bytecache.schemas.dump.rows import Rows
from bytecache.schemas.dump.window import Window, take_rows
from bytecache.stages.engines.engine import Prompt
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.lattice.lattice import Deviations
from bytecache.stages.tokens.vocab import Encoded

LEAD = 16
"""Context tokens evaluated again at the start of a later window."""


class WindowPlan(NamedTuple):
    """A window before evaluation."""

    doc_id: str
    doc_index: int
    prompt: Prompt
    score_start: int
    is_last: bool
    context: bytes = b""


def plan_windows(
    doc_id: str, doc_index: int, encoded: Encoded, *, start_id: int, context: int, overlap: int
) -> list[WindowPlan]:
    """Cut a document into windows of at most `context` - 1 tokens, the start token included.

    One position of the context is left for the token that an engine must be allowed to sample. A document that
    answers something has its context's tokens (`Encoded.prefix`) in the start token's place in every window.
    """
    head = encoded.prefix if encoded.prefix.size else np.array([start_id], np.int32)
    room = context - 1 - len(head)
    overlap = min(overlap, room // 2)
    total = len(encoded.ids)
    plans: list[WindowPlan] = []
    lo = 0
    while True:
        begin = max(0, lo - overlap)
        hi = min(total, begin + room)
        row_lo = max(begin, lo - LEAD) if lo else 0
        is_last = hi == total
        tokens = np.concatenate([head, encoded.ids[begin:hi]])
        base = int(encoded.starts[row_lo])
        text = np.frombuffer(encoded.data, np.uint8)[base : int(encoded.starts[hi])]
        prompt = Prompt(
            f"document {doc_id!r}, window {len(plans)}",
            tokens,
            len(head) - 1 + row_lo - begin,
            text,
            encoded.starts[row_lo : hi + 1] - base,
        )
        score_start = encoded.synthetic if lo == 0 else int(encoded.starts[lo]) - base
        plans.append(WindowPlan(doc_id, doc_index, prompt, score_start, is_last, b"" if lo else encoded.context))
        if is_last:
            return plans
        lo = hi


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

    It ends early where its window or the document does; of an empty document it is END alone.
    `context` and `overlap` in tokens, as in `plan_windows`.
    """
    head = encoded.prefix if encoded.prefix.size else np.array([start_id], np.int32)
    room, total, starts = context - 1 - len(head), len(encoded.ids), encoded.starts
    overlap = min(overlap, room // 2)
    first = int(np.searchsorted(starts, position + encoded.synthetic, side="right")) - 1
    first = max(0, min(first, total - 1))
    lo = begin = 0
    while (hi := min(total, begin + room)) <= first < total:
        lo = hi
        begin = max(0, lo - overlap)
    last = min(first + tokens, hi)
    lead = max(begin, first - LEAD)
    base = int(starts[lead])
    prompt = Prompt(
        f"document {doc_id!r}, bytes from {position}",
        np.concatenate([head, encoded.ids[begin:last]]),
        len(head) - 1 + lead - begin,
        np.frombuffer(encoded.data, np.uint8)[base : int(starts[last])],
        starts[lead : last + 1] - base,
    )
    scored = max(int(starts[first]), encoded.synthetic)
    is_last = last == total
    plan = WindowPlan(doc_id, 0, prompt, scored - base, is_last)
    return Stretch(plan, scored - encoded.synthetic, int(starts[last]) - scored + is_last)


def new_window(plan: WindowPlan, rows: RowMasses) -> Window:
    """The window of a plan's canonical rows."""
    prompt = plan.prompt
    count = len(prompt.starts)
    logp = np.zeros(count, np.float32)
    logp[1:] = rows.next_logp[:-1]
    return Window(
        **_columns(rows), doc_id=plan.doc_id, doc_index=plan.doc_index, text=prompt.text,
        score_start=plan.score_start, is_last=plan.is_last, row_start=prompt.starts.astype(np.int32),
        row_parent=np.arange(-1, count - 1, dtype=np.int32), row_token=prompt.tokens[prompt.first_row :],
        row_logp=logp, row_depth=np.zeros(count, np.uint8), row_static=np.zeros(count, np.uint8),
        context=np.frombuffer(plan.context, np.uint8),
    )  # fmt: skip


def _columns(rows: RowMasses) -> dict[str, Any]:
    """Those of a window, in which the top k lie one row after the other."""
    return {field.name: getattr(rows, field.name).reshape(-1) for field in fields(Rows)}


def extend(window: Window, deviations: Deviations, rows: RowMasses, *, static: bool = False) -> None:
    """Add evaluated branches, or static rows, to a window, in the order of `found`."""
    added = {
        "row_start": deviations.position,
        "row_parent": deviations.row,
        "row_token": deviations.token,
        "row_logp": deviations.logp,
        "row_depth": window.row_depth[deviations.row] + np.uint8(1),
        "row_static": np.full(len(deviations.row), static, np.uint8),
        **_columns(rows),
    }
    for name, values in added.items():
        before = getattr(window, name)
        setattr(window, name, np.concatenate([before, values]).astype(before.dtype))


def deviations_of(window: Window, row: np.ndarray) -> Deviations:
    """The rows `row` int [K] of a window as the histories that they were before they were evaluated; shares unknown."""
    return Deviations(
        window.row_parent[row],
        window.row_token[row],
        window.row_start[row],
        window.row_logp[row],
        np.full(len(row), np.nan, np.float32),
    )


def replace_static(window: Window, row: np.ndarray, rows: RowMasses) -> Window:
    """The window with the static rows `row` int [K] replaced by `rows`, the masses of their histories themselves."""
    order = np.arange(len(window.row_start))
    parent, depth = window.row_parent, window.row_depth
    order[row] = len(order) + np.arange(len(row))
    extend(window, deviations_of(window, row), rows)
    window = take_rows(window, order, parent, depth)
    # What extends these rows has another probability now.
    end = np.cumsum(window.n_stops, dtype=np.int64)
    for child in np.flatnonzero(np.isin(parent, row)):
        stops = slice(end[parent[child]] - window.n_stops[parent[child]], end[parent[child]])
        (mass,) = window.stop_mass[stops][window.stop_token[stops] == window.row_token[child]]
        with np.errstate(divide="ignore"):
            window.row_logp[child] = np.log(mass)
    return window


def chain_of(window: Window, row: int, token: int) -> tuple[int, tuple[int, ...]]:
    """Canonical row that a history leaves from, and its tokens since."""
    chain = [token]
    while window.row_depth[row]:
        chain.append(int(window.row_token[row]))
        row = int(window.row_parent[row])
    return row, tuple(reversed(chain))
