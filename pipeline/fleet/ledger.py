"""The names of a job's claims in the store, and what a listing of them says. Only ever added to.

    fleet/STAGE/job.json                       what all workers of the job must agree on
    fleet/STAGE/units/BLOCK/UNIT.eN            attempt N at the unit was started, and by whom
    fleet/STAGE/units/BLOCK/UNIT.{d,f,r,l}N    it finished, failed, was given back, or its worker was lost
    fleet/STAGE/units/BLOCK/UNIT.aN            attempts up to N are forgiven (`bytecache retry`)
    fleet/STAGE/blocks/BLOCK                   every unit of the block is done
    fleet/STAGE/quarantine/UNIT.N              the unit is set aside after attempt N, and why
    fleet/STAGE/workers/WORKER                 heartbeat, rewritten; absent: the worker left
    fleet/STAGE/lost/WORKER                    the last words of a worker whose heartbeat stopped

STAGE is `teacher` or `convert`, of a later edition of the plan `teacher-edition-00002`. A worker of an older edition
that is still there goes on with its own ledger; what it makes is keyed by content and of use to both.

Everything but heartbeats is created with put_if_absent and never changed, so two workers cannot hold one attempt and
no delete or compare-and-swap is needed. The state of a unit is in the *names*: one listing of a block (`BLOCK` units,
at most two pages of an object store) says what is free, held, done and set aside; one listing of `blocks/` says it of
the whole job, to the block. A million units are 3,907 blocks, four pages.

These are hints that save work. Whether a unit is done is said by its receipt alone (`pipeline.units.receipts`).
"""

from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from bytecache.pipeline.stores import Store, json_bytes
from bytecache.schemas import strict_json
from bytecache.schemas.errors import StorageError

FOLDER = "fleet"
STAGES = ("teacher", "convert")
"""Stages that workers share."""
BLOCK = 256
"""Units of a block: a listing of fresh claims and results fits one page of 1,000 names."""
CLAIM, DONE, FAILED, RELEASED, LOST, FORGIVEN = "edfrla"


@dataclass(frozen=True, slots=True)
class Put:
    """Create the object unless it exists; answers whether it was created."""

    key: str
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Replace:
    """Write the object, whatever was there."""

    key: str
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Get:
    """Answers the object, or None where there is none."""

    key: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the object; absent is fine."""

    key: str


@dataclass(frozen=True, slots=True)
class List:
    """Answers the names under a folder."""

    prefix: str


Request = Put | Replace | Get | Delete | List
Result = TypeVar("Result")
Steps = Generator[Request, Any, Result]
"""Code that asks for store operations instead of doing them: `perform` does them on a store, the simulator
(`benchmarks/queue_simulation.py`) on a model of one, and tests in any interleaving of many workers."""


def perform(store: Store, steps: Steps[Result]) -> Result:
    """Run `steps` against a store."""
    answer: Any = None
    try:
        while True:
            answer = _answer(store, steps.send(answer))
    except StopIteration as done:
        result: Result = done.value
        return result


def _answer(store: Store, request: Request) -> Any:
    match request:
        case Put(key, value):
            return store.put_json_if_absent(key, value)
        case Replace(key, value):
            return store.replace(key, store.write_temp(key, json_bytes(value)))
        case Get(key):
            return read_json(store, key)
        case Delete(key):
            return store.delete(key)
        case List(prefix):
            return list(store.list(prefix))


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """A small document of the ledger, or None where there is none (any more) or it is no JSON object."""
    if not store.exists(key):
        return None
    with suppress(StorageError, ValueError):  # a heartbeat may go between the two calls
        value = strict_json.loads(store.read_bytes(key))
        return value if isinstance(value, dict) else None
    return None


@dataclass(frozen=True, slots=True)
class Layout:
    """Keys of one stage's job on one edition of the plan: units are numbered anew in each, so each has a ledger."""

    stage: str
    edition: int = 1

    @property
    def root(self) -> str:
        return f"{FOLDER}/{self.stage}" + (f"-edition-{self.edition:05d}" if self.edition > 1 else "")

    @property
    def job(self) -> str:
        return f"{self.root}/job.json"

    @property
    def blocks(self) -> str:
        return f"{self.root}/blocks"

    @property
    def quarantine(self) -> str:
        return f"{self.root}/quarantine"

    def units(self, block: int) -> str:
        """Folder of a block's claims."""
        return f"{self.root}/units/{block:06d}"

    def mark(self, unit: int, kind: str, epoch: int) -> str:
        """The claim of attempt `epoch` at a unit, or what became of it."""
        return f"{self.root}/units/{unit // BLOCK:06d}/{unit % BLOCK:03d}.{kind}{epoch:04d}"

    def block(self, block: int) -> str:
        return f"{self.blocks}/{block:06d}"

    def aside(self, unit: int, epoch: int) -> str:
        """The quarantine entry of a unit."""
        return f"{self.quarantine}/{unit:09d}.{epoch:04d}"

    def worker(self, worker: str) -> str:
        """The heartbeat of a worker."""
        return f"{self.root}/workers/{worker}.json"

    def lost(self, worker: str) -> str:
        return f"{self.root}/lost/{worker}.json"


@dataclass(frozen=True, slots=True)
class Limits:
    """Attempts after which a unit is set aside: `failures` that said so, `losses` of workers at it; 0 = never."""

    failures: int = 3
    losses: int = 8


@dataclass(slots=True)
class UnitState:
    """What the names say of one unit. `epoch`: attempts begun; `finished`, `forgiven`: the last such attempt.

    `closed`, `failed`, `lost` are sets of attempts as bit masks (bit N: attempt N); an attempt is closed by a mark of
    any kind but its claim.
    """

    epoch: int = 0
    finished: int = 0
    forgiven: int = 0
    closed: int = 0
    failed: int = 0
    lost: int = 0

    @property
    def done(self) -> bool:
        """Some attempt finished, and was not forgiven since (its output was found damaged)."""
        return self.finished > self.forgiven

    @property
    def held(self) -> bool:
        """Somebody has it, or died with it."""
        return not self.done and self.epoch > self.forgiven and not self.closed >> self.epoch & 1

    @property
    def failures(self) -> int:
        return (self.failed >> self.forgiven + 1).bit_count()

    @property
    def losses(self) -> int:
        return (self.lost >> self.forgiven + 1).bit_count()

    def aside(self, limits: Limits) -> bool:
        """Whether the unit is in quarantine."""
        failed = 0 < limits.failures <= self.failures
        return not self.done and (failed or 0 < limits.losses <= self.losses)


def read_names(names: Iterable[str]) -> dict[int, UnitState]:
    """State of every unit of a block that has been touched, by its number within the block. 0.5 us a name."""
    states: dict[int, UnitState] = {}
    for name in names:
        # The end of a name has a fixed width, "/017.e0001": slicing is all that a page of 1,000 names costs.
        slot, kind, number = name[-9:-6], name[-5:-4], name[-4:]
        if name[-6:-5] != "." or not (slot + number).isdigit():
            continue
        state = states.get(int(slot))
        if state is None:
            state = states[int(slot)] = UnitState()
        epoch = int(number)
        if kind == CLAIM:
            if epoch > state.epoch:
                state.epoch = epoch
        elif kind == FORGIVEN:
            state.forgiven = max(state.forgiven, epoch)
        else:
            state.closed |= 1 << epoch
            if kind == DONE:
                state.finished = max(state.finished, epoch)
            elif kind == FAILED:
                state.failed |= 1 << epoch
            elif kind == LOST:
                state.lost |= 1 << epoch
    return states


@dataclass(frozen=True, slots=True)
class Reading:
    """A listing of a block: the units that are done, and the state of the others that have been touched."""

    done: frozenset[int]
    others: dict[int, UnitState]


def read_block(names: Iterable[str]) -> Reading:
    """What the names of a block say."""
    states = read_names(names)
    done = frozenset(slot for slot, state in states.items() if state.done)
    return Reading(done, {slot: state for slot, state in states.items() if slot not in done})


def block_size(block: int, n_units: int) -> int:
    """Units in a block; the last one may be short."""
    return min(BLOCK, n_units - block * BLOCK)


def n_blocks(n_units: int) -> int:
    """How many blocks so many units fill."""
    return -(-n_units // BLOCK)
