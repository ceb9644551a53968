"""Which byte an entry is, as its place in an order that was learned from the levels before it.

A level's next bytes resemble those of earlier levels after the same byte of text, at a row's start as within a token.
So every such *context* keeps the 256 bytes in order, those that most levels listed first. The *sequence* of a level is
that order with the text's own next byte put first; an entry is a place in it, mostly a small one. Reader and writer
learn from what they have read and written: nothing of an order is stored.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import I64, U8, U16

CONTEXTS = 512
"""By the byte before a level and whether the level is its row's first."""
MOST_TIMES = 255
"""An order no longer changes for a byte that was listed so often."""
_NOWHERE = -1
"""Place of the own byte where the text has no further one."""


class Orders(NamedTuple):
    """The orders of all contexts, [512, 256]."""

    byte: U8
    """uint8; by place"""
    place: U8
    """uint8; by byte"""
    times: U8
    """uint8; how often each byte was listed"""
    above: U16
    """uint16; how many bytes were listed more than so many times: where those begin that were not"""
    listed: I64
    """int64 [257]; scratch"""


def new_orders() -> Orders:
    """Bytes in ascending order in every context."""
    order = np.tile(np.arange(256, dtype=np.uint8), (CONTEXTS, 1))
    shape = order.shape
    return Orders(order, order.copy(), np.zeros(shape, np.uint8), np.zeros(shape, np.uint16), np.zeros(257, np.int64))


@njit(cache=True, nogil=True, inline="always")
def context_of(text: U8, i: int, depth: int) -> int:
    """The context of a level at byte i of the text, `depth` bytes into its row."""
    before = int(text[i - 1]) if i > 0 else 0
    return 2 * before + (1 if depth == 0 else 0)


@njit(cache=True, nogil=True, inline="always")
def own_place(orders: Orders, context: int, text: U8, i: int) -> int:
    """Where the text's own next byte stands in the order, -1 at the text's end."""
    return int(orders.place[context, text[i]]) if i < len(text) else _NOWHERE


@njit(cache=True, nogil=True, inline="always")
def in_sequence(orders: Orders, context: int, own: int, byte: int) -> int:
    """The place of a byte in the sequence of a level whose own byte stands at `own` in the order."""
    place = int(orders.place[context, byte])
    if place == own:
        return 0
    return place + (1 if place < own else 0)


@njit(cache=True, nogil=True, inline="always")
def byte_at(orders: Orders, context: int, own: int, place: int) -> int:
    """The byte at a place of the sequence."""
    if place > own:
        return int(orders.byte[context, place])
    return int(orders.byte[context, place - 1 if place > 0 else own])


@njit(cache=True, nogil=True, inline="always")
def learn(orders: Orders, context: int, byte: int) -> None:
    """The byte was listed once more: it changes places with the first one that was listed as often."""
    times = orders.times[context, byte]
    if times == MOST_TIMES:
        return
    old, new = orders.place[context, byte], orders.above[context, times]
    other = orders.byte[context, new]
    orders.byte[context, new], orders.byte[context, old] = byte, other
    orders.place[context, byte], orders.place[context, other] = new, old
    orders.above[context, times] = new + 1
    orders.times[context, byte] = times + 1
