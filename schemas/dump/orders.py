"""Which byte an entry is, as its place in an order that was learned from the levels before it.

A level's next bytes resemble those of earlier levels after the same byte of text, at a row's start as within a token.
So every such *context* keeps the 256 bytes in order, those that most levels listed first. The *sequence* of a level is
that order with the text's own next byte put first; an entry is a place in it, mostly a small one. Reader and writer
learn from what they have read and written: nothing of an order is stored.
"""

from typing import Any, NamedTuple

import numpy as np

from bytecache.schemas.arrays import I64, PLACE, U8, U64
from bytecache.schemas.dump.ranking import Ranking, listed_again
from bytecache.schemas.loops import inner_loop

MOST_TIMES = 255
"""An order no longer changes for a byte that was listed so often."""
_NOWHERE = -1
"""Place of the own byte where the text has no further one."""


class Orders(NamedTuple):
    """The orders of all contexts, one after the other: items of a context are the 256 from its `context_of` on."""

    ranking: Ranking
    """of bytes: uint8, uint8, uint8 and uint16 [512 contexts of bytes]"""
    first: I64
    """int64 [256]; by the byte before a level, where its two contexts begin"""
    listed: U8
    """uint8 [257]; scratch: the bytes of a level"""
    bits: U64
    """uint64 [4]; which they are"""
    lower: I64
    """int64 [4]; how many of them are below the first byte of each of the four"""


def new_orders(text: U8) -> Orders:
    """Bytes in ascending order in every context of a text."""
    # Few different bytes occur: what is not set up here need not fit into a processor's cache.
    first = np.zeros(256, np.int64)
    first[text] = 1
    first[0] = 1
    first = (np.cumsum(first) - 1) * 512
    order = np.tile(np.arange(256, dtype=np.uint8), int(first[-1]) // 256 + 2)
    n = len(order)
    ranking = Ranking(order, order.copy(), np.zeros(n, np.uint8), np.zeros(n, np.uint16))
    return Orders(ranking, first, np.zeros(257, np.uint8), np.zeros(4, np.uint64), np.zeros(4, np.int64))


@inner_loop
def context_of(orders: Orders, text: U8, i: int, depth: int) -> int:
    """Where the order of a level at byte i of the text begins, `depth` bytes into its row."""
    before = int(text[PLACE(i - 1)]) if i > 0 else 0
    return int(orders.first[PLACE(before)]) + (256 if depth == 0 else 0)


@inner_loop
def own_place(orders: Orders, context: int, text: U8, i: int) -> int:
    """Where the text's own next byte stands in the order, -1 at the text's end."""
    return int(orders.ranking.place[PLACE(context + int(text[PLACE(i)]))]) if i < len(text) else _NOWHERE


@inner_loop
def in_sequence(orders: Orders, context: int, own: int, byte: int) -> int:
    """The place of a byte in the sequence of a level whose own byte stands at `own` in the order."""
    place = int(orders.ranking.place[PLACE(context + byte)])
    if place == own:
        return 0
    return place + (1 if place < own else 0)


@inner_loop
def byte_at(orders: Orders, context: int, own: int, place: int) -> int:
    """The byte at a place of the sequence."""
    if place <= own:
        place = place - 1 if place > 0 else own
    return int(orders.ranking.item[PLACE(context + place)])


@inner_loop
def learn(orders: Orders, context: int, count: int) -> None:
    """The first `count` of `listed` were listed once more."""
    for k in range(PLACE(count)):
        listed_again(orders.ranking, context, int(orders.listed[k]), MOST_TIMES)


@inner_loop
def sort(orders: Orders, count: int) -> None:
    """Note where the first `count` of `listed`, which are all different, stand among each other."""
    listed, bits, lower = orders.listed, orders.bits, orders.lower
    bits[:] = 0
    for k in range(PLACE(count)):
        byte = np.uint64(listed[k])
        bits[byte >> np.uint64(6)] |= np.uint64(1) << (byte & np.uint64(63))
    lower[0] = 0
    for word in range(3):
        lower[word + 1] = lower[word] + _ones(bits[word])


@inner_loop
def rank_of(bits: U64, lower: I64, byte: int) -> int:
    """How many of the listed bytes are below this one; `bits`, `lower`: the members."""
    word = PLACE(byte >> 6)
    below = (np.uint64(1) << np.uint64(byte & 63)) - np.uint64(1)
    rank: int = int(lower[word]) + _ones(bits[word] & below)
    return rank


@inner_loop
def _ones(word: Any) -> int:
    """How many bits of a uint64 are set."""
    pairs = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    eights = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    ones: int = int((eights * np.uint64(0x0101010101010101)) >> np.uint64(56))
    return ones
