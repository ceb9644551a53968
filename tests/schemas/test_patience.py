"""The one policy of repeating: pauses that grow, an end, and what the other side asks for."""

import pytest

from bytecache.schemas import patience as module
from bytecache.schemas.patience import LONGEST_PAUSE, Patience


class Clock:
    """Time that passes only in pauses, each as long as it may be."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module.random, "uniform", lambda low, high: high)
    return clock


def test_pauses_double_to_a_bound_and_end_with_the_patience(clock: Clock) -> None:
    patience = Patience(40.0)
    while patience.pause():
        pass
    assert clock.pauses[:7] == pytest.approx([0.1 * 2**n for n in range(7)])
    assert max(clock.pauses) == LONGEST_PAUSE
    assert 30.0 < clock.now <= 40.0


def test_progress_begins_it_anew(clock: Clock) -> None:
    patience = Patience(1.0)
    for _ in range(50):
        assert patience.pause()
        patience.renew()
    assert clock.pauses == pytest.approx([0.1] * 50)


def test_what_is_asked_for_is_waited_and_cannot_go_on_for_ever(clock: Clock) -> None:
    patience = Patience(20.0)
    while patience.pause(60.0):
        pass
    assert set(clock.pauses) == {60.0}
    assert 5 < len(clock.pauses) < 12


def test_no_patience_is_one_try(clock: Clock) -> None:
    assert not Patience(0.0).pause()
    assert not Patience(0.0).pause(60.0)
    assert clock.pauses == []
