"""A model of an object store for `queue_simulation.py`: what the ledger and the plan ask of it, answered and counted.

Put-if-absent, listings in pages of 1,000 names, reads of heartbeats. Listings of a block of units are kept parsed, by
the claiming code's own parser, so that a million units take minutes.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from bytecache.pipeline.fleet.ledger import Delete, Get, Layout, List, Put, Reading, Replace, Request, read_block
from bytecache.pipeline.plan.index import PAGE, PLAN_KEY, Unit, index_bytes, make_index, page_bytes

LAYOUT = Layout("teacher")
UNITS = f"{LAYOUT.root}/units/"
NAMES = 1000
"""Names of one page of a listing."""


EMPTY = Reading(frozenset(), {})


class Listing(list[str]):
    """What a listing of a block of units answers: its names parsed, a copy that later writes leave alone."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading


@dataclass
class Block:
    """The names of a block of units by unit, and what the claiming code's own parser reads from them."""

    names: dict[int, list[str]] = field(default_factory=dict)
    reading: Reading = EMPTY

    def add(self, name: str) -> None:
        slot = int(name[:3])
        of_unit = self.names.setdefault(slot, [])
        of_unit.append("/" + name)
        fresh, before = read_block(of_unit), self.reading
        others = {unit: state for unit, state in before.others.items() if unit != slot} | fresh.others
        self.reading = Reading(before.done - {slot} | fresh.done, others)


class ModelStore:
    """Answers requests at the moment they reach it.

    `heartbeat(worker)`: what its heartbeat says, None if it left;
    `gone(worker)`: somebody removed its heartbeat.
    """

    def __init__(
        self, n_units: int, heartbeat: Callable[[str], dict[str, Any] | None], gone: Callable[[str], None]
    ) -> None:
        self._heartbeat, self._gone = heartbeat, gone
        self.by_folder: dict[str, dict[str, str]] = {}
        self.blocks: dict[str, Block] = {}
        self.requests: Counter[str] = Counter()
        self.claims_lost = 0
        self.per_second: dict[str, Counter[int]] = {}
        self.all_requests: Counter[int] = Counter()
        self.plan_sizes = plan_sizes(n_units)
        self.plan_bytes: Counter[int] = Counter()
        self.hot_folder: tuple[int, str] = (0, "")
        self.second_folder: Counter[str] = Counter()
        self.this_second = -1

    def answer(self, request: Request, now: float) -> Any:
        """What the service says to a request that reaches it `now` (seconds)."""
        match request:
            case Put(key, value):
                self._count("put", key, now)
                made = self.put(key, str(value.get("worker", "")))
                if not made and ".e" in key:
                    self.claims_lost += 1
                return made
            case Get(key):
                self._count("get", key, now)
                if key.startswith("plan/"):
                    self.plan_bytes[int(now)] += self.plan_sizes[key == PLAN_KEY]
                    return None
                if key.startswith(f"{LAYOUT.root}/workers/"):
                    return self._heartbeat(key.rpartition("/")[2].removesuffix(".json"))
                folder, _, name = key.rpartition("/")
                maker = self.by_folder.get(folder, {}).get(name)
                return None if maker is None else {"worker": maker}
            case Replace(key, _):
                self._count("put", key, now)
            case Delete(key):
                self._count("put", key, now)
                self._gone(key.rpartition("/")[2].removesuffix(".json"))
            case List(prefix):
                for _ in range(max(1, -(-len(self.by_folder.get(prefix, ())) // NAMES))):
                    self._count("list", prefix, now)
                return self._list(prefix)
        return None

    def _count(self, kind: str, key: str, now: float) -> None:
        self.requests[kind] += 1
        second = int(now)
        parts = key.split("/")
        area = "plan" if parts[0] == "plan" else parts[2]
        self.all_requests[second] += 1
        self.per_second.setdefault(f"{area} {'read' if kind in ('get', 'list') else 'write'}", Counter())[second] += 1
        if second != self.this_second:
            if self.second_folder:
                folder, peak = self.second_folder.most_common(1)[0]
                if peak > self.hot_folder[0]:
                    self.hot_folder = (peak, folder)
            self.second_folder = Counter()
            self.this_second = second
        self.second_folder["/".join(parts[2:4]) if area == "units" else key] += 1

    def put(self, key: str, maker: str) -> bool:
        """Create a name unless it is there."""
        folder, _, name = key.rpartition("/")
        names = self.by_folder.setdefault(folder, {})
        if name in names:
            return False
        names[name] = maker
        if folder.startswith(UNITS):
            self.blocks.setdefault(folder, Block()).add(name)
        return True

    def _list(self, folder: str) -> list[str]:
        if folder.startswith(UNITS):
            return Listing(self.blocks[folder].reading if folder in self.blocks else EMPTY)
        return sorted(self.by_folder.get(folder, {}))


def parsed(names: Iterable[str]) -> Reading:
    """What `Claimer` reads from a listing."""
    assert isinstance(names, Listing)
    return names.reading


@cache
def plan_sizes(n_units: int) -> dict[bool, int]:
    """Bytes of the plan's index (True) and of one of its pages (False), as they are stored."""
    units = [
        Unit(index=at, split="heldout" if at % 10 == 0 else "train",
             slice=f"plan/slices/{at:05d}-train-{'0' * 12}.parquet", sha256="0" * 64,
             n_docs=2500, n_bytes=9_999_999)
        for at in range(n_units)
    ]  # fmt: skip
    pages = ["0" * 64] * -(-n_units // PAGE)
    index = make_index({"sha256": "0" * 64, "n_documents": 0, "n_bytes": 0}, {}, units, pages)
    return {True: len(index_bytes(index)), False: len(page_bytes(units[:PAGE]))}
