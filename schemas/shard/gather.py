"""A writer's input, checked: rows of probabilities to the entries that could be listed. No I/O.

Rows come dense, 257 numbers each, or sparse, their non-zero symbols in order; both become the same entries: the most
likely symbol, those that could be listed by descending probability, then the rest, which only the prior learns from.
A row that is no distribution is refused.

Price, one core: 0.2 to 0.3 us a sparse row of a real model (25 to 50 entries).
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bytecache.schemas.arrays import END, F32, I16, I64, PLACE, SYMBOLS, U8, U64
from bytecache.schemas.loops import inner_loop, row_loop
from bytecache.schemas.shard.blocks import Room
from bytecache.schemas.shard.reasons import BAD_ORDER, BAD_SUM, BAD_VALUE, OK
from bytecache.schemas.shard.sorting import PADDING, sort_distinct

SUM_TOLERANCE = 1e-4
_LIMIT_BITS = np.uint32(np.float32(1.0 + SUM_TOLERANCE).view(np.uint32))
_MOST = np.uint32(0x7FFFFFFF)
_KEYS = SYMBOLS + PADDING
U32 = NDArray[np.uint32]


class Dense(NamedTuple):
    """m rows of 257 numbers, and their tails."""

    prob: F32
    """float32 [m * 257]"""
    bits: U32
    """the same memory"""
    tail: F32
    """float32 [m]"""


class Sparse(NamedTuple):
    """m rows without their zeros, and their tails."""

    n_entries: I64
    """int64 [m]: entries of each row"""
    symbol: I16
    """int16 [E], ascending in a row"""
    prob: F32
    """float32 [E]"""
    bits: U32
    """the same memory"""
    tail: F32
    """float32 [m]"""


class Threshold(NamedTuple):
    """What is too small to be an entry is only summed, in fixed point."""

    bits: np.uint32
    """of the least float32 that stays"""
    unit: np.float32
    """units per 1 of the sum; what is below the threshold fits an int32"""


Gathered = tuple[int, int, int, float]
"""(entries, row, reason, value); row is -1 when all rows are good, otherwise the first bad one."""


class _Scan(NamedTuple):
    """What one look at a row's bytes says, END not included."""

    n: int
    """symbols that are not below the threshold"""
    below: int
    """fixed-point sum of those that are"""
    top_bits: np.uint32
    """of the largest value"""


class _Flags(NamedTuple):
    """Which bytes of a row are not below the threshold: flags uint8 [256], the same as words uint64 [32]; symbols."""

    flags: U8
    words: U64
    symbol: I64


@njit(cache=True, nogil=True)
def gather_rows(rows: Dense, threshold: Threshold, room: Room) -> Gathered:
    """Check the numbers of m dense rows; keep what is at or above the threshold, and always the largest.

    Fills of each row `n_kept`, its entries, and `rest`, its tail and all below the threshold; then symbol and prob
    (room for 257 m), its entries.
    """
    words = np.empty(32, np.uint64)
    flags = _Flags(words.view(np.uint8), words, np.empty(SYMBOLS, np.int64))
    gathered: Gathered = _gather_rows(rows, threshold, room, flags)
    return gathered


@row_loop
def _gather_rows(rows: Dense, threshold: Threshold, room: Room, flags: _Flags) -> Gathered:
    prob, bits, symbol = rows.prob, rows.bits, flags.symbol
    out = 0
    for i in range(rows.tail.shape[0]):
        start = np.uint64(i) * np.uint64(SYMBOLS)
        scan = _scan(rows, start, threshold, flags)
        n, top_bits = scan.n, scan.top_bits
        end_bits = bits[start + np.uint64(END)]
        # As unsigned integers, floats >= 0 keep their order; negative, NaN and infinite ones land above the limit.
        if top_bits > _LIMIT_BITS or end_bits > _LIMIT_BITS:
            return out, i, BAD_VALUE, _beyond_limit(prob, bits, start, start + np.uint64(SYMBOLS))
        tail = float(rows.tail[i])
        if not (tail >= 0.0 and tail <= 1.0 + SUM_TOLERANCE):
            return out, i, BAD_VALUE, tail
        missing = scan.below / float(threshold.unit) + tail
        if end_bits >= threshold.bits or end_bits > top_bits:
            symbol[n] = END
            n += 1
        else:
            missing += float(prob[start + np.uint64(END)])
        if n == 0 and top_bits > 0:  # the most likely symbol itself is below the threshold
            symbol[0] = 0
            while bits[start + np.uint64(symbol[0])] != top_bits:
                symbol[0] += 1
            missing = max(0.0, missing - float(prob[start + np.uint64(symbol[0])]))
            n = 1
        for k in range(PLACE(n)):
            room.symbol[PLACE(out) + k] = symbol[k]
            room.prob[PLACE(out) + k] = prob[start + PLACE(symbol[k])]
        room.n_kept[i], room.rest[i] = n, missing
        out += n
    return out, -1, OK, 0.0


@inner_loop
def _scan(rows: Dense, start: np.uint64, threshold: Threshold, flags: _Flags) -> _Scan:
    """One row's 256 bytes, from `start` on; the symbols that are not below the threshold go to `flags.symbol`.

    Two vectorised loops. The sum is in fixed point, each summand rounded up, so that its order does not matter and a
    summand > 0 never vanishes.
    """
    prob, bits, least, unit = rows.prob, rows.bits, threshold.bits, threshold.unit
    flag, words, symbol = flags
    biggest = np.uint32(0)
    pruned = np.int64(0)
    for j in range(np.uint64(256)):
        value = bits[start + j]
        biggest = value if value > biggest else biggest
        fixed = np.int32(prob[start + j] * unit) + np.int32(value != 0)
        pruned += np.int64(0) if value >= least else np.int64(fixed)
    for j in range(np.uint64(256)):
        flag[j] = bits[start + j] >= least
    n = 0
    for word in range(np.uint64(32)):
        if words[word] != 0:
            for j in range(word * np.uint64(8), word * np.uint64(8) + np.uint64(8)):
                symbol[n] = j
                n += flag[j]
    return _Scan(n, int(pruned), biggest)


@inner_loop
def _beyond_limit(prob: F32, bits: U32, start: int, stop: int) -> float:
    """The first of prob[start:stop] that is no probability."""
    for k in range(start, stop):
        if bits[k] > _LIMIT_BITS:
            return float(prob[k])
    return 0.0


class _SparseScan(NamedTuple):
    """What one look at a sparse row's bytes says, END not included."""

    n: int
    below: int
    top_bits: np.uint32
    top_place: int
    """where the largest value is"""
    limit: np.uint32
    """bits of the largest value, negative ones above all"""
    descents: int
    """symbols that do not ascend"""


@njit(cache=True, nogil=True)
def gather_sparse(rows: Sparse, threshold: Threshold, room: Room) -> Gathered:
    """`gather_rows` of sparse rows; room for one entry more than there are."""
    gathered: Gathered = _gather_sparse(rows, threshold, room)
    return gathered


@row_loop
def _gather_sparse(rows: Sparse, threshold: Threshold, room: Room) -> Gathered:
    symbol, prob, bits = rows.symbol, rows.prob, rows.bits
    out = at = 0
    for i in range(rows.tail.shape[0]):
        stop = at + rows.n_entries[i]
        last = stop - (stop > at and symbol[stop - 1] == END)
        scan = _scan_sparse(rows, at, last, threshold, room, out)
        n = scan.n
        end_bits = bits[last] if last < stop else np.uint32(0)
        if scan.descents:
            return out, i, BAD_ORDER, float(i)
        if max(scan.limit, end_bits) > _LIMIT_BITS:
            return out, i, BAD_VALUE, _beyond_limit(prob, bits, at, stop)
        tail = float(rows.tail[i])
        if not (tail >= 0.0 and tail <= 1.0 + SUM_TOLERANCE):
            return out, i, BAD_VALUE, tail
        missing = scan.below / float(threshold.unit) + tail
        if end_bits >= threshold.bits or end_bits > scan.top_bits:
            room.symbol[out + n] = END
            room.prob[out + n] = prob[last]
            n += 1
        elif last < stop:
            missing += float(prob[last])
        if n == 0 and scan.top_bits > 0:
            room.symbol[out] = symbol[scan.top_place]
            room.prob[out] = prob[scan.top_place]
            missing = max(0.0, missing - float(prob[scan.top_place]))
            n = 1
        room.n_kept[i], room.rest[i] = n, missing
        out += n
        at = stop
    return out, -1, OK, 0.0


@inner_loop
def _scan_sparse(rows: Sparse, at: int, last: int, threshold: Threshold, room: Room, out: int) -> _SparseScan:
    """Entries at..last, a row's bytes; those that are not below the threshold go to `room` from `out` on."""
    n: Any
    below: Any
    before: Any
    top_place: Any
    symbol, prob, bits, least, unit = rows.symbol, rows.prob, rows.bits, threshold.bits, threshold.unit
    room_symbol, room_prob = room.symbol, room.prob
    n = below = descents = 0
    top_bits, limit = np.uint32(0), np.uint32(0)
    top_place, before = at, -1
    for k in range(PLACE(at), PLACE(last)):
        value, s = bits[k], symbol[k]
        limit = max(limit, value)
        descents += (s <= before) | (s >= END)
        before = s
        high_enough = value >= least
        larger = value > top_bits
        top_bits = value if larger else top_bits
        top_place = np.int64(k) if larger else top_place
        room_symbol[PLACE(out + n)] = s
        room_prob[PLACE(out + n)] = prob[k]
        n += high_enough
        below += (np.int64(np.int32(prob[k] * unit)) + np.int64(value != 0)) * (1 - np.int64(high_enough))
    return _SparseScan(n, below, top_bits, top_place, limit, descents)


class _Keys(NamedTuple):
    """Entries of one row as numbers that sort by descending probability, of equals the smaller symbol first.

    The bits of a float >= 0 are ordered as it is. int64: `high`, those that could be listed, `low`, the others;
    `value` float32 [1] and `bits` are the same memory, to read one as the other.
    """

    high: I64
    low: I64
    scratch: I64
    value: F32
    bits: U32


@njit(cache=True, nogil=True)
def order_rows(least: float, room: Room) -> Gathered:
    """Correct the sums of gathered rows, which may have any, and put their entries in order.

    A row's rounding residual goes to its largest probability (the smallest symbol of equals). Fills of each row
    `listable`, how many of its entries are the largest or not below `least`, and `unlisted`, `rest` and all entries but
    the largest.
    """
    value = np.empty(1, np.float32)
    keys = _Keys(
        np.empty(_KEYS, np.int64), np.empty(_KEYS, np.int64), np.empty(_KEYS, np.int64), value, value.view(np.uint32)
    )
    gathered: Gathered = _order(least, room, keys)
    return gathered


@row_loop
def _order(least: float, room: Room, keys: _Keys) -> Gathered:
    out: Any
    n_kept, listable, rest, unlisted, _, _, _ = room
    out = 0
    for i in range(n_kept.shape[0]):
        n = np.int64(n_kept[i])
        missing = rest[i]
        if n == 0:
            if not abs(missing - 1.0) <= SUM_TOLERANCE:
                return out, i, BAD_SUM, missing
            rest[i] = unlisted[i] = 1.0
            listable[i] = 0
            continue
        listed, n_high = _split(room, out, n, least, keys)
        if not abs(listed + missing - 1.0) <= SUM_TOLERANCE:
            return out, i, BAD_SUM, listed + missing
        others = listed - _largest(keys)
        if not _absorb(1.0 - missing - others, n_high, n - n_high, keys):
            # The residual made it smaller than the next: once more, with the sum as it is now.
            _replace(room, out, n, keys)
            listed, n_high = _split(room, out, n, least, keys)
            others = listed - _largest(keys)
        unlisted[i] = missing + others
        listable[i] = n_high
        _put_back(room, out, n, n_high, keys)
        out += n
    return out, -1, OK, 0.0


@inner_loop
def _split(room: Room, out: int, n: int, least: float, keys: _Keys) -> tuple[float, int]:
    """Make the keys of a row's n entries, `high` in order; returns the sum of the row, and how many are high (>= 1)."""
    symbol, prob, bits, high, low = room.symbol, room.prob, room.bits, keys.high, keys.low
    n_high: Any
    n_low: Any
    listed = 0.0
    n_high = n_low = 0
    for k in range(PLACE(out), PLACE(out + n)):
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
    sort_distinct(high, keys.scratch, n_high)
    return listed, n_high


@inner_loop
def _largest(keys: _Keys) -> float:
    """The largest probability."""
    keys.bits[0] = _MOST - np.uint32(keys.high[0] >> 9)
    return float(keys.value[0])


@inner_loop
def _absorb(value: float, n_high: int, n_low: int, keys: _Keys) -> bool:
    """Make the largest probability `value`, in float32 in `keys.value`; False where another one is then larger."""
    high, low = keys.high, keys.low
    keys.value[0] = max(np.float32(0.0), np.float32(value))
    largest = np.int64(_MOST - keys.bits[0]) << 9 | (high[0] & 511)
    second = high[1] if n_high > 1 else np.int64(1 << 62)
    if n_high == 1 and largest > high[0]:
        for k in range(n_low):
            second = min(second, low[k])
    if largest > second:
        return False
    high[0] = largest
    return True


@inner_loop
def _replace(room: Room, out: int, n: int, keys: _Keys) -> None:
    """Write `keys.value` over the row's largest probability."""
    for k in range(PLACE(out), PLACE(out + n)):
        if np.int64(room.symbol[k]) == keys.high[0] & 511:
            room.bits[k] = keys.bits[0]


@inner_loop
def _put_back(room: Room, out: int, n: int, n_high: int, keys: _Keys) -> None:
    """A row's entries in the order of their keys: high ones from the front, low ones from the back."""
    symbol, bits, high, low = room.symbol, room.bits, keys.high, keys.low
    first = PLACE(out)
    for k in range(PLACE(n_high)):
        symbol[first + k] = high[k] & 511
        bits[first + k] = _MOST - np.uint32(high[k] >> 9)
    for k in range(PLACE(n - n_high)):
        to = first + PLACE(n - 1) - k
        symbol[to] = low[k] & 511
        bits[to] = _MOST - np.uint32(low[k] >> 9)
