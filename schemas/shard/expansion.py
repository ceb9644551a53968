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

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import END, F32, I16, I32, I64, PLACE, SYMBOLS, U8, U16
from bytecache.schemas.shard.codes import COUNT_OVER, MAX_COUNT, TAIL_IS_ALL
from bytecache.schemas.shard.prior import find_block
from bytecache.schemas.shard.reasons import BAD_CODE, BAD_COUNT, BAD_COUNT_OVER, BAD_GAP_OVER, BAD_MASS, BAD_ORDER, OK
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

_NARROW_ENDS, _LONG = NARROW * LANES, (NARROW + WIDE) * LANES
_NARROW_NETWORK, _WIDE_NETWORK = network(NARROW), network(WIDE)
_FOURTH: I64 = np.append(np.arange(255, dtype=np.int64) ** 4, 1 << 32)
"""int64 [256]: mass of a tail's code in units of 2 ** -32, the unit in which all sums are exact."""


class Stored(NamedTuple):
    """The columns of N positions as a file holds them (SPEC.md); tail_low, count_over and gap_over in their bounds."""

    text: U8
    doc_start: I64
    head: U8
    tail_low: U8
    count_over: U8
    top: U8
    entry: U8
    gap_over: U8


class Contexts(NamedTuple):
    """A prior of K nodes, as the loops of the reader ask it: `Prior.child`, and `Prior.order` with its ranks, flat."""

    child: I16
    """int16 [K + 1, 256]"""
    order: I16
    """int16 [257 K]"""
    rank: I16
    """int16 [257 K]"""


class RowKeys(NamedTuple):
    """N rows by symbol, as `expand_rows` fills them."""

    tail: U8
    """uint8 [N]: code of the unlisted mass"""
    n_keys: U8
    """uint8 [N]: keys of the row, 0 where all is tail"""
    place: U8
    """uint8 [N]: which of them is the implied symbol's, with END_IS_LAST"""
    key: U16
    """uint16 [room for every entry, every row and SPARE]"""
    key_index: I64
    """int64 [ceil(N / 1024) + 1]: where the keys of every 1024th row begin, and where the last ones end"""


class _Lanes(NamedTuple):
    """What is known of `LANES` rows while they are expanded."""

    node: I16
    base: I64
    """where the node of a row begins in `Contexts.order`"""
    top_rank: I16
    """rank of the implied symbol"""
    n_listed: U8
    end_code: I16
    """code of END; -1: it is not in this row, 0: it is implied"""
    squares: I64
    """sum of the squares of the row's codes"""
    slot: I64
    """where the keys of a row begin in `flat`, one every `stride`"""
    stride: I64
    owner: U16
    """the lane of each entry"""
    flat: U16
    """keys before they are sorted: the table of narrow rows, that of wide ones, then the long rows"""


class _Cursor(NamedTuple):
    """How much of the ragged columns has been read."""

    entry: int
    top: int
    count_over: int
    gap_over: int
    document: int


@njit(cache=True, nogil=True)
def expand_rows(stored: Stored, contexts: Contexts, step: int, rows: RowKeys) -> tuple[int, int, int]:
    """Turn stored columns into rows by symbol, refusing what no writer produces.

    `step`: what all codes are multiples of. Returns (row, reason, keys); row is -1 when every row decodes to a
    distribution.
    """
    lanes = _make_lanes()
    narrow, wide = _tables(lanes.flat)
    cursor = _Cursor(0, 0, 0, 0, 0)
    n_rows, n_keys, document = stored.head.shape[0], 0, 0
    for lo in range(0, n_rows, LANES):
        if lo % INDEX_STRIDE == 0:
            rows.key_index[lo // INDEX_STRIDE] = n_keys
        hi = min(lo + LANES, n_rows)
        document = find_block(stored.text, stored.doc_start, contexts.child, document, lo, hi, lanes.node)
        first = cursor.entry
        row, reason, cursor, n_narrow, n_wide = _open_rows(stored, contexts, lo, hi, cursor, lanes, rows.tail)
        if row >= 0:
            return row, reason, n_keys
        row, reason, cursor = _read_entries(stored, contexts.order, step, lo, first, cursor, lanes)
        if row >= 0:
            return row, reason, n_keys
        sort_lanes(narrow, _NARROW_NETWORK, n_narrow)
        if n_wide:
            sort_lanes(wide, _WIDE_NETWORK, n_wide)
        row, n_keys = _write_rows(lo, hi, lanes, rows, n_keys)
        if row >= 0:
            return row, BAD_MASS, n_keys
    rows.key_index[rows.key_index.shape[0] - 1] = n_keys
    reason = _left_over(stored, cursor)
    return (-1 if reason == OK else n_rows - 1), reason, n_keys


@njit(cache=True, nogil=True)
def _make_lanes() -> _Lanes:
    return _Lanes(
        np.empty(LANES, np.int16),
        np.empty(LANES, np.int64),
        np.empty(LANES, np.int16),
        np.empty(LANES, np.uint8),
        np.empty(LANES, np.int16),
        np.empty(LANES, np.int64),
        np.empty(LANES, np.int64),
        np.empty(LANES, np.int64),
        np.empty(LANES * MAX_COUNT + SPARE, np.uint16),
        np.empty(_LONG + LANES * (MAX_COUNT + 1) + SPARE, np.uint16),
    )


@njit(cache=True, nogil=True)
def _tables(flat: U16) -> tuple[U16, U16]:
    """The narrow and the wide table of `_Lanes.flat`, uint16 [NARROW, LANES] and [WIDE, LANES]."""
    return flat[:_NARROW_ENDS].reshape(NARROW, LANES), flat[_NARROW_ENDS:_LONG].reshape(WIDE, LANES)


@njit(cache=True, nogil=True)
def _open_rows(
    stored: Stored, contexts: Contexts, lo: int, hi: int, cursor: _Cursor, lanes: _Lanes, tails: U8
) -> tuple[int, int, _Cursor, int, int]:
    """Rows lo..hi, one by one: context, implied symbol, and where their entries and their keys begin.

    Returns (row, reason) with row -1 where all is well, the cursor behind these rows, and the rows that are narrow
    and wide.
    """
    text, doc_start, head, tail_low, count_over, top, entry, _ = stored
    _, order, rank = contexts
    node, base, top_rank, n_listed, end_code, squares, slot, stride, owner, flat = lanes
    narrow, wide = _tables(flat)
    at, n_top, n_over, n_gap, document = cursor
    first, free, n_narrow, n_wide = at, _LONG, 0, 0
    doc_end = doc_start[min(document + 1, doc_start.shape[0] - 1)]
    narrow[:] = 0xFFFF
    for i in range(lo, hi):
        lane = PLACE(i - lo)
        if i == doc_end:
            document += 1
            doc_end = doc_start[document + 1]
        h = int(head[i])
        m = h >> 1 & 7
        if m == COUNT_OVER:
            if n_over == count_over.shape[0]:
                return i, BAD_COUNT_OVER, cursor, n_narrow, n_wide
            m += int(count_over[n_over])
            n_over += 1
        if at + m > entry.shape[0]:
            return i, BAD_COUNT, cursor, n_narrow, n_wide
        tails[i] = h & 240 | tail_low[i]
        n_listed[lane], end_code[lane], squares[lane] = m, -1, 0
        if tails[i] == TAIL_IS_ALL:
            if m or h & 1:
                return i, BAD_MASS, cursor, n_narrow, n_wide
            continue
        implied = END if i + 1 == doc_end else int(text[PLACE(i)])
        row = np.int64(node[lane]) * SYMBOLS
        if h & 1:
            if n_top == top.shape[0]:
                return i, BAD_COUNT, cursor, n_narrow, n_wide
            r = int(top[n_top])
            n_top += 1
            implied = int(order[PLACE(row + r + (r >= rank[PLACE(row + implied)]))])
        base[lane] = row
        top_rank[lane] = rank[PLACE(row + implied)]
        begin, stride[lane], n_narrow, n_wide, free = _room(m, n_narrow, n_wide, free)
        if NARROW <= m < WIDE:
            wide[:, n_wide - 1] = 0xFFFF
        slot[lane] = begin
        end_code[lane] = 0 if implied == END else -1
        flat[PLACE(begin)] = 0xFFFF if implied == END else implied << 8
        _mark(owner, at - first, m, lane)
        at += m
    return -1, OK, _Cursor(at, n_top, n_over, n_gap, document), n_narrow, n_wide


@njit(cache=True, nogil=True)
def _room(m: int, n_narrow: int, n_wide: int, free: int) -> tuple[int, int, int, int, int]:
    """Where the keys of a row of m entries begin in `flat`, their stride there, and the counts behind that row."""
    if m < NARROW:
        return n_narrow, LANES, n_narrow + 1, n_wide, free
    if m < WIDE:
        return _NARROW_ENDS + n_wide, LANES, n_narrow, n_wide + 1, free
    return free, 1, n_narrow, n_wide, free + m + 1


@njit(cache=True, nogil=True)
def _mark(owner: U16, first: int, count: int, lane: PLACE) -> None:
    """Write down whose `count` entries from `first` on are; eight at a time, of which the next row has the rest."""
    for k in range(PLACE(SPARE)):
        owner[PLACE(first) + k] = lane
    for k in range(SPARE, count):
        owner[first + k] = lane


@njit(cache=True, nogil=True)
def _read_entries(
    stored: Stored, order: I16, step: int, lo: int, first: int, cursor: _Cursor, lanes: _Lanes
) -> tuple[int, int, _Cursor]:
    """Entries `first` to `cursor.entry` of the rows from `lo` on, whichever row they belong to, to keys in `flat`.

    Returns (row, reason) with row -1 where all is well, and the cursor behind their wide gaps.
    """
    entry, gap_over = stored.entry, stored.gap_over
    _, base, top_rank, _, end_code, squares, slot, stride, owner, flat = lanes
    n_gap, widest = cursor.gap_over, step - 1
    lane_before = -1
    r = total = place = 0
    for k in range(first, cursor.entry):
        lane_number = int(owner[PLACE(k - first)])
        lane = PLACE(lane_number)
        fresh = lane_number != lane_before
        lane_before = lane_number
        x = int(entry[PLACE(k)])
        gap = x & widest
        if gap == widest:
            if n_gap == gap_over.shape[0]:
                return lo + lane_number, BAD_GAP_OVER, cursor
            gap += int(gap_over[n_gap])
            n_gap += 1
        code = x & ~widest
        r = gap if fresh else r + 1 + gap
        if r > 255:
            return lo + lane_number, BAD_ORDER, cursor
        if code == 0:
            return lo + lane_number, BAD_CODE, cursor
        total = code * code + (0 if fresh else total)
        squares[lane] = total
        symbol = int(order[PLACE(base[lane] + r + (r >= top_rank[lane]))])
        place = (slot[lane] if fresh else place) + stride[lane]
        if symbol == END:
            if code == 255:
                return lo + lane_number, BAD_CODE, cursor
            end_code[lane] = code
            flat[PLACE(place)] = 0xFFFF
        else:
            flat[PLACE(place)] = symbol << 8 | code
    return -1, OK, _Cursor(cursor.entry, cursor.top, cursor.count_over, n_gap, cursor.document)


@njit(cache=True, nogil=True)
def _write_rows(lo: int, hi: int, lanes: _Lanes, rows: RowKeys, n_keys: int) -> tuple[int, int]:
    """Put the sorted keys of rows lo..hi behind the n_keys there are.

    Returns (the first row that is no distribution or -1, keys there are now).
    """
    _, _, _, n_listed, end_code, squares, slot, stride, _, flat = lanes
    tail, count, place, key, _ = rows
    out = n_keys
    for i in range(lo, hi):
        lane = PLACE(i - lo)
        count[i] = 0
        place[i] = 0
        if tail[i] == TAIL_IS_ALL:
            continue
        if _FOURTH[tail[i]] + (squares[lane] << 16) >= 1 << 32:
            return i, out
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
    return -1, out


@njit(cache=True, nogil=True)
def _left_over(stored: Stored, cursor: _Cursor) -> int:
    """The reason to refuse columns that hold more than their rows ask for; OK where nothing is left."""
    if cursor.entry != stored.entry.shape[0] or cursor.top != stored.top.shape[0]:
        return BAD_COUNT
    if cursor.count_over != stored.count_over.shape[0]:
        return BAD_COUNT_OVER
    return OK if cursor.gap_over == stored.gap_over.shape[0] else BAD_GAP_OVER


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
