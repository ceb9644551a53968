"""Sorting the short lists of a row, a few integers each: one at a time, or many side by side.

`sort_lanes` sorts the columns of a table with a network of compare-exchanges that does not depend on the values
(Batcher's odd-even merge sort, AFIPS 1968), so that a vector unit sorts 16 or 32 lists at once and no branch is
guessed wrong. Price: 1 ns a list of 8 and 5 ns a list of 32; `insertion_sort` takes 15 ns for a random list of 4, and
grows with the square, half of it in wrong guesses; `sort_distinct` sorts one list without them.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bytecache.schemas.arrays import I64

LANES = 512
"""Lists of one table."""
_FEW = 8
PADDING = 16
"""A list given to `sort_distinct` has room for its length rounded up to a multiple of this."""


@njit(cache=True, nogil=True)
def insertion_sort(values: NDArray[Any], start: int, stop: int) -> None:
    """Sort values[start:stop], integers, in place."""
    for i in range(start + 1, stop):
        value = values[i]
        j = i
        while j > start and values[j - 1] > value:
            values[j] = values[j - 1]
            j -= 1
        values[j] = value


@njit(cache=True, nogil=True, inline="always")
def _ordered(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


@njit(cache=True, nogil=True)
def _sort_by_rank(values: I64, scratch: I64, n: int) -> None:
    """Every value goes where the number of smaller ones says: n squared comparisons, in vector instructions."""
    padded = np.uint64((n + PADDING - 1) // PADDING * PADDING)
    for k in range(np.uint64(n), padded):
        values[k] = np.iinfo(np.int64).max
    for k in range(np.uint64(n)):
        value = values[k]
        rank = np.int64(0)
        for j in range(padded):
            rank += np.int64(values[j] < value)
        scratch[np.uint64(rank)] = value
    for k in range(np.uint64(n)):
        values[k] = scratch[k]


@njit(cache=True, nogil=True)
def sort_distinct(values: I64, scratch: I64, n: int) -> None:
    """Sort values[:n], no two of them equal, without a branch that depends on them.

    Both arrays have the room that PADDING says. Up to 8 values go through Batcher's network, more by their ranks.
    """
    if n < 2:
        return
    if n > _FEW:
        _sort_by_rank(values, scratch, n)
        return
    for k in range(np.uint64(n), np.uint64(_FEW)):
        values[k] = np.iinfo(np.int64).max
    a, b = _ordered(values[0], values[1])
    c, d = _ordered(values[2], values[3])
    a, c = _ordered(a, c)
    b, d = _ordered(b, d)
    b, c = _ordered(b, c)
    if n > _FEW // 2:
        e, f = _ordered(values[4], values[5])
        g, h = _ordered(values[6], values[7])
        e, g = _ordered(e, g)
        f, h = _ordered(f, h)
        f, g = _ordered(f, g)
        a, e = _ordered(a, e)
        c, g = _ordered(c, g)
        c, e = _ordered(c, e)
        b, f = _ordered(b, f)
        d, h = _ordered(d, h)
        d, f = _ordered(d, f)
        b, c = _ordered(b, c)
        d, e = _ordered(d, e)
        f, g = _ordered(f, g)
        values[4], values[5], values[6], values[7] = e, f, g, h
    values[0], values[1], values[2], values[3] = a, b, c, d


def network(width: int) -> I64:
    """int64 [pairs, 2]: the places that `sort_lanes` compares, one pair after another; `width` a power of two."""
    pairs = []
    p = 1
    while p < width:
        k = p
        while k:
            for first in range(k % p, width - k, 2 * k):
                for i in range(first, min(first + k, width - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        pairs.append((i, i + k))
            k //= 2
        p *= 2
    return np.array(pairs, np.int64)


@njit(cache=True, nogil=True)
def sort_lanes(table: NDArray[np.uint16], pairs: I64, lanes: int) -> None:
    """Sort the first `lanes` columns of uint16 [width, LANES]; `pairs` from `network`. May sort some more."""
    stop = np.uint64((lanes + 31) // 32 * 32)
    for p in range(pairs.shape[0]):
        low, high = table[pairs[p, 0]], table[pairs[p, 1]]
        for lane in range(stop):
            a, b = low[lane], high[lane]
            low[lane] = min(a, b)
            high[lane] = max(a, b)
