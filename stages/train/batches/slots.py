"""The loops of collation: tokens to slots, the supervised ones of a token's first bytes, and their targets. No I/O.

Price, one core: 10 ns a byte of text for the slots, as much for the targets: 100 bytes of int64 indices are written
for each byte of text.
"""

import numpy as np
from numba import njit

from bytecache.schemas.arrays import END, F32, I16, I32, I64, U8


@njit(cache=True, nogil=True)
def row_slots(
    start: I64, end: I64, skip: I64, mask: U8, symbol: I16, tail: U8, mass: F32, cell: int, mean: bool, limit: int,
    at: int, number: U8, token: I64, true: I64, weight: F32, rest: F32, position: I64,
) -> tuple[int, int, int]:  # fmt: skip
    """Append the slots of one row's tokens to the output arrays from `at` on.

    start, end, skip int64 [tokens]: a token's text bytes, and how many of its first `limit` come before them. mask,
    symbol, tail [N]: the shard's, with `mass` float32 [256] of a tail's code. `cell`: flat index of the row's first
    token. Output, an element a slot: number in its token, flat index of the token, the byte that follows, weight
    (`mean`: the slots of a token share 1), unlisted mass, position. Returns (slots in all, tokens with a slot,
    supervised bytes).
    """
    n_tokens = n_bytes = 0
    for t in range(start.shape[0]):
        first = at
        for within in range(min(limit - skip[t], end[t] - start[t])):
            i = start[t] + within
            if mask[i]:
                number[at] = within + skip[t]
                token[at] = cell + t
                true[at] = symbol[i]
                rest[at] = mass[tail[i]]
                position[at] = i
                at += 1
        share = np.float32(1.0 / (at - first)) if mean and at > first else np.float32(1.0)
        for slot in range(first, at):
            weight[slot] = share
        n_tokens += at > first
    for i in range(start[0], end[-1]):
        n_bytes += mask[i] != 0 and symbol[i] != END
    return at, n_tokens, n_bytes


@njit(cache=True, nogil=True)
def by_number(number: U8, limit: int) -> tuple[I64, I64, I64]:
    """(order, place, counts [limit]): slots sorted by number, stable; where each lands; how many of each."""
    counts = np.zeros(limit, np.int64)
    for slot in range(number.shape[0]):
        counts[number[slot]] += 1
    free = np.cumsum(counts) - counts
    order, place = np.empty(number.shape[0], np.int64), np.empty(number.shape[0], np.int64)
    for slot in range(number.shape[0]):
        k = number[slot]
        place[slot] = free[k]
        order[free[k]] = slot
        free[k] += 1
    return order, place, counts


@njit(cache=True, nogil=True)
def row_targets(
    row: I32, symbol: I16, prob: F32, lo: int, hi: int, position: I64, place: I64, at: int,
    slot: I64, listed: I64, mass: F32,
) -> int:  # fmt: skip
    """Append the probabilities of positions lo..hi (`ByteShard.triples`) that belong to slots; returns the new `at`.

    position, place int64 [slots of the row]: where they are in the shard and in the batch.
    """
    slot_at = np.full(hi - lo, -1, np.int64)
    for k in range(position.shape[0]):
        slot_at[position[k] - lo] = place[k]
    for k in range(row.shape[0]):
        found = slot_at[row[k]]
        if found >= 0:
            slot[at] = found
            listed[at] = symbol[k]
            mass[at] = prob[k]
            at += 1
    return at
