"""Rows as a caller hands them to the writer, dense or sparse: two forms behind one protocol. No I/O."""

from typing import Protocol

import numpy as np

from bytecache.schemas.arrays import F32, I16, I64, SYMBOLS
from bytecache.schemas.shard import gather
from bytecache.schemas.shard.blocks import Room
from bytecache.schemas.shard.gather import Gathered, Threshold


class Incoming(Protocol):
    """Rows of one call of the writer, gathered some at a time."""

    piece: int
    """rows to gather at a time"""

    def most_entries(self, lo: int, hi: int) -> int:
        """Entries that rows lo..hi may need room for."""
        ...

    def gather(self, lo: int, hi: int, tail: F32, threshold: Threshold, room: Room) -> Gathered:
        """Put rows lo..hi, of these tails, into `room`."""
        ...

    def without_negative_zeros(self) -> "Incoming":
        """The same rows with 0.0 for -0.0, whose bits the loops would take for a negative number's."""
        ...


class DenseRows:
    """float32 [m, 257]."""

    piece = 1 << 10  # the worst case, 257 entries a row, is half of a block

    def __init__(self, probs: F32) -> None:
        self._prob = probs.reshape(-1)

    def most_entries(self, lo: int, hi: int) -> int:
        """All of them."""
        return SYMBOLS * (hi - lo)

    def gather(self, lo: int, hi: int, tail: F32, threshold: Threshold, room: Room) -> Gathered:
        """See `Incoming`."""
        prob = self._prob[lo * SYMBOLS : hi * SYMBOLS]
        gathered: Gathered = gather.gather_rows(gather.Dense(prob, prob.view(np.uint32), tail), threshold, room)
        return gathered

    def without_negative_zeros(self) -> "DenseRows":
        """See `Incoming`."""
        return DenseRows(self._prob + np.float32(0))


class SparseRows:
    """count int64 [m] of symbol int16, prob float32 [entries]; start int64 [m + 1]: where each row's entries begin."""

    piece = 1 << 12

    def __init__(self, count: I64, start: I64, symbol: I16, prob: F32) -> None:
        self._count, self._start, self._symbol, self._prob = count, start, symbol, prob

    def most_entries(self, lo: int, hi: int) -> int:
        """Those there are, and one that is written before it is decided whether to keep it."""
        return int(self._start[hi] - self._start[lo]) + 1

    def gather(self, lo: int, hi: int, tail: F32, threshold: Threshold, room: Room) -> Gathered:
        """See `Incoming`."""
        entries = slice(self._start[lo], self._start[hi])
        prob = self._prob[entries]
        sparse = gather.Sparse(self._count[lo:hi], self._symbol[entries], prob, prob.view(np.uint32), tail)
        gathered: Gathered = gather.gather_sparse(sparse, threshold, room)
        return gathered

    def without_negative_zeros(self) -> "SparseRows":
        """See `Incoming`."""
        return SparseRows(self._count, self._start, self._symbol, self._prob + np.float32(0))
