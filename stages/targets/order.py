"""The order of training windows: a pure function of (data set, seed, position), so that resume needs one integer.

A *window* is a run of `window` positions of one shard; its content is whatever student tokens start inside it, so the
order depends on nothing but the manifest: no shard is read and nothing is tokenised to know window number 10 million.
Per epoch: every shard's window grid is shifted by a random offset (the cuts differ between epochs), shards are
permuted, taken `pool` at a time, and the windows of a pool are permuted together. Ranks and loader workers only choose
which numbers of the one global sequence they serve; they never enter the computation.

Permutations sort splitmix64 keys rather than use `numpy.random`, whose streams may change between versions.
Price: 8 bytes per window of one pool (16 shards of 16 MiB and 1 KiB windows: 2 MB), and one pass over the shard sizes
for each epoch that a resume skips. The reader holds the shards of the present and the next pool (`shelf`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bytecache.schemas.arrays import I64

POOL = 16
"""Shards whose windows are mixed together."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Window(NamedTuple):
    """Positions [lo, hi) of shard number `shard` of the split, in its `epoch`-th reading."""

    epoch: int
    shard: int
    lo: int
    hi: int


class Pool:
    """Shards whose windows are mixed, `shards`, and those of their windows that are still to be read, in order."""

    def __init__(self, shards: list[int], rest: int, windows: Iterator[Window]) -> None:
        self.shards, self._rest, self._windows = shards, rest, windows

    def __len__(self) -> int:
        """Windows to be read when the pool was made."""
        return self._rest

    def __iter__(self) -> Iterator[Window]:
        return self._windows


def _splitmix64(key: int, n: int) -> npt.NDArray[np.uint64]:
    """Outputs 1..n of the splitmix64 generator seeded with `key` (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = np.uint64(key) + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Order:
    """The infinite sequence of training windows over one split.

    Args:
        dataset_hash: identity of the data set (its content hash).
        positions: positions in each shard of the split, in manifest order.
        window: positions per window, >= 1.
        seed: any integer.
        pool: shards mixed together.

    Raises:
        ValueError: the split is empty, or a size is not positive.
    """

    def __init__(
        self, dataset_hash: str, positions: Sequence[int], window: int, seed: int, *, pool: int = POOL
    ) -> None:
        if window < 1 or pool < 1:
            raise ValueError(f"window {window} and pool {pool} must be at least 1")
        self.positions = np.asarray(positions, dtype=np.int64)
        if self.positions.size == 0 or int(self.positions.sum()) == 0:
            raise ValueError("the split has no positions")
        self.dataset_hash, self.window, self.seed, self.pool = dataset_hash, window, seed, pool

    def _key(self, epoch: int, purpose: str, index: int = 0) -> int:
        text = f"{self.dataset_hash}:{self.seed}:{epoch}:{purpose}:{index}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def _permutation(self, n: int, key: int) -> I64:
        return np.argsort(_splitmix64(key, n), kind="stable").astype(np.int64)

    def _offsets(self, epoch: int) -> I64:
        keys = _splitmix64(self._key(epoch, "offset"), self.positions.size)
        return (keys % np.uint64(self.window)).astype(np.int64)

    def _counts(self, epoch: int) -> I64:
        counts = (self.positions + self._offsets(epoch) + self.window - 1) // self.window
        return np.where(self.positions > 0, counts, 0)

    def epoch_length(self, epoch: int) -> int:
        """Windows in one epoch; differs by at most one per shard between epochs."""
        return int(self._counts(epoch).sum())

    def windows(self, start: int = 0) -> Iterator[Window]:
        """Windows number `start`, `start` + 1, ... without end."""
        return chain.from_iterable(self.pools(start))

    def pools(self, start: int = 0, epochs: int = 0) -> Iterator[Pool]:
        """The same windows pool by pool; of the first `epochs` epochs alone, unless that is 0."""
        epoch = 0
        while start >= (length := self.epoch_length(epoch)):
            start -= length
            epoch += 1
        while not epochs or epoch < epochs:
            counts, offsets = self._counts(epoch), self._offsets(epoch)
            shards = self._permutation(self.positions.size, self._key(epoch, "shards"))
            for number, first in enumerate(range(0, shards.size, self.pool)):
                members = shards[first : first + self.pool]
                total = int(counts[members].sum())
                if start >= total:
                    start -= total
                    continue
                windows = self._mixed(epoch, number, members, counts, offsets, start)
                yield Pool(members[counts[members] > 0].tolist(), total - start, windows)
                start = 0
            epoch += 1

    def _mixed(self, epoch: int, number: int, members: I64, counts: I64, offsets: I64, start: int) -> Iterator[Window]:
        """Windows of pool `number` of an epoch from the `start`-th on."""
        ends = np.cumsum(counts[members])
        for index in self._permutation(int(ends[-1]), self._key(epoch, "windows", number))[start:]:
            member = int(np.searchsorted(ends, index, side="right"))
            shard = int(members[member])
            cell = int(index - (ends[member] - counts[shard]))
            lo = cell * self.window - int(offsets[shard])
            hi = min(lo + self.window, int(self.positions[shard]))
            yield Window(epoch, shard, max(lo, 0), hi)


def sequential(positions: Sequence[int], window: int) -> Iterator[Window]:
    """Every window of every shard once, in order, cut at multiples of `window`: the order of an evaluation."""
    for shard, n in enumerate(positions):
        for lo in range(0, n, window):
            yield Window(0, shard, lo, min(lo + window, n))
