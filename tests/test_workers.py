"""Workers as threads and as real processes: shared work, poison, refusals, notices, full disks, merged runs."""

import http.server
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli import FakeTeacher, bytecache, fake_convert, fake_teacher, refusal, world  # noqa: F401

from pipeline import receipts
from pipeline.fleet import job as jobs
from pipeline.fleet import preemption, worker
from pipeline.fleet.ledger import DONE, Layout, read_json, read_names
from pipeline.fleet.preemption import Drain
from pipeline.fleet.quarantine import forget_job, quarantined, requeue_lost, retry
from pipeline.fleet.worker import Worker
from pipeline.runner import Job, Task, Tick, Work, finished
from pipeline.stores import LocalStore
from schemas.errors import ConfigError, EngineError, InputError, Interrupted, StorageError
from schemas.settings import Fleet

QUICK = Fleet(heartbeat_s=0.1, lease_s=1.0, notice_s=1.0, notice_poll_s=0.05)
LAYOUT = Layout("teacher")
Do = Callable[[int, Callable[[], bool]], None]


def job(n_units: int, do: Do = lambda unit, stop: None, identity: str = "a") -> Job:
    """Units of a few bytes; `do(unit, stop)` happens inside each."""

    def task(index: int) -> Task:
        return Task("teacher", f"unit {index}", f"teacher/{index:03d}.bin", {"unit": index, "identity": identity}, 10)

    @contextmanager
    def open_work(stop: Callable[[], bool]) -> Iterator[Work]:
        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            do(task.inputs["unit"], stop)
            out.write_bytes(f"{task.inputs}".encode() * 10)
            tick({"bytes": 10})
            return {}

        yield work

    return Job("teacher", {"identity": identity}, [10] * n_units, task, open_work)


def run(store: LocalStore, work: Job, settings: Fleet = QUICK) -> worker.Share:
    return Worker(store, work, settings, lambda: False).run()


def marks(store: LocalStore, kind: str) -> list[str]:
    return [key for key in store.list(f"{LAYOUT.root}/units") if key.rpartition(".")[2].startswith(kind)]


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
    from pipeline.runner import run_job

    run_job(store, job(5), lambda: False)
    share = run(store, job(5, lambda unit, stop: pytest.fail("done before")))
    assert (share.made, share.found) == (0, 5)


def test_two_versions_on_one_plan_are_refused_by_name(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store, job(2))
    with pytest.raises(ConfigError, match=r"begun with other settings or software \(identity.identity: 'a' -> 'b'\)"):
        run(store, job(2, identity="b"))
    hashes = jobs.code_hashes()
    assert "stages/lattice.py" in hashes and not any(name.startswith("stages/training") for name in hashes)
    monkeypatch.setattr(jobs, "code_hashes", lambda: {**hashes, "stages/lattice.py": "0" * 12})
    with pytest.raises(ConfigError, match=r"code.stages/lattice.py: '[0-9a-f]{12}' -> '0{12}'.*--new-job"):
        run(store, job(2))
    monkeypatch.setattr(jobs, "code_hashes", lambda: hashes)
    versions = receipts.software_versions()
    monkeypatch.setattr(receipts, "software_versions", lambda: {**versions, "python": "3.9", "torch": "1.0"})
    with pytest.raises(ConfigError, match=r"software.torch: '.*' -> '1.0'"):
        run(store, job(2))
    forget_job(store, "teacher")
    assert run(store, job(2, identity="b")).made == 2
    with pytest.raises(InputError, match="no convert job"):
        forget_job(store, "convert")


# ---- what fails


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


def fork(step: Callable[[], Any]) -> int:
    """Exit code (or minus the signal) of a child that does one step."""
    pid = os.fork()
    if not pid:
        try:
            step()
            os._exit(0)
        except Interrupted:
            os._exit(75)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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


def test_what_is_called_done_but_has_no_receipt_can_be_opened_again(store: LocalStore) -> None:
    run(store, job(5))
    store.delete(receipts.receipt_path("teacher", job(5).task(1).key))
    assert run(store, job(5)).made == 0
    assert requeue_lost(store, job(5)) == [1]
    assert run(store, job(5)).made == 1
    assert requeue_lost(store, job(5)) == []


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


# ---- preemption


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def drain(stop: list[bool], clock: Clock, **keys: Any) -> Drain:
    return Drain(Fleet.model_validate({"notice_s": 20.0, **keys}), lambda: bool(stop), clock)


def test_a_unit_goes_on_after_the_notice_only_if_it_can_finish() -> None:
    stop: list[bool] = []
    clock = Clock()
    for done, abandoned in ((0, False), (20, True), (60, False)):
        stop.clear()
        leaving = drain(stop, clock)
        leaving.unit_begins(100)
        clock.now += 20
        leaving.tick(done)  # at this speed the rest takes 80 s, or 13 s; nothing is known of the first
        assert not leaving.abandon()
        stop.append(True)
        assert leaving.abandon() == abandoned
        clock.now += 18.1  # the margin before the kill
        assert leaving.abandon()


def test_earlier_units_tell_how_long_one_takes() -> None:
    stop: list[bool] = []
    clock = Clock()
    leaving = drain(stop, clock)
    for _ in range(2):
        leaving.unit_begins(100)
        clock.now += 30
        leaving.unit_ends()
    assert leaving.remaining_s() == 0
    leaving.unit_begins(100)
    clock.now += 5
    stop.append(True)
    assert leaving.requested()
    assert leaving.remaining_s() == 25
    assert leaving.abandon()
    clock.now += 10
    assert not drain([True], clock).abandon()


def test_notice_file_and_nothing_by_default(tmp_path: Path) -> None:
    clock = Clock()
    quiet = drain([], clock)
    quiet.poll()
    assert not quiet.requested()
    told = drain([], clock, notice_file=str(tmp_path / "notice"))
    told.poll()
    assert not told.requested()
    (tmp_path / "notice").touch()
    told.poll()
    assert not told.requested()  # not yet time to look again
    clock.now += 5.1
    told.poll()
    assert told.requested()
    assert "notice appeared" in told.reason
    assert told.deadline == clock.now + 18


class Metadata(http.server.BaseHTTPRequestHandler):
    """A metadata service that wants a token and a header, and first has no notice."""

    answers: list[tuple[int, str]] = []  # noqa: RUF012 - set by the test
    seen: list[dict[str, str]] = []  # noqa: RUF012

    def do_PUT(self) -> None:
        self.reply(200, "secret")

    def do_GET(self) -> None:
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.reply(*self.answers.pop(0))

    def reply(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


def test_notice_url_with_token_header_and_pattern() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    Metadata.answers = [(404, "TRUE"), (200, "FALSE"), (500, ""), (200, "TRUE")]
    Metadata.seen = []
    clock = Clock()
    leaving = drain(
        [], clock, notice_url=f"{url}/x", notice_token_url=f"{url}/token", notice_header="Flavor: Test",
        notice_match="TRUE",
    )  # fmt: skip
    found = []
    for _ in range(4):
        leaving.poll()
        found.append(leaving.requested())
        clock.now += 6
    server.shutdown()
    server.server_close()
    assert found == [False, False, False, True]
    assert Metadata.seen[0]["flavor"] == "Test"
    assert Metadata.seen[0]["x-aws-ec2-metadata-token"] == "secret"
    gone = drain([], clock, notice_url=f"{url}/x")
    gone.poll()  # nobody answers: no notice
    assert not gone.requested()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"notice_url": "file:///etc/passwd"}, "no http:// or https://"),
        ({"notice_header": "nonsense"}, "write `Name: value`"),
        ({"notice_match": "("}, "regular expression"),
    ],
)
def test_notice_settings_that_make_no_sense_are_refused(keys: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        drain([], Clock(), **keys)


def test_a_notice_gives_the_unit_back_and_the_next_worker_has_it_at_once(store: LocalStore, tmp_path: Path) -> None:
    notice = tmp_path / "notice"

    def slow(unit: int, stop: Callable[[], bool]) -> None:
        if unit == 1:
            notice.touch()
        for _ in range(1000):
            if stop():
                raise Interrupted("abandoned")
            if unit != 1:
                return
            time.sleep(0.01)

    settings = QUICK.model_copy(update={"notice_file": str(notice), "lease_s": 600.0})
    with pytest.raises(Interrupted, match="notice appeared"):
        run(store, job(4, slow), settings)
    assert list(store.list(f"{LAYOUT.root}/workers")) == []
    assert run(store, job(4), QUICK.model_copy(update={"lease_s": 600.0})).made >= 1
    assert len(marks(store, DONE)) == 4
    (state,) = [state for state in read_names(store.list(LAYOUT.units(0))).values() if state.epoch > 1]
    assert (state.losses, state.failures) == (0, 0)


def test_an_engine_that_does_not_answer_by_the_deadline_is_left(store: LocalStore, tmp_path: Path) -> None:
    def deaf(unit: int, stop: Callable[[], bool]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    def child() -> None:
        from pipeline.runner import StopFlag

        flag = StopFlag()
        with flag.installed():
            Worker(store, job(1, deaf), QUICK, flag).run()

    began = time.monotonic()
    assert fork(child) == 75
    assert time.monotonic() - began < 30
    assert list(store.list(f"{LAYOUT.root}/workers")) == []
    (state,) = read_names(store.list(LAYOUT.units(0))).values()
    assert not state.held and not state.losses
    assert run(store, job(1)).made == 1


def test_margin_never_eats_a_short_notice() -> None:
    assert preemption.MARGIN_S > 0.5
    leaving = drain([True], Clock(), notice_s=2.0)
    assert leaving.requested()
    assert leaving.deadline == 101.5


# ---- the commands


@pytest.mark.usefixtures("world", "fake_teacher", "fake_convert")
def test_worker_commands_make_a_data_set_and_status_shows_it() -> None:
    quick = ["--set", "fleet.heartbeat_s=0.1", "--set", "fleet.lease_s=1.0"]
    assert bytecache("plan").exit_code == 0
    assert "0 of" in refusal(bytecache("convert", "--worker", *quick), 3)
    FakeTeacher.fail_at = 2  # and all after it
    failing = refusal(bytecache("teacher", "--worker", *quick, "--set", "fleet.max_failures=1"), 1)
    FakeTeacher.fail_at = -1
    assert "set aside after repeated failure" in failing and "poisoned unit; remove it" in failing
    report = json.loads(bytecache("status", "--json").stdout)["fleet"][0]
    assert report["quarantine"][0]["reasons"][0].endswith("poisoned unit; remove it")
    assert "set aside: unit" in bytecache("status").stdout
    assert "has no dump" in refusal(bytecache("convert", "--worker", *quick), 3)
    assert "may be tried again" in bytecache("retry", "teacher").stdout
    assert bytecache("teacher", "--worker", *quick).exit_code == 0
    done = bytecache("convert", "--worker", *quick)
    assert done.exit_code == 0, done.output
    assert bytecache("verify").exit_code == 0
    for report in json.loads(bytecache("status", "--json").stdout)["fleet"]:
        assert report["done"] == report["units"] > 0
        assert report["held"] == 0 and report["quarantine"] == []
    assert "nothing to do" in bytecache("convert").stdout
    assert "nothing to do" in bytecache("teacher").stdout
    assert "this worker made 0" in bytecache("convert", "--worker", *quick).stdout
    other = bytecache("teacher", "--worker", *quick, "--set", "teacher.top_k=3")
    assert "top_k: 16 -> 3" in refusal(other, 2)
    assert "given up" in bytecache("retry", "teacher", "--new-job").stdout
    assert "no stage of workers" in refusal(bytecache("retry", "train"), 3)


def halves(place: Path) -> tuple[LocalStore, LocalStore]:
    """Two copies of a whole run, each without every other dump of the other."""
    stores = []
    for number in (0, 1):
        folder = place / f"half-{number}"
        shutil.copytree(place / "run", folder)
        store = LocalStore(folder)
        for _, key in list(receipts.list_receipts(store, "teacher"))[number::2]:
            receipt = receipts.read_receipt(store, "teacher", key)
            assert receipt is not None
            store.delete(receipt.files[0].path)
            store.delete(receipts.receipt_path("teacher", key))
        stores.append(store)
    return stores[0], stores[1]


@pytest.mark.usefixtures("world", "fake_teacher", "fake_convert")
def test_partial_runs_are_merged_into_the_whole() -> None:
    place = Path.cwd()
    from run_outputs import outputs

    assert bytecache("plan").exit_code == 0
    assert bytecache("teacher").exit_code == 0
    halves(place)
    done = bytecache("merge", "half-0", "half-1", "--run-dir", "whole")
    assert done.exit_code == 0, done.output
    assert "0 skipped" in done.stdout
    assert outputs(place / "whole") == outputs(place / "run")
    assert bytecache("convert", "--run-dir", "whole").exit_code == 0
    assert bytecache("verify", "whole").exit_code == 0
    again = bytecache("merge", "half-0", "half-1", "--run-dir", "whole")
    assert "0 units of teacher copied" in again.stdout


@pytest.mark.usefixtures("world", "fake_teacher", "fake_convert")
def test_merging_refuses_conflicts_before_it_writes() -> None:
    place = Path.cwd()
    assert bytecache("plan").exit_code == 0
    assert bytecache("teacher").exit_code == 0
    halves(place)
    # Another output of a unit that the other half has too.
    store = LocalStore(place / "half-0")
    _, key = next(receipts.list_receipts(store, "teacher"))
    receipt = receipts.read_receipt(store, "teacher", key)
    assert receipt is not None
    path = store.get_path(receipt.files[0].path)
    path.write_bytes(b"other bytes")
    changed = receipt.model_copy(update={"files": (receipts.record_file(store, receipt.files[0].path),)})
    store.delete(receipts.receipt_path("teacher", key))
    receipts.write_receipt(store, changed)
    shutil.copytree(place / "run", place / "other")
    assert "two different outputs" in refusal(bytecache("merge", "half-0", "other", "--run-dir", "whole"), 4)
    assert not (place / "whole").exists()
    # A damaged file is skipped and named, whatever its receipt says.
    path.write_bytes(b"damaged....")
    done = bytecache("merge", "half-0", "--run-dir", "whole")
    assert "1 skipped" in done.stdout and "differs from its receipt" in done.stdout
    # Another plan, another teacher, no plan.
    assert bytecache("plan", "--run-dir", "second", "--set", "run.seed=5").exit_code == 0
    assert "only runs of one plan" in refusal(bytecache("merge", "second", "--run-dir", "whole"), 2)
    shutil.copytree(place / "run/plan", place / "third/plan")
    assert bytecache("teacher", "--run-dir", "third", "--set", "teacher.top_k=3").exit_code == 0
    assert "top_k: 16 -> 3" in refusal(bytecache("merge", "run", "third", "--run-dir", "new"), 2)
    assert "holds no plan" in refusal(bytecache("merge", "nowhere", "--run-dir", "new"), 3)
    assert not (place / "new").exists()


def test_heartbeat_tells_what_the_worker_does(store: LocalStore) -> None:
    seen: list[dict[str, Any]] = []

    def look(unit: int, stop: Callable[[], bool]) -> None:
        if unit == 0:
            time.sleep(0.5)
            (key,) = store.list(f"{LAYOUT.root}/workers")
            seen.append(read_json(store, key) or {})

    run(store, job(1, look))
    assert seen[0]["unit"] == 0 and seen[0]["epoch"] == 1
    assert seen[0]["beat"] > 1
    assert seen[0]["pid"] == os.getpid()
