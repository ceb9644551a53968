"""Dense rows to sparse ones: the scan of a writer's input, and the refusal of rows that are no distributions. No I/O.

Price, one core: about 100 ns a row, most of it the 1 KiB that is read.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from schemas.arrays import F32, F64, I16, I64, U8
from schemas.quantise import BAD_SUM, BAD_VALUE, OK

SUM_TOLERANCE = 1e-4
_LIMIT_BITS = np.uint32(np.float32(1.0 + SUM_TOLERANCE).view(np.uint32))


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
def gather_rows(
    probs: F32,
    bits: NDArray[np.uint32],
    unlisted: F32,
    threshold: np.uint32,
    scale: np.float32,
    count: I16,
    rest: F64,
    symbol: I16,
    prob: F32,
) -> tuple[int, int, int, float]:
    """Check m dense rows and keep what is at or above `threshold` (float32 bits), and always the largest.

    probs float32 [m * 257], flat, and `bits`, the same memory as uint32; unlisted float32 [m]. Output: count int16
    [m], rest float64 [m] (unlisted mass and all that is below the threshold), symbol int16 and prob float32 [257 m].
    A row's rounding residual goes to its largest probability (the smallest symbol of equals). Returns (entries, row,
    reason, value); row is -1 when all rows are good, otherwise the first bad one.
    """
    words = np.empty(32, np.uint64)
    flags = words.view(np.uint8)
    found = np.empty(257, np.int64)
    out = 0
    for i in range(unlisted.shape[0]):
        start = np.uint64(i) * np.uint64(257)
        # As unsigned integers, floats >= 0 keep their order; negative, NaN and infinite ones land above the limit.
        top_bits, fixed, n = _scan(probs, bits, start, threshold, scale, flags, words, found)
        missing = fixed / float(scale)
        end_bits = bits[start + np.uint64(256)]
        given = float(unlisted[i])
        if top_bits > _LIMIT_BITS or end_bits > _LIMIT_BITS:
            for j in range(257):
                if bits[start + np.uint64(j)] > _LIMIT_BITS:
                    return out, i, BAD_VALUE, float(probs[start + np.uint64(j)])
        if not (given >= 0.0 and given <= 1.0 + SUM_TOLERANCE):
            return out, i, BAD_VALUE, given
        missing += given
        if end_bits >= threshold or end_bits > top_bits:
            found[n] = 256
            n += 1
        else:
            missing += float(probs[start + np.uint64(256)])
        if n == 0 and top_bits > 0:  # the most likely symbol itself is below the threshold
            found[0] = 0
            while bits[start + np.uint64(found[0])] != top_bits:
                found[0] += 1
            missing = max(0.0, missing - float(probs[start + np.uint64(found[0])]))
            n = 1
        first = out
        best = out
        listed = 0.0
        for k in range(n):
            p = probs[start + np.uint64(found[k])]
            symbol[out] = found[k]
            prob[out] = p
            listed += float(p)
            if p > prob[best]:
                best = out
            out += 1
        if not abs(listed + missing - 1.0) <= SUM_TOLERANCE:
            return first, i, BAD_SUM, listed + missing
        if n > 0:
            prob[best] = max(np.float32(0.0), np.float32(1.0 - missing - (listed - float(prob[best]))))
            rest[i] = missing
        else:
            rest[i] = 1.0
        count[i] = n
    return out, -1, OK, 0.0
