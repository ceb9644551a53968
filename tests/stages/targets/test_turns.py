"""Turns of a mixture: exact shares, nothing at random, and any turn without those before it."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytecache.schemas.errors import ConfigError
from bytecache.stages.targets.turns import Turns

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@given(weights, st.integers(0, 300))
def test_every_turn_is_reached_without_those_before_it(shares: list[float], start: int) -> None:
    turns = Turns(shares)
    whole = list(islice(turns(), start + 30))
    assert list(islice(turns(start), 30)) == whole[start:]
    counts = [0] * len(shares)
    for source, number in whole[:start]:
        assert number == counts[source]
        counts[source] += 1
    assert turns.before(start) == counts


@given(weights, st.integers(1, 300))
def test_shares_are_kept_at_every_moment(shares: list[float], number: int) -> None:
    turns = Turns(shares)
    for count, weight in zip(turns.before(number), turns.weights, strict=True):
        assert abs(count - number * weight / sum(turns.weights)) <= 2.5


def test_the_order_is_written_down() -> None:
    assert [source for source, _ in islice(Turns([3, 1])(), 8)] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert [source for source, _ in islice(Turns([1, 1])(), 4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("shares", [[], [1.0, 0.0], [-1.0], [float("nan")]])
def test_weights_that_are_none_are_refused(shares: list[float]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Turns(shares)
