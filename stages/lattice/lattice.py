"""The lattice of a window: next-byte distributions from its rows, and which rows it lacks.

The sums are stages/forward.py's; here are their results, and the choice of what a teacher should evaluate next.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import SYMBOLS
from bytecache.schemas.dump.window import NEVER, Window
from bytecache.stages.lattice.forward import Tables, forward, tables

STATIC_PASSES = 2
"""How often static rows are asked for: they end in tokens too; a third pass would find less than 1e-4 of the mass."""


class Targets(NamedTuple):
    """Next-symbol distributions of a window's scored positions; m of them."""

    probs: np.ndarray
    """float32 [m, 257]; column 256 is END. A row and its tail sum to 1."""
    tail: np.ndarray
    """float32 [m]; mass that no symbol could be given: unlisted entries, control tokens, unevaluated histories."""
    logp: np.ndarray
    """float64 [m]; log P(x[:i]) of each position relative to the window's first row, nats; a byte without any mass
    counts as `NEVER`."""
    unaccounted: np.ndarray
    """float32 [m]; the part of the tail that belongs to unevaluated histories."""


class SparseTargets(NamedTuple):
    """`Targets` without their zeros: what of a row is above zero, symbols ascending, row after row."""

    n_symbols: np.ndarray
    """int64 [m]; of each row."""
    symbol: np.ndarray
    """int16 [entries]"""
    prob: np.ndarray
    """float32 [entries]"""
    tail: np.ndarray
    """As in `Targets`, and so are the next two."""
    logp: np.ndarray
    unaccounted: np.ndarray


class Deviations(NamedTuple):
    """Unevaluated histories worth a teacher call: row `row` extended by `token`, ending at byte `position`."""

    row: np.ndarray
    """int32 [D]"""
    token: np.ndarray
    """int32 [D]"""
    position: np.ndarray
    """int32 [D]"""
    logp: np.ndarray
    """float32 [D]; log p(token | row), nats."""
    share: np.ndarray
    """float32 [D]; weight of the history over P(x[:position])."""


@njit(cache=True)
def _spread(count: np.ndarray, symbol: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """float32 [m, 257]: sparse rows with their zeros."""
    out = np.zeros((len(count), SYMBOLS), np.float32)
    at = 0
    for i in range(len(count)):
        for k in range(at, at + count[i]):
            out[i, symbol[k]] = prob[k]
        at += count[i]
    return out


class Lattice:
    """The forward sum of one window; `targets()` for the distributions, `deviations()` for what to evaluate next.

    `marginal_nll` is -log P(scored bytes | bytes before them), nats, END not included: at most the canonical tokens'.
    """

    def __init__(self, window: Window):
        self.window = window
        n = len(window.text)
        lies = Tables(
            *tables(
                n, window.row_start, window.row_depth, window.row_parent, window.row_token, window.n_levels,
                window.fanout, window.n_stops, window.stop_token,
            )
        )  # fmt: skip
        m = n + 1 - window.score_start
        count = np.zeros(m, np.int64)
        room = len(window.entry_byte) + len(window.row_start) + 8
        symbol, prob = np.empty(room, np.int16), np.empty(room, np.float32)
        tail, unaccounted = np.zeros(m, np.float32), np.zeros(m, np.float32)
        ratio = np.zeros(n + 1)
        share = np.zeros(len(window.stop_mass))
        peak = np.zeros(len(window.row_start))
        entries = forward(
            window.text, window.score_start, n, window.row_start, *lies, window.end, window.control,
            window.entry_byte, window.entry_mass, window.stop_depth, window.stop_mass,
            count, symbol, prob, tail, ratio, unaccounted, share, peak,
        )  # fmt: skip
        steps = np.log(ratio, out=np.full(n + 1, NEVER), where=ratio > 0.0)
        logp = np.cumsum(steps)[window.score_start :]
        self.marginal_nll = float(logp[0] - logp[-1])
        # A window inside a document runs to its last byte for the chain rule, but its successor owns that target.
        kept = m if window.is_last else m - 1
        entries -= int(count[kept:].sum())
        self._targets = SparseTargets(
            count[:kept], symbol[:entries], prob[:entries], tail[:kept], logp[:kept], unaccounted[:kept]
        )
        self._share, self._child, self._canonical, self._peak = share, lies.child, lies.canonical, peak

    def sparse_targets(self) -> SparseTargets:
        """Distributions of positions score_start..n-1, and of n (where END is due) in a document's last window."""
        return self._targets

    def targets(self) -> Targets:
        """The same with their zeros, 1 KiB a position."""
        count, symbol, prob, *rest = self._targets
        return Targets(_spread(count, symbol, prob), *rest)

    def deviations(self, *, tau: float, depth: int) -> Deviations:
        """Stops with no row of their own whose share exceeds `tau`, at most `depth` tokens off the canonical path.

        Histories that end where the canonical tokens break join that row unasked, except at tau = 0 (exact); those that
        extend a static row wait for that row to be evaluated (`outgrown`).
        """
        w = self.window
        row, position = self._stops()
        wanted = (self._child < 0) & (self._share > tau) & (w.row_depth[row] < depth) & (w.row_static[row] == 0)
        if tau > 0:
            wanted &= self._canonical[position] < 0
        return self._pick(np.flatnonzero(wanted), row, position)

    def homeless(self, *, share: float) -> Deviations:
        """Where no row ends but a history of more than `share` does: the heaviest such history, by token.

        These want a static row, which all histories that end there then join.
        """
        row, position = self._stops()
        occupied = np.zeros(len(self.window.text) + 1, bool)
        occupied[self.window.row_start] = True
        picked = np.flatnonzero((self._share > share) & ~occupied[position])
        picked = picked[np.lexsort((self._share[picked], position[picked]))]
        last = np.diff(position[picked], append=-1) != 0
        picked = picked[last]
        picked = picked[np.lexsort((position[picked], self.window.stop_token[picked]))]
        return self._pick(picked, row, position)

    def outgrown(self, *, tau: float, depth: int) -> np.ndarray:
        """Static rows, int64 ascending, that somewhere along the text carry more than `tau` of their prefix.

        A history that was light where it ended grows heavy where the text goes on as it said and others did not. With a
        row comes every static row that it extends; at most `depth` tokens off the canonical path.
        """
        w = self.window
        row, _ = self._stops()
        peak = self._peak.copy()
        np.maximum.at(peak, row, self._share)
        found = np.flatnonzero((w.row_static == 1) & (peak > tau) & (w.row_depth <= depth))
        wanted = np.zeros(len(w.row_start), bool)
        while len(found):
            wanted[found] = True
            parent = w.row_parent[found]
            found = np.unique(parent[w.row_static[parent] == 1])
        return np.flatnonzero(wanted)

    def _stops(self) -> tuple[np.ndarray, np.ndarray]:
        """Row of every stop, int32, and the byte where it ends."""
        row = np.repeat(np.arange(len(self.window.row_start), dtype=np.int32), self.window.n_stops)
        return row, self.window.row_start[row] + self.window.stop_depth

    def _pick(self, picked: np.ndarray, row: np.ndarray, position: np.ndarray) -> Deviations:
        w = self.window
        if not w.is_last:  # the next window answers for what ends with this one's text
            picked = picked[position[picked] < len(w.text)]
        return Deviations(
            row[picked],
            w.stop_token[picked],
            position[picked].astype(np.int32),
            np.log(w.stop_mass[picked]),
            self._share[picked].astype(np.float32),
        )
