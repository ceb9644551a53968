"""Rows that wait in memory to be encoded."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytecache.schemas.arrays import END, F32, F64, I16, U8

BLOCK = 1 << 14
"""Rows that are encoded at a time."""
ENTRIES = 1 << 19
"""Entries that a block of rows has room for; memory of which only what is used is real."""


class Block:
    """Up to `BLOCK` rows that wait to be encoded: checked, their entries in order (see `gather`)."""

    def __init__(self, entries: int) -> None:
        self.n_rows = self.n_entries = 0
        self.mask: U8 = np.empty(BLOCK, np.uint8)
        self.true: I16 = np.empty(BLOCK, np.int16)  # the symbol that follows
        self.count: I16 = np.empty(BLOCK, np.int16)
        self.listable: I16 = np.empty(BLOCK, np.int16)
        self.rest: F64 = np.empty(BLOCK, np.float64)
        self.unlisted: F64 = np.empty(BLOCK, np.float64)
        self.given: F32 = np.empty(BLOCK, np.float32)
        self.symbol: I16 = np.empty(entries, np.int16)
        self.prob: F32 = np.empty(entries, np.float32)

    def has_room(self, rows: int, entries: int) -> bool:
        """Whether so many more rows and entries fit."""
        return self.n_rows + rows <= BLOCK and self.n_entries + entries <= len(self.symbol)

    def room(self, rows: int) -> "Room":
        """Where the next `rows` go, with all the room for entries that there is."""
        at, entry = slice(self.n_rows, self.n_rows + rows), self.n_entries
        return Room(
            self.count[at], self.listable[at], self.rest[at], self.unlisted[at],
            self.symbol[entry:], self.prob[entry:], self.prob[entry:].view(np.uint32),
        )  # fmt: skip

    def add(self, text: U8, mask: U8, tail: F32, entries: int) -> None:
        """Count rows that were put into `room`, with what follows them (`text`, then END), and their entries."""
        rows = slice(self.n_rows, self.n_rows + len(tail))
        self.true[rows] = END
        self.true[self.n_rows : self.n_rows + len(text)] = text
        self.mask[rows], self.given[rows] = mask, tail
        self.n_rows, self.n_entries = rows.stop, self.n_entries + entries

    def rows(self, n: int) -> "Rows":
        """The first n rows."""
        m = int(self.count[:n].sum(dtype=np.int64))
        return Rows(
            self.true[:n], self.mask[:n], self.count[:n], self.listable[:n], self.rest[:n], self.unlisted[:n],
            self.given[:n], self.symbol[:m], self.prob[:m], self.prob[:m].view(np.uint32),
        )  # fmt: skip


class Room(NamedTuple):
    """Where `gather` puts m rows: the columns of `Rows` that it fills."""

    n_kept: I16
    listable: I16
    rest: F64
    unlisted: F64
    symbol: I16
    prob: F32
    bits: NDArray[np.uint32]


class Rows(NamedTuple):
    """N rows as `gather` keeps them, with E entries: the most likely symbol, those that could be listed, the rest.

    true int16 [N]: the symbol that follows. mask uint8 [N]: 1 where the divergence counts the row. n_kept, listable
    int16 [N]: entries, and how many could be listed. rest, unlisted float64 [N]: mass that has no entry, and that with
    all entries but the first. given float32 [N]: the unlisted mass they came with. symbol int16, prob float32, and
    its bits, uint32 [E].
    """

    true: I16
    mask: U8
    n_kept: I16
    listable: I16
    rest: F64
    unlisted: F64
    given: F32
    symbol: I16
    prob: F32
    bits: NDArray[np.uint32]
