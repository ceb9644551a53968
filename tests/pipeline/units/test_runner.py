"""The runner: units committed one by one, repeatable, and unharmed by kill -9 at any moment."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.stores import TEMP_FOLDER, LocalStore
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.progress import Reporter
from bytecache.pipeline.units.runner import StopFlag, Task, Tick, finished, run_units
from bytecache.schemas.errors import EngineError, InputError, IntegrityError, Interrupted, StorageError
from bytecache.schemas.files import file_sha256
from tests.support.places import ROOT

N_TASKS = 12


def never() -> bool:
    return False


def hashes(store: LocalStore) -> dict[str, str]:
    return {key: file_sha256(store.get_path(key)) for key in store.list("") if not key.startswith(receipts.FOLDER)}


def tasks(n: int = N_TASKS) -> list[Task]:
    return [Task("fake", f"unit {i}", f"fake/{i:03d}.bin", {"seed": i}, measure=10 + i) for i in range(n)]


def write_unit(task: Task, out: Path, tick: Tick) -> dict[str, int]:
    """Deterministic bytes in several writes, so that a kill can fall between them."""
    generator = random.Random(task.inputs["seed"])
    with out.open("wb") as stream:
        for _ in range(8):
            stream.write(generator.randbytes(5000))
            stream.flush()
            time.sleep(float(os.environ.get("SLOW", "0")))
            tick({"bytes": 1, "tokens": 2})
    return {"writes": 8}


def run(store: LocalStore, work: list[Task], calls: list[str] | None = None) -> int:
    def counted(task: Task, out: Path, tick: Tick) -> dict[str, int]:
        if calls is not None:
            calls.append(task.name)
        return write_unit(task, out, tick)

    return run_units(store, work, lambda: counted, never).made


@pytest.fixture
def reference(tmp_path: Path) -> dict[str, str]:
    store = LocalStore(tmp_path / "reference")
    assert run(store, tasks()) == N_TASKS
    return hashes(store)


def test_a_second_run_does_nothing_and_opens_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(tmp_path / "run")
    first = run_units(store, tasks(3), lambda: write_unit, never)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["unit"], line["units_done"], line["units_total"]) for line in lines] == [
        ("unit 0", 1, 3),
        ("unit 1", 2, 3),
        ("unit 2", 3, 3),
    ]
    assert all(line["bytes_per_s"] > 0 and line["tokens_per_s"] > 0 and line["eta_s"] >= 0 for line in lines)
    assert lines[-1]["eta_s"] == 0

    def fail() -> object:
        raise AssertionError("opened")

    second = run_units(store, tasks(3), fail, never)  # type: ignore[arg-type]
    assert (first.made, second.made) == (3, 0)
    assert second.receipts == first.receipts
    assert first.receipts[1].counts == {"writes": 8}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete", "receipt", "no receipt", "no receipt, truncate"])
def test_damage_is_repaired_by_redoing_that_unit_only(tmp_path: Path, reference: dict[str, str], harm: str) -> None:
    store = LocalStore(tmp_path / "run")
    run(store, tasks())
    victim = tasks()[5]
    path = store.get_path(victim.out)
    receipt = store.get_path(receipts.receipt_path("fake", victim.key))
    if "truncate" in harm:
        path.write_bytes(path.read_bytes()[:100])
    if harm == "flip":
        raw = bytearray(path.read_bytes())
        raw[7] ^= 1
        path.write_bytes(raw)
    if harm == "delete":
        path.unlink()
    if harm == "receipt":
        receipt.write_bytes(b"{}")
    if harm.startswith("no receipt"):
        receipt.unlink()
    calls: list[str] = []
    assert run(store, tasks(), calls) == 1
    assert calls == ["unit 5"]
    assert hashes(store) == reference
    assert run(store, tasks()) == 0


def test_failed_work_keeps_what_is_whole_and_leaves_no_scraps(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")

    def fill_disk(task: Task, out: Path, tick: Tick) -> dict[str, int]:
        counts = write_unit(task, out, tick)
        if task.name == "unit 2":
            raise OSError(28, "No space left on device")
        return counts

    with pytest.raises(StorageError, match=r"unit 2.*disk is full"):
        run_units(store, tasks(), lambda: fill_disk, never)
    assert list(store.list("fake")) == ["fake/000.bin", "fake/001.bin"]
    assert list((store.root / TEMP_FOLDER).iterdir()) == []
    assert run(store, tasks()) == N_TASKS - 2


def test_stop_between_units_and_inside_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    stop = StopFlag()

    def work(task: Task, out: Path, tick: Tick) -> dict[str, int]:
        counts = write_unit(task, out, tick)
        if task.name == "unit 1":
            stop.set()
        return counts

    with pytest.raises(Interrupted, match="2 of 12 units whole"):
        run_units(store, tasks(), lambda: work, stop)
    with pytest.raises(Interrupted, match="2 of 12"):
        run_units(store, tasks(), lambda: work, stop)
    assert Interrupted.exit_code == 75

    def abandon(task: Task, out: Path, tick: Tick) -> dict[str, int]:
        write_unit(task, out, tick)
        raise Interrupted("abandoned")

    with pytest.raises(Interrupted, match="abandoned"):
        run_units(store, tasks(), lambda: abandon, never)
    assert len(list(store.list("fake"))) == 2
    assert list((store.root / TEMP_FOLDER).iterdir()) == []


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (EngineError("a worker of the engine is gone"), Interrupted),
        (BrokenPipeError("the engine's pipe"), Interrupted),
        (InputError("the corpus changed"), InputError),
    ],
)
@pytest.mark.parametrize("opening", [True, False])
def test_work_that_fails_after_a_signal_was_interrupted(
    tmp_path: Path, error: Exception, becomes: type[Exception], opening: bool
) -> None:
    """A signal to the process group ends an engine's helpers too; that is no failure of the unit."""
    store, stop = LocalStore(tmp_path / "run"), StopFlag()

    def fail(*_: Any) -> dict[str, int]:
        stop.set()
        raise error

    def open_work() -> Any:
        return fail() if opening else fail

    with pytest.raises(becomes):
        run_units(store, tasks(), open_work, stop)
    assert run(store, tasks()) == N_TASKS


def test_work_that_writes_nothing_is_a_fault(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    with pytest.raises(IntegrityError, match="wrote nothing"):
        run_units(store, tasks(1), lambda: lambda task, out, tick: {}, never)
    assert finished(store, tasks(1)[0]) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_instead_of_json() -> None:
    screen = Terminal()
    with Reporter("teacher", 3, 3000, done_units=1, done=1000, stream=screen) as progress:
        progress.tick({"bytes": 400, "tokens": 100})
        time.sleep(0.01)
        progress.unit_done("a", 1000, 0.5)
        progress.line({"never": "shown"})
        assert progress.sums["bytes"] == 1000
        rates = progress.rates()
    assert rates["bytes_per_s"] == pytest.approx(10 * rates["tokens_per_s"], rel=1e-3)
    # One more unit is left, and the one that was done before this session does not count as speed.
    assert rates["eta_s"] == pytest.approx(1000 / rates["bytes_per_s"], abs=0.1)
    shown = screen.getvalue()
    assert "2/3 units" in shown
    assert "B/s" in shown
    assert "tok/s" in shown
    assert "left" in shown
    assert "{" not in shown


# ---- real processes, really killed


def start(root: Path, slow: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "SLOW": str(slow), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__)), str(root)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(tmp_path: Path, reference: dict[str, str]) -> None:
    generator = random.Random(1)
    root = tmp_path / "run"
    kills = 0
    for _ in range(40):
        process = start(root, slow=0.004)
        assert process.stderr is not None
        # Aim after the start: wait for some units, then a random moment of the next one.
        lines = [process.stderr.readline() for _ in range(generator.randrange(3))]
        time.sleep(generator.random() * 0.06)
        process.kill()
        code = process.wait()
        process.stderr.close()
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        del lines
    process = start(root, slow=0)
    assert process.wait(30) == 0
    assert process.stderr is not None
    process.stderr.close()
    assert kills >= 3
    store = LocalStore(root)
    assert hashes(store) == reference
    assert all(finished(store, task) for task in tasks())
    assert list((root / TEMP_FOLDER).iterdir()) == []


@pytest.mark.slow
def test_sigterm_drains_with_code_75_and_a_second_one_exits_at_once(tmp_path: Path, reference: dict[str, str]) -> None:
    process = start(tmp_path / "run", slow=0.05)
    assert process.stderr is not None
    assert '"unit 0"' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    noise = process.stderr.read()
    process.stderr.close()
    assert "SIGTERM: stopping after the work in flight" in noise
    store = LocalStore(tmp_path / "run")
    assert 1 <= len(list(store.list("fake"))) <= 3
    assert list((store.root / TEMP_FOLDER).iterdir()) == []

    process = start(tmp_path / "run", slow=5)
    assert process.stderr is not None
    while not list((store.root / TEMP_FOLDER).iterdir()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "once more" in process.stderr.readline()
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert time.monotonic() - started < 3
    process.stderr.close()

    assert run(store, tasks()) > 0
    assert hashes(store) == reference
    assert list((store.root / TEMP_FOLDER).iterdir()) == []


def test_hash_of_the_reference_is_what_the_work_wrote(reference: dict[str, str]) -> None:
    first = random.Random(0)
    raw = b"".join(first.randbytes(5000) for _ in range(8))
    assert reference["fake/000.bin"] == hashlib.sha256(raw).hexdigest()


if __name__ == "__main__":
    with StopFlag().installed() as flag:
        try:
            run_units(LocalStore(Path(sys.argv[1])), tasks(), lambda: write_unit, flag)
        except Interrupted as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
