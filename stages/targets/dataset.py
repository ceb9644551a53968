"""Byte targets for any training loop: windows from a folder or URL, ordered, resumable, in bounded memory.

    from bytecache import ByteTargets

    for window in ByteTargets("hf://datasets/owner/name", split="train", window=1024, seed=0):
        window.text, window.row, window.symbol, window.prob, window.tail, ...

A window is a run of so many positions, or a whole document, or a whole conversation (`by`).

The sequence of windows is endless and a pure function of (dataset, split, window, seed, pool), see `order`; `epochs`
bounds it. Ranks take turns in it, and the workers of a `torch.utils.data.DataLoader` take turns in their rank's share:
with `batch_size=None` (or batches collated by you) R ranks x W workers yield together what one process yields alone.
State is one integer, the position in that sequence, and a fingerprint of what defines it; a state taken in one process
can be loaded at any number of ranks and workers. `torchdata.stateful_dataloader.StatefulDataLoader` saves and restores
it by itself with the same workers; `position` reads the integer out of its state for another layout.
Nothing is skipped: a shard that is not the manifest's is an IntegrityError that names it.

Price: 7 bytes of memory per byte of text and 2 per listed probability (14 together at the default precision), for the
shards of the present pool and, loaded meanwhile, of the next (`shelf`), in each process: with shards of 16 MiB of text
and 16 in a pool 3.7 GB, 7.5 at most; `pool` = 4 takes a quarter of it. A worker is a process: 0 or 1 suffices, since
reading runs in threads beside your step. Speeds: `benchmarks/loader.py`.
"""

import hashlib
import json
import os
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset

from bytecache.schemas.dataset.index import Dataset, ShardEntry
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.shard.reader import ByteShard
from bytecache.stages.targets.order import POOL, Order, Window
from bytecache.stages.targets.prefetch import prefetch
from bytecache.stages.targets.share import Layout, Share
from bytecache.stages.targets.shelf import Shelf
from bytecache.stages.targets.source import CACHE_BYTES, fetch_ahead, load_shard, open_dataset

STATE_VERSION = 1
WINDOW = 1024
"""Positions of a window, unless told."""
_LATER_TURN = re.compile(r"(.*)/(\d+)")
"""The id of an answer in a conversation of several (`stages.corpus.conversations`)."""


class TargetWindow(NamedTuple):
    """n consecutive positions of one shard and what the teacher says at each; may span documents (each ends in END)."""

    number: int
    """position in the global sequence; by conversations it counts documents"""
    epoch: int
    shard: int
    """index among the split's shards, in manifest order"""
    start: int
    """first position in the shard"""
    text: npt.NDArray[np.uint8]
    """uint8 [n]: the byte that follows; 0 at END positions"""
    true: npt.NDArray[np.int64]
    """int64 [n]: the same as a symbol, 256 = END"""
    mask: npt.NDArray[np.uint8]
    """uint8 [n]: 1 = supervised"""
    tail: npt.NDArray[np.float32]
    """float32 [n]: probability of everything not listed"""
    row: npt.NDArray[np.int32]
    """int32 [E], ascending: which of the n positions"""
    symbol: npt.NDArray[np.int16]
    """int16 [E], ascending within a row: 0..255, 256 = END"""
    prob: npt.NDArray[np.float32]
    """float32 [E]: probability of that symbol there; a row's and its tail sum to 1"""
    doc_id: tuple[str, ...] = ()
    """ids of the documents that have a position here, in order"""
    source: int = 0
    """which data set of a mixture (`MixedTargets`)"""


class TargetWindows(IterableDataset[TargetWindow]):
    """A sequence of windows that ranks and workers share, from any place in it.

    Args:
        share: this process's. depth: windows decoded ahead; 0 = none.
        fingerprint: of what defines the sequence. where: its name in messages.
    """

    def __init__(self, share: Share, depth: int, fingerprint: str, where: str) -> None:
        self.depth, self._share, self.fingerprint, self._where = depth, share, fingerprint, where
        self._start = 0  # global position at which the present reading began
        self._taken = 0  # windows this process has handed out since
        self._loaded: list[int] | None = None  # [rank, ranks, worker, workers] of a loaded worker state

    def _windows(self, first: int, stride: int) -> Generator[TargetWindow | None, None, None]:
        """Windows `first`, `first` + `stride`, ...; None for a number that has no window of its own."""
        raise NotImplementedError

    def layout(self) -> Layout:
        """That of the calling process."""
        return self._share.layout()

    def __iter__(self) -> Iterator[TargetWindow]:
        """From the loaded state, or the start; a second call starts again unless a state was loaded since."""
        rank, ranks, worker, workers = self.layout()
        if self._loaded is None:
            self._start = self._taken = 0
        elif self._taken and self._loaded != [rank, ranks, worker, workers]:
            was = "rank {} of {}, worker {} of {}".format(*self._loaded)
            raise ConfigError(
                f"this state is that of {was}, now rank {rank} of {ranks}, worker {worker} of {workers}; "
                "to change the layout load {'position': ByteTargets.position(state)}"
            )
        self._loaded = None
        # Ranks deal the numbers out by remainder, so that any start is fair; a rank's workers by turns.
        first = self._start + (rank - self._start) % ranks + ranks * (worker + workers * self._taken)
        source = self._windows(first, ranks * workers)
        windows = prefetch(source, self.depth) if self.depth else source
        with closing(windows):
            for window in windows:
                self._taken += 1
                if window is not None:
                    yield window

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from: after the last window that this process handed out."""
        rank, ranks, worker, workers = self._loaded or self.layout()
        state = {"version": STATE_VERSION, "fingerprint": self.fingerprint}
        if workers == 1:
            return {**state, "position": self._start + ranks * self._taken}
        return {**state, "start": self._start, "taken": self._taken, "layout": [rank, ranks, worker, workers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the windows that a state has seen.

        {"position": n} alone is enough; a fingerprint is compared if there is one. A position fits any number of
        ranks and workers; the state of one of several workers fits the same worker only. Raises ConfigError.
        """
        if state.get("version", STATE_VERSION) != STATE_VERSION:
            raise ConfigError(f"loader state version {state['version']}, this software knows {STATE_VERSION}")
        if state.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise ConfigError(
                f"{self._where}: the state belongs to another data set, split, window, seed or pool "
                f"(fingerprint {str(state['fingerprint'])[:12]}, now {self.fingerprint[:12]}); restore those"
            )
        self._start = int(state.get("position", state.get("start", 0)))
        self._taken = int(state.get("taken", 0))
        self._loaded = list(state.get("layout", [0, 1, 0, 1]))

    @staticmethod
    def position(state: Any) -> int:
        """The global position in a state: of this class, or of a StatefulDataLoader around it with any workers.

        Every window before it was handed out by the ranks in step, none after it. Raises ConfigError.
        """
        states = list(_states(state))
        if states and "position" in states[0]:
            return int(states[0]["position"])
        if not states or len(states) != states[0]["layout"][3]:
            raise ConfigError("this is no state of ByteTargets, or not that of all its workers")
        ranks = int(states[0]["layout"][1])
        return int(states[0]["start"]) + ranks * sum(int(one["taken"]) for one in states)


@dataclass(frozen=True)
class Reading:
    """Which windows of a split there are, and in which order: all that defines them beside the data set's content.

    Raises:
        ConfigError: impossible arguments.
    """

    split: str
    window: int
    by: Literal["bytes", "documents", "conversations"]
    seed: int
    pool: int

    def __post_init__(self) -> None:
        if self.by not in ("bytes", "documents", "conversations") or (self.by != "bytes" and self.window != WINDOW):
            raise ConfigError(
                f"by = {self.by!r}, window = {self.window}: by is bytes (of a window's size), documents or "
                "conversations"
            )
        if self.window < 1 or self.pool < 1:
            raise ConfigError(f"window {self.window}, pool {self.pool}: must not be negative or 0")

    def order(self, content_sha256: str, entries: Iterable[ShardEntry]) -> Order:
        """Of the windows of these shards."""
        if self.by == "bytes":
            return Order(content_sha256, [e.n_positions for e in entries], self.window, self.seed, pool=self.pool)
        # Whole documents are windows of one in an order of documents.
        return Order(content_sha256, [e.n_documents for e in entries], 1, self.seed, pool=self.pool)

    def fingerprint(self, content_sha256: str) -> str:
        """sha256 of what defines the sequence."""
        what = [content_sha256, self.split, self.window, self.seed, self.pool]
        return hashlib.sha256(json.dumps([*what, *([] if self.by == "bytes" else [self.by])]).encode()).hexdigest()


class ByteTargets(TargetWindows):
    """Windows of byte targets in training order.

    Args:
        place: a folder, an fsspec URL, or a Dataset from `open_dataset`.
        split: "train" or "heldout". window: positions per window, at least 1. seed: of the order.
        by: what a window is: "bytes", `window` positions wherever they end; "documents", one whole document; or
            "conversations", all answers of one conversation, each a document whose masked head is what it answers.
            Only the first has a size.
        epochs: stop after this many readings of the split; 0 = never.
        rank, ranks: this process's share; by default those of torch.distributed, if it is initialised, when iterated.
        pool: shards mixed together; twice as many are in memory at most. depth: windows decoded ahead; 0 = none.
        content_sha256: the content you expect (`content_sha256` of dataset.json); "" = any.
        cache_dir, cache_bytes: see `open_dataset`.

    Raises:
        InputError: the split is empty. ConfigError: impossible arguments, or content other than `content_sha256`.
        IntegrityError, StorageError: an index or, while iterating, a shard that is damaged or out of reach.
    """

    def __init__(
        self, place: str | os.PathLike[str] | Dataset, split: str = "train", *, window: int = WINDOW,
        by: Literal["bytes", "documents", "conversations"] = "bytes", seed: int = 0, epochs: int = 0,
        rank: int | None = None, ranks: int | None = None, pool: int = POOL, depth: int = 8,
        content_sha256: str = "", cache_dir: str | os.PathLike[str] = "", cache_bytes: int = CACHE_BYTES,
    ) -> None:  # fmt: skip
        self.dataset = open_dataset(place, cache_dir=cache_dir, cache_bytes=cache_bytes)
        if content_sha256 and content_sha256 != self.dataset.content_sha256:
            raise ConfigError(
                f"{self.dataset.where}: content is {self.dataset.content_sha256}, expected {content_sha256}; "
                "the data set was replaced: fetch the one you want, or drop content_sha256"
            )
        if depth < 0 or epochs < 0:
            raise ConfigError(f"depth {depth}, epochs {epochs}: must not be negative")
        reading = Reading(split, window, by, seed, pool)
        self.entries = self.dataset.split(split)
        if not self.entries:
            splits = ", ".join(sorted({entry.split for entry in self.dataset.entries}))
            raise InputError(f"{self.dataset.where}: no shards of split {split!r}; it has {splits or 'none'}")
        self.order = reading.order(self.dataset.content_sha256, self.entries)
        self.epochs, self.by = epochs, by
        fingerprint = reading.fingerprint(self.dataset.content_sha256)
        super().__init__(Share(rank, ranks), depth, fingerprint, self.dataset.where)
        self._shelf = self._new_shelf()

    def _new_shelf(self) -> Shelf[ByteShard]:
        return Shelf(
            lambda number: load_shard(self.dataset, self.entries[number]),
            lambda number: fetch_ahead(self.dataset, self.entries[number]),
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process that is spawned gets: everything but the shards in memory, which it loads itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_shelf"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shelf = self._new_shelf()

    def _windows(self, first: int, stride: int) -> Generator[TargetWindow | None, None, None]:
        with closing(self.follow(first)) as windows:
            for number, window in islice(enumerate(windows, first), 0, None, stride):
                yield self.read(number, window)

    def follow(self, first: int) -> Generator[Window, None, None]:
        """Windows number `first`, `first` + 1, ... of its order, their shards loaded in time."""
        return self._shelf.follow(self.order.pools(first, self.epochs))

    def read(self, number: int, window: Window, source: int = 0) -> TargetWindow | None:
        """One window's content; None for a document that is not the first of its conversation, `by` conversations."""
        shard = self._shelf[window.shard]
        lo, hi = window.lo, window.hi
        if self.by == "documents":
            lo, hi = (int(shard.doc_start[i]) for i in (lo, hi))
        elif self.by == "conversations":
            first, last = _conversation(shard, lo)
            if first != lo:
                return None
            lo, hi = int(shard.doc_start[first]), int(shard.doc_start[last])
        text = np.array(shard.text[lo:hi])  # a copy: a view would keep the shard alive
        first, last = np.searchsorted(shard.doc_start, [lo + 1, hi])
        ids = shard.doc_id[int(first) - 1 : int(last)]
        triples = shard.triples(lo, hi)
        return TargetWindow(
            number, window.epoch, window.shard, lo, text, shard.symbols(lo, hi), np.array(shard.mask[lo:hi]),
            shard.tails(lo, hi), triples.row, triples.symbol, triples.prob, tuple(ids), source,
        )  # fmt: skip


def _conversation(shard: ByteShard, document: int) -> tuple[int, int]:
    """(first, one past the last) document of the conversation of one. Raises InputError where there are none."""
    if shard.attrs.get("kind", "text") == "text":
        raise InputError(f"{shard.path} holds plain text, no conversations; read it by documents")

    def follows(later: int) -> bool:
        """Whether a document is the turn after the one before it."""
        turn, before = (_LATER_TURN.fullmatch(shard.doc_id[i]) for i in (later, later - 1))
        return bool(turn and before and turn[1] == before[1] and int(turn[2]) == int(before[2]) + 1)

    first, last = document, document + 1
    while first > 0 and follows(first):
        first -= 1
    while last < len(shard.doc_id) and follows(last):
        last += 1
    return first, last


def _states(value: Any) -> Iterator[dict[str, Any]]:
    """The states of ByteTargets inside nested dictionaries, each worker's once."""
    if not isinstance(value, dict):
        return
    if "fingerprint" in value and ("position" in value or "taken" in value):
        yield value
        return
    for inner in value.values():
        yield from _states(inner)
