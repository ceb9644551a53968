"""What the engine's thread need not do: lattices and the dump's writer, beside it in threads.

Their loops are compiled and let other threads run, so that while the engine evaluates one window the lattice of the one
before says what that one lacks. With a single processor nothing is gained, and all is done where it is asked for.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

from bytecache.schemas.dump.window import Window
from bytecache.stages.lattice.lattice import Lattice

MOST_THREADS = 4
"""Threads for lattices at most: between their compiled loops all of them share one interpreter with the engine."""


def spare_threads() -> int:
    """Processors beside the engine's own, MOST_THREADS at most."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) - 1)


class Lattices:
    """The lattices of a group of windows as they stand, without targets; each computed once until its window changes.

    A window changes by being replaced in the group's list, or by having more rows.
    """

    def __init__(self, windows: Sequence[Window], pool: ThreadPoolExecutor | None) -> None:
        self._windows, self._pool = windows, pool
        self._known: dict[int, tuple[Window, int, Future[Lattice] | Lattice]] = {}

    def ahead(self, number: int) -> None:
        """Begin with that of window `number` where there is a thread for it."""
        window = self._windows[number]
        if self._pool:
            begun = self._pool.submit(partial(Lattice, targets=False), window)
            self._known[number] = window, len(window.row_start), begun

    def of(self, number: int) -> Lattice:
        """That of window `number`."""
        window = self._windows[number]
        known, rows, lattice = self._known.get(number, (None, 0, None))
        if known is not window or rows != len(window.row_start) or lattice is None:
            lattice = Lattice(window, targets=False)
        elif isinstance(lattice, Future):
            lattice = lattice.result()
        self._known[number] = window, len(window.row_start), lattice
        return lattice


class Writer(Protocol):
    """What takes windows in order."""

    def append(self, window: Window) -> None:
        """Take one."""


class WriterBeside:
    """Windows to a writer in a thread of its own, in order; at most one group of them waits.

    What the writer raises is raised by the next call here. Leaving the context waits for the last window, or drops
    what waits where the block failed.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dump-writer")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> "WriterBeside":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._settle()

    def append(self, group: Sequence[Window]) -> None:
        """Take the windows of a group once those before it are written."""
        self._settle()
        self._waiting = [self._thread.submit(self._writer.append, window) for window in group]

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.result()
