"""What the engine's thread need not do: lattices and the dump's writer, beside it in threads.

Their loops are compiled and let other threads run, so that while the engine evaluates one window the lattice of the one
before says what that one lacks. With a single processor nothing is gained, and all is done where it is asked for.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from bytecache.schemas.dump.window import Window
from bytecache.stages.lattice.lattice import Lattice

MOST_THREADS = 4
"""Threads for lattices at most: between their compiled loops all of them share one interpreter with the engine."""


Choice = TypeVar("Choice")


def spare_threads() -> int:
    """Processors beside the engine's own, MOST_THREADS at most."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) - 1)


class Lattices(Generic[Choice]):
    """The lattices of a group of windows as they stand, without targets; each computed once until its window changes.

    A change is made where the lattice is walked, and so is what is chosen of it: beside the engine, where there is a
    thread. Until it is asked for (`of`, `settle`), `windows` has a window as it was. A window that somebody else
    changes, by replacing it in the list or by giving it more rows, is walked again.
    """

    def __init__(
        self, windows: list[Window], pool: ThreadPoolExecutor | None,
        choose: Callable[[int, Window, Lattice], Choice] | None = None,
        go_on: Callable[[Window, Choice], bool] | None = None,
    ) -> None:  # fmt: skip
        """`choose`: what is wanted of every lattice, made with it.

        `go_on`: gives a window what was chosen if it is at hand, in place, and says so; the lattice is walked again.
        """
        self._windows, self._pool, self._choose, self._go_on = windows, pool, choose, go_on
        self._known: dict[int, tuple[Window, int, Lattice, Choice | None]] = {}
        self._begun: dict[int, Future[tuple[Window, int, Lattice, Choice | None]]] = {}

    def change(self, number: int, make: Callable[[], Window]) -> None:
        """Window `number` becomes what `make` gives; it may be the next one that the list has not yet."""
        if self._pool:
            self._begun[number] = self._pool.submit(self._walk, number, make)
        else:
            self._put(number, make())

    def _walk(self, number: int, make: Callable[[], Window]) -> tuple[Window, int, Lattice, Choice | None]:
        window = make()
        while True:
            lattice = Lattice(window, targets=False)
            choice = None if self._choose is None else self._choose(number, window, lattice)
            if choice is None or self._go_on is None or not self._go_on(window, choice):
                return window, len(window.row_start), lattice, choice

    def _put(self, number: int, window: Window) -> None:
        self._windows[number : number + 1] = [window]

    def settle(self) -> None:
        """All changes are in the list."""
        for number in list(self._begun):
            self._settle(number)

    def _settle(self, number: int) -> None:
        if begun := self._begun.pop(number, None):
            self._known[number] = begun.result()
            self._put(number, self._known[number][0])

    def of(self, number: int) -> tuple[Lattice, Choice | None]:
        """That of window `number`, and what was chosen of it."""
        self._settle(number)
        window = self._windows[number]
        known = self._known.get(number)
        if known is None or known[0] is not window or known[1] != len(window.row_start):
            known = self._known[number] = self._walk(number, lambda: window)
        return known[2], known[3]


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
