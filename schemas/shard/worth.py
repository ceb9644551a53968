"""Which symbols of a row are worth listing. No I/O.

A symbol that is not listed still gets its share of the tail from the prior (prior.py), so listing it gains
p ln(p / q) - p + q nats over that share q; it is listed where this exceeds `rate` nats per bit of its price. Logarithms
that decide come from an integer table, so the choice does not depend on the machine; most choices need none, since the
ratio of price and p says between which shares q the gain must be computed.
"""

from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F64, I16, I64, PLACE, SYMBOLS, U8, U64
from bytecache.schemas.loops import inner_loop
from bytecache.schemas.shard.blocks import Rows
from bytecache.schemas.shard.codes import MAX_COUNT
from bytecache.schemas.shard.sorting import PADDING


def _log2_table() -> I64:
    """log2(1 + m / 4096) in units of 2 ** -20, rounded: the same on every machine."""
    with localcontext() as context:
        context.prec = 30
        two = Decimal(2).ln()
        return np.array([int(((1 + Decimal(m) / 4096).ln() / two * 2**20).to_integral_value()) for m in range(4096)])


_LOG2 = _log2_table().astype(np.int32)
_FIRST_OCTAVE, _OCTAVES, _STEPS = -20, 28, 32
_LOG_ERROR = 4e-4
"""How far ln(p / q) may be off where both logarithms come from the table."""


def _worthy_shares() -> tuple[F64, F64]:
    """float64 [octaves * steps + 2] each: q / p below which listing p surely gains its price, above which surely not.

    By price / p = y, a number of steps to an octave: the share r at which the gain is the price solves
    r - 1 - ln(r) = y and falls with y. The bounds leave room for the table's logarithms; at both ends, beyond the
    octaves, they say nothing.
    """
    edge = 2.0 ** np.arange(_FIRST_OCTAVE, _FIRST_OCTAVE + _OCTAVES)[:, None] * (1 + np.arange(_STEPS) / _STEPS)
    edge = np.append(edge.ravel(), 2.0 ** (_FIRST_OCTAVE + _OCTAVES))

    def share(y: F64) -> F64:
        low, high = np.full(len(y), -400.0), np.zeros(len(y))  # ln(r)
        for _ in range(80):
            middle = (low + high) / 2
            above = np.expm1(middle) - middle > y
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.exp(high)

    sure = share(edge[1:] + _LOG_ERROR) * (1 - 1e-9)
    hopeless = share(np.maximum(edge[:-1] - _LOG_ERROR, 0.0)) * (1 + 1e-9)
    return np.concatenate([[0.0], sure, [0.0]]), np.concatenate([[np.inf], hopeless, [np.inf]])


_SURE, _HOPELESS = _worthy_shares()
_LN2_UNIT = 0.6931471805599453 / 2**20


class Table(NamedTuple):
    """A prior as the kernel reads it, and what an entry must gain.

    prior int16 [K, 257]: 512 * code of the weight + rank; weights float64 [codes], and `inverse`, one over it; total
    float64 [K] of the weights; price float64 [257]: nats an entry at each rank must gain.
    """

    prior: I16
    weights: F64
    inverse: F64
    total: F64
    price: F64


class Row(NamedTuple):
    """The row at hand: numbers that the steps of its encoding hand on."""

    number: np.int64
    node: np.uint64
    top: np.uint64
    """its first entry, the most likely symbol's"""
    n_others: np.int64
    """entries behind it"""
    n_listable: np.int64
    """those of them that could be listed, the first ones"""
    top_rank: np.int64
    implied: float
    """probability of the most likely symbol"""
    weight: float
    """of all other symbols in the prior"""


class Scratch(NamedTuple):
    """What is found out about the listable symbols of the row at hand, by their place; room for SYMBOLS each."""

    rank: I16
    weight: F64
    hopeless: F64
    """share of the tail from which on the symbol is surely not worth its price"""
    listed: U8
    chosen: I64
    """places of the listed ones in ascending order"""
    coded: F64
    """of the chosen, in this order: probabilities that their codes stand for"""
    spots: I64
    """of the chosen: 256 * rank + code"""
    spare: I64
    number: F64
    """a number, float64 [1]"""
    bits: U64
    """the same as uint64"""


@njit(cache=True, nogil=True)
def make_scratch() -> Scratch:
    """Room for one row."""
    number = np.empty(1, np.float64)
    return Scratch(
        np.empty(SYMBOLS, np.int16),
        np.empty(SYMBOLS),
        np.empty(SYMBOLS),
        np.empty(SYMBOLS, np.uint8),
        np.empty(SYMBOLS, np.int64),
        np.empty(SYMBOLS),
        np.empty(SYMBOLS + PADDING, np.int64),
        np.empty(SYMBOLS + PADDING, np.int64),
        number,
        number.view(np.uint64),
    )


@inner_loop
def open_row(i: np.uint64, stop: int, rows: Rows, node: I16, table: Table) -> Row:
    """Row i, whose entries end at `stop`; it has at least one."""
    n = np.int64(rows.n_kept[i])
    top = PLACE(stop - n)
    row = np.uint64(node[i])
    packed = np.int64(table.prior[row, np.uint64(rows.symbol[top])])
    others = table.total[row] - table.weights[PLACE(packed >> 9)]
    n_listable = np.int64(rows.listable[i]) - 1
    return Row(np.int64(i), row, top, n - 1, n_listable, packed & 511, float(rows.prob[top]), others)


@njit(cache=True, nogil=True, inline="always")
def _log2(bits: np.uint64) -> np.int64:
    """log2 of a positive float64 with these bits, units of 2 ** -20 above an arbitrary zero, within 2 ** -12."""
    return (np.int64(bits >> np.uint64(52)) << 20) + np.int64(_LOG2[bits >> np.uint64(40) & np.uint64(4095)])


@inner_loop
def choose(row: Row, rows: Rows, table: Table, scratch: Scratch) -> tuple[int, float]:
    """Which of a row's listable symbols are worth their price, by descending probability: `listed`, in order `chosen`.

    Two rounds: what is listed takes mass from the tail, so a symbol that was not worth it may be once others are
    listed; the second round asks only those whose question has changed. Returns how many are chosen, and the mass that
    is left unlisted, never below what had no entry before.
    """
    n_chosen, left, weight_left = _choose_in_order(row, rows, table, scratch)
    last = scratch.chosen[PLACE(n_chosen - 1)] if n_chosen else np.int64(0)
    again = np.uint8(0)
    for k in range(PLACE(last)):
        hopeful = left * scratch.weight[k] <= scratch.hopeless[k] * weight_left
        again |= (scratch.listed[k] ^ np.uint8(1)) & np.uint8(hopeful)
    if again:
        n_chosen, left = _choose_again(row, rows, table, scratch, n_chosen, left, weight_left)
    return n_chosen, left


@inner_loop
def _choose_in_order(row: Row, rows: Rows, table: Table, scratch: Scratch) -> tuple[int, float, float]:
    """The first round: every listable symbol is asked once, of what those before it have left.

    Returns how many are chosen, the mass that is left unlisted, and the weight that it is spread over.
    """
    k: Any
    place: Any
    n_chosen: Any
    symbol, prob, bits = rows.symbol, rows.prob, rows.bits
    prior, weights, price = table.prior, table.weights, table.price
    rank, weight, hopeless, listed, chosen, number, number_bits = (
        scratch.rank, scratch.weight, scratch.hopeless, scratch.listed, scratch.chosen, scratch.number, scratch.bits
    )  # fmt: skip
    first, left, weight_left = row.top + PLACE(1), rows.unlisted[row.number], row.weight
    least = rows.rest[row.number]
    n_chosen = 0
    for k in range(PLACE(row.n_listable)):
        packed = np.int64(prior[row.node, np.uint64(symbol[first + k])])
        r = (packed & 511) - ((packed & 511) > row.top_rank)
        rank[k] = r
        weight[k] = weights[PLACE(packed >> 9)]
        p = float(prob[first + k])
        number[0] = price[PLACE(r)] / p
        place = np.int64(number_bits[0] >> np.uint64(47)) - (_FIRST_OCTAVE + 1023) * _STEPS + 1
        place = min(max(place, 0), _OCTAVES * _STEPS + 1)
        hopeless[k] = _HOPELESS[PLACE(place)] * p
        x, limit = left * weight[k], _SURE[PLACE(place)] * p * weight_left
        if n_chosen == MAX_COUNT:
            limit = -1.0
        elif x >= limit and x <= hopeless[k] * weight_left:
            b = bits[first + k]
            log_p = (np.int64(b >> np.uint32(23)) + 896 << 20) + np.int64(_LOG2[b >> np.uint32(11) & np.uint32(4095)])
            q = number[0] = x / weight_left
            gain = p * (float(log_p - _log2(number_bits[0])) * _LN2_UNIT) - p + q
            limit = np.inf if p > q and gain > price[PLACE(r)] else -1.0
        # Arithmetic in place of a branch that would be guessed wrong.
        yes = 1.0 if x < limit else 0.0
        left -= p * yes
        left = left if left > least else least
        weight_left -= weight[k] * yes
        listed[k] = np.uint8(yes)
        chosen[PLACE(n_chosen)] = np.int64(k)
        n_chosen += np.int64(yes)
    return n_chosen, left, weight_left


@inner_loop
def _choose_again(
    row: Row, rows: Rows, table: Table, scratch: Scratch, n_chosen: int, left: float, weight_left: float
) -> tuple[int, float]:
    """The second round, which asks once more where what is left makes it worth it; returns what `choose` returns."""
    j: Any
    k: Any
    last: Any
    rank, weight, hopeless, listed, chosen, number, number_bits = (
        scratch.rank, scratch.weight, scratch.hopeless, scratch.listed, scratch.chosen, scratch.number, scratch.bits
    )  # fmt: skip
    prob, price = rows.prob, table.price
    first, least = row.top + PLACE(1), rows.rest[row.number]
    last = chosen[PLACE(n_chosen - 1)]
    j = 0
    while j < last and n_chosen < MAX_COUNT:
        k = PLACE(j)
        j += 1
        if listed[k] or left * weight[k] > hopeless[k] * weight_left:
            continue
        p = float(prob[first + k])
        number[0] = p
        log_p = _log2(number_bits[0])
        q = number[0] = left * weight[k] / weight_left
        gain = p * (float(log_p - _log2(number_bits[0])) * _LN2_UNIT) - p + q
        if p > q and gain > price[PLACE(rank[k])]:
            listed[k] = 1
            n_chosen += 1
            left = max(left - p, least)
            weight_left -= weight[k]
            last = row.n_listable
    n_chosen = 0
    for k in range(PLACE(row.n_listable)):
        chosen[PLACE(n_chosen)] = np.int64(k)
        n_chosen += listed[k]
    return n_chosen, left


@inner_loop
def unlisted_mass(row: Row, rows: Rows, listed: U8) -> float:
    """Mass of a row that is not listed, summed anew, without the rounding of the subtractions in `choose`."""
    first = row.top + PLACE(1)
    mass: float = rows.rest[row.number]
    for k in range(PLACE(row.n_listable)):
        mass += float(rows.prob[first + k]) * (1.0 - listed[k])
    for k in range(PLACE(row.n_listable), PLACE(row.n_others)):
        mass += float(rows.prob[first + k])
    return mass
