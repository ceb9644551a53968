"""The forward sum over covers: rows of path masses to next-byte distributions.

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
that ends there, and the others join it; one that comes to weigh more than tau is `outgrown` (lattice.py), and its
history is evaluated. What has no row even so is *unaccounted*: it is kept in U, follows the text at the rate of the
known cells, and joins the canonical row at its next break. What is unlisted or unaccounted at a position is that
position's tail; nothing is renormalised. With every history evaluated nothing joins, U is empty, the sums are exact.

One pass, float64, weights rescaled at every byte so that P(x[:i]) never underflows; time is linear in the bytes
and in the listed entries, memory is one window. Text to which no known history gives a mass (beyond float32: below
1e-45 of its row) is all tail until the canonical tokens break, whose row then goes on alone.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import END, PLACE

_NOTHING = 1e-300
"""A total that is no better than zero: one over it must be finite."""


class Tables(NamedTuple):
    """What lies where in a window of n bytes and R rows."""

    by_start: np.ndarray
    """int32 [R]; rows by their first byte, of equals in their order"""
    at: np.ndarray
    """int64 [n + 3]; those that start at byte i are by_start[at[i] : at[i + 1]]"""
    canonical: np.ndarray
    """int32 [n + 2]; the canonical row that starts at each byte, or -1"""
    child: np.ndarray
    """int32 [S]; row that continues each stop, or -1"""
    level_offset: np.ndarray
    """int64 [R + 1]; where a row's levels begin"""
    entry_offset: np.ndarray
    """int64 [L + 1]; where a level's entries begin"""
    stop_offset: np.ndarray
    """int64 [R + 1]; where a row's stops begin"""


@njit(cache=True, nogil=True)
def _offsets(counts: np.ndarray) -> np.ndarray:
    out = np.zeros(len(counts) + 1, np.int64)
    for k in range(len(counts)):
        out[k + 1] = out[k] + counts[k]
    return out


@njit(cache=True, nogil=True)
def tables(
    n: int, row_start: np.ndarray, row_depth: np.ndarray, row_parent: np.ndarray, row_token: np.ndarray,
    n_levels: np.ndarray, fanout: np.ndarray, n_stops: np.ndarray, stop_token: np.ndarray,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The members of `Tables`."""
    rows = len(row_start)
    starting = np.zeros(n + 2, np.int64)
    canonical = np.full(n + 2, -1, np.int32)
    for r in range(rows):
        starting[row_start[r]] += 1
        if row_depth[r] == 0:
            canonical[row_start[r]] = r
    at = _offsets(starting)
    place = at.copy()
    by_start = np.empty(rows, np.int32)
    for r in range(rows):
        by_start[place[row_start[r]]] = r
        place[row_start[r]] += 1
    stop_offset = _offsets(n_stops)
    child = np.full(len(stop_token), -1, np.int32)
    for r in range(1, rows):
        p = row_parent[r]
        for s in range(stop_offset[p], stop_offset[p + 1]):
            if stop_token[s] == row_token[r]:
                child[s] = r
                break
    return by_start, at, canonical, child, _offsets(n_levels), _offsets(fanout), stop_offset


@njit(cache=True, nogil=True, error_model="numpy")
def forward(
    text: np.ndarray, first: int, last: int, row_start: np.ndarray,
    by_start: np.ndarray, at: np.ndarray, canonical: np.ndarray, child: np.ndarray,
    level_offset: np.ndarray, entry_offset: np.ndarray, stop_offset: np.ndarray,
    end: np.ndarray, control: np.ndarray, entry_byte: np.ndarray, entry_mass: np.ndarray,
    stop_depth: np.ndarray, stop_mass: np.ndarray,
    count: np.ndarray, symbol: np.ndarray, prob: np.ndarray, tail: np.ndarray, ratio: np.ndarray,
    unaccounted: np.ndarray, share: np.ndarray, peak: np.ndarray,
) -> int:  # fmt: skip
    """Run over positions 0..last; write targets of first..last, `share` of every stop, largest share of every row.

    `ratio` becomes P(x[:i]) over P(x[:i - 1]) of every position. `symbol` and `prob` need room for every entry and
    every row. Returns how many of it were written.
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
    pending = np.zeros(len(stop_depth), np.int64)
    n_pending = 0
    weight[by_start[0]] = 1.0
    for i in range(last + 1):
        for k in range(at[i], at[i + 1]):
            active[n_active] = by_start[k]
            prefix[n_active] = 1.0
            n_active += 1
        byte = np.int64(text[i]) if i < len(text) else np.int64(-1)
        lost = canonical[i] >= 0 and weight[canonical[i]] <= _NOTHING
        if lost:  # perhaps the text so far has probability zero; the canonical row asks nothing of what came before
            for a in range(n_active):
                lost &= weight[active[a]] * prefix[a] <= _NOTHING
            if lost:
                weight[canonical[i]] = 1.0
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
            before = np.int64(-1)
            for e in range(PLACE(entry_offset[level]), PLACE(entry_offset[level + 1])):
                m = np.float64(entry_mass[e])
                b = np.int64(entry_byte[e])
                alone &= b > before
                before = b
                here += m
                mass = m if b == byte else mass
            found[0] = mass
            if alone:
                listed = w * here
                if depth == 0:
                    listed += w * end[r]
                    here += end[r] + control[r]
                known = w * max(prefix[0], here)
                ahead = w * mass
        for a in range(0 if alone else n_active):
            r = active[a]
            depth = i - row_start[r]
            level = level_offset[r] + depth
            w = weight[r]
            here = mass = 0.0
            for e in range(PLACE(entry_offset[level]), PLACE(entry_offset[level + 1])):
                m = np.float64(entry_mass[e])
                b = np.uint64(entry_byte[e])
                acc[b] += w * m
                touched[b] = 1
                here += m
                mass = m if np.int64(b) == byte else mass
            found[a] = mass
            listed += w * here
            if depth == 0:
                acc[END] += w * end[r]
                touched[END] = 1
                listed += w * end[r]
                here += end[r] + control[r]
            # Tokens that end here left the cell already; rounding must not make the rest smaller than its parts.
            known += w * max(prefix[a], here)
        if not alone and byte >= 0:
            ahead = acc[byte]
        rate = 0.0
        if i < len(text):
            rate = ahead / known if known > 0.0 else 1.0
        total = ratio[i] = known + unknown
        if total <= _NOTHING:
            unknown = 1.0
            total = 1.0
            ratio[i] = 0.0
        elif lost:
            ratio[i] = 0.0
        inverse = 1.0 / total
        for k in range(n_pending):
            share[pending[k]] *= inverse
        n_pending = 0
        for a in range(n_active):
            r = active[a]
            peak[r] = max(peak[r], weight[r] * inverse * prefix[a])
        if i >= first:
            out = i - first
            unaccounted[out] = unknown * inverse
            tail[out] = max(0.0, 1.0 - listed * inverse)
            before = np.int64(written)
            if alone:
                w *= inverse
                for e in range(PLACE(entry_offset[level]), PLACE(entry_offset[level + 1])):
                    p = np.float32(w * np.float64(entry_mass[e]))
                    symbol[PLACE(written)] = entry_byte[e]
                    prob[PLACE(written)] = p
                    written += p > np.float32(0.0)
                if depth == 0:
                    p = np.float32(w * end[r])
                    symbol[PLACE(written)] = END
                    prob[PLACE(written)] = p
                    written += p > np.float32(0.0)
            for word in range(PLACE(0 if alone else 33)):
                if seen[word] != 0:
                    for b in range(word * PLACE(8), word * PLACE(8) + PLACE(8)):
                        p = np.float32(acc[b] * inverse)
                        symbol[PLACE(written)] = b
                        prob[PLACE(written)] = p
                        written += p > np.float32(0.0)
            count[out] = written - before
        for word in range(PLACE(0 if alone else 33)):
            if seen[word] != 0:
                seen[word] = 0
                for b in range(word * PLACE(8), word * PLACE(8) + PLACE(8)):
                    acc[b] = 0.0
        if i == last or i >= len(text):
            break
        unknown *= rate * inverse
        orphan = 0.0
        kept = 0
        for a in range(n_active):
            r = active[a]
            depth = i - row_start[r]
            level = level_offset[r] + depth
            mass = found[a]
            if level + 1 >= level_offset[r + 1] or mass == 0.0:  # a weight beside no mass would grow beyond float64
                continue
            weight[r] *= inverse
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
