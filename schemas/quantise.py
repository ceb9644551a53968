"""The 8-bit probability code and the loops over positions: encode, check, decode. No I/O.

Code: 0 is exactly zero, c in 1..255 is 10 ** (-6 * (255 - c) / 254), so 1e-6 .. 1 in steps of 5.6 %.
One symbol per position, the most likely one, is not coded: it is 1 minus all the rest, so that the
largest probability has the smallest error. What is cheap to get wrong and is guaranteed here:

* the decoded rest never reaches 1. Codes are rounded to the nearest, but the summed rounding error is
  carried along the row and may lift the rest by at most 1/32 of the implied symbol; a code that would
  exceed that is rounded down instead. The implied symbol keeps >= 31/32 of its value, hence is > 0;
* mass is never dropped or renormalised: whatever is not listed is in the tail, and a tail > 0 never
  gets code 0. A row whose most likely symbol is below 1e-6 lists nothing and has a tail of exactly 1;
* the result does not depend on the width of the machine's vectors: thresholds come from exact decimal
  arithmetic and sums run in 16 fixed lanes.

Price, one core, rows of 10 symbols: about 200 ns to encode a position, half of it the scan of its 1 KiB of input;
15 to check one, 30 to decode one (SPEC.md, "Cost").
"""

from decimal import Decimal, localcontext

import numpy as np
from numba import njit
from numpy.typing import NDArray

SYMBOLS = 257
END = 256
FLOOR = 1e-6
"""Smallest probability that has a code; anything rarer is summed into the tail."""
END_IS_TOP = 255
"""Value of the `end` column that says: END is the implied symbol of this row (P(END) <= 0.5 otherwise)."""
TAIL_IS_ALL = 255
"""Value of the `tail` column that says: nothing is listed, all mass is unlisted."""
SUM_TOLERANCE = 1e-4
INDEX_STRIDE = 1024
"""Rows between two entries of the sparse row -> entry index."""

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Reasons a row is refused (returned by the kernels, worded by byte_shard.py).
OK, BAD_VALUE, BAD_SUM, BAD_ORDER, BAD_CODE, BAD_MASS, BAD_COUNT = range(7)


def _power(half_steps: int) -> float:
    """10 ** (-6 * half_steps / 508), correctly rounded on every machine (libm's pow is not)."""
    with localcontext() as context:
        context.prec = 40
        return float(Decimal(10) ** (Decimal(-6 * half_steps) / Decimal(508)))


DECODE: F64 = np.array([0.0] + [_power(2 * (255 - c)) for c in range(1, 256)])
"""float64 [256]: probability of each code."""
_MIDDLE: F64 = np.array([0.0] + [_power(2 * (255 - c) - 1) for c in range(1, 255)] + [np.inf])
"""float64 [256]: geometric mean of codes c and c + 1, where rounding to the nearest turns upwards."""
_NEXT: F64 = np.append(DECODE[1:], np.inf)
_INVERSE: F64 = np.append(0.0, 1.0 / DECODE[1:])
_GUESS: U8 = np.maximum(
    np.searchsorted(
        DECODE, (np.arange(0x3F84, dtype=np.uint32) << np.uint32(16))[::4].view(np.float32).astype(np.float64), "right"
    )
    - 1,
    1,
).astype(np.uint8)
"""uint8: first 14 bits of a float32 -> the code at or one below it (such a bucket is narrower than a step)."""
_LIMIT_BITS = np.uint32(np.float32(1.0 + SUM_TOLERANCE).view(np.uint32))


@njit(cache=True, nogil=True, inline="always")
def _guess(bits: np.uint32, p: float) -> int:
    """Largest code whose probability is <= p, a float32 with these bits; 1 when p is below the range."""
    code = np.int64(_GUESS[bits >> np.uint32(18)])
    return code + (p >= _NEXT[code])


@njit(cache=True, nogil=True, inline="always")
def _carry(p: float, below: int, error: float, limit: float) -> int:
    """Code for p, given the one below it: the nearest, unless the row's summed error says otherwise.

    Invariant: the summed error stays <= limit. The other direction only pulls back towards zero.
    """
    code = below + (p >= _MIDDLE[below])
    after = error + (DECODE[code] - p)
    if after > limit:
        return below
    if after < -limit and code == below and below < 255:
        above = error + (DECODE[below + 1] - p)
        if above <= limit and above < -after:
            return below + 1
    return code


@njit(cache=True, nogil=True, inline="always")
def _divergence(p: float, q: float, inverse: float) -> float:
    """p ln(p / q), inverse = 1 / q; a series where they are a code's step apart, cheaper than a logarithm."""
    x = (p - q) * inverse
    if abs(x) > 0.06:
        return p * np.log(p * inverse)
    return p * x * (1.0 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5)))))


@njit(cache=True, nogil=True)
def _scan(
    probs: F32,
    bits: NDArray[np.uint32],
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
def encode_rows(
    probs: F32,
    bits: NDArray[np.uint32],
    unlisted: F32,
    threshold: np.uint32,
    floor: np.uint32,
    scale: np.float32,
    top: U8,
    tail: U8,
    end: U8,
    count: U8,
    entry_byte: U8,
    entry_code: U8,
    divergence: F64,
) -> tuple[int, int, int, float]:
    """Quantise m rows of next-symbol probabilities.

    probs float32 [m * 257], flat, and `bits`, the same memory as uint32; unlisted float32 [m]; `threshold` for
    bytes and `floor` for END as float32 bits. Output columns uint8 [m] and entries uint8 [256 m]. `divergence[0]`
    grows by the KL (nats) between each row (listed symbols + tail) and its decoding. Returns (entries, row,
    reason, value); row is -1 when all rows are good, otherwise the first bad one.
    """
    words = np.empty(32, np.uint64)
    flags = words.view(np.uint8)
    found = np.empty(257, np.int64)
    scratch = np.empty(1, np.float32)
    scratch_bits = scratch.view(np.uint32)
    n_entries = 0
    total_divergence = 0.0
    for i in range(unlisted.shape[0]):
        start = np.uint64(i) * np.uint64(257)
        # As unsigned integers, floats >= 0 keep their order; negative, NaN and infinite ones land above the limit.
        top_bits, fixed, n = _scan(probs, bits, start, threshold, scale, flags, words, found)
        pruned = fixed / float(scale)
        end_bits = bits[start + np.uint64(256)]
        p_end = float(probs[start + np.uint64(256)])
        given = float(unlisted[i])
        if top_bits > _LIMIT_BITS or end_bits > _LIMIT_BITS:
            for j in range(257):
                if bits[start + np.uint64(j)] > _LIMIT_BITS:
                    return n_entries, i, BAD_VALUE, float(probs[start + np.uint64(j)])
        if not (given >= 0.0 and given <= 1.0 + SUM_TOLERANCE):
            return n_entries, i, BAD_VALUE, given
        if end_bits > top_bits:
            top_symbol = END
            implied = p_end
            p_end = 0.0
        else:
            top_symbol = -1
            for k in range(n):
                if bits[start + np.uint64(found[k])] == top_bits:
                    top_symbol = found[k]
                    break
            if top_symbol < 0:  # the most likely symbol itself is below the threshold
                top_symbol = 0
                while bits[start + np.uint64(top_symbol)] != top_bits:
                    top_symbol += 1
                pruned = max(0.0, pruned - float(probs[start + np.uint64(top_symbol)]))
            implied = float(probs[start + np.uint64(top_symbol)])
            if end_bits < floor:
                pruned += p_end
                p_end = 0.0
        skip = top_symbol
        if n == 256 and top_symbol == END:  # `count` has no 256: the least likely byte goes to the tail
            skip = 0
            for j in range(1, 256):
                if bits[start + np.uint64(j)] < bits[start + np.uint64(skip)]:
                    skip = j
            pruned += float(probs[start + np.uint64(skip)])
        rest = p_end
        for k in range(n):
            if found[k] != skip:
                rest += float(probs[start + np.uint64(found[k])])
        missing = given + pruned
        if not abs(implied + rest + missing - 1.0) <= SUM_TOLERANCE:
            return n_entries, i, BAD_SUM, implied + rest + missing
        implied = 1.0 - rest - missing
        if implied < FLOOR:  # then every symbol is below 1.1e-4 and the tail above 0.97
            top[i], tail[i], end[i], count[i] = 0, TAIL_IS_ALL, 0, 0
            continue
        limit = implied / 32.0
        error = 0.0
        code = 0
        if missing > 0.0:
            scratch[0] = missing
            code = _guess(scratch_bits[0], missing)
            while code > 1 and missing < DECODE[code]:  # the cast to float32 may have rounded up
                code -= 1
            if missing >= FLOOR:
                code = _carry(missing, code, 0.0, limit)
            error = DECODE[code] - missing
            total_divergence += _divergence(missing, DECODE[code], _INVERSE[code])
        tail[i] = code
        code = 0
        if p_end > 0.0:
            code = _carry(p_end, _guess(end_bits, p_end), error, limit)
            error += DECODE[code] - p_end
            total_divergence += _divergence(p_end, DECODE[code], _INVERSE[code])
        first = n_entries
        for k in range(n):
            if found[k] != skip:
                at = start + np.uint64(found[k])
                p = float(probs[at])
                entry = _carry(p, _guess(bits[at], p), error, limit)
                entry_byte[n_entries] = found[k]
                entry_code[n_entries] = entry
                n_entries += 1
                error += DECODE[entry] - p
                total_divergence += _divergence(p, DECODE[entry], _INVERSE[entry])
        total_divergence += _divergence(implied, implied - error, 1.0 / (implied - error))
        count[i] = n_entries - first
        top[i] = 0 if top_symbol == END else top_symbol
        end[i] = END_IS_TOP if top_symbol == END else code
    divergence[0] += total_divergence
    return n_entries, -1, OK, 0.0


@njit(cache=True, nogil=True)
def check_rows(top: U8, tail: U8, end: U8, count: U8, entry_byte: U8, entry_code: U8, index: I64) -> tuple[int, int]:
    """Refuse columns that no writer produces, and fill `index` int64 [ceil(N / 1024) + 1] with entry offsets.

    Returns (row, reason); row is -1 when every row decodes to a distribution: entries in range, bytes strictly
    ascending and unlike `top`, no zero codes, mass below 1.
    """
    at = 0
    for i in range(top.shape[0]):
        if i % INDEX_STRIDE == 0:
            index[i // INDEX_STRIDE] = at
        stop = at + int(count[i])
        if stop > entry_byte.shape[0]:
            return i, BAD_COUNT
        if tail[i] == TAIL_IS_ALL:
            if stop != at or end[i] != 0 or top[i] != 0:
                return i, BAD_MASS
            continue
        total = DECODE[tail[i]]
        implied = int(top[i])
        if end[i] == END_IS_TOP:
            if implied != 0:
                return i, BAD_CODE
            implied = END
        else:
            total += DECODE[end[i]]
        before = -1
        for k in range(at, stop):
            byte = int(entry_byte[k])
            if byte <= before or byte == implied:
                return i, BAD_ORDER
            if entry_code[k] == 0:
                return i, BAD_CODE
            before = byte
            total += DECODE[entry_code[k]]
        if total >= 1.0:
            return i, BAD_MASS
        at = stop
    index[index.shape[0] - 1] = at
    return (-1, OK) if at == entry_byte.shape[0] else (top.shape[0] - 1, BAD_COUNT)


@njit(cache=True, nogil=True)
def decode_rows(
    lo: int,
    hi: int,
    at: int,
    top: U8,
    tail: U8,
    end: U8,
    count: U8,
    entry_byte: U8,
    entry_code: U8,
    row: NDArray[np.int32],
    symbol: NDArray[np.int16],
    prob: F32,
) -> int:
    """Write rows lo..hi as (row - lo, symbol, probability), symbols ascending; `at` is the entry offset of lo.

    Output arrays need sum(count) + 2 (hi - lo) places; returns how many were written. Implied symbols and END
    are included, zero probabilities are not.
    """
    out = 0
    for i in range(lo, hi):
        stop = at + int(count[i])
        code = end[i]
        total = DECODE[tail[i]]
        if code != END_IS_TOP:
            total += DECODE[code]
        for k in range(at, stop):
            total += DECODE[entry_code[k]]
        implied = 1.0 - total
        relative = i - lo
        top_symbol = int(top[i])
        k = at
        if code != END_IS_TOP and tail[i] != TAIL_IS_ALL:
            while k < stop and entry_byte[k] < top_symbol:
                row[out] = relative
                symbol[out] = entry_byte[k]
                prob[out] = DECODE[entry_code[k]]
                out += 1
                k += 1
            row[out] = relative
            symbol[out] = top_symbol
            prob[out] = implied
            out += 1
        while k < stop:
            row[out] = relative
            symbol[out] = entry_byte[k]
            prob[out] = DECODE[entry_code[k]]
            out += 1
            k += 1
        if code != 0:
            row[out] = relative
            symbol[out] = END
            prob[out] = implied if code == END_IS_TOP else DECODE[code]
            out += 1
        at = stop
    return out
