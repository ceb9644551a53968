"""The lattice: rows of path masses to next-byte distributions, by a forward sum over covers.

A *cell* (row, d) at position i = start(row) + d is a history that ended at start(row) and a next token that begins
with x[start : i] and does not end there. Its weight is p(history) times the mass of such tokens. With K_i the sum
of the weights of all cells at i, and U_i the weight of histories that nobody evaluated,

    P(x[:i])        = K_i + U_i
    P(b | x[:i])    = sum over cells of p(history) * mass(row, x[start:i] + b) / P(x[:i])     b a byte
    P(END | x[:i])  = sum over rows that end at i of p(history) * mass(row, END) / P(x[:i])

(Vieira et al., arXiv 2412.03719). One byte on, a cell moves down its row's path; tokens that end there (*stops*)
hand their weight to the row of the longer history if that was evaluated. If not, it joins the heaviest row that
ends at the same byte, the canonical one first: the same text cut differently predicts nearly the same continuation.
Where no row ends, a static row (stages.engines.static) should: the teacher stage adds one for the heaviest history
that ends there, and the others join it; one that comes to weigh more than tau is `outgrown`, and its history is
evaluated. What has no row even so is *unaccounted*: it is kept in U, follows the text at the rate of the known cells,
and joins the canonical row at its next break. What is unlisted or unaccounted at a position is that position's tail;
nothing is renormalised. With every history evaluated nothing joins, U is empty, and the sums are exact.

One pass, float64, weights rescaled at every byte so that P(x[:i]) never underflows; time is linear in the bytes
and in the listed entries, memory is one window.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from schemas.token_dump import Window

END = 256
"""Symbol of the end of a document; 0..255 are bytes."""
_PLACE = np.uint64  # unsigned places spare numba the question whether they are negative
STATIC_PASSES = 2
"""How often static rows are asked for: they end in tokens too; a third pass would find less than 1e-4 of the mass."""


class Targets(NamedTuple):
    """Next-symbol distributions of a window's scored positions; m of them."""

    probs: np.ndarray
    """float32 [m, 257]; column 256 is END. A row and its tail sum to 1."""
    tail: np.ndarray
    """float32 [m]; mass that no symbol could be given: unlisted entries, control tokens, unevaluated histories."""
    logp: np.ndarray
    """float64 [m]; log P(x[:i]) of each position relative to the window's first row, nats."""
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


def _offsets(counts: np.ndarray) -> np.ndarray:
    out = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=out[1:])
    return out


@njit(cache=True)
def _children(
    row_parent: np.ndarray, row_token: np.ndarray, stop_offset: np.ndarray, stop_token: np.ndarray
) -> np.ndarray:
    """Row that continues each stop, or -1."""
    child = np.full(len(stop_token), -1, np.int32)
    for r in range(1, len(row_parent)):
        p = row_parent[r]
        for s in range(stop_offset[p], stop_offset[p + 1]):
            if stop_token[s] == row_token[r]:
                child[s] = r
                break
    return child


@njit(cache=True, nogil=True, error_model="numpy")
def _forward(
    text: np.ndarray, first: int, last: int, row_start: np.ndarray, by_start: np.ndarray, at: np.ndarray,
    canonical: np.ndarray, end: np.ndarray, control: np.ndarray, level_offset: np.ndarray, entry_offset: np.ndarray,
    entry_byte: np.ndarray, entry_mass: np.ndarray, stop_offset: np.ndarray, stop_depth: np.ndarray,
    stop_mass: np.ndarray, child: np.ndarray,
    count: np.ndarray, symbol: np.ndarray, prob: np.ndarray, tail: np.ndarray, logp: np.ndarray,
    unaccounted: np.ndarray, share: np.ndarray, peak: np.ndarray,
) -> int:  # fmt: skip
    """Run over positions 0..last; write targets of first..last, `share` of every stop, largest share of every row.

    `symbol` and `prob` need room for every entry and every row. Returns how many of it were written.
    """
    alone: Any
    b: Any
    k: Any
    before: Any
    written: Any
    rows = len(row_start)
    weight = np.zeros(rows)
    next_stop = stop_offset[:-1].copy()
    active = np.zeros(rows, np.int64)
    prefix = np.zeros(rows)
    n_active = 0
    acc = np.zeros(264)
    seen = np.zeros(40, np.uint64)
    touched = seen.view(np.uint8)  # by symbol, eight to a word
    found = np.empty(rows, np.float64)  # mass of the text's next byte in each active cell
    written = 0
    unknown = 0.0
    log_total = 0.0
    pending = np.zeros(len(stop_depth), np.int64)
    n_pending = 0
    weight[by_start[0]] = 1.0
    for i in range(last + 1):
        for k in range(at[i], at[i + 1]):
            active[n_active] = by_start[k]
            prefix[n_active] = 1.0
            n_active += 1
        byte = np.int64(text[i]) if i < len(text) else np.int64(-1)
        known = 0.0
        listed = 0.0
        ahead = 0.0  # weight that has the text's next byte
        alone = n_active == 1
        if alone:  # most positions: the entries are in order, nothing is summed by symbol
            r = active[0]
            depth = i - row_start[r]
            level = level_offset[r] + depth
            w = weight[r]
            here = mass = 0.0
            if depth == 0:
                here = end[r] + control[r]
                listed = w * end[r]
            before = np.int64(-1)
            for e in range(_PLACE(entry_offset[level]), _PLACE(entry_offset[level + 1])):
                m = np.float64(entry_mass[e])
                b = np.int64(entry_byte[e])
                alone &= b > before
                before = b
                here += m
                listed += w * m
                mass = m if b == byte else mass
            found[0] = mass
            known = w * max(prefix[0], here)
            ahead = w * mass
            if not alone:
                known = listed = 0.0
        for a in range(0 if alone else n_active):
            r = active[a]
            depth = i - row_start[r]
            level = level_offset[r] + depth
            w = weight[r]
            here = 0.0
            if depth == 0:
                here = end[r] + control[r]
                acc[END] += w * end[r]
                listed += w * end[r]
                touched[END] = 1
            mass = 0.0
            for e in range(_PLACE(entry_offset[level]), _PLACE(entry_offset[level + 1])):
                m = np.float64(entry_mass[e])
                b = np.uint64(entry_byte[e])
                acc[b] += w * m
                touched[b] = 1
                here += m
                listed += w * m
                mass = m if np.int64(b) == byte else mass
            found[a] = mass
            # Tokens that end here left the cell already; rounding must not make the rest smaller than its parts.
            known += w * max(prefix[a], here)
        if not alone and byte >= 0:
            ahead = acc[byte]
        rate = 0.0
        if i < len(text):
            rate = ahead / known if known > 0.0 else 1.0
        total = known + unknown
        if total <= 0.0:
            # The text has probability zero for every known history: all is tail until the canonical tokens break.
            unknown = 1.0
            total = 1.0
            log_total = -np.inf
        for k in range(n_pending):
            share[pending[k]] /= total
        n_pending = 0
        for a in range(n_active):
            r = active[a]
            peak[r] = max(peak[r], weight[r] * prefix[a] / total)
        log_total += np.log(total)
        if i >= first:
            out = i - first
            logp[out] = log_total
            unaccounted[out] = unknown / total
            tail[out] = max(0.0, 1.0 - listed / total)
            before = np.int64(written)
            if alone:
                for e in range(_PLACE(entry_offset[level]), _PLACE(entry_offset[level + 1])):
                    p = np.float32(w * np.float64(entry_mass[e]) / total)
                    symbol[_PLACE(written)] = entry_byte[e]
                    prob[_PLACE(written)] = p
                    written += p > np.float32(0.0)
                if depth == 0:
                    p = np.float32(w * end[r] / total)
                    symbol[_PLACE(written)] = END
                    prob[_PLACE(written)] = p
                    written += p > np.float32(0.0)
            for word in range(_PLACE(0 if alone else 33)):
                if seen[word] != 0:
                    for b in range(word * _PLACE(8), word * _PLACE(8) + _PLACE(8)):
                        p = np.float32(acc[b] / total)
                        symbol[_PLACE(written)] = b
                        prob[_PLACE(written)] = p
                        written += p > np.float32(0.0)
            count[out] = written - before
        for word in range(_PLACE(0 if alone else 33)):
            if seen[word] != 0:
                seen[word] = 0
                for b in range(word * _PLACE(8), word * _PLACE(8) + _PLACE(8)):
                    acc[b] = 0.0
        if i == last or i >= len(text):
            break
        unknown = unknown * rate / total
        orphan = 0.0
        kept = 0
        for a in range(n_active):
            r = active[a]
            depth = i - row_start[r]
            level = level_offset[r] + depth
            if level + 1 >= level_offset[r + 1]:
                continue
            mass = found[a]
            weight[r] /= total
            w = weight[r]
            s = next_stop[r]
            while s < stop_offset[r + 1] and stop_depth[s] == depth + 1:
                m = np.float64(stop_mass[s])
                mass -= m
                c = child[s]
                share[s] = w * m
                pending[n_pending] = s
                n_pending += 1
                if c >= 0:
                    weight[c] += w * m
                else:
                    orphan += w * m
                s += 1
            next_stop[r] = s
            active[kept] = r
            prefix[kept] = max(mass, 0.0)
            kept += 1
        n_active = kept
        # The text cut differently predicts nearly the same continuation: orphans join the heaviest row that ends here.
        heir = canonical[i + 1]
        if heir >= 0:
            orphan += unknown
            unknown = 0.0
        elif orphan > 0.0:
            for k in range(at[i + 1], at[i + 2]):
                if heir < 0 or weight[by_start[k]] > weight[heir]:
                    heir = by_start[k]
        if heir >= 0:
            weight[heir] += orphan
        else:
            unknown += orphan
    return written


@njit(cache=True)
def _spread(count: np.ndarray, symbol: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """float32 [m, 257]: sparse rows with their zeros."""
    out = np.zeros((len(count), 257), np.float32)
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
        level_offset = _offsets(window.n_levels)
        stop_offset = _offsets(window.n_stops)
        order = np.argsort(window.row_start, kind="stable").astype(np.int32)
        at = np.searchsorted(window.row_start[order], np.arange(n + 2)).astype(np.int64)
        canonical = np.full(n + 2, -1, np.int32)
        on_path = np.flatnonzero(window.row_depth == 0)
        canonical[window.row_start[on_path]] = on_path
        child = _children(window.row_parent, window.row_token, stop_offset, window.stop_token)
        m = n + 1 - window.score_start
        count = np.zeros(m, np.int64)
        room = len(window.entry_byte) + len(window.row_start) + 8
        symbol, prob = np.empty(room, np.int16), np.empty(room, np.float32)
        tail, logp, unaccounted = np.zeros(m, np.float32), np.zeros(m), np.zeros(m, np.float32)
        share = np.zeros(len(window.stop_mass))
        peak = np.zeros(len(window.row_start))
        _forward(
            window.text, window.score_start, n, window.row_start, order, at, canonical, window.end, window.control,
            level_offset, _offsets(window.fanout), window.entry_byte, window.entry_mass, stop_offset,
            window.stop_depth, window.stop_mass, child, count, symbol, prob, tail, logp, unaccounted, share, peak,
        )  # fmt: skip
        self.marginal_nll = float(logp[0] - logp[-1])
        # A window inside a document runs to its last byte for the chain rule, but its successor owns that target.
        kept = m if window.is_last else m - 1
        entries = int(count[:kept].sum())
        self._targets = SparseTargets(
            count[:kept], symbol[:entries], prob[:entries], tail[:kept], logp[:kept], unaccounted[:kept]
        )
        self._share, self._child, self._canonical, self._peak = share, child, canonical, peak

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
