"""Document ids made unique in the order of the corpus: repeated ones get `#2`, `#3`, ...

Batches of ids are met as 64-bit hashes in sorted arrays, merged as those of one length meet (a log-structured set):
8 bytes of memory a document and 0.4 us, so that a billion documents fit where a dictionary would take 100 GB. Two ids
of one hash count as one; the second is renamed then, needlessly and harmlessly: of 2.5 billion, with a chance of 16 %.
"""

import hashlib
import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bytecache.schemas.arrays import U64


class DocumentIds:
    """The ids so far. `n_renamed`: how many were changed."""

    def __init__(self) -> None:
        self.n_renamed = 0
        self._runs: list[U64] = []  # sorted; each at most half as long as the one before
        self._counts: dict[int, int] = {}

    def add(self, ids: Sequence[str], hashes: U64) -> dict[int, str]:
        """Take in the ids of the next documents; returns {place in `ids`: new id} of those that were taken before.

        `hashes`: what `hash_ids` says of them.
        """
        fresh, first = np.unique(hashes, return_index=True)
        firsts = dict(zip(fresh.tolist(), first.tolist(), strict=True))
        repeated = self._known(hashes)
        repeated[np.setdiff1d(np.arange(len(ids)), first)] = True
        todo = np.flatnonzero(repeated).tolist()  # sorted, so a heap
        renamed: dict[int, str] = {}
        issued: set[int] = set()
        while todo:
            at = heapq.heappop(todo)
            own, name, mark = int(hashes[at]), "", 0
            count = self._counts.get(own, 1)
            while not name:
                count += 1
                mark = _hash(f"{ids[at]}#{count}")
                if (
                    mark not in issued
                    and firsts.get(mark, at) >= at
                    and not self._known(np.array([mark], np.uint64))[0]
                ):
                    name = f"{ids[at]}#{count}"
            self._counts[own] = count
            renamed[at] = name
            issued.add(mark)
            later = firsts.get(mark)
            if later is not None and not repeated[later]:  # a document that has this very id of its own
                repeated[later] = True
                heapq.heappush(todo, later)
        self._merge(np.union1d(fresh, np.fromiter(issued, np.uint64, len(issued))))
        self.n_renamed += len(renamed)
        return renamed

    def _known(self, hashes: U64) -> NDArray[np.bool_]:
        found = np.zeros(len(hashes), bool)
        for run in self._runs:
            found |= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] == hashes
        return found

    def _merge(self, run: U64) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.union1d(self._runs.pop(), run)
        if len(run):
            self._runs.append(run)


def hash_ids(ids: Sequence[str]) -> U64:
    """64 bits of each id."""
    return np.fromiter(map(_hash, ids), np.uint64, len(ids))


def _hash(doc_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(doc_id.encode("utf-8"), digest_size=8).digest(), "little")
