"""Runs the units of a stage: skip what has a valid receipt, work, commit, receipt. Knows nothing of any stage.

The commit protocol, per unit:
1. the work writes to a temporary file on the store's device;
2. the file is flushed and linked to its key, only if the key is free;
3. a receipt with size and sha256 is linked last.
A kill before 3 leaves no receipt, so the unit is redone; it makes the same bytes and either finds its object
there or replaces one that differs (a torn copy, a fault of the disk). At most the unit in flight is lost.
A first SIGTERM or SIGINT raises a flag that the work polls; the unit in flight is finished or abandoned and the
process exits with code 75. A second one exits at once, which is as safe as kill -9.
"""

import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from bytecache.pipeline.stores import Store, disk_errors, overlapped, refuse_no_file
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.progress import Reporter, human_bytes
from bytecache.pipeline.units.receipts import FileRecord, Receipt
from bytecache.schemas.errors import BytecacheError, EngineError, IntegrityError, Interrupted
from bytecache.schemas.files import file_sha256
from bytecache.schemas.messages import one_line

_LOGGER = logging.getLogger("bytecache")

Tick = Callable[[dict[str, Any]], None]


class StopFlag:
    """Callable: true once the process was asked to stop. Passed to stages as `stop`."""

    def __init__(self) -> None:
        self._set = False

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self._set

    def set(self) -> None:
        """Ask for a stop; the work notices at its next poll."""
        self._set = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._set:
            os._exit(Interrupted.exit_code)
        self._set = True
        note = f"{signal.Signals(number).name}: stopping after the work in flight; once more to exit at once\n"
        os.write(2, note.encode())

    @contextmanager
    def installed(self) -> Iterator["StopFlag"]:
        """Answer SIGTERM and SIGINT by setting the flag, for the duration of the block (main thread only)."""
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Task:
    """One unit of a stage: `inputs` determine its bytes and hash to its key; `out` is the store key it makes.

    `measure` is its size for progress (bytes of text); `payload` is whatever the work needs to find its inputs.
    """

    stage: str
    name: str
    out: str
    inputs: dict[str, Any]
    measure: int
    payload: Any = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Content key: hex sha256."""
        return receipts.unit_key(self.stage, self.inputs)


Work = Callable[[Task, Path, Tick], dict[str, Any]]
"""(task, temporary path to write, tick) -> counts for the receipt. Must raise Interrupted rather than return early."""


@dataclass(frozen=True)
class Job:
    """A stage's units, and how to do them.

    `identity`: what everybody who works on it must agree on (JSON). `measures`: size of every unit (bytes of text).
    `task(i)` names unit i; making it may read receipts, so it is made when needed. `open(stop)` gives the work, an
    engine loaded behind it, which raises Interrupted soon after `stop()` turns true. `edition`: of the plan.
    """

    stage: str
    identity: dict[str, Any]
    measures: Sequence[int]
    task: Callable[[int], Task]
    open: Callable[[Callable[[], bool]], AbstractContextManager[Work]]
    edition: int = 1

    @property
    def tasks(self) -> list[Task]:
        """All of them."""
        return [self.task(index) for index in range(len(self.measures))]


@dataclass(frozen=True)
class Outcome:
    """Receipts of all tasks in their order, and how many of them this call made."""

    receipts: list[Receipt]
    made: int

    @property
    def content(self) -> str:
        """Hex sha256 of the keys of all units: what was made, whoever made it, and when."""
        digest = hashlib.sha256()
        for receipt in self.receipts:
            digest.update(receipt.key.encode())
        return digest.hexdigest()


def finished(store: Store, task: Task, warn: Callable[[str], None] | None = None) -> Receipt | None:
    """The task's receipt if its files match it to the sha256, else None (and `warn` is told what is damaged).

    Raises StorageError where what stands in the place of one is no file: it could not be made again.
    """
    try:
        receipt = receipts.read_receipt(store, task.stage, task.key)
        faults = receipts.problems(store, receipt) if receipt else []
        if receipt is not None and (fault := receipts.key_fault(receipt)):
            raise IntegrityError(fault)
    except receipts.OtherVersion:
        raise
    except IntegrityError as error:
        receipt, faults = None, [str(error)]
    if faults:
        places = [file.path for file in (receipt.files if receipt else ())]
        refuse_no_file(store, receipts.receipt_path(task.stage, task.key), *places)
    if faults and warn:
        warn(f"{task.stage} {task.name} will be redone: {'; '.join(faults)}")
    return None if faults else receipt


def run_job(store: Store, job: Job, stop: Callable[[], bool]) -> Outcome:
    """Finish every unit of a job in this process, in order; see `run_units`."""
    with ExitStack() as cleanup:
        return run_units(store, job.tasks, lambda: cleanup.enter_context(job.open(stop)), stop)


def run_units(
    store: Store,
    tasks: Sequence[Task],
    open_work: Callable[[], Work],
    stop: Callable[[], bool],
    *,
    reporter: Callable[[int, int], Reporter] | None = None,
) -> Outcome:
    """Finish every task, in order. `open_work` (loading an engine) is called only if something is left to do.

    `reporter(done_units, done_measure)` makes the progress display. Raises Interrupted when `stop()` is true
    between units or the work raises it; StorageError when the disk refuses; and whatever the work raises. In
    every case units already committed stay.
    """
    store.sweep()
    receipts_of_tasks = overlapped(lambda task: finished(store, task, warn_user), tasks)
    known = {task.key: receipt for task, receipt in zip(tasks, receipts_of_tasks, strict=True)}
    pending = list({task.key: task for task in tasks if known[task.key] is None}.values())
    if not pending:
        return Outcome([receipt for task in tasks if (receipt := known[task.key])], 0)
    if stop():
        raise _interrupted(tasks[0].stage, len(tasks) - len(pending), len(tasks))
    whole = [task for task in tasks if known[task.key] is not None]
    make_reporter = reporter or _default_reporter(tasks)
    done = len(whole)
    with interruption_of(stop, partial(_interrupted, tasks[0].stage, done, len(tasks))):
        work = open_work()
    with make_reporter(len(whole), sum(task.measure for task in whole)) as progress:
        for number, task in enumerate(pending):
            if stop():
                raise _interrupted(task.stage, len(tasks) - len(pending) + number, len(tasks))
            started = time.monotonic()
            with interruption_of(stop, partial(_interrupted, tasks[0].stage, done, len(tasks))):
                known[task.key], _ = run_one(store, task, work, progress.tick)
            done += 1
            progress.unit_done(task.name, task.measure, time.monotonic() - started)
    return Outcome([receipt for task in tasks if (receipt := known[task.key])], len(pending))


@contextmanager
def interruption_of(stop: Callable[[], bool], interrupted: Callable[[], Interrupted]) -> Iterator[None]:
    """Work that fails once it was asked to stop was interrupted.

    A signal to the whole process group ends an engine's helpers too, and what the engine makes of that is no fault of
    the unit. Refusals of the input, the settings or the store stay what they are.
    """
    try:
        yield
    except Exception as error:
        if stop() and (isinstance(error, EngineError) or not isinstance(error, BytecacheError)):
            raise interrupted() from error
        raise


def run_one(store: Store, task: Task, work: Work, tick: Tick) -> tuple[Receipt, bool]:
    """Do one unit and commit it; returns its receipt and whether it is ours (not that of a faster worker)."""
    temporary = store.temp_path(task.out)
    started = time.monotonic()
    try:
        with disk_errors(f"{task.stage} {task.name}, writing {temporary}"):
            counts = work(task, temporary, tick)
        # Another worker that was taken for dead, or took us for it, may have been faster; its object is in use already.
        other = finished(store, task)
        if other is not None:
            return other, False
        record = commit_file(store, task.out, temporary)
    finally:
        temporary.unlink(missing_ok=True)
    receipt = receipt_of(task, [record], counts, time.monotonic() - started)
    published = commit_receipt(store, receipt)
    return published, published is receipt


def receipt_of(task: Task, files: Sequence[FileRecord], counts: dict[str, Any], seconds: float) -> Receipt:
    """The receipt of a unit that was made here, in so many seconds."""
    return Receipt(
        stage=task.stage,
        key=task.key,
        name=task.name,
        files=tuple(files),
        inputs=task.inputs,
        counts=counts,
        timings={"seconds": round(seconds, 3)},
        versions=receipts.software_versions(),
    )


def commit_file(store: Store, key: str, temporary: Path) -> FileRecord:
    """Publish a finished temporary file. An object already there is kept if equal and replaced if damaged."""
    if not temporary.is_file():
        raise IntegrityError(f"{key}: the stage wrote nothing to {temporary}; this is a fault of the stage")
    record = FileRecord(path=key, size=temporary.stat().st_size, sha256=file_sha256(temporary))
    if store.exists(key) and store.sha256(key) != record.sha256:
        # Without a valid receipt the old object's wholeness is unproven; ours was just made.
        store.replace(key, temporary)
    else:
        store.put_if_absent(key, temporary)
    return record


def commit_receipt(store: Store, receipt: Receipt) -> Receipt:
    """Publish a receipt; a sound one that another worker published first wins, a stale one is replaced."""
    if receipts.write_receipt(store, receipt):
        return receipt
    other = receipts.sound_receipt(store, receipt.stage, receipt.key)
    # One with other files beside its own is replaced too: it would name what this call wrote anew.
    sound = other is not None and other.beside == receipt.beside and not receipts.key_fault(other)
    if other is not None and sound and (other.files == receipt.files or not receipts.problems(store, other)):
        return other
    store.delete(receipts.receipt_path(receipt.stage, receipt.key))
    if not receipts.write_receipt(store, receipt):
        raise IntegrityError(f"{receipt.stage} {receipt.name}: another worker made different bytes meanwhile; rerun")
    return receipt


def _default_reporter(tasks: Sequence[Task]) -> Callable[[int, int], Reporter]:
    def make(done_units: int, done: int) -> Reporter:
        total = sum(task.measure for task in tasks)
        return Reporter(tasks[0].stage, len(tasks), total, done_units=done_units, done=done)

    return make


def _interrupted(stage: str, done: int, total: int) -> Interrupted:
    return Interrupted(f"{stage} stopped by a signal with {done} of {total} units whole; rerun the same command")


def warn_user(message: str) -> None:
    """One line of warning, whatever strangers wrote into it."""
    _LOGGER.warning("%s", one_line(message))


def outcome_line(stage: str, outcome: Outcome) -> str:
    """What a stage did, for the user."""
    size = sum(file.size for receipt in outcome.receipts for file in receipt.files)
    total = len(outcome.receipts)
    if not outcome.made:
        return f"{stage}: nothing to do, {total} of {total} units are whole ({human_bytes(size)})"
    return f"{stage}: {outcome.made} units made, {total - outcome.made} were already whole ({human_bytes(size)} in all)"
