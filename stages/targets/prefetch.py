"""Work done ahead in a thread of its own."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(source: Iterator[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Run `source` in a thread, at most `depth` steps ahead; its exceptions are raised here; closing ends it."""
    items: queue.Queue[Item | BaseException] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Item | BaseException) -> bool:
        while not closed.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put(item):
                    return
            put(StopIteration())
        except BaseException as error:
            put(error)
        finally:
            if isinstance(source, Generator):  # its threads end with it, not when it is collected some day
                source.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
