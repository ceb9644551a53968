"""Shards are there when their windows come, in the memory of two pools."""

import threading
import time
from contextlib import closing
from itertools import islice, pairwise

import pytest

from bytecache.stages.targets.order import Order
from bytecache.stages.targets.shelf import Shelf

SIZES = [640, 640, 600, 700, 640, 0, 640, 610]


class Loads:
    """A load that takes a while, and what was in memory while it ran."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.done, self.threads = seconds, list[int](), set[str]()
        self.shelf = Shelf(self.load)
        self.most = 0

    def load(self, number: int) -> int:
        time.sleep(self.seconds)
        self.most = max(self.most, len(self.shelf))
        self.done.append(number)
        self.threads.add(threading.current_thread().name)
        return number

    def has(self, number: int) -> bool:
        return number in self.shelf._shards and self.shelf._shards[number].done()


def test_the_next_pool_is_loaded_before_it_begins_and_two_are_the_most() -> None:
    loads, order = Loads(0.002), Order("x", SIZES, 16, 5, pool=2)
    pools = list(islice(order.pools(), 9))
    with closing(loads.shelf.follow(order.pools())) as windows:
        for pool, following in pairwise(pools):
            for window in islice(windows, len(pool)):
                assert loads.shelf[window.shard] == window.shard
            # All of this pool's windows are out, none of the next one's: its shards come without being asked for.
            deadline = time.monotonic() + 20
            while not all(loads.has(shard) for shard in following.shards) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert all(loads.has(shard) for shard in following.shards)
    assert loads.most == 4
    assert any(name.startswith("shards") for name in loads.threads)


def test_what_both_pools_need_is_loaded_once() -> None:
    loads, order = Loads(), Order("x", SIZES, 16, 5, pool=16)
    with closing(loads.shelf.follow(order.pools(0, 3))) as windows:
        assert [loads.shelf[window.shard] for window in windows] == [
            w.shard for pool in order.pools(0, 3) for w in pool
        ]
    assert sorted(loads.done) == [0, 1, 2, 3, 4, 6, 7]


def test_windows_are_those_of_the_order_from_any_position() -> None:
    order = Order("x", SIZES, 16, 5, pool=3)
    whole = list(islice(order.windows(), 900))
    for start in (0, 1, 250, 401, 560):
        with closing(Loads().shelf.follow(order.pools(start))) as windows:
            assert list(islice(windows, 300)) == whole[start : start + 300]
    length = order.epoch_length(0) + order.epoch_length(1)
    with closing(Loads().shelf.follow(order.pools(250, 2))) as windows:
        assert list(windows) == whole[250:length]
    assert list(order.pools(length, 2)) == []


def test_a_failed_load_is_raised_where_its_shard_is_used_and_may_be_tried_again() -> None:
    order = Order("x", SIZES, 16, 5, pool=2)
    bad = list(islice(order.pools(), 2))[1].shards[0]
    broken = [True]

    def load(number: int) -> int:
        if number == bad and broken[0]:
            raise ValueError("torn")
        return number

    shelf = Shelf(load)
    with closing(shelf.follow(order.pools())) as windows:
        for window in windows:
            if window.shard == bad:
                break
            assert shelf[window.shard] == window.shard
        with pytest.raises(ValueError, match="torn"):
            shelf[bad]
    broken[0] = False
    with closing(shelf.follow(order.pools())) as windows:
        assert all(shelf[window.shard] == window.shard for window in islice(windows, 200))


def test_any_order_keeps_the_last_used() -> None:
    loads = Loads()
    loads.shelf.keep = 2
    assert [loads.shelf[n] for n in (3, 1, 3, 0, 3, 1)] == [3, 1, 3, 0, 3, 1]
    assert loads.done == [3, 1, 0, 1] and len(loads.shelf) == 2
