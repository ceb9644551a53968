"""Which token a stop is, by how the text spells it: an id is stored where a spelling first occurs in a window.

Tokens of one spelling are nearly always one token, and many rows of a window list the same ones. A table of spellings,
open addressing, is kept by writer and reader alike; a second token of a spelling takes the place of the first.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import I32, I64, U8

HASH_START, HASH_STEP = 1469598103934665603, 1099511628211
"""FNV-1a, 64 bits; of numbering within a table only, so it is no part of the format."""


class Spellings(NamedTuple):
    """A table of more slots than stops."""

    start: I64
    """int64 [slots]; where the text spells it; -1 in an empty slot"""
    length: I64
    """int64 [slots]"""
    token: I32
    """int32 [slots]"""


def new_spellings(stops: int) -> Spellings:
    """An empty table with room for the spellings of so many stops."""
    slots = 1 << max(4, (2 * stops).bit_length())
    return Spellings(np.full(slots, -1, np.int64), np.zeros(slots, np.int64), np.zeros(slots, np.int32))


@njit(cache=True, nogil=True)
def slot_of(spellings: Spellings, text: U8, start: int, length: int) -> int:
    """The slot of a spelling, or the empty one where it belongs."""
    code = np.uint64(HASH_START)
    for i in range(start, start + length):
        code = (code ^ np.uint64(text[i])) * np.uint64(HASH_STEP)
    last = np.uint64(len(spellings.start) - 1)
    slot = (code ^ (code >> np.uint64(32))) & last
    while spellings.start[slot] >= 0 and not _same(spellings, text, start, length, slot):
        slot = (slot + np.uint64(1)) & last
    return int(slot)


@njit(cache=True, nogil=True)
def _same(spellings: Spellings, text: U8, start: int, length: int, slot: int) -> bool:
    if spellings.length[slot] != length:
        return False
    first = spellings.start[slot]
    k = 0
    while k < length and text[first + k] == text[start + k]:
        k += 1
    return bool(k == length)


@njit(cache=True, nogil=True)
def note(spellings: Spellings, slot: int, start: int, length: int, token: int) -> None:
    """The token of the spelling at the slot."""
    spellings.start[slot], spellings.length[slot], spellings.token[slot] = start, length, token
