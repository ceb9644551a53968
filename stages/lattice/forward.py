"""The forward sum over covers: rows of path masses to next-byte distributions.

A *cell* (row, d) at position i = start(row) + d is a history that ended at start(row) and a next token that begins
with x[start : i] and does not end there. Its weight is p(history) times the mass of such tokens. With K_i the sum
of the weights of all cells at i, and U_i the weight of histories that nobody evaluated,

    P(x[:i])        = K_i + U_i
    P(b | x[:i])    = sum over cells of p(history) * mass(row, x[start:i] + b) / P(x[:i])     b a byte
    P(END | x[:i])  = sum over rows that end at i of p(history) * mass(row, END) / P(x[:i])

(Vieira et al., arXiv 2412.03719). One byte on, a cell moves down its row's path; tokens that end there (*stops*)
hand their weight to the row of the longer history if that was evaluated. If not, they are *orphans*, too light to have
been asked for (stages/lattice/lattice.py says when), and one of three things becomes of them:

    joined    they go on as the heaviest row that ends at the same byte would, the canonical one first
    static    where no row ends, a static row (stages.engines.static) should: the teacher stage adds one for the
              heaviest history that ends there, and the others join it
    nowhere   what has no row even so is *unaccounted*: it is kept in U, follows the text at the rate of the known
              cells, and joins the canonical row at its next break

What is unlisted or unaccounted at a position is that position's tail; nothing is renormalised. With every history
evaluated nothing joins, U is empty, the sums are exact. Beside the weight of a row goes the part of it that came
through evaluated histories alone, so that what was handed on can be told (`Sums.evaluated`). Orphans of at most the
share `drop` are dropped instead, for a reference that shares no assumption with production: P is then that of the
evaluated histories, and of those that were followed as far as any is (stages/lattice/effort.py).

One pass, float64, weights rescaled at every byte so that P(x[:i]) never underflows; time is linear in the bytes
and in the listed entries, memory is one window. Text to which no known history gives a mass (beyond float32: below
1e-45 of its row) is all tail until the canonical tokens break, whose row then goes on alone.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import END, PLACE
from bytecache.schemas.loops import inner_loop, row_loop
from bytecache.stages.lattice.tables import Masses, Tables

_NOTHING = 1e-300
"""A total that is no better than zero: one over it must be finite."""
_WORDS = 33
"""Words of eight symbols that hold the 257."""


class Sums(NamedTuple):
    """What the sum writes; m scored positions, R rows, S stops, and room for every entry and every row."""

    n_symbols: np.ndarray
    """int64 [m]; those above zero of each scored position"""
    symbol: np.ndarray
    """int16; they, ascending, position after position"""
    prob: np.ndarray
    """float32; their probabilities"""
    tail: np.ndarray
    """float32 [m]"""
    unaccounted: np.ndarray
    """float32 [m]"""
    ratio: np.ndarray
    """float64 [n + 1]; P(x[:i]) over P(x[:i - 1])"""
    share: np.ndarray
    """float64 [S]; weight of each stop over P of the text to its end"""
    held: np.ndarray
    """float64 [L]; what each level's cell holds of P(x[:i]) at its byte: the weight of its row times the mass of tokens
    that do not end before"""
    purity: np.ndarray
    """float64 [R]; the part of each row's weight that came through evaluated histories alone"""
    evaluated: np.ndarray
    """float64 [n + 1]; the share of such weight in P(x[:i]), after what ends at i was handed on"""


class _Cells(NamedTuple):
    """The rows that the walk is inside of, R at most, and what is known of every row."""

    row: np.ndarray
    """int64; the rows, in no order that matters"""
    prefix: np.ndarray
    """float64; of each, the mass of tokens that begin with the text since its start and do not end before here"""
    follows: np.ndarray
    """float64; of each, the mass of those that go on with the text's next byte"""
    weight: np.ndarray
    """float64 [R]; p(history) over P(x[:i]), by row"""
    next_stop: np.ndarray
    """int64 [R]; the first stop of each row that lies ahead"""
    ended: np.ndarray
    """int64 [S]; stops that ended at the last byte, whose shares await its total"""


class _Board(NamedTuple):
    """Sums by symbol at one position."""

    mass: np.ndarray
    """float64 [264]"""
    words: np.ndarray
    """uint64 [40]; which symbols were touched, eight to a word"""
    touched: np.ndarray
    """uint8 [320]; the same, a symbol an item"""


@njit(cache=True, nogil=True, error_model="numpy")
def forward(rows: Masses, lies: Tables, first: int, last: int, drop: float, sums: Sums) -> int:
    """Run over positions 0..last; write targets of first..last, and of all of them what `Sums` says.

    Returns how many of `sums.symbol` were written.
    """
    words = np.zeros(40, np.uint64)
    board = _Board(np.zeros(264), words, words.view(np.uint8))
    written: int = _walk(rows, lies, first, last, drop, _empty_cells(lies), board, sums)
    return written


@row_loop
def _walk(
    rows: Masses, lies: Tables, first: int, last: int, drop: float, cells: _Cells, board: _Board, sums: Sums
) -> int:
    count = ended = written = 0
    unknown = 0.0
    cells.weight[lies.by_start[0]] = sums.purity[lies.by_start[0]] = 1.0
    for i in range(last + 1):
        count = _enter(cells, count, lies, sums, i)
        restarted = _restart_if_lost(cells, count, lies, sums, i)
        alone = count == 1
        known = evaluated = listed = ahead = 0.0
        if alone:
            alone, known, evaluated, listed, ahead = _look_in_one(rows, lies, cells, sums, i)
        if not alone:
            known, evaluated, listed, ahead = _look_in_all(rows, lies, cells, count, sums, i, board)
        rate = ahead / known if known > 0.0 else 1.0
        total = known + unknown
        sums.ratio[i] = 0.0 if restarted else total
        if total <= _NOTHING:
            unknown = total = 1.0
            sums.ratio[i] = 0.0
        inverse = 1.0 / total
        _note_shares(rows, lies, cells, count, ended, i, inverse, sums)
        sums.evaluated[i] = evaluated * inverse
        if i >= first:
            sums.unaccounted[i - first] = unknown * inverse
            sums.tail[i - first] = max(0.0, 1.0 - listed * inverse)
            before = written
            if alone:
                written = _write_one(rows, lies, cells, i, inverse, sums, written)
            else:
                written = _write_all(board, inverse, sums, written)
            sums.n_symbols[i - first] = written - before
        if not alone:
            _wipe(board)
        if i == last or i >= len(rows.text):
            break
        unknown *= rate * inverse
        least = drop * (ahead * inverse + unknown)
        count, ended, orphan = _advance(rows, lies, cells, count, inverse, least, i, sums)
        unknown = _hand_on(lies, cells, i + 1, orphan, unknown)
    return written


@njit(cache=True, nogil=True)
def _empty_cells(lies: Tables) -> _Cells:
    rows, stops = len(lies.by_start), len(lies.child)
    return _Cells(
        np.zeros(rows, np.int64), np.zeros(rows), np.zeros(rows), np.zeros(rows), lies.stop_offset[:-1].copy(),
        np.zeros(stops, np.int64),
    )  # fmt: skip


@inner_loop
def _enter(cells: _Cells, count: int, lies: Tables, sums: Sums, i: int) -> int:
    """Rows that start at byte i become cells; returns how many cells there are."""
    for k in range(lies.at[i], lies.at[i + 1]):
        r = lies.by_start[k]
        cells.row[count] = r
        cells.prefix[count] = 1.0
        # So far it is the weight that evaluated histories handed down, the sum of which nothing else can exceed.
        sums.purity[r] = min(1.0, sums.purity[r] / cells.weight[r]) if cells.weight[r] > 0.0 else 0.0
        count += 1
    return count


@inner_loop
def _restart_if_lost(cells: _Cells, count: int, lies: Tables, sums: Sums, i: int) -> bool:
    """Perhaps the text so far has probability zero; the canonical row asks nothing of what came before."""
    heir = lies.canonical[i]
    if heir < 0 or cells.weight[heir] > _NOTHING:
        return False
    for a in range(count):
        if cells.weight[cells.row[a]] * cells.prefix[a] > _NOTHING:
            return False
    cells.weight[heir] = sums.purity[heir] = 1.0
    return True


@inner_loop
def _look_in_one(
    rows: Masses, lies: Tables, cells: _Cells, sums: Sums, i: int
) -> tuple[bool, float, float, float, float]:
    """`_look_in_all` of a single cell, as at most positions: its entries are in order, nothing is summed by symbol.

    The first result is whether they were.
    """
    b: Any
    before: Any
    r = cells.row[0]
    depth = i - rows.start[r]
    level = lies.level_offset[r] + depth
    byte = np.int64(rows.text[i]) if i < len(rows.text) else np.int64(-1)
    w = cells.weight[r]
    ordered = True
    here = mass = 0.0
    before = np.int64(-1)
    for e in range(PLACE(lies.entry_offset[level]), PLACE(lies.entry_offset[level + 1])):
        m = np.float64(rows.entry_mass[e])
        b = np.int64(rows.entry_byte[e])
        ordered &= b > before
        before = b
        here += m
        mass = m if b == byte else mass
    cells.follows[0] = mass
    listed = w * here
    if depth == 0:
        listed += w * rows.end[r]
        here += rows.end[r] + rows.control[r]
    known = w * max(cells.prefix[0], here)
    return ordered, known, sums.purity[r] * known, listed, w * mass


@inner_loop
def _look_in_all(
    rows: Masses, lies: Tables, cells: _Cells, count: int, sums: Sums, i: int, board: _Board
) -> tuple[float, float, float, float]:
    """Sum the cells at i by symbol.

    Returns their weight, the evaluated part of it, the part that has a listed symbol, the part that has the text's own
    next byte.
    """
    byte = np.int64(rows.text[i]) if i < len(rows.text) else np.int64(-1)
    known = evaluated = listed = 0.0
    for a in range(count):
        r = cells.row[a]
        depth = i - rows.start[r]
        level = lies.level_offset[r] + depth
        w = cells.weight[r]
        here = mass = 0.0
        for e in range(PLACE(lies.entry_offset[level]), PLACE(lies.entry_offset[level + 1])):
            m = np.float64(rows.entry_mass[e])
            b = np.uint64(rows.entry_byte[e])
            board.mass[b] += w * m
            board.touched[b] = 1
            here += m
            mass = m if np.int64(b) == byte else mass
        cells.follows[a] = mass
        listed += w * here
        if depth == 0:
            board.mass[END] += w * rows.end[r]
            board.touched[END] = 1
            listed += w * rows.end[r]
            here += rows.end[r] + rows.control[r]
        # Tokens that end here left the cell already; rounding must not make the rest smaller than its parts.
        in_cell = w * max(cells.prefix[a], here)
        known += in_cell
        evaluated += sums.purity[r] * in_cell
    return known, evaluated, listed, board.mass[byte] if byte >= 0 else 0.0


@inner_loop
def _note_shares(
    rows: Masses, lies: Tables, cells: _Cells, count: int, ended: int, i: int, inverse: float, sums: Sums
) -> None:
    """The total at this byte is known: shares of the tokens that ended here, and of the rows that go on."""
    for k in range(ended):
        sums.share[cells.ended[k]] *= inverse
    for a in range(count):
        r = cells.row[a]
        sums.held[lies.level_offset[r] + i - rows.start[r]] = cells.weight[r] * inverse * cells.prefix[a]


@inner_loop
def _write_one(rows: Masses, lies: Tables, cells: _Cells, i: int, inverse: float, sums: Sums, written: int) -> int:
    """The distribution of a single cell, straight from its entries; returns the new end of what is written."""
    place: Any
    place = written
    r = cells.row[0]
    depth = i - rows.start[r]
    level = lies.level_offset[r] + depth
    w = cells.weight[r] * inverse
    for e in range(PLACE(lies.entry_offset[level]), PLACE(lies.entry_offset[level + 1])):
        p = np.float32(w * np.float64(rows.entry_mass[e]))
        sums.symbol[PLACE(place)] = rows.entry_byte[e]
        sums.prob[PLACE(place)] = p
        place += p > np.float32(0.0)
    if depth == 0:
        p = np.float32(w * rows.end[r])
        sums.symbol[PLACE(place)] = END
        sums.prob[PLACE(place)] = p
        place += p > np.float32(0.0)
    return int(place)


@inner_loop
def _write_all(board: _Board, inverse: float, sums: Sums, written: int) -> int:
    """The distribution on the board; returns the new end of what is written."""
    place: Any
    b: Any
    place = written
    for word in range(PLACE(_WORDS)):
        if board.words[word] != 0:
            for b in range(word * PLACE(8), word * PLACE(8) + PLACE(8)):
                p = np.float32(board.mass[b] * inverse)
                sums.symbol[PLACE(place)] = b
                sums.prob[PLACE(place)] = p
                place += p > np.float32(0.0)
    return int(place)


@inner_loop
def _wipe(board: _Board) -> None:
    b: Any
    for word in range(PLACE(_WORDS)):
        if board.words[word] != 0:
            board.words[word] = 0
            for b in range(word * PLACE(8), word * PLACE(8) + PLACE(8)):
                board.mass[b] = 0.0


@inner_loop
def _advance(
    rows: Masses, lies: Tables, cells: _Cells, count: int, inverse: float, least: float, i: int, sums: Sums
) -> tuple[int, int, float]:
    """Move every cell over the byte at i; tokens that end there hand their weight to the rows of their histories.

    Returns how many cells are left, how many tokens ended, and the weight of those without a row that exceed `least`.
    """
    orphan = 0.0
    left = ended = 0
    for a in range(count):
        r = cells.row[a]
        depth = i - rows.start[r]
        mass = cells.follows[a]
        if lies.level_offset[r] + depth + 1 >= lies.level_offset[r + 1] or mass == 0.0:
            continue  # a weight beside no mass would grow beyond float64
        cells.weight[r] *= inverse
        w = cells.weight[r]
        s = cells.next_stop[r]
        while s < lies.stop_offset[r + 1] and rows.stop_depth[s] == depth + 1:
            m = np.float64(rows.stop_mass[s])
            mass -= m
            c = lies.child[s]
            sums.share[s] = w * m
            cells.ended[ended] = s
            ended += 1
            if c >= 0:
                cells.weight[c] += w * m
                if rows.static[c] == 0:
                    sums.purity[c] += sums.purity[r] * w * m
            elif w * m > least:
                orphan += w * m
            s += 1
        cells.next_stop[r] = s
        cells.row[left] = r
        cells.prefix[left] = max(mass, 0.0)
        left += 1
    return left, ended, orphan


@inner_loop
def _hand_on(lies: Tables, cells: _Cells, i: int, orphan: float, unknown: float) -> float:
    """Orphans join the heaviest row that ends at i, the canonical one first; returns the weight that has none."""
    heir = lies.canonical[i]
    if heir >= 0:
        orphan += unknown
        unknown = 0.0
    elif orphan > 0.0:
        for k in range(lies.at[i], lies.at[i + 1]):
            if heir < 0 or cells.weight[lies.by_start[k]] > cells.weight[heir]:
                heir = lies.by_start[k]
    if heir < 0:
        return unknown + orphan
    cells.weight[heir] += orphan
    return unknown
