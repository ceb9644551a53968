"""The lattice of a window: next-byte distributions from its rows, and which rows it lacks.

The sums are stages/lattice/forward.py's; here are their results, and the choice of what a teacher should evaluate next:
every history that carries more of its prefix than stages/lattice/effort.py says, wherever it ends, and lighter ones
where the text goes on as the known ones did not foresee. Where the canonical tokens break is no exception. A cut can
say what follows: with a pre-tokeniser that takes a run of white space whole, two line breaks are one token only before
more white space, so a history that ends at the same byte by another cut goes on otherwise. (Such histories used to join
the canonical row unasked. On Python source that cost 0.01 to 0.02 nats per byte at `exact`, nearly all of it at a few
positions after blank lines, in indentation and at quotes.)
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import NEVER, SYMBOLS
from bytecache.schemas.dump.packed import Weights
from bytecache.schemas.dump.window import Window
from bytecache.stages.lattice.effort import (
    AHEAD,
    AHEAD_BYTES,
    LIGHT_PER_TOKEN,
    borne_out,
    deepest,
    least_share,
    tokens_off,
)
from bytecache.stages.lattice.forward import Sums, forward
from bytecache.stages.lattice.tables import Masses, Tables, tables

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


class Handed(NamedTuple):
    """What evaluated histories lose along the text.

    Of their weight at each byte 0..n, the part that ends in a history which was not evaluated, by what stands in for
    it. (`stages.fidelity.bound` says what follows from that.)
    """

    joined: np.ndarray
    """float64 [n + 1]; goes on as another row that ends at the same byte would."""
    static: np.ndarray
    """float64 [n + 1]; goes on as its last token would alone."""
    nowhere: np.ndarray
    """float64 [n + 1]; no row ends there; all of it where the text had become impossible."""
    evaluated: np.ndarray
    """float64 [n + 1]; what is left of it: the share of P(x[:i]) that came through evaluated histories alone."""

    @property
    def total(self) -> np.ndarray:
        """float64 [n + 1]; the three together."""
        total: np.ndarray = np.minimum(self.joined + self.static + self.nowhere, 1.0)
        return total


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
    `drop`: histories of at most this share that were not evaluated go nowhere instead of joining a row (a reference's).
    Without `targets` no distribution is written: for those who ask what to evaluate next, and nothing else.
    """

    def __init__(self, window: Window, *, drop: float = 0.0, targets: bool = True) -> None:
        self.window = window
        n = len(window.text)
        lies = Tables(
            *tables(
                n, window.row_start, window.row_depth, window.row_parent, window.row_token, window.n_levels,
                window.fanout, window.n_stops, window.stop_token,
            )
        )  # fmt: skip
        first = window.score_start if targets else n + 1
        m = n + 1 - first
        sums = _room_for(window, m)
        entries = forward(_masses_of(window), lies, first, n, drop, sums)
        self._sums, self._lies = sums, lies
        if targets:
            self._keep_targets(m, entries)

    def _keep_targets(self, m: int, entries: int) -> None:
        """What was written of m positions, `entries` symbols in all."""
        window, sums, n = self.window, self._sums, len(self.window.text)
        steps = np.log(sums.ratio, out=np.full(n + 1, NEVER), where=sums.ratio > 0.0)
        logp = np.cumsum(steps)[window.score_start :]
        self.marginal_nll = float(logp[0] - logp[-1])
        # A window inside a document runs to its last byte for the chain rule, but its successor owns that target.
        targets = m if window.is_last else m - 1
        entries -= int(sums.n_symbols[targets:].sum())
        self._targets = SparseTargets(
            sums.n_symbols[:targets], sums.symbol[:entries], sums.prob[:entries], sums.tail[:targets], logp[:targets],
            sums.unaccounted[:targets],
        )  # fmt: skip

    def sparse_targets(self) -> SparseTargets:
        """Distributions of positions score_start..n-1, and of n (where END is due) in a document's last window."""
        return self._targets

    def targets(self) -> Targets:
        """The same with their zeros, 1 KiB a position."""
        count, symbol, prob, *rest = self._targets
        return Targets(_spread(count, symbol, prob), *rest)

    def handed(self) -> Handed:
        """What was handed on to other rows than a history's own, byte by byte of the whole window."""
        w, sums, n = self.window, self._sums, len(self.window.text)
        row, position = self._stops
        child = self._lies.child
        lost = sums.share * sums.purity[row]
        to_static = (child >= 0) & (w.row_static[child] == 1)
        orphan = child < 0
        housed = np.diff(self._lies.at)[position] > 0

        def along_text(which: np.ndarray) -> np.ndarray:
            return np.bincount(position[which], lost[which], minlength=n + 1)[: n + 1].astype(np.float64)

        joined, static, nowhere = (along_text(which) for which in (orphan & housed, to_static, orphan & ~housed))
        # The evaluated share is what there is after the losses at the same byte.
        whole = sums.evaluated + joined + static + nowhere
        for part in (joined, static, nowhere):
            np.divide(part, whole, out=part, where=whole > 0.0)
        nowhere[(whole <= 0.0) | (sums.ratio <= 0.0)] = 1.0
        return Handed(joined, static, nowhere, sums.evaluated)

    def deviations(self, *, tau: float, depth: int) -> Deviations:
        """Stops with no row of their own that are worth one, wherever they end.

        Those that extend a static row wait for that row to be evaluated (`outgrown`).
        """
        return self._pick(np.flatnonzero(self._worth(tau, depth) & (self._lies.child < 0)))

    def homeless(self, *, share: float) -> Deviations:
        """Where no row ends but a history of more than `share` does: the heaviest such history, by token.

        These want a static row, which all histories that end there then join.
        """
        _, position = self._stops
        occupied = np.zeros(len(self.window.text) + 1, bool)
        occupied[self.window.row_start] = True
        homeless = np.flatnonzero((self._sums.share > share) & ~occupied[position])
        homeless = homeless[np.lexsort((self._sums.share[homeless], position[homeless]))]
        homeless = homeless[np.diff(position[homeless], append=-1) != 0]
        return self._pick(homeless[np.lexsort((position[homeless], self.window.stop_token[homeless]))])

    def outgrown(self, *, tau: float, depth: int) -> np.ndarray:
        """Static rows, int64 ascending, that were worth a row, or somewhere carry more than `least_share`.

        A history that was light where it ended grows heavy where the text goes on as it said and others did not. With a
        row comes every static row that it extends.
        """
        w = self.window
        row, _ = self._stops
        peak = self.peaks()
        np.maximum.at(peak, row, self._sums.share)
        heavy = (peak > least_share(tau, depth, self.off)) & (w.row_depth <= deepest(depth))
        child = self._lies.child
        heavy[child[(child >= 0) & self._worth(tau, depth)]] = True
        grown = np.flatnonzero((w.row_static == 1) & heavy)
        wanted = np.zeros(len(w.row_start), bool)
        while len(grown):
            wanted[grown] = True
            parent = w.row_parent[grown]
            grown = np.unique(parent[w.row_static[parent] == 1])
        return np.flatnonzero(wanted)

    def _worth(self, tau: float, depth: int) -> np.ndarray:
        """Which stops are worth a row that they do not have, bool [S]: heavy ones, and light ones to be borne out."""
        w, share, child = self.window, self._sums.share, self._lies.child
        row, position = self._stops
        least = least_share(tau, depth, self.off[row] + 1)
        evaluated = (child >= 0) & (w.row_static[child] == 0)
        open_ = ~evaluated & (w.row_static[row] == 0) & (w.row_depth[row] < deepest(depth))
        wanted: np.ndarray = open_ & (share > least)
        light = np.flatnonzero(open_ & ~wanted & borne_out(share, self._ahead[position], tau))
        # Of every canonical token so many: those that it has already count.
        token = np.searchsorted(self._breaks, position)
        spent = np.bincount(
            token[evaluated & (w.row_depth[child] > 0) & (share <= least)], minlength=len(self._breaks) + 1
        )
        light = light[np.lexsort((-share[light], token[light]))]
        first = np.searchsorted(token[light], token[light])
        wanted[light[np.arange(len(light)) - first + spent[token[light]] < LIGHT_PER_TOKEN]] = True
        return wanted

    @cached_property
    def ended(self) -> np.ndarray:
        """Share of P(text so far) that each row's history carried where it ended, float64 [R]; 0 of the first."""
        child, ended = self._lies.child, np.zeros(len(self.window.row_start))
        ended[child[child >= 0]] = self._sums.share[child >= 0]
        return ended

    @cached_property
    def off(self) -> np.ndarray:
        """Tokens that each row is off one that counts as canonical, int64 [R]."""
        off: np.ndarray = tokens_off(self.window.row_depth, self.window.row_parent, self.ended)
        return off

    @cached_property
    def logp(self) -> np.ndarray:
        """Log of the probability that is known for the text before each byte, nats, float64 [n + 1]."""
        ratio = self._sums.ratio
        logp: np.ndarray = np.cumsum(np.log(ratio, out=np.full(len(ratio), NEVER), where=ratio > 0.0))
        return logp

    @cached_property
    def _breaks(self) -> np.ndarray:
        """Bytes where canonical tokens begin or the last one ends, ascending."""
        breaks: np.ndarray = np.flatnonzero(self._lies.canonical[: len(self.window.text) + 1] >= 0)
        return breaks

    @cached_property
    def _ahead(self) -> np.ndarray:
        """Probability that is known for the text after each byte, float64 [n + 1].

        Of `AHEAD` canonical tokens, and of the first of them that ends `AHEAD_BYTES` away or farther.
        """
        known = self.logp
        breaks, places = self._breaks, np.arange(len(self.window.text) + 1)
        after = np.maximum(
            np.searchsorted(breaks, places, side="right") + AHEAD - 1, np.searchsorted(breaks, places + AHEAD_BYTES)
        )
        ahead: np.ndarray = np.exp(known[breaks[np.minimum(after, len(breaks) - 1)]] - known)
        return ahead

    def peaks(self) -> np.ndarray:
        """The largest share of P(text so far) that each row holds along the text, float64 [R]."""
        peaks: np.ndarray = np.maximum.reduceat(self._sums.held, self._lies.level_offset[:-1])
        return peaks

    def weights(self) -> Weights:
        """What the window's levels and stops hold of P(text so far); 0 where no target of this window is read."""
        w, lies = self.window, self._lies
        row, _ = self._stops
        level = self._sums.held.copy()
        np.add.at(level, lies.level_offset[row] + w.stop_depth, self._sums.share)
        owner = np.repeat(np.arange(len(w.row_start)), w.n_levels)
        at = w.row_start[owner] + np.arange(len(level)) - lies.level_offset[owner]
        level[(at < w.score_start) | ((at == len(w.text)) & (not w.is_last))] = 0.0
        return Weights(np.minimum(level, 1.0), self._sums.share)

    @cached_property
    def _stops(self) -> tuple[np.ndarray, np.ndarray]:
        """Row of every stop, int32, and the byte where it ends."""
        row = np.repeat(np.arange(len(self.window.row_start), dtype=np.int32), self.window.n_stops)
        return row, self.window.row_start[row] + self.window.stop_depth

    def _pick(self, stops: np.ndarray) -> Deviations:
        w = self.window
        row, position = self._stops
        if not w.is_last:  # the next window answers for what ends with this one's text
            stops = stops[position[stops] < len(w.text)]
        return Deviations(
            row[stops],
            w.stop_token[stops],
            position[stops].astype(np.int32),
            np.log(w.stop_mass[stops]),
            self._sums.share[stops].astype(np.float32),
        )


def _masses_of(w: Window) -> Masses:
    return Masses(
        w.text, w.row_start, w.row_static, w.end, w.control, w.entry_byte, w.entry_mass, w.stop_depth, w.stop_mass
    )


def _room_for(w: Window, m: int) -> Sums:
    """`Sums` of a window with m scored positions, at zero."""
    n, rows = len(w.text), len(w.row_start)
    room = (len(w.entry_byte) + rows if m else 0) + 8
    return Sums(
        n_symbols=np.zeros(m, np.int64), symbol=np.empty(room, np.int16), prob=np.empty(room, np.float32),
        tail=np.zeros(m, np.float32), unaccounted=np.zeros(m, np.float32), ratio=np.zeros(n + 1),
        share=np.zeros(len(w.stop_mass)), held=np.zeros(len(w.fanout)), purity=np.zeros(rows),
        evaluated=np.zeros(n + 1),
    )  # fmt: skip
