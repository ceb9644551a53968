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

Price, one core: SPEC.md, "Cost".
"""

import math
from decimal import Decimal, localcontext

import numpy as np
from numba import njit
from numpy.typing import NDArray

from schemas.arrays import F32, F64, I16, I64, SYMBOLS, U8
from schemas.sorting import insertion_sort

TAIL_IS_ALL = 255
"""Value of the `tail` column that says: nothing is listed, all mass is unlisted."""
FLOOR = 1e-6
"""A row whose most likely symbol is rarer than this lists nothing."""
MAX_COUNT = 127
FLAT_TAIL = 0.98
"""Unlisted mass above which a row lists nothing: no code is near it."""
FINE_TAIL = 20.0
"""A tail leaves the multiples of its step where that spares more than so many bits are worth."""


# Reasons a row is refused (returned by the kernels, worded by byte_shard.py).
OK, BAD_VALUE, BAD_SUM, BAD_ORDER, BAD_CODE, BAD_MASS, BAD_COUNT, BAD_COUNT_OVER, BAD_GAP_OVER = range(9)

VALUE: F64 = (np.arange(256) / 256.0) ** 2
"""float64 [256]: probability of a listed symbol's code."""
TAIL: F64 = np.append(((np.arange(255) / 256.0) ** 2) ** 2, 1.0)
"""float64 [256]: mass of a `tail` code; 255 = 1."""


def _log2_table() -> I64:
    """log2(1 + m / 4096) in units of 2 ** -20, rounded: the same on every machine."""
    with localcontext() as context:
        context.prec = 30
        two = Decimal(2).ln()
        return np.array([int(((1 + Decimal(m) / 4096).ln() / two * 2**20).to_integral_value()) for m in range(4096)])


_LOG2 = _log2_table().astype(np.int32)
_LN2_UNIT = 0.6931471805599453 / 2**20
_PLACE = np.uint64  # unsigned places spare numba the question whether they are negative
_TERMS = 4096
"""Logarithms taken at a time."""
_ROOM = SYMBOLS + 2
"""Logarithms that a row may ask for."""


@njit(cache=True, nogil=True, inline="always")
def _log2(bits: np.uint64) -> int:
    """log2 of a positive float64 with these bits, units of 2 ** -20 above an arbitrary zero, within 2 ** -12."""
    return (np.int64(bits >> np.uint64(52)) << 20) + np.int64(_LOG2[bits >> np.uint64(40) & np.uint64(4095)])


@njit(cache=True, nogil=True, inline="always")
def _round_code(root: float, step: int, highest: int, p: float, power: int, error: float, top: float) -> int:
    """The multiple of `step` next to 256 * root, `highest` at most, that errs least on p and on the implied symbol.

    `power` 2 or 4; `error` summed so far; `top` the implied symbol's true mass. 0: none above zero leaves the
    implied symbol half of its value.
    """
    x = root * 256.0
    below = int(x / step) * step
    best = 0
    least = np.inf
    for code in (below, below + step):
        code = min(code, highest)
        if code < 1:
            continue
        value = (code / 256.0) * (code / 256.0)
        if power == 4:
            value *= value
        off = value - p
        after = error + off
        if after > 0.5 * top:
            continue
        cost = off * off / max(value, p) + after * after / top
        if cost < least:
            least, best = cost, code
    return best


@njit(cache=True, nogil=True)
def learn_masses(node: I16, count: I16, symbol: I16, prob: F32, unit: float, mass: I64) -> None:
    """Add the probabilities of rows to int64 `mass` [K, 257] of their nodes."""
    at = 0
    for i in range(_PLACE(node.shape[0])):
        row = np.uint64(node[i])
        for k in range(_PLACE(at), _PLACE(at + count[i])):
            mass[row, np.uint64(symbol[k])] += np.int64(float(prob[k]) * unit)
        at += count[i]


@njit(cache=True, nogil=True)
def _choose(
    n: int,
    t: float,
    w: float,
    rest: float,
    top_rank: int,
    row: np.uint64,
    symbol: I16,
    prob: F32,
    prior: I16,
    weights: F64,
    price: F64,
    scratch: F64,
    scratch_bits: NDArray[np.uint64],
    listed: U8,
) -> int:
    """Mark in `listed` which of the first n entries, by descending probability, a row lists; returns how many.

    `t`, `w`: mass and prior weight of all symbols but the implied one. Two rounds: what is listed takes mass from the
    tail, so a symbol that was not worth its price may be once others are listed. The second round asks only those
    whose question has changed.
    """
    n_listed = 0
    last = 0
    for k in range(n):
        listed[_PLACE(k)] = 0
        if n_listed == MAX_COUNT:
            continue
        here = prior[row, np.uint64(symbol[_PLACE(k)])]
        weight = weights[np.uint64(here >> 9)]
        p = float(prob[_PLACE(k)])
        q = t * weight / w
        if p <= q:
            continue
        scratch[0] = p
        lp = _log2(scratch_bits[0])
        scratch[0] = q
        gain = p * (float(lp - _log2(scratch_bits[0])) * _LN2_UNIT) - p + q
        r = np.int64(here & 511)
        if gain > price[_PLACE(r - (r > top_rank))]:
            listed[_PLACE(k)] = 1
            n_listed += 1
            t = max(t - p, rest)
            w -= weight
            last = k
    k = 0
    while k < last and n_listed < MAX_COUNT:
        if not listed[_PLACE(k)]:
            here = prior[row, np.uint64(symbol[_PLACE(k)])]
            weight = weights[np.uint64(here >> 9)]
            p = float(prob[_PLACE(k)])
            q = t * weight / w
            if p > q:
                scratch[0] = p
                lp = _log2(scratch_bits[0])
                scratch[0] = q
                gain = p * (float(lp - _log2(scratch_bits[0])) * _LN2_UNIT) - p + q
                r = np.int64(here & 511)
                if gain > price[_PLACE(r - (r > top_rank))]:
                    listed[_PLACE(k)] = 1
                    n_listed += 1
                    t = max(t - p, rest)
                    w -= weight
                    last = n
        k += 1
    return n_listed


@njit(cache=True, nogil=True)
def sum_logs(times: F64, x: F64, n: int) -> float:
    """Sum of times[k] * ln(x[k]) over k < n, normal numbers above zero; 1e-15 of the summands, alike on every machine.

    x = 2 ** e * m with m in sqrt(1/2)..sqrt(2); ln(m) = 2 artanh(s) with s = (m - 1) / (m + 1), by its series. Loops
    without branches, which a compiler turns into vector instructions. Overwrites x; n is rounded up to 4.
    """
    bits = x.view(np.int64)
    whole = np.empty(n + 4)
    for k in range(n, (n + 3) // 4 * 4):
        times[k], x[k] = 0.0, 1.0
    n = (n + 3) // 4 * 4
    for k in range(_PLACE(n)):
        e = (bits[k] - 0x3FE6A09E667F3BCD) >> 52
        bits[k] -= e << 52
        whole[k] = float(e)
    for k in range(_PLACE(n)):
        s = (x[k] - 1.0) / (x[k] + 1.0)
        z = s * s
        series = 1 / 15 + z * (1 / 17)
        series = 1 / 9 + z * (1 / 11 + z * (1 / 13 + z * series))
        series = 1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * series)))
        whole[k] = times[k] * (whole[k] * 0.6931471805599453 + 2.0 * s * series)
    a = b = c = d = 0.0
    for k in range(_PLACE(0), _PLACE(n), _PLACE(4)):
        a += whole[k]
        b += whole[k + _PLACE(1)]
        c += whole[k + _PLACE(2)]
        d += whole[k + _PLACE(3)]
    return (a + b) + (c + d)


@njit(cache=True, nogil=True)
def encode_rows(
    true: I16,
    node: I16,
    mask: U8,
    count: I16,
    listable: I16,
    rest: F64,
    unlisted: F64,
    given: F32,
    symbol: I16,
    prob: F32,
    prior: I16,
    weights: F64,
    inverse: F64,
    total_weight: F64,
    price: F64,
    rate: float,
    value_step: int,
    tail_step: int,
    head: U8,
    tail: U8,
    top: U8,
    gap: U8,
    value: U8,
    divergence: F64,
    unit: float,
    mass: I64,
) -> tuple[int, int]:
    """Choose what rows list, quantise it, and lay it out; or, with `mass`, only take what they list from there.

    true int16 [n]: the symbol that follows; node int16 [n]: its context; mask uint8 [n]: 1 where `divergence` counts
    the row; count, listable, rest, unlisted, symbol, prob: rows as `gather_rows` keeps them; given float32 [n]: the
    unlisted mass they came with; prior int16 [K, 257]: 512 * code of the weight + rank; weights float64 [codes] and
    `inverse`, one over it; total_weight float64 [K]; price float64 [257]: nats an entry at each rank must gain.
    Output, as in `packing.Codes`: head, tail uint8 [n]; top uint8 [M]; gap, value uint8 [E]. divergence[0] grows by the
    quantisation KL (rows over listed symbols and tail), [1] by the whole KL, tail spread by the prior. Returns (M, E).
    Where `mass` int64 [K, 257] has rows, nothing of this is written: what `learn_masses` added of listed symbols is
    subtracted again.
    """
    learning = mass.shape[0] > 0
    scratch = np.empty(1, np.float64)
    scratch_bits = scratch.view(np.uint64)
    listed = np.empty(SYMBOLS, np.uint8)
    coded = np.empty(SYMBOLS)
    spots = np.empty(SYMBOLS, np.int64)  # 256 * rank + code
    # Terms of the divergence, times[k] * ln(x[k]): of both figures, of the first, of the second.
    both_times, both_x, n_both = np.empty(_TERMS), np.empty(_TERMS), 0
    one_times, one_x, n_one = np.empty(_TERMS), np.empty(_TERMS), 0
    two_times, two_x, n_two = np.empty(_TERMS), np.empty(_TERMS), 0
    stop = at = 0
    n_top = 0
    out = 0
    for i in range(_PLACE(node.shape[0])):
        at = stop
        m = np.int64(count[i])
        stop = at + m
        row = np.uint64(node[i])
        implied = float(prob[_PLACE(at)]) if m else 0.0
        if implied < FLOOR:
            if not learning:
                head[i], tail[i] = 0, TAIL_IS_ALL
            continue
        top_symbol = np.int64(symbol[_PLACE(at)])
        here = np.int64(prior[row, np.uint64(top_symbol)])
        top_rank = here & 511
        others = total_weight[row] - weights[here >> 9]
        n = np.int64(listable[i]) - 1
        mine, mine_p = symbol[at + 1 : stop], prob[at + 1 : stop]
        n_listed = _choose(
            n, unlisted[i], others, rest[i], top_rank, row, mine, mine_p, prior, weights, price, scratch, scratch_bits,
            listed,
        )  # fmt: skip
        t = rest[i]  # again, without the rounding of the subtractions above
        for k in range(_PLACE(n)):
            if not listed[k]:
                t += float(mine_p[k])
        for k in range(_PLACE(n), _PLACE(m - 1)):
            t += float(mine_p[k])
        if t > FLAT_TAIL:
            if not learning:
                head[i], tail[i] = 0, TAIL_IS_ALL
            continue
        error = 0.0
        code = 0
        if t > 0.0:
            root = math.sqrt(math.sqrt(t))
            code = _round_code(root, tail_step, 254, t, 4, 0.0, implied)
            off = TAIL[code] - t
            if code == 0 or off * off / max(t, TAIL[code]) + off * off / implied > FINE_TAIL * rate:
                code = max(1, _round_code(root, 1, 254, t, 4, 0.0, implied))
            error = TAIL[code] - t
        tail_code = code
        n_spots = 0
        for k in range(_PLACE(n)):
            coded[k] = 0.0
            if not listed[k]:
                continue
            p = float(mine_p[k])
            code = _round_code(math.sqrt(p), value_step, 256 - value_step, p, 2, error, implied)
            if code == 0:  # no code leaves the implied symbol enough: this one stays unlisted, its mass with that
                listed[k] = 0
                error -= p
                continue
            coded[k] = VALUE[code]
            error += VALUE[code] - p
            r = np.int64(prior[row, np.uint64(mine[k])]) & 511
            spots[n_spots] = (r - (r > top_rank)) << 8 | code
            n_spots += 1
        if learning:
            mass[row, np.uint64(top_symbol)] -= np.int64(implied * unit)
            for k in range(_PLACE(n)):
                if listed[k]:
                    mass[row, np.uint64(mine[k])] -= np.int64(float(mine_p[k]) * unit)
            continue
        insertion_sort(spots, 0, n_spots)
        before = -1
        for j in range(_PLACE(n_spots)):
            r = spots[j] >> 8
            gap[_PLACE(out)] = r - before - 1
            value[_PLACE(out)] = spots[j] & 255
            before = r
            out += 1
        miss = top_symbol != true[i]
        if miss:
            r = np.int64(prior[row, np.uint64(true[i])]) & 511
            top[n_top] = top_rank - (top_rank > r)
            n_top += 1
        head[i] = 2 * n_spots + miss
        tail[i] = tail_code
        if not mask[i]:
            continue
        # The KL of the row, quantisation alone and with the tail spread; nothing is decided by it. Of what the row
        # did not keep, `rest`, the input's own unlisted mass, `given`, is spread as the decoder spreads it, and the
        # remainder counts as one symbol.
        both_times[n_both], both_x[n_both] = implied, implied / (implied - error)
        n_both += 1
        missing = rest[i]
        share = others
        for k in range(_PLACE(n)):
            p = float(mine_p[k])
            if listed[k]:
                others -= weights[prior[row, np.uint64(mine[k])] >> 9]
                both_times[n_both], both_x[n_both] = p, p / coded[k]
                n_both += 1
            else:
                missing += p
        for k in range(_PLACE(n), _PLACE(m - 1)):
            missing += float(mine_p[k])
        if missing > 1e-12 and tail_code > 0:
            mass_of_tail = TAIL[tail_code]
            one_times[n_one], one_x[n_one] = missing, missing / mass_of_tail
            n_one += 1
            share = others
            given_each, scale = float(given[i]) / others, others / mass_of_tail
            for k in range(_PLACE(m - 1)):
                p = float(mine_p[k])
                if (k < _PLACE(n) and listed[k]) or p <= 0.0:
                    continue
                c = prior[row, np.uint64(mine[k])] >> 9
                share -= weights[c]
                p += given_each * weights[c]
                two_times[n_two], two_x[n_two] = p, p * inverse[c] * scale
                n_two += 1
            w = max(share, 1e-12) / others
            p = max(0.0, rest[i] - float(given[i])) + float(given[i]) * w
            if p > 1e-12:
                two_times[n_two], two_x[n_two] = p, p / (mass_of_tail * w)
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
