"""Where slices end: a document's own hash says so, between half of `corpus.unit_bytes` and the whole.

A document ends a slice if no document of its split that ends less than half a unit before or after it has a lower hash
(of equal ones the first counts). Two such ends are half a unit apart or more, and each depends on its neighbours alone:
whoever reads a part of the corpus finds the same ends as who reads the whole, and a document that comes, goes or
changes leaves all ends but those within half a unit of it where they are. A stretch between two ends that is longer
than a unit is divided into two slices, or, where it is longer than two, first into slices as full as documents allow;
a document longer than a unit is a slice alone.

Source: local maximum chunking (Bjørner, Blass and Gurevich 2010, "Content-dependent chunking for differential
compression"), with documents in place of bytes. Price: 0.5 us a document; four units of text at a time in memory.
"""

import itertools
from typing import NamedTuple

import numpy as np

from bytecache.schemas.arrays import I64, U64

LONGEST_HEAD = 128 * 1024 * 1024
"""Bytes of text after which who does not know where a slice begins gives up looking for the first end of one."""


class Entry(NamedTuple):
    """A document on its way into a slice: `text` in UTF-8, `digest` of text and context, `place` in the corpus."""

    doc_id: str
    text: bytes
    context: str
    digest: bytes
    place: tuple[int, int]


class AllAlikeError(Exception):
    """No slice ends for certain within `LONGEST_HEAD` bytes: the documents are too alike."""


class Slicer:
    """Takes the documents of one split in order and gives slices.

    `begins`: whether the first document begins a slice. Where nobody knows, `head` gets the documents up to the first
    end that is certain: they belong to a slice that began earlier.
    """

    def __init__(self, unit_bytes: int, *, begins: bool) -> None:
        self.head: list[Entry] | None = [] if begins else None
        self.n_bytes = 0
        """Of text that is in no slice yet."""
        self._entries: list[Entry] = []
        self._n_cut = 0
        """How many of the entries are in slices: the last half a unit, by which the documents after it are judged."""
        self._unit_bytes = unit_bytes
        self._enough = unit_bytes

    def add(self, entry: Entry) -> list[list[Entry]]:
        """One more document; the slices that are certain now, looked for whenever a unit or so has come in."""
        self._entries.append(entry)
        self.n_bytes += len(entry.text)
        if self.n_bytes < self._enough:
            return []
        pieces = self.slices()
        if self.head is None and self.n_bytes > LONGEST_HEAD:
            raise AllAlikeError
        return pieces

    def join(self, later: "Slicer") -> list[list[Entry]]:
        """What one that knew nothing of these documents made of those that follow; the slices that are certain now."""
        if later.head is None:
            self._entries += later._entries
            return self.slices()
        self._entries += later.head
        pieces = self.slices(end=True)
        self._entries, self._n_cut = later._entries, later._n_cut
        return pieces + self.slices()

    def slices(self, *, end: bool = False) -> list[list[Entry]]:
        """The slices that are certain; all of them where after the last document a slice ends."""
        entries, begin = self._entries, self._n_cut
        sizes = np.fromiter((len(entry.text) for entry in entries), np.int64, len(entries))
        hashes = np.frombuffer(b"".join(entry.digest[:8] for entry in entries), "<u8")
        if self.head is None:
            begin = next(iter(certain_ends(sizes, hashes, self._unit_bytes // 2)), 0)
            self.head = entries[:begin] or None
        edges = [begin]
        if self.head is not None:
            edges += slice_ends(sizes, hashes, self._unit_bytes, begin=begin, whole=end)
        last = edges[-1]
        near = int(np.searchsorted(np.cumsum(sizes[:last][::-1]), self._unit_bytes // 2)) + 1
        self._n_cut = min(near, last)
        self._entries = entries[last - self._n_cut :]
        self.n_bytes = int(sizes[last:].sum())
        self._enough = self.n_bytes + max(self._unit_bytes // 2, self.n_bytes if self.head is None else 0)
        return [entries[low:high] for low, high in itertools.pairwise(edges)]


def slice_ends(sizes: I64, hashes: U64, unit_bytes: int, *, begin: int = 0, whole: bool) -> list[int]:
    """How many documents are before each end of a slice, of which the one at `begin` begins a slice.

    Args:
        sizes: bytes of each. hashes: what decides. begin: how many are in slices already. whole: a slice ends after
            the last one too; else the ends that do not depend on what comes.
    """
    ends: list[int] = []
    for end in certain_ends(sizes, hashes, unit_bytes // 2):
        if end > begin:
            ends += [begin + edge for edge in _divide(sizes[begin:end], unit_bytes, whole=True)]
            begin = end
    return ends + [begin + edge for edge in _divide(sizes[begin:], unit_bytes, whole=whole)]


def certain_ends(sizes: I64, hashes: U64, least: int) -> list[int]:
    """How many documents are before each end that content decides, where `least` bytes on either side are known."""
    after = np.cumsum(sizes)  # the byte after each document
    ends: list[int] = []
    at = int(np.searchsorted(after, least))
    while at < len(after) and after[at] + least <= after[-1]:
        first, last = np.searchsorted(after, after[at] - least, "right"), np.searchsorted(after, after[at] + least)
        lowest = int(first + np.argmin(hashes[first:last]))
        if lowest == at:
            ends.append(at + 1)
        # Whatever lies between has a lower hash too near.
        at = lowest if lowest > at else int(np.searchsorted(after, after[lowest] + least))
    return ends


def _divide(sizes: I64, unit_bytes: int, *, whole: bool) -> list[int]:
    """Ends within a stretch that content does not divide; not `whole`: of which only the beginning is known."""
    after = np.concatenate(([0], np.cumsum(sizes)))
    certain = after[-1] if whole else after[-1] - unit_bytes // 2  # content may yet end the stretch there
    edges = [0]
    while edges[-1] < len(sizes):
        begin = after[edges[-1]]
        fitting = max(int(np.searchsorted(after, begin + unit_bytes, "right")) - 1, edges[-1] + 1)
        if certain - begin <= 2 * unit_bytes:
            if not whole:
                break
            middle = int(np.argmin(np.abs(after - (begin + after[-1]) / 2)))
            if fitting < len(sizes) and max(after[middle] - begin, after[-1] - after[middle]) <= unit_bytes:
                fitting = middle
        edges.append(fitting)
    return edges[1:]
