"""One worker: claim, work, commit, say so, until every unit of the job is done or set aside.

A thread beats beside the work (every `fleet.heartbeat_s`) and looks for notices of preemption; it falls silent if the
work shows no progress for `fleet.stall_s`, so that others take over from an engine that hangs. What a unit's failure
means: InputError and IntegrityError are the unit's; other errors may be the engine's, which is opened anew; a refusing
disk or store is neither's, so the unit goes back and the worker ends. A worker that fails at one unit after another
ends too: it is more likely sick than they.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bytecache.pipeline.fleet.claims import Claim, Claimer, Idle
from bytecache.pipeline.fleet.job import join
from bytecache.pipeline.fleet.ledger import Delete, Layout, Limits, Replace, Steps, perform
from bytecache.pipeline.fleet.preemption import Drain
from bytecache.pipeline.stores import Store
from bytecache.pipeline.stores.processes import has_ended, process_name
from bytecache.pipeline.units.receipts import Receipt
from bytecache.pipeline.units.runner import Job, Task, Tick, Work, finished, interruption_of, run_one
from bytecache.schemas.errors import BytecacheError, EngineError, InputError, IntegrityError, Interrupted, StorageError
from bytecache.schemas.settings import Fleet

TICK_S = 0.2
"""Between looks of the heartbeat's thread at signals and deadlines."""
SICK = 3
"""A worker ends after `SICK` units failed in a row if none succeeded before, after three times as many otherwise."""


@dataclass(frozen=True)
class Share:
    """What one worker did of a job: units made, units it found done by others, attempts of its own that failed."""

    worker: str
    made: int
    found: int
    failed: int


class Heartbeat:
    """Writes who we are and what we do, from a thread of its own; a context manager. `facts` may be read by anyone."""

    def __init__(self, store: Store, layout: Layout, worker: str, settings: Fleet, drain: Drain) -> None:
        self.store, self.layout, self.worker, self.settings, self.drain = store, layout, worker, settings, drain
        self.facts: dict[str, Any] = {
            "worker": worker, "host": socket.gethostname(), "pid": os.getpid(), "unit": -1, "epoch": 0,
            "made": 0, "failed": 0, "bytes": 0, "seconds": 0.0, "started": round(time.time(), 3),
        }  # fmt: skip
        self.committing = False
        self.give_back: Callable[[], Steps[None]] | None = None
        self._beat = 0
        self._progress = time.monotonic()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self.beat()  # before the first claim: a claim without a heartbeat is anybody's
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            perform(self.store, self._leave())

    def touch(self) -> None:
        """The work moved on."""
        self._progress = time.monotonic()

    def hold(self, unit: int, epoch: int, give_back: Callable[[], Steps[None]] | None) -> None:
        """From now on at this unit; -1: at none. `give_back` releases the claim if the process has to go."""
        with self._lock:
            self.facts["unit"], self.facts["epoch"] = unit, epoch
            self.give_back = give_back
        self.touch()

    def beat(self) -> None:
        """Write the heartbeat. Raises StorageError."""
        self._beat += 1
        with self._lock:
            facts = {**self.facts, "beat": self._beat, "time": round(time.time(), 3)}
        perform(self.store, self._write(facts))

    def _write(self, facts: dict[str, Any]) -> Steps[None]:
        yield Replace(self.layout.worker(self.worker), facts)

    def _leave(self) -> Steps[None]:
        yield Delete(self.layout.worker(self.worker))

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_S):
            self.drain.poll()
            now = time.monotonic()
            if self.drain.deadline is not None and now >= self.drain.deadline + TICK_S:
                self._past_deadline()
            if now - last >= self.settings.heartbeat_s and now - self._progress < self.settings.stall_s:
                last = now
                with contextlib.suppress(Exception):  # it has to go on; the work meets the same store, and says so
                    self.beat()

    def _past_deadline(self) -> None:
        """The engine has not answered in time: give the unit back and go, unless a commit is under way."""
        with self._lock:
            give_back, committing = self.give_back, self.committing
        if give_back is None or committing:
            return
        with contextlib.suppress(StorageError):
            perform(self.store, give_back())
            perform(self.store, self._leave())
        left = "the unit in flight was given back at the deadline; rerun the same command to continue"
        say({"worker": self.worker, "left": left})
        os._exit(Interrupted.exit_code)


class Worker:
    """Works on one job. `gone` and the clock are those of this machine; see `Claimer`."""

    def __init__(self, store: Store, job: Job, settings: Fleet, stop: Callable[[], bool]) -> None:
        self.store, self.job, self.settings = store, job, settings
        self.layout = Layout(job.stage, job.edition)
        self.name = f"{process_name()}-{os.urandom(2).hex()}"
        self.drain = Drain(settings, stop)
        self.heart = Heartbeat(store, self.layout, self.name, settings, self.drain)
        self.claimer = Claimer(
            self.layout,
            len(job.measures),
            self.name,
            limits=Limits(settings.max_failures, settings.max_losses),
            lease_s=settings.lease_s,
            clock=time.monotonic,
            gone=has_ended,
        )
        self.made = self.found = self.failed = 0
        self._failed_in_a_row: set[int] = set()
        self._sick = ""
        self._work: Work | None = None
        self._engine = ExitStack()

    def run(self) -> Share:
        """Work until the job is settled. The claim in hand is given back whatever is raised.

        Raises Interrupted (signal or notice), ConfigError (other settings or software began this job), StorageError,
        EngineError (one unit after another failed here), and whatever opening the engine raises.
        """
        self.store.sweep()
        join(self.store, self.job)
        with self._engine, self.heart:
            self._loop()
        return Share(self.name, self.made, self.found, self.failed)

    def _loop(self) -> None:
        idle_since: float | None = None
        while True:
            if self.drain.requested():
                raise self._interrupted()
            claimed = perform(self.store, self.claimer.claim())
            if isinstance(claimed, Claim):
                idle_since = None
                if self.drain.requested():
                    perform(self.store, self.claimer.release(claimed))
                    raise self._interrupted()
                self._attempt(claimed)
                if self._sick:
                    raise EngineError(
                        f"this worker failed at {self._sick}; mend the machine or the settings and start it again"
                    )
            elif isinstance(claimed, Idle):
                self.heart.touch()
                now = time.monotonic()
                idle_since = now if idle_since is None else idle_since
                if 0 < self.settings.idle_exit_s <= now - idle_since:
                    say({"stage": self.job.stage, "worker": self.name, "left": "nothing to do but to wait for others"})
                    return
                self._pause(claimed.seconds)
            else:
                return

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.drain.requested():
            time.sleep(min(left, TICK_S))

    def _attempt(self, claim: Claim) -> None:
        """Do one unit, and put down what became of it. What it raises is not the unit's fault."""
        self.heart.hold(claim.unit, claim.epoch, lambda: self.claimer.release(claim))
        try:
            if claim.epoch > 1:
                self.heart.beat()  # whoever watched the unit's last holder sees its new one
            task = self.job.task(claim.unit)
            if finished(self.store, task) is not None:
                perform(self.store, self.claimer.finish(claim, {"found": True}))
                self.found += 1
                return
            if self._work is None:
                with interruption_of(self.drain.requested, self._interrupted):
                    self._work = self._engine.enter_context(self.job.open(self.drain.abandon))
            began = time.monotonic()
            self.drain.unit_begins(task.measure)
            try:
                with interruption_of(self.drain.requested, self._interrupted):
                    receipt, ours = run_one(self.store, task, self._working, self._tick)
            except (Interrupted, StorageError):
                raise
            except Exception as error:
                self._failed(claim, task, error)
                return
            finally:
                self.heart.committing = False
            self._succeeded(claim, task, receipt, ours, time.monotonic() - began)
        except Interrupted:
            self._give_back(claim)
            raise self._interrupted() from None
        except BaseException:
            self._give_back(claim)
            raise
        finally:
            self.heart.hold(-1, 0, None)

    def _give_back(self, claim: Claim) -> None:
        with contextlib.suppress(StorageError):
            perform(self.store, self.claimer.release(claim))

    def _working(self, task: Task, out: Path, tick: Tick) -> dict[str, Any]:
        assert self._work is not None
        counts = self._work(task, out, tick)
        self.heart.committing = True
        return counts

    def _tick(self, increments: dict[str, Any]) -> None:
        self.heart.touch()
        self.drain.tick(float(increments.get("bytes", 0)))

    def _succeeded(self, claim: Claim, task: Task, receipt: Receipt, ours: bool, seconds: float) -> None:
        self.drain.unit_ends()
        perform(self.store, self.claimer.finish(claim, {"seconds": round(seconds, 3), "duplicate": not ours}))
        self.made += ours
        self.found += not ours
        self._failed_in_a_row.clear()
        facts = self.heart.facts
        facts["made"], facts["bytes"] = self.made, facts["bytes"] + task.measure
        facts["seconds"] = round(facts["seconds"] + seconds, 3)
        say({
            "stage": task.stage, "unit": task.name, "worker": self.name, "attempt": claim.epoch, "made": self.made,
            "duplicate": not ours, "bytes": task.measure, "seconds": round(seconds, 3),
            "size": sum(file.size for file in receipt.files),
            "bytes_per_s": round(facts["bytes"] / max(facts["seconds"], 1e-9), 3),
        })  # fmt: skip

    def _failed(self, claim: Claim, task: Task, error: Exception) -> None:
        words = " ".join(str(error).split())
        reason = words if isinstance(error, BytecacheError) else f"{type(error).__name__}: {words}"
        aside = perform(self.store, self.claimer.fail(claim, f"{task.name}: {reason}"[:2000]))
        self.failed += 1
        self.heart.facts["failed"] = self.failed
        self._failed_in_a_row.add(claim.unit)
        say({
            "stage": task.stage, "unit": task.name, "worker": self.name, "attempt": claim.epoch, "failed": reason,
            "set_aside": aside,
        })  # fmt: skip
        if not isinstance(error, InputError | IntegrityError):
            self._work = None
            with contextlib.suppress(Exception):  # it may be what failed
                self._engine.close()
        if len(self._failed_in_a_row) >= (SICK if not self.made else 3 * SICK):
            self._sick = f"{len(self._failed_in_a_row)} units in a row, the last for this reason: {reason}"

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"{self.job.stage} worker stopped ({self.drain.reason}) after {self.made} units; nothing of what is whole "
            "is lost; rerun the same command to go on"
        )


def say(facts: dict[str, Any]) -> None:
    """One JSON line on stderr."""
    print(json.dumps(facts), file=sys.stderr, flush=True)
