"""Shards in memory while their windows are read: the present pool's, and the next pool's before it begins.

The windows of a pool are mixed, so that nearly all of its shards are needed within its first few dozen windows and
until its end (`order`). A reader that loads a shard when it is first asked for would stand still there for a whole
pool's reading. `Shelf.follow` therefore loads the next pool's shards in a thread while the present one drains, one
after another, evenly, all of them by three quarters of the way; files of a remote data set are fetched before that,
several at a time. At most two pools are in memory, on average one and a half: `pool` is what bounds it.
A shard that the thread has not begun is loaded by whoever needs it. What a load raises reaches that window's reader.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Generic, TypeVar

from bytecache.stages.targets.order import Pool, Window

T = TypeVar("T")

FETCHERS = 4
"""Transfers of remote files at a time."""
EARLY = 0.75
"""Share of a pool after which all of the next one is asked for."""


class Shelf(Generic[T]):
    """Loaded shards by number.

    Args:
        load: shard of a number. fetch: brings its file near, if that is worth doing ahead; must not raise.
        keep: shards kept, those used last, where they are asked for in any order.
    """

    def __init__(self, load: Callable[[int], T], fetch: Callable[[int], None] | None = None, keep: int = 1) -> None:
        self._load, self._fetch, self.keep = load, fetch, keep
        self._shards: OrderedDict[int, Future[T]] = OrderedDict()

    def __len__(self) -> int:
        """Shards in memory, or asked for."""
        return len(self._shards)

    def __getitem__(self, number: int) -> T:
        shard = self._shards.get(number)
        if shard is None or shard.cancel():  # nobody has begun it
            self._shards.pop(number, None)
            while len(self._shards) >= self.keep:
                self._shards.popitem(last=False)
            shard = Future()
            shard.set_result(self._load(number))
            self._shards[number] = shard
        self._shards.move_to_end(number)
        return shard.result()

    def follow(self, pools: Iterator[Pool]) -> Generator[Window, None, None]:
        """The windows of `pools`, one after another, their shards loaded in time; close it to end its threads."""
        pool = next(pools, None)
        with ExitStack() as stack:
            loader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="shards"))
            stack.callback(loader.shutdown, wait=False, cancel_futures=True)
            fetcher = stack.enter_context(ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch"))
            stack.callback(fetcher.shutdown, wait=False, cancel_futures=True)

            def fetch(wanted: Pool | None) -> None:
                for number in wanted.shards if wanted and self._fetch else ():
                    if number not in self._shards:
                        fetcher.submit(self._fetch, number)  # type: ignore[arg-type]

            def ask(number: int) -> None:
                held = self._shards.get(number)
                if held is None or held.cancelled() or (held.done() and held.exception()):
                    self._shards[number] = loader.submit(self._load, number)

            fetch(pool)
            while pool is not None:
                following = next(pools, None)
                for number in self._shards.keys() - set(pool.shards):
                    self._shards.pop(number).cancel()
                self.keep = len(pool.shards) + (len(following.shards) if following else 0)
                for number in pool.shards:
                    ask(number)
                fetch(following)
                waiting = list(following.shards) if following else []
                step = EARLY * len(pool) / max(1, len(waiting))
                for done, window in enumerate(pool):
                    while waiting and done >= step * (len(following.shards) - len(waiting)):  # type: ignore[union-attr]
                        ask(waiting.pop(0))
                    yield window
                for number in waiting:
                    ask(number)
                pool = following
