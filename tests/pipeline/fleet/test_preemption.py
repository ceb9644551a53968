"""Leaving in time: signals, notice files, metadata services, deadlines."""

import os
import signal
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.fleet import preemption
from bytecache.pipeline.fleet.ledger import DONE, read_names
from bytecache.pipeline.fleet.preemption import Drain
from bytecache.pipeline.fleet.worker import Worker
from bytecache.pipeline.stores import LocalStore
from bytecache.schemas.errors import ConfigError, Interrupted
from bytecache.schemas.settings import Fleet
from tests.support.fleet_jobs import LAYOUT, QUICK, fork, job, marks, run
from tests.support.loopback import Loopback, Quiet


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


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


class Metadata(Quiet, BaseHTTPRequestHandler):
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


def test_notice_url_with_token_header_and_pattern() -> None:
    server = Loopback(Metadata)
    url = server.url
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
    server.close()
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


@pytest.mark.slow
def test_an_engine_that_does_not_answer_by_the_deadline_is_left(store: LocalStore, tmp_path: Path) -> None:
    def deaf(unit: int, stop: Callable[[], bool]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    def child() -> None:
        from bytecache.pipeline.units.runner import StopFlag

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
