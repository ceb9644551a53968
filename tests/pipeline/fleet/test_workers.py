"""Workers as threads and as real processes: shared work, poison, refusals, full disks, hung engines."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.fleet import job as jobs
from bytecache.pipeline.fleet import worker
from bytecache.pipeline.fleet.ledger import DONE, FAILED, Layout, read_json, read_names
from bytecache.pipeline.fleet.quarantine import forget_job, quarantined, requeue_lost, retry
from bytecache.pipeline.fleet.worker import Worker
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.runner import Job, Work, finished
from bytecache.schemas.errors import ConfigError, EngineError, InputError, Interrupted, StorageError
from tests.support.fleet_jobs import LAYOUT, QUICK, fork, job, marks, run


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


# ---- sharing


def test_workers_share_the_units_and_do_none_twice(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    lock, calls = threading.Lock(), []

    def do(unit: int, stop: Callable[[], bool]) -> None:
        time.sleep(0.005)
        with lock:
            calls.append(unit)

    shares: list[worker.Share] = []
    threads = [threading.Thread(target=lambda: shares.append(run(store, job(40, do)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(calls) == list(range(40))
    assert sum(share.made for share in shares) == 40
    assert sum(share.made > 0 for share in shares) > 1
    assert all(finished(store, task) for task in job(40).tasks)
    assert list(store.list(f"{LAYOUT.root}/workers")) == []
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert sorted(line["unit"] for line in lines) == sorted(f"unit {unit}" for unit in range(40))
    assert run(store, job(40, lambda unit, stop: pytest.fail("done before"))).made == 0


def test_units_that_one_process_made_alone_are_found(store: LocalStore) -> None:
    from bytecache.pipeline.units.runner import run_job

    run_job(store, job(5), lambda: False)
    share = run(store, job(5, lambda unit, stop: pytest.fail("done before")))
    assert (share.made, share.found) == (0, 5)


def test_two_versions_on_one_plan_are_refused_by_name(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store, job(2))
    with pytest.raises(ConfigError, match=r"begun with other settings or software \(identity.identity: 'a' -> 'b'\)"):
        run(store, job(2, identity="b"))
    hashes = jobs.code_hashes()
    assert "stages/lattice/lattice.py" in hashes and not any(name.startswith("stages/train/") for name in hashes)
    monkeypatch.setattr(jobs, "code_hashes", lambda: {**hashes, "stages/lattice/lattice.py": "0" * 12})
    with pytest.raises(ConfigError, match=r"code.stages/lattice/lattice.py: '[0-9a-f]{12}' -> '0{12}'.*--new-job"):
        run(store, job(2))
    monkeypatch.setattr(jobs, "code_hashes", lambda: hashes)
    versions = receipts.software_versions()
    monkeypatch.setattr(receipts, "software_versions", lambda: {**versions, "python": "3.9", "torch": "1.0"})
    with pytest.raises(ConfigError, match=r"software.torch: '.*' -> '1.0'"):
        run(store, job(2))
    forget_job(store, Layout("teacher"))
    assert run(store, job(2, identity="b")).made == 2
    with pytest.raises(InputError, match="no convert job"):
        forget_job(store, Layout("convert"))


# ---- what fails


@pytest.mark.slow
def test_a_poisoned_unit_is_set_aside_with_its_reasons_until_it_is_let_in(store: LocalStore) -> None:
    opened = []

    def poison(unit: int, stop: Callable[[], bool]) -> None:
        opened.append(unit)
        if unit == 3:
            raise ValueError("NaN in\n logits")

    share = run(store, job(8, poison))
    assert (share.made, share.failed) == (7, 3)
    (entry,) = quarantined(store, LAYOUT)
    assert (entry.unit, entry.attempts) == (3, 3)
    assert entry.reasons == ("unit 3: ValueError: NaN in logits",) * 3
    assert run(store, job(8, poison)).failed == 0  # it stays aside
    assert retry(store, LAYOUT) == [3]
    assert quarantined(store, LAYOUT) == []
    assert run(store, job(8, poison)).failed == 3
    retry(store, LAYOUT)
    assert run(store, job(8)).made == 1
    assert quarantined(store, LAYOUT) == []


def test_a_unit_that_kills_its_worker_is_set_aside(store: LocalStore) -> None:
    def deadly(unit: int, stop: Callable[[], bool]) -> None:
        if unit == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = QUICK.model_copy(update={"max_losses": 3})
    codes = [fork(lambda: run(store, job(6, deadly), settings)) for _ in range(4)]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    (entry,) = quarantined(store, LAYOUT)
    assert (entry.unit, entry.attempts) == (2, 3)
    assert "died at it" in entry.reasons[0]
    assert len(marks(store, DONE)) == 5
    assert len(list(store.list(f"{LAYOUT.root}/lost"))) == 3


@pytest.mark.parametrize(("number", "words"), [(28, "disk is full"), (30, "read-only")])
def test_a_refusing_disk_gives_the_unit_back_and_ends_the_worker(store: LocalStore, number: int, words: str) -> None:
    def refuse(unit: int, stop: Callable[[], bool]) -> None:
        if unit == 4:
            raise OSError(number, "refused")

    with pytest.raises(StorageError, match=words):
        run(store, job(6, refuse))
    states = read_names(store.list(LAYOUT.units(0)))
    assert not states[4].held and not states[4].failures
    assert run(store, job(6)).made == 6 - len(marks(store, DONE)) or len(marks(store, DONE)) == 6
    assert quarantined(store, LAYOUT) == []
    assert len(marks(store, DONE)) == 6


def test_a_store_that_refuses_every_write_is_named_at_once(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store, job(2))

    def refuse(path: Path, raw: bytes) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match=r"read-only; point run.dir at a writable folder"):
        run(store, job(4))


def test_a_worker_that_fails_at_everything_ends(store: LocalStore) -> None:
    def broken(unit: int, stop: Callable[[], bool]) -> None:
        raise RuntimeError("device lost")

    with pytest.raises(EngineError, match=r"3 units in a row, .*RuntimeError: device lost"):
        run(store, job(30, broken))
    assert quarantined(store, LAYOUT) == []
    assert run(store, job(30)).made == 30


def test_an_engine_that_cannot_start_costs_no_unit_an_attempt(store: LocalStore) -> None:
    @contextmanager
    def fail(stop: Callable[[], bool]) -> Iterator[Work]:
        raise EngineError("no GPU")
        yield

    good = job(3)
    bad = Job(good.stage, good.identity, good.measures, good.task, fail)
    for _ in range(5):
        with pytest.raises(EngineError, match="no GPU"):
            run(store, bad)
    assert run(store, good).made == 3


@pytest.mark.parametrize("error", [EngineError("a worker of the engine is gone"), BrokenPipeError("its pipe")])
def test_a_failure_after_a_signal_is_no_failure_of_the_unit(store: LocalStore, error: Exception) -> None:
    """Slurm signals the whole process group: the engine may break before the worker has left."""
    stopped: list[bool] = []

    def fail(unit: int, stop: Callable[[], bool]) -> None:
        stopped.append(True)
        raise error

    for _ in range(QUICK.max_failures + 1):
        stopped.clear()
        with pytest.raises(Interrupted, match="signal"):
            Worker(store, job(2, fail), QUICK, lambda: bool(stopped)).run()
    assert marks(store, FAILED) == [] and quarantined(store, LAYOUT) == []
    assert run(store, job(2)).made == 2


def test_what_is_called_done_but_has_no_receipt_can_be_opened_again(store: LocalStore) -> None:
    run(store, job(5))
    store.delete(receipts.receipt_path("teacher", job(5).task(1).key))
    assert run(store, job(5)).made == 0
    assert requeue_lost(store, job(5)) == [1]
    assert run(store, job(5)).made == 1
    assert requeue_lost(store, job(5)) == []


@pytest.mark.slow
def test_an_engine_that_hangs_loses_its_unit_to_others(store: LocalStore) -> None:
    hung = threading.Event()
    over = threading.Event()

    def hang(unit: int, stop: Callable[[], bool]) -> None:
        hung.set()
        over.wait(60)

    settings = QUICK.model_copy(update={"stall_s": 0.3})
    thread = threading.Thread(target=lambda: run(store, job(1, hang), settings))
    thread.start()
    try:
        assert hung.wait(20)
        assert run(store, job(1)).made == 1
    finally:
        over.set()
        thread.join(60)
    assert finished(store, job(1).task(0))
    (state,) = read_names(store.list(LAYOUT.units(0))).values()
    assert state.losses == 1


def test_heartbeat_tells_what_the_worker_does(store: LocalStore) -> None:
    seen: list[dict[str, Any]] = []

    def look(unit: int, stop: Callable[[], bool]) -> None:
        if unit == 0:
            deadline = time.monotonic() + 30
            while not (seen and seen[-1].get("beat", 0) > 1 and seen[-1]["unit"] == 0) and time.monotonic() < deadline:
                (key,) = store.list(f"{LAYOUT.root}/workers")
                seen.append(read_json(store, key) or {})
                time.sleep(0.01)

    run(store, job(1, look))
    assert seen[-1]["unit"] == 0 and seen[-1]["epoch"] == 1
    assert seen[-1]["beat"] > 1
    assert seen[-1]["pid"] == os.getpid()
