"""Claiming under any interleaving of workers that die, drift and dawdle: no unit lost, none set aside unjustly."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from bytecache.pipeline.fleet import ledger
from bytecache.pipeline.fleet.claims import Claim, Claimer, Idle, Settled
from bytecache.pipeline.fleet.ledger import BLOCK, Delete, Get, Layout, Limits, List, Put, Replace, perform, read_names
from bytecache.pipeline.stores import LocalStore

LAYOUT = Layout("teacher")


class Memory:
    """A store in a dictionary: every request is one atomic step, as in an object store."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.requests: Counter[str] = Counter()

    def answer(self, request: ledger.Request) -> Any:
        self.requests[type(request).__name__] += 1
        match request:
            case Put(key, value):
                if key in self.objects:
                    return False
                self.objects[key] = value
                return True
            case Replace(key, value):
                self.objects[key] = value
            case Get(key):
                return self.objects.get(key)
            case Delete(key):
                self.objects.pop(key, None)
            case List(prefix):
                return sorted(key for key in self.objects if key.startswith(prefix + "/"))
        return None

    def run(self, steps: ledger.Steps[Any]) -> Any:
        answer = None
        try:
            while True:
                answer = self.answer(steps.send(answer))
        except StopIteration as done:
            return done.value


class Fleet:
    """Workers on one store, one request of one worker at a time, in an order drawn at random."""

    def __init__(
        self, n_units: int, n_workers: int, seed: int, death: float, limits: Limits, skew: bool = False
    ) -> None:
        self.store, self.random = Memory(), random.Random(seed)
        self.n_units, self.death, self.limits, self.skew = n_units, death, limits, skew
        self.now = 0.0
        self.n_started = 0
        self.done: Counter[int] = Counter()
        self.poison: set[int] = set()
        self.workers = [self.start() for _ in range(n_workers)]
        self.max_deaths = 10 * n_units
        self.deaths = 0

    def start(self) -> Any:
        self.n_started += 1
        name = f"worker-{self.n_started}"
        offset = self.random.uniform(-1e6, 1e6) if self.skew else 0.0
        rate = self.random.uniform(0.5, 2.0) if self.skew else 1.0
        claimer = Claimer(
            LAYOUT, self.n_units, name, limits=self.limits, lease_s=30.0, clock=lambda: offset + rate * self.now
        )
        return self.life(name, claimer)

    def life(self, name: str, claimer: Claimer) -> Any:
        """Steps of a worker; yields requests, or seconds to sleep."""
        beat = 0
        yield Replace(LAYOUT.worker(name), {"beat": beat, "unit": -1, "epoch": 0})
        while True:
            found = yield from claimer.claim()
            if isinstance(found, Settled):
                yield Delete(LAYOUT.worker(name))
                return
            beat += 1
            if isinstance(found, Idle):
                yield Replace(LAYOUT.worker(name), {"beat": beat, "unit": -1, "epoch": 0})
                yield found.seconds
                continue
            assert isinstance(found, Claim)
            for _ in range(self.random.randrange(1, 4)):
                beat += 1
                yield Replace(LAYOUT.worker(name), {"beat": beat, "unit": found.unit, "epoch": found.epoch})
                yield self.random.uniform(1.0, 9.0)
            if found.unit in self.poison:
                yield from claimer.fail(found, "poison")
            else:
                self.done[found.unit] += 1
                yield from claimer.finish(found, {})

    def run(self) -> None:
        asleep = [(0.0, worker, None) for worker in self.workers]
        steps = 0
        while asleep:
            steps += 1
            assert steps < 400_000
            earliest = min(wake for wake, _, _ in asleep)
            self.now = max(self.now, earliest)
            ready = [index for index, (wake, _, _) in enumerate(asleep) if wake <= self.now + 0.05]
            index = self.random.choice(ready)
            _, worker, answer = asleep[index]
            if self.random.random() < self.death and self.deaths < self.max_deaths:
                self.deaths += 1
                asleep[index] = (self.now + 1.0, self.start(), None)
                continue
            try:
                request = worker.send(answer)
            except StopIteration:
                asleep.pop(index)
                continue
            if isinstance(request, float):
                asleep[index] = (self.now + request, worker, None)
            else:
                asleep[index] = (self.now + 0.01, worker, self.store.answer(request))

    def states(self) -> dict[int, ledger.UnitState]:
        return {
            block * BLOCK + slot: state
            for block in range(ledger.n_blocks(self.n_units))
            for slot, state in read_names(self.store.answer(List(LAYOUT.units(block)))).items()
        }


@settings(max_examples=40, deadline=None)
@given(
    seed=some.integers(0, 10**6),
    n_units=some.sampled_from([1, 7, 30]),
    n_workers=some.integers(1, 6),
    death=some.sampled_from([0.0, 0.01, 0.05]),
    skew=some.booleans(),
)
def test_every_unit_gets_done_whoever_dies_and_whatever_clocks_say(
    seed: int, n_units: int, n_workers: int, death: float, skew: bool
) -> None:
    fleet = Fleet(n_units, n_workers, seed, death, Limits(3, 0), skew)
    fleet.run()
    states = fleet.states()
    assert sorted(fleet.done) == list(range(n_units))
    assert all(state.done for state in states.values())
    assert len(states) == n_units
    if not death and not skew:
        assert set(fleet.done.values()) == {1}  # nobody died: nothing is done twice
        assert all(state.epoch == 1 for state in states.values())
    blocks = fleet.store.answer(List(LAYOUT.blocks))
    assert len(blocks) == ledger.n_blocks(n_units)


def test_units_of_several_blocks_with_deaths() -> None:
    fleet = Fleet(BLOCK + 10, 5, 3, 0.01, Limits(3, 0))
    fleet.run()
    assert sorted(fleet.done) == list(range(fleet.n_units))
    assert fleet.deaths > 10
    assert sum(fleet.done.values()) - fleet.n_units <= fleet.deaths


def test_a_poisoned_unit_is_set_aside_and_the_rest_finishes() -> None:
    fleet = Fleet(20, 3, 1, 0.0, Limits(3, 0))
    fleet.poison = {4, 11}
    fleet.run()
    assert sorted(fleet.done) == [unit for unit in range(20) if unit not in fleet.poison]
    states = fleet.states()
    for unit in fleet.poison:
        assert states[unit].aside(fleet.limits)
        assert states[unit].failures == 3
    entries = fleet.store.answer(List(LAYOUT.quarantine))
    assert [int(key.rpartition("/")[2].partition(".")[0]) for key in entries] == [4, 11]
    assert {fleet.store.objects[key]["reason"] for key in entries} == {"poison"}


def test_a_unit_that_kills_its_worker_is_set_aside_by_the_count_of_its_dead() -> None:
    store = Memory()
    clock = [0.0]
    for number in range(20):
        claimer = Claimer(
            LAYOUT, 3, f"w{number}", limits=Limits(3, 4), lease_s=5.0, clock=lambda: clock[0], gone=lambda name: True
        )
        store.answer(Replace(LAYOUT.worker(f"w{number}"), {"beat": 1, "unit": 1, "epoch": number + 1}))
        while isinstance(found := store.run(claimer.claim()), Claim) and found.unit != 1:
            store.run(claimer.finish(found, {}))
        if not isinstance(found, Claim):
            break  # a worker survived: the unit was not given to it
    assert number == 4
    assert isinstance(store.run(claimer.claim()), Settled)
    states = read_names(store.answer(List(LAYOUT.units(0))))
    assert states[1].losses == 4
    assert states[0].done and states[2].done
    (entry,) = store.answer(List(LAYOUT.quarantine))
    assert "4 workers were lost" in store.objects[entry]["reason"]
    assert len(store.answer(List(f"{LAYOUT.root}/lost"))) == 4


def test_a_holder_is_dead_only_by_the_watchers_own_clock() -> None:
    store, clock = Memory(), [0.0]

    def claimer(name: str) -> Claimer:
        return Claimer(LAYOUT, 1, name, limits=Limits(), lease_s=60.0, clock=lambda: clock[0])

    holder, watcher = claimer("a"), claimer("b")
    held = store.run(holder.claim())
    beat = {"beat": 1, "unit": 0, "epoch": 1, "time": -1e12}
    store.answer(Replace(LAYOUT.worker("a"), beat))
    for second in range(0, 300, 20):  # it beats, however old its clock says the beats are
        clock[0] = float(second)
        store.answer(Replace(LAYOUT.worker("a"), {**beat, "beat": second}))
        assert isinstance(store.run(watcher.claim()), Idle)
    clock[0] += 59.0
    assert isinstance(store.run(watcher.claim()), Idle)
    clock[0] += 2.0
    assert store.run(watcher.claim()) == Claim(0, 2, 0, 1)
    # The slow one comes back and finishes: its result counts, and so does the other's.
    store.run(holder.finish(held, {}))
    assert isinstance(store.run(claimer("c").claim()), Settled)


def test_a_worker_that_left_or_forgot_its_claim_does_not_keep_it() -> None:
    store, clock = Memory(), [0.0]
    watcher = Claimer(LAYOUT, 1, "b", limits=Limits(), lease_s=60.0, clock=lambda: clock[0])
    store.answer(Put(LAYOUT.mark(0, ledger.CLAIM, 1), {"worker": "a"}))
    assert store.run(watcher.claim()) == Claim(0, 2, 0, 1)  # no heartbeat: it left
    other = Claimer(LAYOUT, 1, "c", limits=Limits(), lease_s=60.0, clock=lambda: clock[0])
    for second in range(0, 130, 10):  # it lives, but is at something else
        store.answer(Replace(LAYOUT.worker("b"), {"beat": second, "unit": 7, "epoch": 1}))
        clock[0] = float(second)
        found = store.run(other.claim())
        assert isinstance(found, Idle) == (second < 60), second
        if second >= 60:
            break
    assert found == Claim(0, 3, 0, 2)
    # A claim of our own whose answer was lost on the way is ours again at once.
    mine = Claimer(LAYOUT, 1, "c", limits=Limits(), lease_s=60.0, clock=lambda: clock[0])
    store.answer(Replace(LAYOUT.worker("c"), {"beat": 1, "unit": -1, "epoch": 0}))
    assert store.run(mine.claim()) == Claim(0, 4, 0, 3)


def test_of_two_that_bury_a_holder_one_gets_its_unit() -> None:
    store = Memory()
    store.answer(Put(LAYOUT.mark(0, ledger.CLAIM, 1), {"worker": "dead"}))
    running: dict[str, Any] = {
        name: Claimer(LAYOUT, 1, name, limits=Limits(), lease_s=60.0, clock=lambda: 0.0).claim() for name in ("a", "b")
    }
    store.answer(Replace(LAYOUT.worker("a"), {"beat": 1, "unit": -1, "epoch": 0}))
    store.answer(Replace(LAYOUT.worker("b"), {"beat": 1, "unit": -1, "epoch": 0}))
    answers: dict[str, Any] = dict.fromkeys(running)
    results = []
    while running:  # in step: both find the holder dead before either has claimed
        for name in list(running):
            try:
                answers[name] = store.answer(running[name].send(answers[name]))
            except StopIteration as done:
                results.append(done.value)
                del running[name]
    assert sorted(type(result).__name__ for result in results) == ["Claim", "Idle"]


def test_a_released_unit_is_free_at_once_and_costs_nothing() -> None:
    store = Memory()
    first, second = (
        Claimer(LAYOUT, 1, name, limits=Limits(1, 1), lease_s=60.0, clock=lambda: 0.0) for name in ("a", "b")
    )
    claim = store.run(first.claim())
    store.answer(Replace(LAYOUT.worker("a"), {"beat": 1, "unit": 0, "epoch": 1}))
    assert isinstance(store.run(second.claim()), Idle)
    store.run(first.release(claim))
    assert store.run(second.claim()) == Claim(0, 2, 0, 0)


def test_forgiving_opens_failed_and_done_units_again() -> None:
    states = read_names(["x/003.a0002", "x/003.d0002", "x/003.e0002", "x/003.f0001", "x/004.d0001", "x/004.e0001"])
    assert not states[3].done and not states[3].held and not states[3].aside(Limits(1, 1))
    assert states[4].done
    assert read_names(["x/003.a0002", "x/003.d0002", "x/003.d0003", "x/003.e0003"])[3].done
    assert read_names(["odd", "x/1.e", "x/.e1", "x/a.e1"]) == {}


def test_perform_does_the_steps_on_a_real_store(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")

    def steps() -> ledger.Steps[list[Any]]:
        return [
            (yield Get("fleet/a")), (yield Put("fleet/a", {"n": 1})), (yield Put("fleet/a", {"n": 2})),
            (yield Get("fleet/a")), (yield Replace("fleet/b", {"n": 3})), (yield List("fleet")),
            (yield Delete("fleet/a")), (yield Get("fleet/a")),
        ]  # fmt: skip

    assert perform(store, steps()) == [None, True, False, {"n": 1}, None, ["fleet/a", "fleet/b"], None, None]


@pytest.mark.parametrize("n_units", [0, 1, BLOCK, 3 * BLOCK + 1])
def test_one_worker_alone_takes_every_unit_once_with_few_requests(n_units: int) -> None:
    store = Memory()
    claimer = Claimer(LAYOUT, n_units, "only", limits=Limits(), lease_s=60.0, clock=lambda: 0.0)
    taken = []
    while isinstance(found := store.run(claimer.claim()), Claim):
        taken.append(found.unit)
        store.run(claimer.finish(found, {}))
    assert isinstance(found, Settled)
    assert sorted(taken) == list(range(n_units))
    blocks = ledger.n_blocks(n_units)
    assert store.requests["List"] <= 1 + 3 * blocks
    assert store.requests["Put"] == 2 * n_units + blocks
