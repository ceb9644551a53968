"""Two hundred workers killed at random moments of every stage; what is left equals the undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bytecache.pipeline.config_text import render_template
from bytecache.pipeline.stores import LocalStore
from tests.support.fleet_jobs import LAYOUT, job, run
from tests.support.places import ROOT
from tests.support.small_run import small_settings
from tests.torture.harness import _compare, outputs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_kills_change_nothing(tmp_path: Path) -> None:
    config = tmp_path / "pipeline.toml"
    config.write_text(render_template(small_settings(tmp_path)))
    # A process of its own: it forks, and this one has started threads.
    command = [
        sys.executable, "-m", "tests.torture", str(tmp_path / "torture"), "--config", str(config),
        "--kills", "200", "--seed", "1",
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["killed"] == 200
    assert report["faults"] == []
    assert {name.split()[1] for name in report["kills"]} == {"SIGKILL", "SIGTERM"}
    assert report["attempts"]["teacher"] > report["units"]["teacher"]
    assert not (tmp_path / "torture").exists()


def test_comparison_names_what_differs_and_what_is_not_done(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    run(store, job(3))
    whole = outputs(store)
    assert len(whole) == 3
    found = _compare(store, whole)
    assert found["faults"] == []
    assert (found["units"]["teacher"], found["attempts"]["teacher"], found["twice"]["teacher"]) == (3, 3, 0)
    changed = {**whole, "teacher/000.bin": "0", "teacher/009.bin": "1"}
    assert _compare(store, changed)["faults"] == ["teacher/000.bin: differs", "teacher/009.bin: missing"]
    del changed["teacher/001.bin"]
    assert "teacher/001.bin: extra" in _compare(store, changed)["faults"]
    mark = next(key for key in store.list(f"{LAYOUT.root}/units") if ".d" in key)
    store.delete(mark)
    store.write_temp("scrap", b"x").rename(tmp_path / "run/.tmp/other-machine-1-scrap")
    faults = _compare(store, whole)["faults"]
    assert any("was claimed and never done" in fault for fault in faults)
    assert "left over: other-machine-1-scrap" in faults
