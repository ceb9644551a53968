"""What a position stores: the codes, and the loops that choose and quantise it. No I/O.

Codes: a listed symbol has (c / 256) ** 2, the unlisted mass (c / 256) ** 4. Steps are equal in the square root of a
probability, where equal steps cost equal divergence; the fourth power reaches down to the small tails. Both are
multiples of 2 ** -32, so sums are exact. One symbol per position, the most likely, is implied: 1 minus all the rest.

What is listed is a trade of rate against distortion. A symbol that is not listed still gets its share of the tail from
the prior (prior.py), so listing it gains p ln(p / q) - p + q nats over that share q; it is listed where this exceeds
`rate` nats per bit of its price. Codes are rounded to multiples of a coarse step where that divergence is small beside
what finer ones would cost. Guaranteed whatever the input:

* the implied symbol keeps at least half of its value (normally within a percent), hence is > 0;
* mass is never dropped or renormalised: what is not listed is in the tail, and a tail > 0 never gets code 0;
* the result does not depend on the machine: sums run in fixed point or in a fixed order, logarithms that decide
  come from an integer table, square roots are IEEE's.

Price, one core: docs/results.md, "Speed of the format".
"""

import math
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bytecache.schemas.arrays import F32, F64, I16, I64, PLACE, SYMBOLS, U8
from bytecache.schemas.shard.blocks import Rows
from bytecache.schemas.shard.codes import MAX_COUNT, TAIL, TAIL_IS_ALL, VALUE, Codes
from bytecache.schemas.shard.logarithms import sum_logs
from bytecache.schemas.shard.sorting import PADDING, sort_distinct

FLOOR = 1e-6
"""A row whose most likely symbol is rarer than this lists nothing."""
FLAT_TAIL = 0.98
"""Unlisted mass above which a row lists nothing: no code is near it."""
FINE_TAIL = 20.0
"""A tail leaves the multiples of its step where that spares more than so many bits are worth."""


# Reasons a row is refused (returned by the kernels, worded by byte_shard.py).
OK, BAD_VALUE, BAD_SUM, BAD_ORDER, BAD_CODE, BAD_MASS, BAD_COUNT, BAD_COUNT_OVER, BAD_GAP_OVER = range(9)


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
_TERMS = 4096
"""Logarithms taken at a time."""
_ROOM = SYMBOLS + 2
"""Logarithms that a row may ask for."""


@njit(cache=True, nogil=True, inline="always")
def _log2(bits: np.uint64) -> np.int64:
    """log2 of a positive float64 with these bits, units of 2 ** -20 above an arbitrary zero, within 2 ** -12."""
    return (np.int64(bits >> np.uint64(52)) << 20) + np.int64(_LOG2[bits >> np.uint64(40) & np.uint64(4095)])


@njit(cache=True, nogil=True, inline="always", error_model="numpy")
def _round_code(
    root: float, step: int, highest: int, p: float, power: int, error: float, top: float, inverse_top: float
) -> tuple[int, float]:
    """The multiple of `step` next to 256 * root, `highest` at most, that errs least on p and on the implied symbol.

    `power` 2 or 4; `error` summed so far; `top` the implied symbol's true mass. Returns the code, and `error` with its
    own; code 0: none above zero leaves the implied symbol half of its value.
    """
    below = int(root * 256.0) & -step
    low, high = min(below, highest), min(below + step, highest)
    low_value, high_value = (low / 256.0) * (low / 256.0), (high / 256.0) * (high / 256.0)
    if power == 4:
        low_value, high_value = low_value * low_value, high_value * high_value
    low_off, high_off = low_value - p, high_value - p
    low_after, high_after = error + low_off, error + high_off
    low_cost = low_off * low_off / max(low_value, p) + low_after * low_after * inverse_top
    high_cost = high_off * high_off / max(high_value, p) + high_after * high_after * inverse_top
    low_cost = np.inf if low < 1 or low_after > 0.5 * top else low_cost
    high_cost = np.inf if high_after > 0.5 * top else high_cost
    if low_cost == np.inf and high_cost == np.inf:
        return 0, error
    higher = high_cost < low_cost
    return high if higher else low, high_after if higher else low_after


@njit(cache=True, nogil=True)
def learn_masses(node: I16, count: I16, symbol: I16, prob: F32, unit: float, mass: I64) -> None:
    """Add the probabilities of rows to int64 `mass` [K, 257] of their nodes."""
    at = 0
    for i in range(PLACE(node.shape[0])):
        row = np.uint64(node[i])
        for k in range(PLACE(at), PLACE(at + count[i])):
            mass[row, np.uint64(symbol[k])] += np.int64(float(prob[k]) * unit)
        at += count[i]


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


class Steps(NamedTuple):
    """What codes are multiples of, the nats that a bit is worth, and the unit in which `mass` counts."""

    value: int
    tail: int
    rate: float
    unit: float


@njit(cache=True, nogil=True, inline="always", error_model="numpy")
def _choose(
    n: int, first: np.uint64, row: np.uint64, top_rank: int, t: float, kept_out: float, w: float,
    symbol: I16, prob: F32, bits: NDArray[np.uint32], prior: I16, weights: F64, price: F64,
    rank: I16, weight: F64, hopeless: F64, listed: U8, chosen: I64, scratch: F64, scratch_bits: NDArray[np.uint64],
) -> tuple[int, float]:  # fmt: skip
    """Which of a row's n other symbols are worth their price, by descending probability: `listed`, in order `chosen`.

    Two rounds: what is listed takes mass from the tail, so a symbol that was not worth it may be once others are
    listed; the second round asks only those whose question has changed. `t`: the unlisted mass before, never below
    `kept_out`; `w`: the weight that it is spread over. Returns how many are chosen, and the mass left.
    """
    k: Any
    last: Any
    place: Any
    n_chosen: Any
    j: Any
    n_chosen = 0
    for k in range(PLACE(n)):
        here = np.int64(prior[row, np.uint64(symbol[first + k])])
        r = (here & 511) - ((here & 511) > top_rank)
        rank[k] = r
        weight[k] = weights[PLACE(here >> 9)]
        p = float(prob[first + k])
        scratch[0] = price[PLACE(r)] / p
        place = np.int64(scratch_bits[0] >> np.uint64(47)) - (_FIRST_OCTAVE + 1023) * _STEPS + 1
        place = min(max(place, 0), _OCTAVES * _STEPS + 1)
        hopeless[k] = _HOPELESS[PLACE(place)] * p
        x, limit = t * weight[k], _SURE[PLACE(place)] * p * w
        if n_chosen == MAX_COUNT:
            limit = -1.0
        elif x >= limit and x <= hopeless[k] * w:
            b = bits[first + k]
            lp = (np.int64(b >> np.uint32(23)) + 896 << 20) + np.int64(_LOG2[b >> np.uint32(11) & np.uint32(4095)])
            q = scratch[0] = x / w
            gain = p * (float(lp - _log2(scratch_bits[0])) * _LN2_UNIT) - p + q
            limit = np.inf if p > q and gain > price[PLACE(r)] else -1.0
        # Arithmetic in place of a branch that would be guessed wrong; t is never below `kept_out`.
        yes = 1.0 if x < limit else 0.0
        t -= p * yes
        t = t if t > kept_out else kept_out
        w -= weight[k] * yes
        listed[k] = np.uint8(yes)
        chosen[PLACE(n_chosen)] = np.int64(k)
        n_chosen += np.int64(yes)
    last = chosen[PLACE(n_chosen - 1)] if n_chosen else 0
    again = np.uint8(0)
    for k in range(PLACE(last)):
        again |= (listed[k] ^ np.uint8(1)) & np.uint8(t * weight[k] <= hopeless[k] * w)
    j = 0 if again else last
    while j < last and n_chosen < MAX_COUNT:
        k = PLACE(j)
        j += 1
        if listed[k] or t * weight[k] > hopeless[k] * w:
            continue
        p = float(prob[first + k])
        scratch[0] = p
        lp = _log2(scratch_bits[0])
        q = scratch[0] = t * weight[k] / w
        gain = p * (float(lp - _log2(scratch_bits[0])) * _LN2_UNIT) - p + q
        if p > q and gain > price[PLACE(rank[k])]:
            listed[k] = 1
            n_chosen += 1
            t = max(t - p, kept_out)
            w -= weight[k]
            last = n
    if again:
        n_chosen = 0
        for k in range(PLACE(n)):
            chosen[PLACE(n_chosen)] = np.int64(k)
            n_chosen += listed[k]
    return n_chosen, t


@njit(cache=True, nogil=True, inline="always")
def _take_from(
    mass: I64, row: np.uint64, symbol: I16, prob: F32, top: np.uint64, chosen: I64, n: int, unit: float
) -> None:
    """Subtract from a node's `mass` what a row lists: entry `top`, and the n `chosen` ones behind it."""
    mass[row, np.uint64(symbol[top])] -= np.int64(float(prob[top]) * unit)
    for j in range(PLACE(n)):
        e = top + PLACE(1) + PLACE(chosen[j])
        mass[row, np.uint64(symbol[e])] -= np.int64(float(prob[e]) * unit)


@njit(cache=True, nogil=True, inline="always", error_model="numpy")
def _tail_code(t: float, step: int, rate: float, top: float) -> int:
    """Code of an unlisted mass t: a multiple of `step`, or the next code where that is worth its bits; 0 = none is."""
    code = 0
    if t > 0.0:
        root, inverse_top = math.sqrt(math.sqrt(t)), 1.0 / top
        code, _ = _round_code(root, step, 254, t, 4, 0.0, top, inverse_top)
        off = TAIL[code] - t
        if code == 0 or off * off / max(t, TAIL[code]) + off * off / top > FINE_TAIL * rate:
            code, _ = _round_code(root, 1, 254, t, 4, 0.0, top, inverse_top)
            code = max(1, code)
    return code


@njit(cache=True, nogil=True, inline="always", error_model="numpy")
def _round_values(
    n_chosen: int, first: np.uint64, step: int, error: float, top: float, prob: F32,
    rank: I16, listed: U8, chosen: I64, coded: F64, spots: I64,
) -> tuple[int, int, float]:  # fmt: skip
    """Codes of the chosen symbols: `coded`, their values, and `spots`, 256 * rank + code.

    Where no code leaves the implied symbol enough, a symbol stays unlisted. Returns how many are left, how many were
    refused, and the summed error of all codes, that of the tail, `error`, included.
    """
    refused = 0
    inverse_top = 1.0 / top
    for j in range(PLACE(n_chosen)):
        k = PLACE(chosen[j])
        p = float(prob[first + k])
        code, error = _round_code(math.sqrt(p), step, 256 - step, p, 2, error, top, inverse_top)
        if code == 0:
            listed[k] = 0
            error -= p
            refused += 1
            continue
        place = PLACE(np.int64(j) - refused)
        chosen[place] = np.int64(k)
        coded[place] = VALUE[code]
        spots[place] = np.int64(rank[k]) << 8 | code
    return n_chosen - refused, refused, error


@njit(cache=True, nogil=True, inline="always")
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


@njit(cache=True, nogil=True, error_model="numpy")
def encode_rows(
    rows: Rows, node: I16, table: Table, steps: Steps, out_codes: Codes, divergence: F64, mass: I64
) -> tuple[int, int]:
    """Choose what rows list, quantise it, and lay it out; or, with `mass`, only take what they list from there.

    node int16 [n]: the context of each row. Output: the codes, of which `top` uint8 [M], gap and value uint8 [E] are
    filled from the beginning; divergence[0] grows by the quantisation KL of the rows that count (over listed symbols
    and tail), [1] by the whole KL, tail spread by the prior. Returns (M, E). Where `mass` int64 [K, 257] has rows,
    nothing of this is written: what `learn_masses` added of listed symbols is subtracted again.
    """
    true, mask, count, listable, rest, unlisted, given, symbol, prob, bits = rows
    prior, weights, inverse, total_weight, price = table
    value_step, tail_step, rate, unit = steps
    head, tail, top, gap, value = out_codes
    k: Any
    stop: Any
    n_two: Any
    j: Any
    e: Any
    learning = mass.shape[0] > 0
    scratch = np.empty(1, np.float64)
    scratch_bits = scratch.view(np.uint64)
    listed = np.empty(SYMBOLS, np.uint8)
    coded = np.empty(SYMBOLS)
    rank = np.empty(SYMBOLS, np.int16)
    weight, hopeless = np.empty(SYMBOLS), np.empty(SYMBOLS)
    chosen = np.empty(SYMBOLS, np.int64)
    value_unit = (value_step / 256.0) ** 2
    most_tail = np.empty(65)  # by 64 * tail: what rounding it up to the next code may add to it
    for k in range(65):
        most_tail[k] = (((k + 1) / 64.0) ** 0.25 + tail_step / 256.0) ** 4 - (k + 1) / 64.0
    # Of every listed symbol, 256 * rank + code.
    spots, scratch_spots = np.empty(SYMBOLS + PADDING, np.int64), np.empty(SYMBOLS + PADDING, np.int64)
    # Terms of the divergence, times[k] * ln(x[k]): of both figures, of the first, of the second.
    both_times, both_x, n_both = np.empty(_TERMS), np.empty(_TERMS), 0
    one_times, one_x, n_one = np.empty(_TERMS), np.empty(_TERMS), 0
    two_times, two_x, n_two = np.empty(_TERMS), np.empty(_TERMS), 0
    stop = at = 0
    n_top = 0
    out = 0
    for i in range(PLACE(node.shape[0])):
        at = stop
        m = np.int64(count[i])
        stop = at + m
        row = np.uint64(node[i])
        implied = float(prob[PLACE(at)]) if m else 0.0
        if implied < FLOOR:
            if not learning:
                head[i], tail[i] = 0, TAIL_IS_ALL
            continue
        top_symbol = np.int64(symbol[PLACE(at)])
        here = np.int64(prior[row, np.uint64(top_symbol)])
        top_rank = here & 511
        others = w = total_weight[row] - weights[PLACE(here >> 9)]
        n = np.int64(listable[i]) - 1
        first = PLACE(at + 1)
        n_chosen, t = _choose(
            n, first, row, top_rank, unlisted[i], rest[i], w, symbol, prob, bits, prior, weights, price,
            rank, weight, hopeless, listed, chosen, scratch, scratch_bits,
        )  # fmt: skip
        if learning and t < 0.9 * FLAT_TAIL:
            # No code can be refused (see `_round_code`) where even all of them rounded up leave the implied symbol
            # half of its value: sum of (sqrt(p) + step)^2 - p, with sum of sqrt(p) <= sqrt(n * sum of p).
            most = value_step / 128.0 * math.sqrt(n_chosen * max(0.0, unlisted[i] - t)) + (n_chosen + 1) * value_unit
            if most + most_tail[PLACE(t * 64.0)] < 0.499 * implied:
                _take_from(mass, row, symbol, prob, PLACE(at), chosen, n_chosen, unit)
                continue
        t = rest[i]  # again, without the rounding of the subtractions above
        for k in range(PLACE(n)):
            t += float(prob[first + k]) * (1.0 - listed[k])
        for k in range(PLACE(n), PLACE(m - 1)):
            t += float(prob[first + k])
        if t > FLAT_TAIL:
            if not learning:
                head[i], tail[i] = 0, TAIL_IS_ALL
            continue
        tail_code = _tail_code(t, tail_step, rate, implied)
        error = TAIL[tail_code] - t if t > 0.0 else 0.0
        n_chosen, refused, error = _round_values(
            n_chosen, first, value_step, error, implied, prob, rank, listed, chosen, coded, spots
        )
        if learning:
            _take_from(mass, row, symbol, prob, PLACE(at), chosen, n_chosen, unit)
            continue
        sort_distinct(spots, scratch_spots, n_chosen)
        out = _lay_out(spots, n_chosen, gap, value, out)
        miss = top_symbol != true[i]
        r = np.int64(prior[row, np.uint64(true[i])]) & 511
        top[PLACE(n_top)] = top_rank - (top_rank > r)
        n_top += miss
        head[i] = 2 * n_chosen + miss
        tail[i] = tail_code
        if not mask[i]:
            continue
        # The KL of the row, quantisation alone and with the tail spread; nothing is decided by it. Of what the row
        # did not keep, `rest`, the input's own unlisted mass, `given`, is spread as the decoder spreads it, and the
        # remainder counts as one symbol.
        both_times[PLACE(n_both)], both_x[PLACE(n_both)] = implied, implied / (implied - error)
        n_both += 1
        w = others
        for j in range(PLACE(n_chosen)):
            p = float(prob[first + PLACE(chosen[j])])
            w -= weight[PLACE(chosen[j])]
            both_times[PLACE(n_both)], both_x[PLACE(n_both)] = p, p / coded[j]
            n_both += 1
        missing = t
        if refused:
            missing = rest[i]
            for k in range(PLACE(m - 1)):
                if k >= PLACE(n) or not listed[k]:
                    missing += float(prob[first + k])
        if missing > 1e-12 and tail_code > 0:
            tail_mass = TAIL[tail_code]
            one_times[PLACE(n_one)], one_x[PLACE(n_one)] = missing, missing / tail_mass
            n_one += 1
            share, each, scale = w, float(given[i]) / w, w / tail_mass
            for k in range(PLACE(n), PLACE(m - 1)):
                listed[k] = 0
            for k in range(PLACE(m - 1)):
                e = first + k
                c = PLACE(prior[row, np.uint64(symbol[e])] >> 9)
                p = float(prob[e]) + each * weights[c]
                two_times[PLACE(n_two)], two_x[PLACE(n_two)] = p, p * inverse[c] * scale
                n_two += 1 - np.int64(listed[k])
                share -= weights[c] * (1 - np.int64(listed[k]))
            x = max(share, 1e-12) / w
            p = max(0.0, rest[i] - float(given[i])) + float(given[i]) * x
            if p > 1e-12:
                two_times[PLACE(n_two)], two_x[PLACE(n_two)] = p, p / (tail_mass * x)
                n_two += 1
        if max(n_both, n_two) > _TERMS - _ROOM or n_one > _TERMS - _ROOM:
            common = sum_logs(both_times, both_x, n_both)
            divergence[0] += common + sum_logs(one_times, one_x, n_one)
            divergence[1] += common + sum_logs(two_times, two_x, n_two)
            n_both = n_one = n_two = 0
    common = sum_logs(both_times, both_x, n_both)
    divergence[0] += common + sum_logs(one_times, one_x, n_one)
    divergence[1] += common + sum_logs(two_times, two_x, n_two)
    return n_top, out
