"""The queue of units at fleet size: the real claiming code on a model of an object store, up to 10,000 workers.

    python -m benchmarks.queue_simulation --out benchmarks/results/queue_simulation.json --plot queue_simulation.png

A discrete-event simulation. Every worker runs `pipeline.fleet.claims.Claimer` as it is; each request it asks for is
answered at the moment it reaches the store, some latency later, so that listings go stale and claims collide as they do
outside. Modelled: the store (put-if-absent, listings in pages of 1,000 names, log-normal latency with a slow 1 %), the
duration of units (log-normal, and workers of different speed), preemption (half with a notice, half without),
the start of an engine, replacement machines, reading the plan (its index at every start, pages as units are claimed
from them, at their real sizes). The requests that move a unit's data (`IO_PER_UNIT`) are counted, not
simulated: their keys are spread by hash or by unit. Not modelled: the service's own throttling; the peaks say where
it would begin (S3 documents 3,500 writes and 5,500 reads a second per partition of the key space).

What it shows (10 TB in a million units, 10 to 10,000 workers): 7.1 to 7.4 units per worker and hour at every size, none
lost, none done twice; 529 requests a second to the ledger, 500 of them heartbeats, 2,800 in the worst second (without
heartbeats); no folder above 520. A short job is mostly its beginning and its end: with ten units a worker the rate
falls from 6.7 (100 workers) to 6.1 (10,000), since more workers wait for the slowest of more units; with one unit it is
4.3 to 4.9 at every size, a quarter of what units alone would take, the rest being starts of engines and waiting. Claims
collide twice a unit there, and 10,000 workers make 6,100 requests in the worst second, most of them reads of heartbeats
by those that found nothing to do. Where it breaks next: that peak, if it met one partition (S3 documents 5,500 reads a
second); heartbeats alone reach 3,500 writes a second at 70,000 workers (raise `fleet.heartbeat_s`); the index of the
plan, 9 bytes a unit, is 90 MB at ten million units. Planning 10 TB is `benchmarks/planning.py`.
"""

import argparse
import heapq
import json
import math
import random
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.simulated_store import LAYOUT, NAMES, ModelStore, parsed
from bytecache.pipeline.fleet.claims import Claim, Claimer, Idle
from bytecache.pipeline.fleet.ledger import BLOCK, Delete, Get, Limits, Replace, Request, n_blocks
from bytecache.pipeline.plan.index import KEPT, PAGE, PLAN_KEY
from bytecache.schemas.settings import Fleet

BANDWIDTH = 100e6
"""Bytes a second that a worker reads an object with."""
SPREAD_UNITS, SPREAD_WORKERS = 0.3, 0.15
"""Standard deviations of the logarithm of a unit's duration, over units and over workers."""
IO_PER_UNIT = {"head": 3, "get": 1, "put": 2}
"""runner.run_one and worker: receipt looked for twice, object once; slice read; object and receipt written."""
PRICE = {"put": 5e-6, "list": 5e-6, "get": 4e-7, "head": 4e-7}
"""US dollars a request, S3 Standard, list price."""


@dataclass(frozen=True)
class Scenario:
    """One run. Times in seconds, `preemptions` per worker and hour, half of them with a notice."""

    workers: int
    units_per_worker: int
    unit_s: float = 180.0
    unit_mb: float = 4.0
    preemptions: float = 0.0
    latency_s: float = 0.03
    engine_s: float = 90.0
    replace_s: float = 120.0
    notice_s: float = 25.0
    seed: int = 0


@dataclass
class Machine:
    """A worker's process."""

    number: int
    name: str
    speed: float
    born: float
    life: Generator[Request | float, Any, None] | None = None
    end: float = math.inf
    graceful: bool = False
    dead_at: float | None = None
    left: bool = False
    unit: int = -1
    epoch: int = 0
    began: float = 0.0
    duration: float = 0.0
    claim: Claim | None = None
    claimer: Claimer | None = None
    pages: list[int] = field(default_factory=list)


class Simulation:
    """Runs one scenario; `result` says what it took."""

    def __init__(self, scenario: Scenario, settings: Fleet) -> None:
        self.scenario, self.settings = scenario, settings
        self.random = random.Random(scenario.seed)
        self.now = 0.0
        self.n_units = scenario.workers * scenario.units_per_worker
        self.store = ModelStore(self.n_units, self.heartbeat, self.forget)
        self.machines: dict[str, Machine] = {}
        self.events: list[tuple[float, int, Machine, Any]] = []
        self.sequence = 0
        self.completions = bytearray(self.n_units)
        self.n_done = 0
        self.wasted = self.useful = self.idle = self.beats = self.alive_s = 0.0
        self.counts: Counter[str] = Counter()
        self.last_done = 0.0
        self.half_idle_at: float | None = None
        self.n_idle = 0

    # ---- workers

    def forget(self, name: str) -> None:
        """Somebody removed a dead worker's heartbeat."""
        machine = self.machines.get(name)
        if machine is not None and machine.dead_at is not None:
            machine.left = True

    def heartbeat(self, name: str) -> dict[str, Any] | None:
        machine = self.machines.get(name)
        if machine is None or machine.left:
            return None
        until = self.now if machine.dead_at is None else machine.dead_at
        beat = int((until - machine.born) / self.settings.heartbeat_s)
        return {"beat": beat, "unit": machine.unit, "epoch": machine.epoch}

    def start(self, number: int, at: float) -> None:
        scenario = self.scenario
        name = f"{self.random.getrandbits(32):08x}-{number}-{self.counts['started']}"
        self.counts["started"] += 1
        machine = Machine(number, name, self.random.lognormvariate(0, SPREAD_WORKERS), at)
        machine.claimer = Claimer(
            LAYOUT, self.n_units, name, limits=Limits(self.settings.max_failures, self.settings.max_losses),
            lease_s=self.settings.lease_s, clock=lambda: self.now, read=parsed,
        )  # fmt: skip
        machine.life = self.life(machine)
        if scenario.preemptions:
            machine.end = at + self.random.expovariate(scenario.preemptions / 3600)
            machine.graceful = self.random.random() < 0.5
            self.push(machine.end, machine, "preempted")
        self.machines[name] = machine
        self.push(at, machine, None)

    def push(self, at: float, machine: Machine, answer: Any) -> None:
        self.sequence += 1
        heapq.heappush(self.events, (at, self.sequence, machine, answer))

    def life(self, machine: Machine) -> Generator[Request | float, Any, None]:
        claimer = machine.claimer
        assert claimer is not None
        yield Get(PLAN_KEY)
        yield self.store.plan_sizes[True] / BANDWIDTH
        yield Get(LAYOUT.job)
        yield Replace(LAYOUT.worker(machine.name), {})
        warm = False
        while True:
            claim = yield from claimer.claim()
            if isinstance(claim, Idle):
                self.idle += claim.seconds
                yield claim.seconds
                continue
            if not isinstance(claim, Claim):
                break
            machine.unit, machine.epoch, machine.claim = claim.unit, claim.epoch, claim
            page = claim.unit // PAGE
            if page not in machine.pages:
                machine.pages = [*machine.pages[-KEPT + 1 :], page]
                yield Get(f"plan/units/{page:05d}")
            if not warm:
                yield self.scenario.engine_s
                warm = True
            machine.began = self.now
            machine.duration = self.scenario.unit_s * machine.speed * self.random.lognormvariate(0, SPREAD_UNITS)
            yield machine.duration
            self.useful += machine.duration
            if self.completions[claim.unit]:
                self.counts["duplicates"] += 1
                self.wasted += machine.duration
                self.useful -= machine.duration
            else:
                self.n_done += 1
                self.last_done = self.now
            self.completions[claim.unit] = 1
            yield from claimer.finish(claim, {})
            machine.unit, machine.claim = -1, None
            if machine.graceful and self.now >= machine.end:
                break
        machine.left = True
        yield Delete(LAYOUT.worker(machine.name))

    def preempt(self, machine: Machine) -> None:
        """The cloud takes the machine back; another one starts later."""
        if machine.dead_at is not None or machine.left:
            return
        self.counts["preemptions"] += 1
        spent = self.now - machine.began if machine.claim is not None and machine.duration else 0.0
        if machine.graceful:
            if machine.claim is not None and machine.duration and machine.duration - spent <= self.scenario.notice_s:
                self.start(machine.number, self.now + self.scenario.replace_s)
                return  # it finishes its unit, then leaves
            if machine.claim is not None and machine.claimer is not None:
                for request in machine.claimer.release(machine.claim):
                    self.store.answer(request, self.now)
            machine.left = True
        self.wasted += max(spent, 0.0)
        self.retire(machine)
        self.start(machine.number, self.now + self.scenario.replace_s)

    def retire(self, machine: Machine) -> None:
        machine.dead_at = self.now
        self.alive_s += self.now - machine.born
        self.beats += (self.now - machine.born) / self.settings.heartbeat_s
        machine.life = machine.claimer = None

    def delay(self) -> float:
        slow = 10.0 if self.random.random() < 0.01 else 1.0
        return self.scenario.latency_s * slow * self.random.lognormvariate(0, 0.4)

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        for number in range(self.scenario.workers):
            self.start(number, self.random.uniform(0, 60))
        while self.events:
            self.now, _, machine, answer = heapq.heappop(self.events)
            if answer == "preempted":
                if self.n_done < self.n_units:
                    self.preempt(machine)
                continue
            if machine.life is None:
                continue
            try:
                asked = machine.life.send(answer)
            except StopIteration:
                self.retire(machine)
                continue
            if isinstance(asked, float):
                self.push(self.now + asked, machine, None)
            else:
                reply = self.store.answer(asked, self.now)
                self.push(self.now + self.delay(), machine, reply)
        return self.result(time.perf_counter() - began)

    def result(self, seconds: float) -> dict[str, Any]:
        scenario, store = self.scenario, self.store
        # Mean duration of a unit over units, and mean speed over workers, of the log-normal draws.
        ideal = scenario.units_per_worker * scenario.unit_s * math.exp((SPREAD_UNITS**2 - SPREAD_WORKERS**2) / 2)
        total = store.requests + Counter({"put": int(self.beats)})
        data = Counter({kind: count * self.n_done for kind, count in IO_PER_UNIT.items()})
        peaks = {area: max(counter.values()) for area, counter in sorted(store.per_second.items())}
        beats_per_s = scenario.workers / self.settings.heartbeat_s
        steady = sum(sum(counter.values()) for counter in store.per_second.values()) / max(self.now, 1) + beats_per_s
        return {
            "scenario": asdict(scenario),
            "units": self.n_units, "blocks": n_blocks(self.n_units),
            "text_tb": round(self.n_units * scenario.unit_mb / 1e6, 6),
            "lost_units": self.n_units - self.n_done,
            "hours": round(self.last_done / 3600, 3),
            "units_per_worker_hour": round(self.n_done / (scenario.workers * self.last_done / 3600), 3),
            "ideal_hours": round(ideal / 3600, 3),
            "busy_share": round(self.useful / max(self.alive_s, 1e-9), 4),
            "idle_share": round(self.idle / max(self.alive_s, 1e-9), 4),
            "wasted_share": round(self.wasted / max(self.useful, 1e-9), 5),
            "preemptions": self.counts["preemptions"], "duplicates": self.counts["duplicates"],
            "claims_lost_per_unit": round(store.claims_lost / self.n_units, 4),
            "ledger_requests_per_unit": {k: round(v / self.n_units, 4) for k, v in sorted(total.items())},
            "mean_ledger_requests_per_s": round(steady, 2),
            "heartbeats_per_s": round(beats_per_s, 2),
            "peak_requests_per_s": peaks,
            "worst_second_of_all": max(store.all_requests.values()),
            "mean_data_requests_per_s": round(sum(IO_PER_UNIT.values()) * self.n_done / self.last_done, 2),
            "plan": {
                "index_bytes": store.plan_sizes[True], "page_bytes": store.plan_sizes[False],
                "gb_read": round(sum(store.plan_bytes.values()) / 1e9, 3),
                "worst_second_mb": round(max(store.plan_bytes.values()) / 1e6, 1),
            },
            "hottest_folder": {"folder": store.hot_folder[1], "requests_in_its_worst_second": store.hot_folder[0]},
            "dollars_per_1000_units": {
                "ledger": round(sum(PRICE[k] * v for k, v in total.items()) / self.n_units * 1000, 4),
                "data": round(sum(PRICE[k] * v for k, v in data.items()) / self.n_units * 1000, 4),
            },
            "simulation_s": round(seconds, 1),
        }  # fmt: skip


def naive_listing(scenario: Scenario) -> dict[str, float]:
    """For comparison: every worker lists all receipts once at its start, as a single process does."""
    pages = -(-scenario.workers * scenario.units_per_worker // NAMES)
    return {"list_requests": pages * scenario.workers, "seconds_at_5500_per_s": pages * scenario.workers / 5500}


def scenarios(largest: int) -> dict[str, list[Scenario]]:
    """What is asked, by question."""
    scaling = [
        Scenario(n, 100, unit_s=450.0, unit_mb=10.0, preemptions=1 / 6) for n in (10, 100, 1000, 10000) if n <= largest
    ]
    short = [Scenario(n, 10, unit_s=450.0, unit_mb=10.0) for n in (100, 1000, 10000) if n <= largest]
    rates = [Scenario(300, 60, preemptions=rate) for rate in (0.0, 0.1, 0.3, 1.0, 3.0)]
    latencies = [Scenario(300, 60, preemptions=1 / 6, latency_s=latency) for latency in (0.003, 0.1, 1.0)]
    sizes = [
        Scenario(300, int(60 * 180 / unit_s), unit_s=unit_s, unit_mb=4 * unit_s / 180, preemptions=1.0)
        for unit_s in (30.0, 600.0, 1800.0)
    ]
    tail = [Scenario(n, 1, preemptions=1 / 6) for n in (100, 1000, 10000) if n <= largest]
    return {
        "scaling": scaling,
        "ten_units_each": short,
        "preemption": rates,
        "latency": latencies,
        "unit_size": sizes,
        "one_unit_each": tail,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=10000, help="most workers")
    parser.add_argument("--only", default="", help="one of the questions")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    settings = Fleet()
    answers: dict[str, Any] = {
        "machine": "2 cores, x86-64",
        "settings": {"block": BLOCK, "heartbeat_s": settings.heartbeat_s, "lease_s": settings.lease_s},
        "data_requests_per_unit": IO_PER_UNIT,
        "naive_listing_at_10000": naive_listing(Scenario(10000, 100)),
    }
    if args.only and args.out and args.out.is_file():
        answers = json.loads(args.out.read_text()) | answers
    for question, wanted in scenarios(args.largest).items():
        if args.only in ("", question):
            answers[question] = []
            for scenario in wanted:
                result = Simulation(scenario, settings).run()
                answers[question].append(result)
                print(json.dumps({"question": question, **result}), flush=True)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(answers, indent=1) + "\n")
    if args.plot:
        plot(answers, args.plot)


def plot(answers: dict[str, Any], path: Path) -> None:
    """Throughput per worker and request rates against workers; waste against preemption."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8))
    workers = [row["scenario"]["workers"] for row in answers["scaling"]]
    left.semilogx(workers, [row["units_per_worker_hour"] for row in answers["scaling"]], "o-")
    left.set(xlabel="workers", ylabel="units per worker and hour", title="throughput", ylim=(0, None))
    middle.loglog(workers, [row["mean_ledger_requests_per_s"] for row in answers["scaling"]], "o-", label="mean")
    peaks = [max(row["peak_requests_per_s"].values()) for row in answers["scaling"]]
    middle.loglog(workers, peaks, "s--", label="worst second, one area")
    hottest = [row["hottest_folder"]["requests_in_its_worst_second"] for row in answers["scaling"]]
    middle.loglog(workers, hottest, "^:", label="worst second, one folder")
    middle.axhline(3500, color="grey", linewidth=0.8)
    middle.set(xlabel="workers", ylabel="requests per second", title="load on the store")
    middle.legend()
    rates = [row["scenario"]["preemptions"] for row in answers["preemption"]]
    right.plot(rates, [row["wasted_share"] for row in answers["preemption"]], "o-")
    right.set(
        xlabel="preemptions per worker and hour", ylabel="wasted / useful work", title="preemption, units of 3 minutes"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
