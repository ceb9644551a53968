"""The loops of a reader: stored columns to rows by symbol, refusing what no writer makes, and rows to triples. No I/O.

A listed symbol in memory is a *key*: 256 * byte + code of its probability, so that keys in order are symbols in
order. The implied symbol is a key too, with code 0; its probability is computed when asked for. END's key is the last
of its row, 0xFF00 + code, told from byte 255 by a flag.

`expand_rows` takes `LANES` rows at a time and avoids what a processor is bad at, branches that depend on the data:

1. row by row: the context, the implied symbol, where the row's entries begin;
2. entry by entry, whichever row they belong to: gap to rank, rank to symbol, sums of mass;
3. rows of up to 8 and up to 32 keys are sorted side by side (`sorting.sort_lanes`), longer ones each for itself;
4. row by row: keys to their place, eight at a time, of which the next row overwrites what was too many.

`decode_rows` works the same way: all keys of a range first, then what there is one of per row.
Price, one core: docs/results.md, "Speed of the format".
"""

import numpy as np
from numba import njit

from bytecache.schemas.arrays import END, F32, I16, I32, I64, PLACE, SYMBOLS, U8, U16
from bytecache.schemas.shard.codes import COUNT_OVER, MAX_COUNT, TAIL_IS_ALL
from bytecache.schemas.shard.prior import find_block
from bytecache.schemas.shard.quantise import BAD_CODE, BAD_COUNT, BAD_COUNT_OVER, BAD_GAP_OVER, BAD_MASS, BAD_ORDER, OK
from bytecache.schemas.shard.sorting import LANES, insertion_sort, network, sort_lanes

INDEX_STRIDE = 1024
"""Rows between two entries of the sparse row -> key index; a multiple of LANES."""
SPARE = 8
"""Elements behind the last key that `expand_rows` may write."""
END_KEY = 0xFF00
END_IS_LAST = 128
"""Bit of a row's `place` that says: its last key is END's."""
NARROW, WIDE = 8, 32
"""Keys of the rows that are sorted side by side."""

_NARROW_NETWORK, _WIDE_NETWORK = network(NARROW), network(WIDE)
_FOURTH: I64 = np.append(np.arange(255, dtype=np.int64) ** 4, 1 << 32)
"""int64 [256]: mass of a tail's code in units of 2 ** -32, the unit in which all sums are exact."""


@njit(cache=True, nogil=True)
def expand_rows(
    text: U8,
    doc_start: I64,
    child: I16,
    order: I16,
    rank: I16,
    head: U8,
    tail_low: U8,
    count_over: U8,
    top: U8,
    entry: U8,
    gap_over: U8,
    step: int,
    tail: U8,
    count: U8,
    place: U8,
    key: U16,
    index: I64,
) -> tuple[int, int, int]:
    """Turn stored columns into rows by symbol, refusing what no writer produces.

    Columns as in SPEC.md, `order` and `rank` int16 [257 K], flat; the values of tail_low, count_over and gap_over must
    be in their bounds. Output: tail, count, place uint8 [N]: code of the unlisted mass, keys of the row (0 where all is
    tail), and which of them is the implied symbol's (with END_IS_LAST); key uint16 [room for every entry, every row and
    SPARE]; `index` int64 [ceil(N / 1024) + 1] gets key offsets. Returns (row, reason, keys); row is -1 when every
    row decodes to a distribution.
    """
    widest = step - 1
    node = np.empty(LANES, np.int16)
    base = np.empty(LANES, np.int64)
    top_rank = np.empty(LANES, np.int16)
    n_listed = np.empty(LANES, np.uint8)
    end_code = np.empty(LANES, np.int16)  # -1: END is not in this row; 0: it is implied
    squares = np.empty(LANES, np.int64)  # sum of the codes' squares
    slot = np.empty(LANES, np.int64)  # where a row's keys begin in `flat`, one every `stride`
    stride = np.empty(LANES, np.int64)
    owner = np.empty(LANES * MAX_COUNT + SPARE, np.uint16)
    n_wide, n_long = NARROW * LANES, (NARROW + WIDE) * LANES
    flat = np.empty(n_long + LANES * (MAX_COUNT + 1) + SPARE, np.uint16)
    narrow, wide = flat[:n_wide].reshape(NARROW, LANES), flat[n_wide:n_long].reshape(WIDE, LANES)
    at = n_top = n_over = n_gap = out = document = last = 0
    doc_end = doc_start[min(1, doc_start.shape[0] - 1)]
    for lo in range(0, head.shape[0], LANES):
        if lo % INDEX_STRIDE == 0:
            index[lo // INDEX_STRIDE] = out
        hi = min(lo + LANES, head.shape[0])
        document = find_block(text, doc_start, child, document, lo, hi, node)
        narrow[:] = 0xFFFF
        lanes = wide_lanes = 0
        free = n_long
        first = at
        for i in range(lo, hi):
            lane = PLACE(i - lo)
            if i == doc_end:
                last += 1
                doc_end = doc_start[last + 1]
            h = int(head[i])
            m = h >> 1 & 7
            if m == COUNT_OVER:
                if n_over == count_over.shape[0]:
                    return i, BAD_COUNT_OVER, out
                m += int(count_over[n_over])
                n_over += 1
            if at + m > entry.shape[0]:
                return i, BAD_COUNT, out
            tail[i] = h & 240 | tail_low[i]
            n_listed[lane] = m
            end_code[lane] = -1
            squares[lane] = 0
            if tail[i] == TAIL_IS_ALL:
                if m or h & 1:
                    return i, BAD_MASS, out
                continue
            implied = int(text[PLACE(i)])
            if i + 1 == doc_end:
                implied = END
            row = np.int64(node[lane]) * SYMBOLS
            if h & 1:
                if n_top == top.shape[0]:
                    return i, BAD_COUNT, out
                r = int(top[n_top])
                n_top += 1
                implied = int(order[PLACE(row + r + (r >= rank[PLACE(row + implied)]))])
            base[lane] = row
            top_rank[lane] = rank[PLACE(row + implied)]
            if m < NARROW:
                begin, stride[lane] = lanes, LANES
                lanes += 1
            elif m < WIDE:
                begin, stride[lane] = n_wide + wide_lanes, LANES
                wide[:, wide_lanes] = 0xFFFF
                wide_lanes += 1
            else:
                begin, stride[lane] = free, 1
                free += m + 1
            slot[lane] = begin
            flat[PLACE(begin)] = implied << 8
            if implied == END:
                end_code[lane] = 0
                flat[PLACE(begin)] = 0xFFFF
            for k in range(PLACE(SPARE)):
                owner[PLACE(at - first) + k] = lane
            for k in range(SPARE, m):
                owner[at - first + k] = lane
            at += m
        before = -1
        r = total = cursor = 0
        for k in range(first, at):
            wanted = int(owner[PLACE(k - first)])
            lane = PLACE(wanted)
            fresh = wanted != before
            before = wanted
            x = int(entry[PLACE(k)])
            gap = x & widest
            if gap == widest:
                if n_gap == gap_over.shape[0]:
                    return lo + wanted, BAD_GAP_OVER, out
                gap += int(gap_over[n_gap])
                n_gap += 1
            code = x & ~widest
            r = gap if fresh else r + 1 + gap
            if r > 255:
                return lo + wanted, BAD_ORDER, out
            if code == 0:
                return lo + wanted, BAD_CODE, out
            total = code * code + (0 if fresh else total)
            squares[lane] = total
            symbol = int(order[PLACE(base[lane] + r + (r >= top_rank[lane]))])
            cursor = (slot[lane] if fresh else cursor) + stride[lane]
            if symbol == END:
                if code == 255:
                    return lo + wanted, BAD_CODE, out
                end_code[lane] = code
                flat[PLACE(cursor)] = 0xFFFF
            else:
                flat[PLACE(cursor)] = symbol << 8 | code
        sort_lanes(narrow, _NARROW_NETWORK, lanes)
        if wide_lanes:
            sort_lanes(wide, _WIDE_NETWORK, wide_lanes)
        for i in range(lo, hi):
            lane = PLACE(i - lo)
            count[i] = 0
            place[i] = 0
            if tail[i] == TAIL_IS_ALL:
                continue
            if _FOURTH[tail[i]] + (squares[lane] << 16) >= 1 << 32:
                return i, BAD_MASS, out
            start, gaps = PLACE(slot[lane]), PLACE(stride[lane])
            has_end = end_code[lane] >= 0
            n = int(n_listed[lane]) + 1 - has_end
            if n_listed[lane] >= WIDE:
                insertion_sort(flat, slot[lane], slot[lane] + n_listed[lane] + 1)
            spot = np.int64(0)
            for k in range(PLACE(SPARE)):
                value = flat[start + k * gaps]
                key[PLACE(out) + k] = value
                spot = np.int64(k) if value & 255 == 0 else spot
            for k in range(SPARE, n):
                value = flat[start + PLACE(k) * gaps]
                key[out + k] = value
                spot = np.int64(k) if value & 255 == 0 else spot
            if has_end:
                key[out + n] = END_KEY | end_code[lane]
                spot = (np.int64(n) if end_code[lane] == 0 else spot) | END_IS_LAST
                n += 1
            place[i] = spot
            count[i] = n
            out += n
    index[index.shape[0] - 1] = out
    last_row = head.shape[0] - 1
    if at != entry.shape[0] or n_top != top.shape[0]:
        return last_row, BAD_COUNT, out
    if n_over != count_over.shape[0]:
        return last_row, BAD_COUNT_OVER, out
    return (-1, OK, out) if n_gap == gap_over.shape[0] else (last_row, BAD_GAP_OVER, out)


@njit(cache=True, nogil=True)
def decode_rows(lo: int, hi: int, index: I64, tail: U8, count: U8, place: U8, key: U16) -> tuple[I32, I16, F32]:
    """Rows lo..hi as (row - lo, symbol, probability), symbols ascending; columns as `expand_rows` made them.

    Implied symbols and END are included, zero probabilities are not.
    """
    near = lo // INDEX_STRIDE
    first = index[near]
    for i in range(PLACE(near * INDEX_STRIDE), PLACE(lo)):
        first += count[i]
    n = 0
    for i in range(PLACE(lo), PLACE(hi)):
        n += count[i]
    row, symbol, prob = np.empty(n + SPARE, np.int32), np.empty(n + SPARE, np.int16), np.empty(n, np.float32)
    before = np.empty(n + 1, np.uint32)  # sum of the squared codes of all keys before; of a row it stays below 2 ** 16
    keys = key[first : first + n]
    for k in range(PLACE(n)):
        symbol[k] = keys[k] >> 8
        code = np.int32(keys[k] & 255)
        prob[k] = np.float32(code * code) * np.float32(2.0**-16)
    total = np.uint32(0)
    for k in range(PLACE(n)):
        before[k] = total
        wide = np.uint32(keys[k] & 255)
        total = np.uint32(total + wide * wide)
    before[n] = total
    at = 0
    for i in range(PLACE(lo), PLACE(hi)):
        m = int(count[i])
        for k in range(PLACE(SPARE)):
            row[PLACE(at) + k] = i - lo
        for k in range(SPARE, m):
            row[at + k] = i - lo
        if m:
            listed = np.int64(np.uint32(before[PLACE(at + m)] - before[PLACE(at)])) << 16
            prob[PLACE(at + int(place[i] & 127))] = ((1 << 32) - _FOURTH[tail[i]] - listed) * 2.0**-32
            symbol[PLACE(at + m - 1)] += place[i] >> 7
            at += m
    return row[:n], symbol[:n], prob
