"""One teacher over two processes (tensor parallelism over gloo): the same rows; signals and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bytecache.pipeline.fleet.ledger import FAILED, LOST
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.stores.base import TEMP_FOLDER
from tests.support.fleet_jobs import marks
from tests.support.places import ROOT
from tests.support.tiny_gemma3 import rows
from tests.support.tiny_models import make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SENTENCE = "the student reads the notes as often as it likes, and so does the teacher. "


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run of sixteen long units: more than are made before a signal comes, on a slow machine too."""
    folder = tmp_path_factory.mktemp("spread")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{i}: " + SENTENCE * 400}) + "\n" for i in range(16)))
    teacher = make_checkpoint(folder / "teacher")
    chosen = {
        "run.dir": folder / "run", "corpus.source": corpus, "corpus.unit_bytes": 30_000, "corpus.max_bytes": 0,
        "corpus.heldout_fraction": 0.0, "teacher.model": teacher, "teacher.context": 128,
        "teacher.tensor_parallel": 2, "fleet.notice_s": 4, "fleet.heartbeat_s": 0.2,
    }  # fmt: skip
    settings = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
    subprocess.run([sys.executable, "-m", "bytecache", "plan", *settings], check=True, env=environment())
    return settings


def environment() -> dict[str, str]:
    """Two workers of vLLM on two cores, started as quickly as can be."""
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


@contextmanager
def worker(settings: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of the teacher in a process group of its own, as a scheduler starts it."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "bytecache", "teacher", "--worker", *settings],
            env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            for pid in members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def until(what: str, true: object, seconds: float = 240.0) -> None:
    """Wait for a condition; fails by its name."""
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.1)


def dumps_begun(run: LocalStore) -> set[Path]:
    """Dumps that are being written, or were when their worker was killed."""
    return set((run.root / TEMP_FOLDER).glob("*.parquet"))


def begin_a_unit(run: LocalStore, process: subprocess.Popen[bytes], log: Path, before: set[Path]) -> None:
    """Wait until the worker has claimed a unit and its engine writes a dump that was not there before."""
    until("a unit is in flight", lambda: dumps_begun(run) - before or process.poll() is not None)
    assert len(members(process.pid)) >= 3, log.read_text()


def test_a_signal_to_the_group_ends_in_75_and_a_kill_leaves_nobody(planned: list[str], tmp_path: Path) -> None:
    run = LocalStore(Path(planned[1].partition("=")[2]))
    for number in (signal.SIGTERM, signal.SIGINT):
        log, before = tmp_path / f"{number}.log", dumps_begun(run)
        with worker(planned, log) as process:
            begin_a_unit(run, process, log, before)
            os.killpg(process.pid, number)
            assert process.wait(60) == 75, log.read_text()
            until("no worker outlives its parent", lambda pid=process.pid: not members(pid), 5)
        said = log.read_text()
        assert "Traceback" not in said and "rerun the same command" in said
        assert marks(run, FAILED) == [] == marks(run, LOST)
    log, before = tmp_path / "kill.log", dumps_begun(run)
    with worker(planned, log) as process:
        begin_a_unit(run, process, log, before)
        process.kill()
        until("no worker outlives its parent", lambda: not members(process.pid), 10)


def test_two_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    """Windows, branches over their cache blocks, static rows."""
    folder = make_checkpoint(tmp_path / "teacher")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tiny_gemma3", str(folder), "vllm", "2"],
        env=environment() | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    assert "go as requests" not in done.stderr
    spread, alone = json.loads(done.stdout.splitlines()[-1]), rows(folder, "hf")
    assert len(spread) == len(alone) > 1
    for ours, theirs in zip(spread, alone, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        np.testing.assert_allclose(ours["log_norm"], theirs["log_norm"], atol=1e-3)
