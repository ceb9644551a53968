"""The order of windows: a pure function of position, complete, and indifferent to who reads it."""

from itertools import islice

import numpy as np
import pytest

from bytecache.stages.targets.order import Order, Window, sequential

SIZES = [1000, 37, 0, 512, 4096, 64, 65, 1]


def order(seed: int = 3, pool: int = 3, dataset: str = "abc") -> Order:
    return Order(dataset, SIZES, 64, seed, pool=pool)


def test_any_position_can_be_entered_directly():
    whole = list(islice(order().windows(), 500))
    for start in (0, 1, 63, 92, 93, 94, 200, 380):
        assert list(islice(order().windows(start), 20)) == whole[start : start + 20]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_reads_every_position_once(epoch):
    o = order()
    first = sum(o.epoch_length(e) for e in range(epoch))
    windows = list(islice(o.windows(first), o.epoch_length(epoch)))
    assert {w.epoch for w in windows} == {epoch}
    seen = [np.zeros(n, np.int64) for n in SIZES]
    for w in windows:
        assert 0 < w.hi - w.lo <= 64
        seen[w.shard][w.lo : w.hi] += 1
    assert all((s == 1).all() for s in seen)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_partition_the_same_global_sequence(ranks):
    batch, steps = 8, 30
    whole = list(islice(order().windows(), batch * steps))
    for step in range(steps):
        block = list(islice(order().windows(step * batch), batch))
        shared = [w for rank in range(ranks) for w in block[rank::ranks]]
        assert sorted(shared) == sorted(whole[step * batch : (step + 1) * batch])


def test_seed_dataset_and_epoch_change_the_order():
    base = list(islice(order().windows(), 50))
    assert list(islice(order(seed=4).windows(), 50)) != base
    assert list(islice(order(dataset="abd").windows(), 50)) != base
    o = order()
    cuts = [{w.lo for w in islice(o.windows(o.epoch_length(0) * e), 93) if w.shard == 4} for e in (0, 1)]
    assert cuts[0] != cuts[1]


def test_windows_are_mixed_within_a_pool_and_only_there():
    o = Order("abc", [640] * 6, 64, 3, pool=2)
    shards = [w.shard for w in islice(o.windows(), o.epoch_length(0))]
    spans = {s: (shards.index(s), len(shards) - shards[::-1].index(s)) for s in range(6)}
    for first, last in spans.values():
        # Exactly one other shard, the pool's second member, is mixed with it.
        assert sum(a < last and first < b for a, b in spans.values()) == 2, spans


def test_the_sequence_itself_is_frozen():
    # A change here changes what every interrupted run resumes into.
    assert list(islice(Order("data", [300, 200], 100, 7).windows(), 4)) == FROZEN


FROZEN = [Window(0, 1, 51, 151), Window(0, 0, 156, 256), Window(0, 1, 151, 200), Window(0, 0, 56, 156)]


def test_sequential_is_every_window_in_order():
    windows = list(sequential([130, 0, 64], 64))
    assert windows == [Window(0, 0, 0, 64), Window(0, 0, 64, 128), Window(0, 0, 128, 130), Window(0, 2, 0, 64)]


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="no positions"):
        Order("x", [0, 0], 64, 0)
