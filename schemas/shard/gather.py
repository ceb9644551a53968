"""A writer's input, checked: rows of probabilities to the entries that could be listed. No I/O.

Rows come dense, 257 numbers each, or sparse, their non-zero symbols in order; both become the same entries: the most
likely symbol, those that could be listed by descending probability, then the rest, which only the prior learns from.
A row that is no distribution is refused.

Price, one core: 0.2 to 0.3 us a sparse row of a real model (25 to 50 entries).
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bytecache.schemas.arrays import END, F32, F64, I16, I64, PLACE, SYMBOLS, U8
from bytecache.schemas.shard.quantise import BAD_ORDER, BAD_SUM, BAD_VALUE, OK
from bytecache.schemas.shard.sorting import PADDING, sort_distinct

SUM_TOLERANCE = 1e-4
_LIMIT_BITS = np.uint32(np.float32(1.0 + SUM_TOLERANCE).view(np.uint32))
_MOST = np.uint32(0x7FFFFFFF)
_KEYS = SYMBOLS + PADDING
U32 = NDArray[np.uint32]


@njit(cache=True, nogil=True)
def _scan(
    probs: F32,
    bits: U32,
    start: np.uint64,
    threshold: np.uint32,
    scale: np.float32,
    flags: U8,
    words: NDArray[np.uint64],
    found: I64,
) -> tuple[np.uint32, int, int]:
    """One row's 256 bytes: (largest value's bits, sum of those below threshold, how many are not), ids in `found`.

    Two vectorised loops. The sum is in fixed point (`scale` units per 1, each summand rounded up), so that its
    order does not matter and a summand > 0 never vanishes.
    """
    biggest = np.uint32(0)
    pruned = np.int64(0)
    for j in range(np.uint64(256)):
        value = bits[start + j]
        biggest = value if value > biggest else biggest
        fixed = np.int32(probs[start + j] * scale) + np.int32(value != 0)
        pruned += np.int64(0) if value >= threshold else np.int64(fixed)
    for j in range(np.uint64(256)):
        flags[j] = bits[start + j] >= threshold
    n = 0
    for word in range(np.uint64(32)):
        if words[word] != 0:
            for j in range(word * np.uint64(8), word * np.uint64(8) + np.uint64(8)):
                found[n] = j
                n += flags[j]
    return biggest, int(pruned), n


@njit(cache=True, nogil=True)
def order_rows(
    least: float, count: I16, listable: I16, rest: F64, unlisted: F64, symbol: I16, prob: F32, bits: U32
) -> tuple[int, int, int, float]:
    """Correct the sums of gathered rows, which may have any, and put their entries in order.

    count, rest, symbol, prob: as `gather_rows` leaves them, `bits` the same memory as prob. A row's rounding residual
    goes to its largest probability (the smallest symbol of equals). Output: of each row `listable` int16, how many of
    its entries are the largest or not below `least`; `unlisted` float64, `rest` and all entries but the largest.
    Returns what `gather_rows` returns.

    An entry's key sorts by descending probability, of equals the smaller symbol first: the bits of a float >= 0 are
    ordered as it is.
    """
    i: Any
    row: Any
    out: Any
    high, low, scratch = np.empty(_KEYS, np.int64), np.empty(_KEYS, np.int64), np.empty(_KEYS, np.int64)
    value = np.empty(1, np.float32)
    value_bits = value.view(np.uint32)
    out = 0
    for i in range(PLACE(count.shape[0])):
        row = np.int64(i)
        n = np.int64(count[i])
        first = PLACE(out)
        missing = rest[i]
        if n == 0:
            if not abs(missing - 1.0) <= SUM_TOLERANCE:
                return out, row, BAD_SUM, missing
            rest[i] = unlisted[i] = 1.0
            listable[i] = 0
            continue
        settled = False
        while True:
            listed = 0.0
            n_high = n_low = 0
            for k in range(first, first + PLACE(n)):
                p = float(prob[k])
                listed += p
                high[PLACE(n_high)] = low[PLACE(n_low)] = np.int64(_MOST - bits[k]) << 9 | np.int64(symbol[k])
                n_high += p >= least
                n_low += p < least
            if n_high == 0:  # the largest goes first even so
                top = np.argmin(low[:n_low])
                high[0], n_high = low[top], 1
                n_low -= 1
                for k in range(top, n_low):
                    low[k] = low[k + 1]
            sort_distinct(high, scratch, n_high)
            value_bits[0] = _MOST - np.uint32(high[0] >> 9)
            others = listed - float(value[0])
            if settled:
                break
            if not abs(listed + missing - 1.0) <= SUM_TOLERANCE:
                return out, row, BAD_SUM, listed + missing
            value[0] = max(np.float32(0.0), np.float32(1.0 - missing - others))
            largest = np.int64(_MOST - value_bits[0]) << 9 | (high[0] & 511)
            second = high[1] if n_high > 1 else np.int64(1 << 62)
            if n_high == 1 and largest > high[0]:
                for k in range(n_low):
                    second = min(second, low[k])
            if largest <= second:
                high[0] = largest
                break
            settled = True  # the residual made it smaller than the next: once more, with the sum as it is now
            for k in range(first, first + PLACE(n)):
                if np.int64(symbol[k]) == high[0] & 511:
                    bits[k] = value_bits[0]
        unlisted[i] = missing + others
        listable[i] = n_high
        for k in range(PLACE(n_high)):
            symbol[first + k] = high[k] & 511
            bits[first + k] = _MOST - np.uint32(high[k] >> 9)
        for k in range(PLACE(n_low)):
            to = first + PLACE(n - 1) - k
            symbol[to] = low[k] & 511
            bits[to] = _MOST - np.uint32(low[k] >> 9)
        out += n
    return out, -1, OK, 0.0


@njit(cache=True, nogil=True)
def gather_rows(
    probs: F32,
    bits: U32,
    given: F32,
    threshold: np.uint32,
    scale: np.float32,
    count: I16,
    rest: F64,
    symbol: I16,
    prob: F32,
) -> tuple[int, int, int, float]:
    """Check the numbers of m dense rows; keep what is at or above `threshold` (float32 bits), and always the largest.

    probs float32 [m * 257], flat, and `bits`, the same memory as uint32; given float32 [m]: the tails. Output: of each
    row `count` int16, its entries; `rest` float64, its tail and all below the threshold; then symbol int16, prob
    float32 [room for 257 m]: its entries. Returns (entries, row, reason, value); row is -1 when all rows are good,
    otherwise the first bad one.
    """
    words = np.empty(32, np.uint64)
    flags = words.view(np.uint8)
    found = np.empty(257, np.int64)
    out = 0
    for i in range(given.shape[0]):
        start = np.uint64(i) * np.uint64(257)
        # As unsigned integers, floats >= 0 keep their order; negative, NaN and infinite ones land above the limit.
        top_bits, fixed, n = _scan(probs, bits, start, threshold, scale, flags, words, found)
        missing = fixed / float(scale)
        end_bits = bits[start + np.uint64(256)]
        tail = float(given[i])
        if top_bits > _LIMIT_BITS or end_bits > _LIMIT_BITS:
            for j in range(257):
                if bits[start + np.uint64(j)] > _LIMIT_BITS:
                    return out, i, BAD_VALUE, float(probs[start + np.uint64(j)])
        if not (tail >= 0.0 and tail <= 1.0 + SUM_TOLERANCE):
            return out, i, BAD_VALUE, tail
        missing += tail
        if end_bits >= threshold or end_bits > top_bits:
            found[n] = END
            n += 1
        else:
            missing += float(probs[start + np.uint64(256)])
        if n == 0 and top_bits > 0:  # the most likely symbol itself is below the threshold
            found[0] = 0
            while bits[start + np.uint64(found[0])] != top_bits:
                found[0] += 1
            missing = max(0.0, missing - float(probs[start + np.uint64(found[0])]))
            n = 1
        for k in range(PLACE(n)):
            symbol[PLACE(out) + k] = found[k]
            prob[PLACE(out) + k] = probs[start + PLACE(found[k])]
        count[i], rest[i] = n, missing
        out += n
    return out, -1, OK, 0.0


@njit(cache=True, nogil=True)
def gather_sparse(
    counts: I64,
    symbols: I16,
    probs: F32,
    bits: U32,
    given: F32,
    threshold: np.uint32,
    scale: np.float32,
    count: I16,
    rest: F64,
    symbol: I16,
    prob: F32,
) -> tuple[int, int, int, float]:
    """`gather_rows` of sparse rows: `counts` int64 [m] of `symbols` int16, ascending in a row, with `probs` float32."""
    n: Any
    fixed: Any
    before: Any
    top_place: Any
    out = at = 0
    for i in range(given.shape[0]):
        tail = float(given[i])
        n = 0
        fixed = 0
        below_end = 0.0
        top_bits, end_bits = np.uint32(0), np.uint32(0)
        top_place = at
        before = -1
        stop = at + counts[i]
        last = stop - (stop > at and symbols[stop - 1] == END)
        limit = np.uint32(0)
        descents = 0
        for k in range(PLACE(at), PLACE(last)):
            value, s = bits[k], symbols[k]
            limit = max(limit, value)
            descents += (s <= before) | (s >= END)
            before = s
            high_enough = value >= threshold
            larger = value > top_bits
            top_bits = value if larger else top_bits
            top_place = np.int64(k) if larger else top_place
            symbol[PLACE(out + n)] = s
            prob[PLACE(out + n)] = probs[k]
            n += high_enough
            fixed += (np.int64(np.int32(probs[k] * scale)) + np.int64(value != 0)) * (1 - np.int64(high_enough))
        if last < stop:
            end_bits = bits[last]
            limit = max(limit, end_bits)
            if end_bits >= threshold:
                symbol[out + n] = END
                prob[out + n] = probs[last]
                n += 1
                end_bits = np.uint32(0)
            else:
                below_end = float(probs[last])
        if descents:
            return out, i, BAD_ORDER, float(i)
        if limit > _LIMIT_BITS:
            for k in range(at, stop):
                if bits[k] > _LIMIT_BITS:
                    return out, i, BAD_VALUE, float(probs[k])
        if not (tail >= 0.0 and tail <= 1.0 + SUM_TOLERANCE):
            return out, i, BAD_VALUE, tail
        missing = fixed / float(scale)
        missing += tail
        if end_bits > top_bits:  # END is the most likely symbol, below the threshold
            symbol[out + n] = END
            prob[out + n] = np.float32(below_end)
            n += 1
        else:
            missing += below_end
        if n == 0 and top_bits > 0:
            symbol[out] = symbols[top_place]
            prob[out] = probs[top_place]
            missing = max(0.0, missing - float(probs[top_place]))
            n = 1
        count[i], rest[i] = n, missing
        out += n
        at = stop
    return out, -1, OK, 0.0
