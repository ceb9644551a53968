"""The loops of a reader: codes to rows by symbol, refusing what no writer produces, and rows to triples. No I/O.

Price, one core: SPEC.md, "Cost".
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from schemas.prior import find_node
from schemas.quantise import (
    BAD_CODE,
    BAD_COUNT,
    BAD_MASS,
    BAD_ORDER,
    END,
    F32,
    I16,
    I32,
    I64,
    OK,
    TAIL,
    TAIL_IS_ALL,
    U8,
    VALUE,
)

END_IS_TOP = 255
"""Value of the expanded `end` column that says: END is the implied symbol of this row."""
INDEX_STRIDE = 1024
"""Rows between two entries of the sparse row -> entry index."""


@njit(cache=True, nogil=True)
def expand_rows(
    text: U8,
    doc_start: I64,
    child: I32,
    order: I16,
    rank: I16,
    head: U8,
    tail: U8,
    top: U8,
    gap: U8,
    value: U8,
    count: U8,
    top_byte: U8,
    end: U8,
    entry_byte: U8,
    entry_code: U8,
    index: I64,
) -> tuple[int, int, int]:
    """Turn stored columns into rows by symbol, refusing what no writer produces.

    Output: count, top_byte, end uint8 [N]: how many bytes a row lists; its implied byte (0 where END is); code of
    P(END), 255 = END is implied. entry_byte, entry_code uint8 [E]: listed bytes, ascending within a row. `index`
    int64 [ceil(N / 1024) + 1] gets entry offsets. Returns (row, reason, entries); row is -1 when every row decodes
    to a distribution.
    """
    at = 0
    n_top = 0
    out = 0
    document = 0
    for i in range(head.shape[0]):
        if i % INDEX_STRIDE == 0:
            index[i // INDEX_STRIDE] = out
        while doc_start[document + 1] <= i:
            document += 1
        stop = at + (head[i] >> 1)
        if stop > gap.shape[0]:
            return i, BAD_COUNT, out
        end[i] = 0
        count[i] = 0
        top_byte[i] = 0
        if tail[i] == TAIL_IS_ALL:
            if head[i] != 0:
                return i, BAD_MASS, out
            continue
        node = find_node(text, doc_start[document], i, child)
        true = END if i + 1 == doc_start[document + 1] else int(text[i])
        implied = true
        if head[i] & 1:
            if n_top == top.shape[0]:
                return i, BAD_COUNT, out
            r = int(top[n_top])
            implied = int(order[node, r + (r >= rank[node, true])])
            n_top += 1
        top_rank = rank[node, implied]
        if implied == END:
            end[i] = END_IS_TOP
        else:
            top_byte[i] = implied
        total = TAIL[tail[i]]
        r = -1
        first = out
        for k in range(at, stop):
            r += int(gap[k]) + 1
            if r > 255:
                return i, BAD_ORDER, out
            code = value[k]
            if code == 0:
                return i, BAD_CODE, out
            total += VALUE[code]
            s = int(order[node, r + (r >= top_rank)])
            if s == END:
                if code == END_IS_TOP:
                    return i, BAD_CODE, out
                end[i] = code
                continue
            j = out
            while j > first and entry_byte[j - 1] > s:
                entry_byte[j] = entry_byte[j - 1]
                entry_code[j] = entry_code[j - 1]
                j -= 1
            entry_byte[j] = s
            entry_code[j] = code
            out += 1
        if total >= 1.0:
            return i, BAD_MASS, out
        count[i] = out - first
        at = stop
    index[index.shape[0] - 1] = out
    if at != gap.shape[0] or n_top != top.shape[0]:
        return head.shape[0] - 1, BAD_COUNT, out
    return -1, OK, out


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
        total = TAIL[tail[i]]
        if code != END_IS_TOP:
            total += VALUE[code]
        for k in range(at, stop):
            total += VALUE[entry_code[k]]
        implied = 1.0 - total
        relative = i - lo
        top_symbol = int(top[i])
        k = at
        if code != END_IS_TOP and tail[i] != TAIL_IS_ALL:
            while k < stop and entry_byte[k] < top_symbol:
                row[out] = relative
                symbol[out] = entry_byte[k]
                prob[out] = VALUE[entry_code[k]]
                out += 1
                k += 1
            row[out] = relative
            symbol[out] = top_symbol
            prob[out] = implied
            out += 1
        while k < stop:
            row[out] = relative
            symbol[out] = entry_byte[k]
            prob[out] = VALUE[entry_code[k]]
            out += 1
            k += 1
        if code != 0:
            row[out] = relative
            symbol[out] = END
            prob[out] = implied if code == END_IS_TOP else VALUE[code]
            out += 1
        at = stop
    return out
