"""The loops of collation: tokens to slots, the supervised ones of a token's first bytes, and their targets. No I/O.

Price, one core: 10 ns a byte of text for the slots, as much for the targets: 100 bytes of int64 indices are written
for each byte of text.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import END, F32, I16, I64, U8
from bytecache.schemas.shard.reader import Triples


class Tokens(NamedTuple):
    """Tokens of one row: the positions of their text bytes, and how many of their bytes come before the text.

    start, end, skip int64 [tokens].
    """

    start: I64
    end: I64
    skip: I64


class Positions(NamedTuple):
    """What a shard says of N positions: mask uint8, symbol int16, tail uint8 [N]; mass float32 [256] of a tail."""

    mask: U8
    symbol: I16
    tail: U8
    mass: F32


class SlotColumns(NamedTuple):
    """Slots of a batch, row by row."""

    number: U8
    """uint8: place in its token"""
    token: I64
    """int64: flat index of the token"""
    true: I64
    """int64: the symbol that follows"""
    weight: F32
    rest: F32
    """float32: unlisted mass"""
    position: I64
    """int64: in its shard"""

    @classmethod
    def empty(cls, room: int) -> "SlotColumns":
        """Columns with room for so many slots."""
        return cls(
            np.empty(room, np.uint8),
            np.empty(room, np.int64),
            np.empty(room, np.int64),
            np.empty(room, np.float32),
            np.empty(room, np.float32),
            np.empty(room, np.int64),
        )

    def first(self, n: int) -> "SlotColumns":
        """The first n slots."""
        return SlotColumns(
            self.number[:n], self.token[:n], self.true[:n], self.weight[:n], self.rest[:n], self.position[:n]
        )


class ListedColumns(NamedTuple):
    """The teacher's entries of a batch: slot, symbol int64, prob float32."""

    slot: I64
    symbol: I64
    prob: F32


@njit(cache=True, nogil=True)
def row_slots(
    tokens: Tokens, positions: Positions, slots: SlotColumns, at: int, cell: int, limit: int, mean: bool
) -> tuple[int, int, int]:
    """Append the slots of one row's tokens, on the first `limit` bytes of each, to `slots` from `at` on.

    `cell`: flat index of the row's first token. `mean`: the slots of a token share a weight of 1. Returns (slots in
    all, tokens with a slot, supervised bytes).
    """
    start, end, skip = tokens
    mask, symbol, tail, mass = positions
    number, token, true, weight, rest, position = slots
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
    triples: Triples, span: tuple[int, int], position: I64, place: I64, listed: ListedColumns, at: int
) -> int:
    """Append the probabilities of the positions `span` that belong to slots, from `at` on; returns the new `at`.

    position, place int64 [slots of the row]: where they are in the shard and in the batch.
    """
    lo, hi = span
    row, symbol, prob = triples
    listed_slot, listed_symbol, listed_prob = listed
    slot_at = np.full(hi - lo, -1, np.int64)
    for k in range(position.shape[0]):
        slot_at[position[k] - lo] = place[k]
    for k in range(row.shape[0]):
        slot = slot_at[row[k]]
        if slot >= 0:
            listed_slot[at] = slot
            listed_symbol[at] = symbol[k]
            listed_prob[at] = prob[k]
            at += 1
    return at
