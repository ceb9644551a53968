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


_LOG2 = _log2_table()
_LN2_UNIT = 0.6931471805599453 / 2**20


@njit(cache=True, nogil=True, inline="always")
def _log2(bits: np.uint64) -> int:
    """log2 of a positive float64 with these bits, units of 2 ** -20 above an arbitrary zero, within 2 ** -12."""
    return (np.int64(bits >> np.uint64(52)) << 20) + _LOG2[np.int64(bits >> np.uint64(40)) & 4095]


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
def learn_masses(node: I16, skip: U8, count: I16, symbol: I16, prob: F32, unit: float, mass: I64) -> None:
    """Add the probabilities of rows to int64 `mass` [K, 257] of their nodes, where `skip` [entries] is 0."""
    at = 0
    for i in range(node.shape[0]):
        for k in range(at, at + count[i]):
            if skip[k] == 0:
                mass[node[i], symbol[k]] += np.int64(float(prob[k]) * unit)
        at += count[i]


@njit(cache=True, nogil=True)
def _add_divergence(
    order: I64,
    listed: U8,
    symbol: I16,
    prob: F32,
    coded: F64,
    implied: float,
    error: float,
    rest: float,
    given: float,
    tail: float,
    weight: F64,
    unlisted_weight: float,
    divergence: F64,
) -> None:
    """Bookkeeping, nothing is decided by it: the KL of one row, quantisation alone and with the tail spread.

    `order`: the row's entries, the implied symbol's first; `coded` their decoded probabilities where listed;
    `unlisted_weight`: prior weight of all symbols but the implied one. Of what the row did not keep, `rest`, the
    input's own unlisted mass, `given`, is spread as the decoder spreads it, and the remainder counts as one symbol.
    """
    quantised = implied * math.log(implied / (implied - error))
    whole = quantised
    missing = rest
    for k in range(1, order.shape[0]):
        e = order[k]
        p = float(prob[e])
        if listed[e]:
            unlisted_weight -= weight[symbol[e]]
            x = p * math.log(p / coded[k])
            quantised += x
            whole += x
        else:
            missing += p
    if missing > 1e-12 and tail > 0.0:
        quantised += missing * math.log(missing / tail)
        share = unlisted_weight
        for k in range(1, order.shape[0]):
            e = order[k]
            if not listed[e] and prob[e] > 0:
                w = weight[symbol[e]] / unlisted_weight
                share -= weight[symbol[e]]
                p = float(prob[e]) + given * w
                whole += p * math.log(p / (tail * w))
        w = max(share, 1e-12) / unlisted_weight
        p = max(0.0, rest - given) + given * w
        if p > 1e-12:
            whole += p * math.log(p / (tail * w))
    divergence[0] += quantised
    divergence[1] += whole


@njit(cache=True, nogil=True)
def encode_rows(
    true: I16,
    node: I16,
    mask: U8,
    count: I16,
    rest: F64,
    given: F32,
    symbol: I16,
    prob: F32,
    weight: F64,
    total_weight: F64,
    rank: I16,
    price: F64,
    rate: float,
    prune: float,
    value_step: int,
    tail_step: int,
    head: U8,
    tail: U8,
    top: U8,
    gap: U8,
    value: U8,
    listed: U8,
    divergence: F64,
) -> tuple[int, int]:
    """Choose what rows list, quantise it, and lay it out.

    true int16 [n]: the symbol that follows; node int16 [n]: its context; mask uint8 [n]: 1 where `divergence` counts
    the row; count, rest, symbol, prob: rows as `gather_rows` keeps them; given float32 [n]: the unlisted mass they came
    with; weight, rank [K, 257], total_weight [K]: the prior; price float64 [257]: nats an entry at each rank must gain.
    Output, as in `packing.Codes`: head, tail uint8 [n]; top uint8 [M]; gap, value uint8 [E]; `listed` uint8 [entries
    of the input]: 1 = not in the tail. divergence[0] grows by the quantisation KL (rows over listed symbols and
    tail), [1] by the whole KL, tail spread by the prior. Returns (M, E).
    """
    scratch = np.empty(1, np.float64)
    scratch_bits = scratch.view(np.uint64)
    order = np.empty(SYMBOLS, np.int64)
    coded = np.empty(SYMBOLS)
    spots = np.empty(SYMBOLS, np.int64)  # 256 * rank + code
    at = 0
    n_top = 0
    out = 0
    for i in range(node.shape[0]):
        m = int(count[i])
        row = node[i]
        best = at
        for k in range(at + 1, at + m):
            if prob[k] > prob[best]:
                best = k
        implied = float(prob[best]) if m else 0.0
        t = rest[i]
        n_sorted, n_rest = 0, m
        for k in range(at, at + m):  # what could be listed by descending probability, the top first; then the others
            listed[k] = 0
            if k != best:
                t += float(prob[k])
                if prob[k] < prune:
                    n_rest -= 1
                    order[n_rest] = k
                    continue
            j = n_sorted
            while j > 0 and prob[order[j - 1]] < prob[k]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = k
            n_sorted += 1
        top_symbol = int(symbol[best]) if m else 0
        if implied < FLOOR:
            head[i], tail[i] = 0, TAIL_IS_ALL
            at += m
            continue
        listed[best] = 1
        w = total_weight[row] - weight[row, top_symbol]
        top_rank = rank[row, top_symbol]
        n_listed = 0
        for _ in range(2):
            for k in range(1, m):
                e = order[k]
                p = float(prob[e])
                if p < prune or n_listed == MAX_COUNT:
                    break
                if listed[e]:
                    continue
                s = symbol[e]
                q = t * weight[row, s] / w
                if p <= q:
                    continue
                scratch[0] = p
                lp = _log2(scratch_bits[0])
                scratch[0] = q
                gain = p * (float(lp - _log2(scratch_bits[0])) * _LN2_UNIT) - p + q
                r = rank[row, s]
                if gain > price[r - (r > top_rank)]:
                    listed[e] = 1
                    n_listed += 1
                    t = max(t - p, rest[i])
                    w -= weight[row, s]
        t = rest[i]  # again, without the rounding of the subtractions above
        for k in range(1, m):
            if not listed[order[k]]:
                t += float(prob[order[k]])
        if t > FLAT_TAIL:
            for k in range(m):
                listed[at + k] = 0
            head[i], tail[i] = 0, TAIL_IS_ALL
            at += m
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
        tail[i] = code
        n = 0
        for k in range(1, m):
            e = order[k]
            coded[k] = 0.0
            if not listed[e]:
                continue
            p = float(prob[e])
            code = _round_code(math.sqrt(p), value_step, 256 - value_step, p, 2, error, implied)
            if code == 0:  # no code leaves the implied symbol enough: this one stays unlisted, its mass with that
                listed[e] = 0
                error -= p
                continue
            coded[k] = VALUE[code]
            error += VALUE[code] - p
            r = int(rank[row, symbol[e]])
            spots[n] = (r - (r > top_rank)) << 8 | code
            n += 1
        insertion_sort(spots, 0, n)
        before = -1
        for j in range(n):
            r = spots[j] >> 8
            gap[out] = r - before - 1
            value[out] = spots[j] & 255
            before = r
            out += 1
        miss = top_symbol != true[i]
        if miss:
            r = rank[row, top_symbol]
            top[n_top] = r - (r > rank[row, true[i]])
            n_top += 1
        head[i] = 2 * n + miss
        if mask[i]:
            _add_divergence(
            order[:m], listed, symbol, prob, coded, implied, error, rest[i], float(given[i]), TAIL[tail[i]],
            weight[row], total_weight[row] - weight[row, top_symbol], divergence,
        )  # fmt: skip
        at += m
    return n_top, out
