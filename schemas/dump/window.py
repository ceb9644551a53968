"""A dump window: what a teacher said about a run of text, and whether it can be so."""

import math
from dataclasses import dataclass, field

import numpy as np
from numba import njit

NEVER = -149 * math.log(2)
"""Nats that sums of log-probabilities count for a probability of zero: the smallest float32 above it."""


@dataclass
class Window:
    """A run of text and its R evaluated rows; L levels, E entries, S stops (see stages.engines.paths for the terms)."""

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
    log_norm: np.ndarray
    """float32 [R]; log of the sum of exp(logits), nats; NaN of a window that a dump of version 3 held."""
    end: np.ndarray
    """float32 [R]; mass of END."""
    control: np.ndarray
    """float32 [R]; mass of ids without bytes that are not END."""
    n_levels: np.ndarray
    """int32 [R]"""
    fanout: np.ndarray
    """uint16 [L]"""
    entry_byte: np.ndarray
    """uint8 [E]"""
    entry_mass: np.ndarray
    """float32 [E]"""
    n_stops: np.ndarray
    """int32 [R]"""
    stop_depth: np.ndarray
    """uint16 [S]"""
    stop_token: np.ndarray
    """int32 [S]"""
    stop_mass: np.ndarray
    """float32 [S]"""
    topk_id: np.ndarray
    """int32 [R * K]"""
    topk_logp: np.ndarray
    """float32 [R * K]; nats"""
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
    kept = w.row_sampled == 1
    closed = kept[w.row_parent[1:][kept[1:]]].all()
    return bool((w.row_sampled <= 1).all() and kept[0] and kept[w.row_depth == 0].all() and closed)


_PER_ROW = (
    "row_parent", "row_token", "row_logp", "row_depth", "row_static", "log_norm", "end", "control", "n_levels",
    "n_stops",
)  # fmt: skip


@njit(cache=True, nogil=True)
def _adds_up(
    n: int, row_start: np.ndarray, row_parent: np.ndarray, row_token: np.ndarray, row_depth: np.ndarray,
    n_levels: np.ndarray, n_stops: np.ndarray, fanout: np.ndarray, n_entries: int, stop_depth: np.ndarray,
    stop_token: np.ndarray,
) -> bool:  # fmt: skip
    """Whether a window's counts add up, and every row but the first is one of its parent's stops, one token on."""
    levels = stops = entries = 0
    first_stop = np.zeros(len(row_start) + 1, np.int64)
    for r in range(len(row_start)):
        parent, mine = row_parent[r], n_levels[r]
        if row_start[r] < 0 or row_start[r] > n or parent >= r or (r > 0 and parent < 0):
            return False
        if mine < 1 or mine > n - row_start[r] + 1 or n_stops[r] < 0:
            return False
        levels += mine
        if stops + n_stops[r] > len(stop_depth):
            return False
        before = 1
        for s in range(stops, stops + n_stops[r]):
            if stop_depth[s] < before or stop_depth[s] >= mine:
                return False
            before = stop_depth[s]
        stops += n_stops[r]
        first_stop[r + 1] = stops
        if r == 0:
            if row_start[r] != 0 or row_depth[r] != 0:
                return False
            continue
        if row_depth[r] != row_depth[parent] + 1 and (row_depth[r] != 0 or row_depth[parent] != 0):
            return False
        s, last = first_stop[parent], first_stop[parent + 1]
        while s < last and (stop_token[s] != row_token[r] or row_start[parent] + stop_depth[s] != row_start[r]):
            s += 1
        if s == last:
            return False
    for f in fanout:
        entries += f
    return levels == len(fanout) and stops == len(stop_depth) and entries == n_entries


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
        and all(len(getattr(w, name)) == rows for name in _PER_ROW)
        and 0 <= w.score_start <= n
        and len(w.entry_byte) == len(w.entry_mass)
        and len(w.stop_depth) == len(w.stop_token) == len(w.stop_mass)
        and len(w.topk_id) == len(w.topk_logp)
        and len(w.row_sampled) == (rows if w.reference else 0)
        and (w.doc_position >= 0) == w.reference
        and _adds_up(
            n, w.row_start, w.row_parent, w.row_token, w.row_depth, w.n_levels, w.n_stops, w.fanout,
            len(w.entry_byte), w.stop_depth, w.stop_token,
        )
        and all(_are_masses(masses) for masses in (w.entry_mass, w.stop_mass, w.end, w.control))
        and (w.row_logp < 1.0).all()  # NaN is not
        and w.row_static.max() <= 1
        and (not w.reference or _sampled_rows_stand_alone(w))
    )  # fmt: skip
