"""The KL of encoded rows, quantisation alone and with the tail spread; nothing is decided by it. No I/O.

Terms wait until there are enough of them for vector instructions (`logarithms`).
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F64, I64, PLACE, SYMBOLS
from bytecache.schemas.loops import inner_loop
from bytecache.schemas.shard.blocks import Rows
from bytecache.schemas.shard.codes import TAIL
from bytecache.schemas.shard.logarithms import sum_logs
from bytecache.schemas.shard.rounding import Rounded
from bytecache.schemas.shard.worth import Row, Scratch, Table

_TERMS = 4096
"""Logarithms taken at a time."""
_ROOM = SYMBOLS + 2
"""Logarithms that a row may ask for."""
_BOTH, _FIRST, _SECOND = range(3)


class Terms(NamedTuple):
    """Terms times[k] * ln(x[k]) that wait: of both figures, of quantisation alone, of the whole; float64 [3, room]."""

    times: F64
    x: F64
    n_waiting: I64
    """int64 [3]"""
    spare: F64
    """room for as many"""
    divergence: F64
    """float64 [2]: nats of quantisation alone, and of the whole"""


@njit(cache=True, nogil=True)
def make_terms(divergence: F64) -> Terms:
    """Room for many rows' terms, which go to `divergence`."""
    return Terms(np.empty((3, _TERMS)), np.empty((3, _TERMS)), np.zeros(3, np.int64), np.empty(_TERMS), divergence)


@inner_loop
def note_row(row: Row, rounded: Rounded, rows: Rows, table: Table, scratch: Scratch, terms: Terms) -> None:
    """Add the terms of a row.

    Of what the row did not keep, `rest`, the input's own unlisted mass, `given`, is spread as the decoder spreads it,
    and the remainder counts as one symbol.
    """
    times, x = terms.times[_BOTH], terms.x[_BOTH]
    chosen, coded, weight = scratch.chosen, scratch.coded, scratch.weight
    n_both = terms.n_waiting[_BOTH]
    times[PLACE(n_both)], x[PLACE(n_both)] = row.implied, row.implied / (row.implied - rounded.error)
    n_both += 1
    weight_left = row.weight
    for j in range(PLACE(rounded.n_listed)):
        p = float(rows.prob[row.top + PLACE(1) + PLACE(chosen[j])])
        weight_left -= weight[PLACE(chosen[j])]
        times[PLACE(n_both)], x[PLACE(n_both)] = p, p / coded[j]
        n_both += 1
    terms.n_waiting[_BOTH] = n_both
    missing = _missing_mass(row, rounded, rows, scratch)
    if missing > 1e-12 and rounded.tail_code > 0:
        tail = TAIL[rounded.tail_code]
        n_first = terms.n_waiting[_FIRST]
        terms.times[_FIRST, PLACE(n_first)], terms.x[_FIRST, PLACE(n_first)] = missing, missing / tail
        terms.n_waiting[_FIRST] = n_first + 1
        _note_spread(row, weight_left, tail, rows, table, scratch, terms)


@inner_loop
def _missing_mass(row: Row, rounded: Rounded, rows: Rows, scratch: Scratch) -> float:
    """Mass of a row that has no code of its own."""
    missing = rounded.tail_mass
    if rounded.n_refused:
        missing = rows.rest[row.number]
        for k in range(PLACE(row.n_others)):
            if k >= PLACE(row.n_listable) or not scratch.listed[k]:
                missing += float(rows.prob[row.top + PLACE(1) + k])
    return missing


@inner_loop
def _note_spread(
    row: Row, weight_left: float, tail: float, rows: Rows, table: Table, scratch: Scratch, terms: Terms
) -> None:
    """Add the terms of the symbols that a row does not list, over which `tail` is spread by their weights."""
    e: Any
    symbol, prob, prior, weights, inverse = rows.symbol, rows.prob, table.prior, table.weights, table.inverse
    listed, times, x = scratch.listed, terms.times[_SECOND], terms.x[_SECOND]
    rest, given = rows.rest[row.number], float(rows.given[row.number])
    n_second = terms.n_waiting[_SECOND]
    share, each, scale = weight_left, given / weight_left, weight_left / tail
    for k in range(PLACE(row.n_listable), PLACE(row.n_others)):
        listed[k] = 0
    for k in range(PLACE(row.n_others)):
        e = row.top + PLACE(1) + k
        c = PLACE(prior[row.node, np.uint64(symbol[e])] >> 9)
        p = float(prob[e]) + each * weights[c]
        times[PLACE(n_second)], x[PLACE(n_second)] = p, p * inverse[c] * scale
        n_second += 1 - np.int64(listed[k])
        share -= weights[c] * (1 - np.int64(listed[k]))
    rest_share = max(share, 1e-12) / weight_left
    p = max(0.0, rest - given) + given * rest_share
    if p > 1e-12:
        times[PLACE(n_second)], x[PLACE(n_second)] = p, p / (tail * rest_share)
        n_second += 1
    terms.n_waiting[_SECOND] = n_second


@inner_loop
def is_full(terms: Terms) -> bool:
    """Whether another row might not fit."""
    most = max(terms.n_waiting[_BOTH], terms.n_waiting[_FIRST], terms.n_waiting[_SECOND])
    return bool(most > _TERMS - _ROOM)


@inner_loop
def add_up(terms: Terms) -> None:
    """Move the terms into `divergence`."""
    times, x, n_waiting, spare, divergence = terms
    common = sum_logs(times[_BOTH], x[_BOTH], n_waiting[_BOTH], spare)
    divergence[0] += common + sum_logs(times[_FIRST], x[_FIRST], n_waiting[_FIRST], spare)
    divergence[1] += common + sum_logs(times[_SECOND], x[_SECOND], n_waiting[_SECOND], spare)
    n_waiting[:] = 0
