"""What a position stores: the loops that choose it (`worth`), round it (`rounding`) and lay it out. No I/O.

Codes: a listed symbol has (c / 256) ** 2, the unlisted mass (c / 256) ** 4. Steps are equal in the square root of a
probability, where equal steps cost equal divergence; the fourth power reaches down to the small tails. Both are
multiples of 2 ** -32, so sums are exact. One symbol per position, the most likely, is implied: 1 minus all the rest.

What is listed is a trade of rate against distortion. Guaranteed whatever the input:

* the implied symbol keeps at least half of its value (normally within a percent), hence is > 0;
* mass is never dropped or renormalised: what is not listed is in the tail, and a tail > 0 never gets code 0;
* the result does not depend on the machine: sums run in fixed point or in a fixed order, logarithms that decide
  come from an integer table, square roots are IEEE's.

Price, one core: docs/results.md, "Speed of the format".
"""

from typing import Any

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F32, F64, I16, I64, PLACE, U8
from bytecache.schemas.loops import inner_loop, row_loop
from bytecache.schemas.shard.blocks import Rows
from bytecache.schemas.shard.codes import TAIL_IS_ALL, Codes
from bytecache.schemas.shard.divergence import Terms, add_up, is_full, make_terms, note_row
from bytecache.schemas.shard.rounding import Steps, round_row, surely_fits, tail_rises
from bytecache.schemas.shard.sorting import sort_distinct
from bytecache.schemas.shard.worth import Row, Scratch, Table, choose, make_scratch, open_row, unlisted_mass

FLOOR = 1e-6
"""A row whose most likely symbol is rarer than this lists nothing."""
FLAT_TAIL = 0.98
"""Unlisted mass above which a row lists nothing: no code is near it."""


@njit(cache=True, nogil=True)
def encode_rows(rows: Rows, node: I16, table: Table, steps: Steps, codes: Codes, divergence: F64) -> tuple[int, int]:
    """Choose what rows list, quantise it, and lay it out.

    node int16 [n]: the context of each row. Output: the codes, of which `top` uint8 [M], gap and value uint8 [E] are
    filled from the beginning; divergence[0] grows by the quantisation KL of the rows that count (over listed symbols
    and tail), [1] by the whole KL, tail spread by the prior. Returns (M, E).
    """
    written: tuple[int, int] = _encode(rows, node, table, steps, codes, make_scratch(), make_terms(divergence))
    return written


@row_loop
def _encode(
    rows: Rows, node: I16, table: Table, steps: Steps, codes: Codes, scratch: Scratch, terms: Terms
) -> tuple[int, int]:
    stop: Any
    stop = n_top = n_entries = 0
    for i in range(PLACE(node.shape[0])):
        stop += np.int64(rows.n_kept[i])
        codes.head[i], codes.tail[i] = 0, TAIL_IS_ALL
        if rows.n_kept[i] == 0:
            continue
        row = open_row(i, stop, rows, node, table)
        if row.implied < FLOOR:
            continue
        n_chosen, _ = choose(row, rows, table, scratch)
        tail_mass = unlisted_mass(row, rows, scratch.listed)
        if tail_mass > FLAT_TAIL:
            continue
        rounded = round_row(n_chosen, tail_mass, row, rows, steps, scratch)
        sort_distinct(scratch.spots, scratch.spare, rounded.n_listed)
        n_entries = _lay_out(scratch.spots, rounded.n_listed, codes.gap, codes.value, n_entries)
        n_missed = _name_top(row, rows, table, codes.top, n_top)
        n_top += n_missed
        codes.head[i], codes.tail[i] = 2 * rounded.n_listed + n_missed, rounded.tail_code
        if rows.mask[i]:
            note_row(row, rounded, rows, table, scratch, terms)
            if is_full(terms):
                add_up(terms)
    add_up(terms)
    return n_top, n_entries


@inner_loop
def _lay_out(spots: I64, n: int, gap: U8, value: U8, out: int) -> int:
    """Write n sorted spots as gaps of ranks and values from place `out` on; returns the place behind."""
    before = -1
    for j in range(PLACE(n)):
        r = spots[j] >> 8
        gap[PLACE(out)] = r - before - 1
        value[PLACE(out)] = spots[j] & 255
        before = r
        out += 1
    return out


@inner_loop
def _name_top(row: Row, rows: Rows, table: Table, top: U8, n_top: int) -> int:
    """Write the implied symbol's rank among all but the true one; where it is the true one, return 0: it may go."""
    true = rows.true[row.number]
    true_rank = np.int64(table.prior[row.node, np.uint64(true)]) & 511
    top[PLACE(n_top)] = row.top_rank - (row.top_rank > true_rank)
    return int(rows.symbol[row.top] != true)


@njit(cache=True, nogil=True)
def learn_masses(rows: Rows, node: I16, unit: float, mass: I64) -> None:
    """Add the probabilities of rows to int64 `mass` [K, 257] of their nodes."""
    _, _, count, _, _, _, _, symbol, prob, _ = rows
    at = 0
    for i in range(PLACE(node.shape[0])):
        row = np.uint64(node[i])
        for k in range(PLACE(at), PLACE(at + count[i])):
            mass[row, np.uint64(symbol[k])] += np.int64(float(prob[k]) * unit)
        at += count[i]


@njit(cache=True, nogil=True)
def forget_listed(rows: Rows, node: I16, table: Table, steps: Steps, mass: I64) -> None:
    """Subtract from `mass` what `learn_masses` added of the symbols that the rows list under `table`."""
    _forget(rows, node, table, steps, mass, make_scratch(), tail_rises(steps.tail))


@row_loop
def _forget(rows: Rows, node: I16, table: Table, steps: Steps, mass: I64, scratch: Scratch, rises: F64) -> None:
    stop: Any
    stop = 0
    for i in range(PLACE(node.shape[0])):
        stop += np.int64(rows.n_kept[i])
        if rows.n_kept[i] == 0:
            continue
        row = open_row(i, stop, rows, node, table)
        if row.implied < FLOOR:
            continue
        n_listed, left = choose(row, rows, table, scratch)
        chosen_mass = rows.unlisted[row.number] - left
        if left >= 0.9 * FLAT_TAIL or not surely_fits(n_listed, chosen_mass, left, row.implied, steps.value, rises):
            tail_mass = unlisted_mass(row, rows, scratch.listed)
            if tail_mass > FLAT_TAIL:
                continue
            n_listed = round_row(n_listed, tail_mass, row, rows, steps, scratch).n_listed
        _take_from(mass, row, rows.symbol, rows.prob, scratch.chosen[:n_listed], steps.unit)


@inner_loop
def _take_from(mass: I64, row: Row, symbol: I16, prob: F32, chosen: I64, unit: float) -> None:
    """Subtract from a node's `mass` a row's most likely symbol and the chosen ones behind it."""
    mass[row.node, np.uint64(symbol[row.top])] -= np.int64(float(prob[row.top]) * unit)
    for j in range(PLACE(chosen.shape[0])):
        entry = row.top + PLACE(1) + PLACE(chosen[j])
        mass[row.node, np.uint64(symbol[entry])] -= np.int64(float(prob[entry]) * unit)
