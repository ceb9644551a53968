"""A function of many tasks in processes of this machine: answers in order, few in waiting, no process left behind.

Processes are started anew (spawn), so threads and locks of this one do not matter. They leave when this process does,
however it ends, and leave signals to it. With one process everything happens here, one task at a time.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, Generic, TypeVar

from bytecache.schemas.errors import Interrupted

Task = TypeVar("Task")
Answer = TypeVar("Answer")
Stop = Callable[[], bool]
_POLL_S = 0.2

_stop: Any = None
"""In a process of a pool: the event that says it shall stop."""


class Processes(Generic[Task, Answer]):
    """Use as a context. `jobs`: how many; 1 = none but this one. `stop`: looked at while waiting, and by the tasks."""

    def __init__(self, jobs: int, stop: Stop) -> None:
        self.jobs, self.stop = jobs, stop
        self._pool: ProcessPoolExecutor | None = None
        self._event: Any = None

    def __enter__(self) -> "Processes[Task, Answer]":
        if self.jobs > 1:
            context = multiprocessing.get_context("spawn")
            self._event = context.Event()
            self._pool = ProcessPoolExecutor(self.jobs, context, _begin, (self._event,))
        return self

    def __exit__(self, *reason: object) -> None:
        if self._pool is not None:
            self._event.set()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Task, Stop], Answer], tasks: Iterable[Task]) -> Iterator[Answer]:
        """`function(task, stop)` of every task, in order; tasks are asked for as answers are taken.

        Raises what `function` raises, when its turn comes, and Interrupted when `stop()` or a process was killed.
        """
        if self._pool is None:
            for task in tasks:
                yield function(task, self.stop)
            return
        waiting: deque[Future[Answer]] = deque()
        left = iter(tasks)
        try:
            while True:
                with suppress(StopIteration):
                    while len(waiting) < 2 * self.jobs:
                        waiting.append(self._pool.submit(_call, function, next(left)))
                if not waiting:
                    return
                yield self._result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def _result(self, future: "Future[Answer]") -> Answer:
        while not wait([future], _POLL_S).done:
            if self.stop():
                self._event.set()
                raise Interrupted("stopped by a signal before it was whole; rerun the same command")
        try:
            return future.result()
        except BrokenProcessPool:
            raise Interrupted(
                "a process of this command was killed from outside (out of memory?); rerun the same command, "
                "with fewer processes"
            ) from None


def _begin(event: Any) -> None:
    global _stop
    _stop = event
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Task, Stop], Answer], task: Task) -> Answer:
    return function(task, _stop.is_set)
