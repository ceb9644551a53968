"""Which unit next: the claiming of units by any number of workers that know nothing of each other.

A worker starts at a block drawn from its own name and works through it from a random unit on, in order. A claim is one
`put_if_absent` of the unit's next attempt; of two workers one gets it, and the other goes on to the next unit (after
two misses it lists the block again). An exhausted block is left for a random one that is not known to be done: that is
the stealing of work, and near the end everybody does it. Where nothing is free, the worker watches a few of the
holders; it takes over the unit of one that has died, and otherwise asks again after a pause that doubles.

A holder is dead if its heartbeat is gone, if its process was on this machine and has ended, or if its heartbeat
has not changed (or has been at another unit) for `lease_s` seconds *of the watcher's clock*: no two clocks are
ever compared. Declaring a live worker dead costs a unit done twice, never a wrong result.

Price: two small writes per unit (claim, result) and one per heartbeat; a listing per exhausted block or pair of misses;
up to six requests in a pause of an idle worker. With a hundred units for each of 10,000 workers that is two listings
and three reads a unit in all (`benchmarks/queue_simulation.py`).
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bytecache.pipeline.fleet.ledger import (
    BLOCK,
    CLAIM,
    DONE,
    FAILED,
    LOST,
    RELEASED,
    Delete,
    Get,
    Layout,
    Limits,
    List,
    Put,
    Reading,
    Steps,
    block_size,
    n_blocks,
    read_block,
)

PROBES = 8
"""Blocks looked at before a worker that found nothing pauses."""
IDLE_PROBES = 2
"""The same for a worker that found nothing the last time either."""
WATCHED = 4
"""Holders that an idle worker keeps an eye on."""
FIRST_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Claim:
    """Attempt `epoch` at unit `unit` is ours; `failures` and `losses` of those before it that count."""

    unit: int
    epoch: int
    failures: int = 0
    losses: int = 0


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing is free: every unit that is left is held. Ask again after `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Settled:
    """Every unit is done or set aside."""


@dataclass(slots=True)
class _Watch:
    """A unit held by another: its holder, and the last change seen of it."""

    claim: Claim
    holder: str
    sign: object
    since: float


class Claimer:
    """One worker's view of a job. Methods are `Steps`, see `ledger`.

    `worker`: our name, the seed of our order. `clock`: seconds, monotonic. `gone(worker)`: certainly dead (a
    process of this machine that has ended). `read`: what a listing of a block says (a simulation's is parsed already).
    """

    def __init__(
        self,
        layout: Layout,
        n_units: int,
        worker: str,
        *,
        limits: Limits,
        lease_s: float,
        clock: Callable[[], float],
        gone: Callable[[str], bool] = lambda worker: False,
        read: Callable[[Iterable[str]], Reading] = read_block,
    ) -> None:
        self.layout, self.n_units, self.worker = layout, n_units, worker
        self.limits, self.lease_s, self.clock, self.gone, self._read = limits, lease_s, clock, gone, read
        self._random = random.Random(worker)
        self._n_blocks = n_blocks(n_units)
        self._settled = bytearray(self._n_blocks)
        self._block: int | None = self._random.randrange(self._n_blocks) if n_units else None
        self._looked = False  # this block, at all
        self._fresh = False  # this block, within this call
        self._free: list[int] = []
        self._attempts: dict[int, Claim] = {}  # what a free unit of this block has behind it, where there is anything
        self._held: list[Claim] = []
        self._watched: dict[int, _Watch] = {}
        self._failed_here: set[int] = set()
        self._noted: set[int] = set()
        self._idle = 0
        self._learned = False

    # ---- what became of a claim

    def finish(self, claim: Claim, facts: dict[str, object]) -> Steps[None]:
        """The unit has its receipt."""
        yield Put(self.layout.mark(claim.unit, DONE, claim.epoch), {"worker": self.worker, **facts})

    def release(self, claim: Claim) -> Steps[None]:
        """Give the unit back unharmed: it was not its fault."""
        yield Put(self.layout.mark(claim.unit, RELEASED, claim.epoch), {"worker": self.worker})

    def fail(self, claim: Claim, reason: str) -> Steps[bool]:
        """The unit failed; True if it is now set aside."""
        self._failed_here.add(claim.unit)
        facts = {"worker": self.worker, "reason": reason}
        yield Put(self.layout.mark(claim.unit, FAILED, claim.epoch), facts)
        if 0 < self.limits.failures <= claim.failures + 1:
            yield Put(self.layout.aside(claim.unit, claim.epoch), {**facts, "attempts": claim.failures + 1})
            return True
        return False

    # ---- the next claim

    def claim(self) -> Steps[Claim | Idle | Settled]:
        """Take a unit. One call makes a bounded number of requests."""
        if not self.n_units:
            return Settled()
        self._fresh = False
        if not self._learned:
            yield from self._learn()
        if self._idle:
            taken = yield from self._check_watched()
            if taken:
                return taken
        visited: set[int] = set()
        probes = IDLE_PROBES if self._idle else PROBES
        while True:
            if self._block is None or self._settled[self._block]:
                self._block, self._looked = self._pick(visited), False
            if self._block is None:
                break
            if not self._looked:
                yield from self._look(self._block)
            taken = yield from self._take_free(self._block)
            if taken is None and not self._settled[self._block]:
                taken = yield from self._take_over()
            if taken:
                self._idle = 0
                return taken
            visited.add(self._block)
            self._block = None
            if len(visited) >= probes:
                break
        if 0 not in self._settled and not (yield from self._let_in_again()):
            return Settled()
        self._idle += 1
        if self._idle % 4 == 1:
            yield from self._learn()
        pause = min(FIRST_PAUSE_S * 1.5 ** min(self._idle - 1, 40), self.lease_s / 2)
        return Idle(pause * self._random.uniform(0.5, 1.0))

    def _learn(self) -> Steps[None]:
        """Which blocks are done, from their marks."""
        self._learned = True
        for name in (yield List(self.layout.blocks)):
            number = name.rpartition("/")[2]
            if number.isdigit() and int(number) < self._n_blocks:
                self._settled[int(number)] = 1

    def _let_in_again(self) -> Steps[bool]:
        """Whether a unit that was set aside when we saw it is not any more."""
        for block in sorted({unit // BLOCK for unit in self._noted})[:PROBES]:
            self._settled[block] = 0
            yield from self._look(block)
            self._block = None
        return 0 in self._settled

    def _pick(self, visited: set[int]) -> int | None:
        """A random block that is neither settled nor visited."""
        for _ in range(4):
            block = self._random.randrange(self._n_blocks)
            if not self._settled[block] and block not in visited:
                return block
        start = self._random.randrange(self._n_blocks)
        for first, last in ((start, self._n_blocks), (0, start)):
            block = self._settled.find(0, first, last)
            while block >= 0:
                if block not in visited:
                    return block
                block = self._settled.find(0, block + 1, last)
        return None

    def _look(self, block: int) -> Steps[None]:
        """List a block: what is free in it, what is held, whether it is settled."""
        states = self._read((yield List(self.layout.units(block))))
        size = block_size(block, self.n_units)
        start = self._random.randrange(size)
        self._attempts, self._held = {}, []
        n_aside = 0
        for slot, state in states.others.items():
            if state.held:
                self._held.append(Claim(block * BLOCK + slot, state.epoch, state.failures, state.losses))
            elif state.aside(self.limits):
                n_aside += 1
                yield from self._note_aside(block * BLOCK + slot, state.epoch)
            else:
                self._attempts[slot] = Claim(block * BLOCK + slot, state.epoch, state.failures, state.losses)
        rotated = (*range(start - 1, -1, -1), *range(size - 1, start - 1, -1))  # taken from the end: from `start` on
        taken = states.done | (states.others.keys() - self._attempts.keys())
        self._free = [slot for slot in rotated if slot not in taken]
        self._looked = self._fresh = True
        if len(states.done) == size:
            yield Put(self.layout.block(block), {"worker": self.worker})
        if len(states.done) + n_aside == size:
            self._settled[block] = 1

    def _note_aside(self, unit: int, epoch: int) -> Steps[None]:
        """Remember a unit that is set aside; write its entry, in case whoever should have written it died before."""
        if unit not in self._noted:
            self._noted.add(unit)
            yield Put(
                self.layout.aside(unit, epoch), {"worker": self.worker, "reason": "see the marks of its attempts"}
            )

    def _take_free(self, block: int) -> Steps[Claim | None]:
        misses = 0
        passed_over: list[int] = []
        while True:
            if not self._free:
                if self._fresh:
                    return None
                # What was held when we came may be done by now, and what we finished ourselves certainly is.
                yield from self._look(block)
                passed_over = []
                continue
            slot = self._free.pop()
            unit = block * BLOCK + slot
            if unit in self._failed_here and not self._idle:
                passed_over.append(slot)  # others first: what failed here may work elsewhere, or later
                continue
            before = self._attempts.get(slot, Claim(unit, 0))
            claim = Claim(unit, before.epoch + 1, before.failures, before.losses)
            if (yield from self._put_claim(claim)):
                self._free = passed_over + self._free
                return claim
            misses += 1
            if misses == 2:
                yield from self._look(block)
                misses, passed_over = 0, []

    def _put_claim(self, claim: Claim) -> Steps[bool]:
        return bool((yield Put(self.layout.mark(claim.unit, CLAIM, claim.epoch), {"worker": self.worker})))

    def _take_over(self) -> Steps[Claim | None]:
        """Look after some of the holders in the block last listed; take the unit of a dead one."""
        unknown = [claim for claim in self._held if claim.unit not in self._watched]
        for claim in self._random.sample(unknown, min(len(unknown), max(WATCHED - len(self._watched), 0))):
            taken = yield from self._check(claim)
            if taken:
                return taken
        return None

    def _check_watched(self) -> Steps[Claim | None]:
        for watch in list(self._watched.values()):
            taken = yield from self._check(watch.claim)
            if taken:
                self._idle = 0
                return taken
        return None

    def _check(self, claim: Claim) -> Steps[Claim | None]:
        """Take a held unit over if its holder is dead; otherwise remember what was seen of the holder."""
        watch = self._watched.get(claim.unit)
        if watch is None or watch.claim.epoch != claim.epoch:
            lease = yield Get(self.layout.mark(claim.unit, CLAIM, claim.epoch))
            watch = _Watch(claim, str((lease or {}).get("worker", "")), None, self.clock())
        heartbeat = None if self.gone(watch.holder) else (yield Get(self.layout.worker(watch.holder)))
        if watch.holder == self.worker:
            heartbeat = None  # a claim of ours whose answer was lost on the way
        if heartbeat is not None:
            working = heartbeat.get("unit") == claim.unit and heartbeat.get("epoch") == claim.epoch
            sign = ("here", heartbeat.get("beat")) if working else ("elsewhere",)
            if sign != watch.sign:
                was_here = watch.sign is not None and watch.sign != ("elsewhere",)
                watch.sign, watch.since = sign, self.clock()
                if was_here and not working:
                    self._watched.pop(claim.unit, None)  # finished, most likely; the next listing tells
                else:
                    self._watched[claim.unit] = watch
            if self.clock() - watch.since < self.lease_s:
                return None
        self._watched.pop(claim.unit, None)
        return (yield from self._succeed(claim, watch.holder))

    def _succeed(self, claim: Claim, holder: str) -> Steps[Claim | None]:
        """Declare the holder of a unit dead and take the unit, or set it aside if it has cost enough workers."""
        block = claim.unit // BLOCK
        state = self._read((yield List(self.layout.units(block)))).others.get(claim.unit % BLOCK)
        if state is None or not state.held or state.epoch != claim.epoch:
            return None
        yield Put(self.layout.mark(claim.unit, LOST, claim.epoch), {"worker": holder, "declared_by": self.worker})
        heartbeat = (yield Get(self.layout.worker(holder))) if holder != self.worker else None
        if heartbeat is not None and (self.gone(holder) or heartbeat.get("unit") == claim.unit):
            yield Put(self.layout.lost(holder), heartbeat)
            yield Delete(self.layout.worker(holder))  # one that was only slow writes it again
        losses = state.losses + 1
        if 0 < self.limits.losses <= losses:
            reason = f"{losses} workers were lost at it, the last one {holder}"
            yield Put(self.layout.aside(claim.unit, claim.epoch), {"reason": reason, "attempts": losses})
            return None
        taken = Claim(claim.unit, claim.epoch + 1, state.failures, losses)
        return taken if (yield from self._put_claim(taken)) else None
