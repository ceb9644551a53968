"""A dump window: what a teacher said about a run of text, and whether it can be so."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import NEVER
from bytecache.schemas.dump.rows import PER_ROW, Rows, columns_of
from bytecache.schemas.loops import inner_loop, row_loop


@dataclass
class Window(Rows):
    """A run of text and its R evaluated rows, each with its history."""

    doc_id: str
    doc_index: int
    """Index of the document within the unit."""
    text: np.ndarray
    """uint8 [n]; the window's bytes, context included."""
    score_start: int
    """First position of `text` whose targets this window gives; the bytes before it are context."""
    is_last: bool
    """Whether the document ends with this window, so that its END target is given too."""
    row_start: np.ndarray
    """int32 [R]; byte position in `text` where the row's history ends."""
    row_parent: np.ndarray
    """int32 [R]; row whose history this one extends by one token; -1 for the first."""
    row_token: np.ndarray
    """int32 [R]; last token of the history; the start or last context token for the first row."""
    row_logp: np.ndarray
    """float32 [R]; log p(row_token | parent), nats; 0 for the first row."""
    row_depth: np.ndarray
    """uint8 [R]; 0 on the canonical tokens, else how many tokens ago the history left them."""
    row_static: np.ndarray
    """uint8 [R]; 1 where the row is p(. | row_token) in short contexts of its own instead of p(. | history)."""
    reference: bool = False
    """Whether this is a reference window: no targets; its rows but the static ones are the tau -> 0 reference."""
    doc_position: int = -1
    """Position in the document of a reference window's first target; -1 in the others."""
    row_sampled: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """uint8 [R] in a reference window, 1 = the row belongs to the production capture too; empty elsewhere."""
    context: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """uint8; bytes that stand before the document in a shard, unsupervised; on its first window only."""

    @property
    def canonical_nll(self) -> float:
        """Negative log-likelihood of the scored canonical tokens, nats (END not included)."""
        on_path = (self.row_depth == 0) & (self.row_start > self.score_start)
        logp = self.row_logp[on_path].astype(np.float64)
        return float(-np.where(np.isneginf(logp), NEVER, logp).sum())


def _sampled_rows_stand_alone(w: Window) -> bool:
    """The production capture is a window of its own: the canonical rows and whole chains of branches."""
    sampled = w.row_sampled == 1
    closed = sampled[w.row_parent[1:][sampled[1:]]].all()
    return bool((w.row_sampled <= 1).all() and sampled[0] and sampled[w.row_depth == 0].all() and closed)


_HISTORY = ("row_start", "row_parent", "row_token", "row_logp", "row_depth", "row_static")


def keep_rows(window: Window, chosen: np.ndarray) -> Window:
    """An ordinary window of the rows where `chosen` (bool [R]) is true, parents (kept as well) numbered anew."""
    number = np.cumsum(chosen) - 1
    row = np.flatnonzero(chosen)
    parent = window.row_parent[row]
    return take_rows(window, row, np.where(parent < 0, -1, number[parent]), window.row_depth[row])


def take_rows(window: Window, row: np.ndarray, parent: np.ndarray, depth: np.ndarray) -> Window:
    """An ordinary window of the rows `row` int [K], in that order, extending the rows `parent` of the new window."""
    columns = columns_of(window, row) | {name: getattr(window, name)[row] for name in _HISTORY}
    columns["row_parent"] = parent.astype(window.row_parent.dtype)
    columns["row_depth"] = depth.astype(window.row_depth.dtype)
    ordinary: dict[str, Any] = {"reference": False, "doc_position": -1, "row_sampled": np.zeros(0, np.uint8)}
    return replace(window, **ordinary, **columns)


class _Counts(NamedTuple):
    """The columns of a window that lead from rows to levels, entries and stops."""

    row_start: np.ndarray
    row_parent: np.ndarray
    row_token: np.ndarray
    row_depth: np.ndarray
    n_levels: np.ndarray
    n_stops: np.ndarray
    fanout: np.ndarray
    stop_depth: np.ndarray
    stop_token: np.ndarray


@njit(cache=True, nogil=True)
def _adds_up(n: int, n_entries: int, counts: _Counts) -> bool:
    """Whether a window's counts add up, and every row but the first is one of its parent's stops, one token on."""
    adds_up: bool = _rows_add_up(n, n_entries, counts, np.zeros(len(counts.row_start) + 1, np.int64))
    return adds_up


@row_loop
def _rows_add_up(n: int, n_entries: int, counts: _Counts, first_stop: np.ndarray) -> bool:
    n_rows, n_stops = len(counts.row_start), len(counts.stop_depth)
    levels = stops = entries = 0
    for r in range(n_rows):
        if not _is_in_text(r, n, counts) or stops + counts.n_stops[r] > n_stops:
            return False
        levels += counts.n_levels[r]
        if not _are_stops(counts.stop_depth[stops : stops + counts.n_stops[r]], counts.n_levels[r]):
            return False
        stops += counts.n_stops[r]
        first_stop[r + 1] = stops
        if not _is_one_token_on(r, first_stop, counts):
            return False
    for f in counts.fanout:
        entries += f
    return levels == len(counts.fanout) and stops == n_stops and entries == n_entries


@inner_loop
def _is_in_text(r: int, n: int, counts: _Counts) -> bool:
    """Whether a row starts and ends in a text of n bytes, and its parent comes before it."""
    start, parent, levels = counts.row_start[r], counts.row_parent[r], counts.n_levels[r]
    if start < 0 or start > n or parent >= r or (r > 0 and parent < 0):
        return False
    return bool(levels >= 1 and levels <= n - start + 1 and counts.n_stops[r] >= 0)


@inner_loop
def _are_stops(depths: np.ndarray, n_levels: int) -> bool:
    """Whether a row's stops ascend and stand on its levels, the first one left out."""
    before = 1
    for depth in depths:
        if depth < before or depth >= n_levels:
            return False
        before = depth
    return True


@inner_loop
def _is_one_token_on(r: int, first_stop: np.ndarray, counts: _Counts) -> bool:
    """Whether a row's history is its parent's and one of the parent's stops; that of the first row is empty."""
    row_start, row_depth, stop_depth, stop_token = (
        counts.row_start, counts.row_depth, counts.stop_depth, counts.stop_token
    )  # fmt: skip
    if r == 0:
        return bool(row_start[0] == 0 and row_depth[0] == 0)
    parent = counts.row_parent[r]
    if row_depth[r] != row_depth[parent] + 1 and (row_depth[r] != 0 or row_depth[parent] != 0):
        return False
    for s in range(first_stop[parent], first_stop[parent + 1]):
        if stop_token[s] == counts.row_token[r] and row_start[parent] + stop_depth[s] == row_start[r]:
            return True
    return False


_MOST_BITS = np.float32(1.0 + 2.0**-5).view(np.uint32)
"""Five bits of mantissa are the fewest that version 2 keeps."""


def _are_masses(values: np.ndarray) -> bool:
    """Whether float32 values are within 0..1, rounding aside; as unsigned integers, NaN and negative ones are large."""
    return bool(values.dtype == np.float32 and values.view(np.uint32).max(initial=0) <= _MOST_BITS)


def is_consistent(w: Window) -> bool:
    """Whether a window can be what a teacher said: lengths, counts and parents agree, masses and flags are such."""
    rows, n = len(w.row_start), len(w.text)
    return bool(
        rows > 0
        and all(len(getattr(w, name)) == rows for name in (*PER_ROW, *_HISTORY))
        and 0 <= w.score_start <= n
        and len(w.entry_byte) == len(w.entry_mass)
        and len(w.stop_depth) == len(w.stop_token) == len(w.stop_mass)
        and len(w.topk_id) == len(w.topk_logp)
        and len(w.row_sampled) == (rows if w.reference else 0)
        and (w.doc_position >= 0) == w.reference
        and _adds_up(n, len(w.entry_byte), _Counts(*(getattr(w, name) for name in _Counts._fields)))
        and all(_are_masses(masses) for masses in (w.entry_mass, w.stop_mass, w.end, w.control))
        and (w.row_logp < 1.0).all()  # NaN is not
        and w.row_static.max() <= 1
        and (not w.reference or _sampled_rows_stand_alone(w))
    )  # fmt: skip
