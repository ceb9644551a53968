"""Which token a stop is, by how the text spells it: an id is stored where a spelling first occurs in a window.

Tokens of one spelling are nearly always one token, and many rows of a window list the same ones. A table of spellings,
open addressing, is kept by writer and reader alike; a second token of a spelling takes the place of the first.
"""

import numpy as np
from numba import njit

from bytecache.schemas.arrays import I32, U8

HASH_START, HASH_STEP = 1469598103934665603, 1099511628211
"""FNV-1a, 64 bits; of numbering within a table only, so it is no part of the format."""

Spellings = I32
"""int32 [4 slots]: where the text spells it, how many bytes (0: an empty slot), the token, nothing."""


def new_spellings(n: int) -> Spellings:
    """An empty table with room for `n` spellings."""
    return np.zeros(4 << max(4, (2 * n).bit_length()), np.int32)


@njit(cache=True, nogil=True)
def slot_of(spellings: Spellings, text: U8, start: int, length: int) -> int:
    """The slot of a spelling, or the empty one where it belongs."""
    code = np.uint64(HASH_START)
    for i in range(start, start + length):
        code = (code ^ np.uint64(text[i])) * np.uint64(HASH_STEP)
    last = np.uint64(len(spellings) - 1)
    slot = (code ^ (code >> np.uint64(32))) << np.uint64(2) & last
    while spellings[slot + np.uint64(1)]:
        k = 0
        if spellings[slot + np.uint64(1)] == length:
            first = spellings[slot]
            while k < length and text[first + k] == text[start + k]:
                k += 1
        if k == length:
            break
        slot = slot + np.uint64(4) & last
    return int(slot)


@njit(cache=True, nogil=True, inline="always")
def is_empty(spellings: Spellings, slot: int) -> bool:
    """Whether no spelling is at the slot."""
    return bool(spellings[slot + 1] == 0)


@njit(cache=True, nogil=True, inline="always")
def token_at(spellings: Spellings, slot: int) -> int:
    """The token of the spelling at the slot."""
    return int(spellings[slot + 2])


@njit(cache=True, nogil=True)
def note(spellings: Spellings, slot: int, start: int, length: int, token: int) -> None:
    """The token of the spelling at the slot."""
    spellings[slot], spellings[slot + 1], spellings[slot + 2] = start, length, token
