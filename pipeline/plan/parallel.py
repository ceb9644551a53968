"""A function of many tasks in processes of this machine: answers in order, few in waiting, no process left behind.

Processes are started anew (spawn), so threads and locks of this one do not matter. They leave when this process does,
however it ends, and leave signals to it.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from bytecache.schemas.errors import Interrupted

Task = TypeVar("Task")
Answer = TypeVar("Answer")
Stop = Callable[[], bool]
_POLL_S = 0.2

_stop: Any = None
"""In a process of a pool: the event that says it shall stop."""


def in_order(
    function: Callable[[Task, Stop], Answer], tasks: Sequence[Task], jobs: int, stop: Stop
) -> Generator[Answer, None, None]:
    """`function(task, stop)` of every task by `jobs` processes, in order, a few ahead of who takes them.

    Close it to end the processes. Raises what `function` raises, when its turn comes, and Interrupted when `stop()` or
    a process was killed.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    event = context.Event()
    pool = ProcessPoolExecutor(jobs, context, _begin, (event,))
    waiting: list[Future[Answer]] = []
    left = iter(tasks)
    try:
        while True:
            waiting += [pool.submit(_call, function, task) for task in itertools.islice(left, 2 * jobs - len(waiting))]
            if not waiting:
                return
            while not wait(waiting[:1], _POLL_S).done:
                if stop():
                    raise Interrupted("stopped by a signal before it was whole; rerun the same command")
            yield waiting.pop(0).result()
    except BrokenProcessPool:
        raise Interrupted(
            "a process of this command was killed from outside (out of memory?); rerun the same command, "
            "with fewer processes"
        ) from None
    finally:
        event.set()
        pool.shutdown(cancel_futures=True)


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
