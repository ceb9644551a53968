"""One damaged file of a finished run, of each kind: found, named, and whole again for whoever does what he is told.

The run has a real (tiny) teacher, two students, a report and an export. `benchmarks/damage.py` does the same to every
file and prints the table.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.damage import DAMAGES, LOGS, STRANGERS, call, examine, files, inflict, kind, make_finished_run

KINDS = (
    "config.toml", "plan/plan.json", "plan/slices/UNIT.parquet", "plan/units/PAGE.json", "teacher/UNIT.parquet",
    "teacher/start/RECORD.json",
    "targets/README.md", "targets/dataset.json", "targets/manifest.parquet", "targets/SHARD.zarr.zip",
    "targets/config.toml", "train/student/student.json", "train/student/model.safetensors",
    "train/RUN/step-00000002.safetensors", "train/RUN/step-00000004.json", "train/RUN/step-00000004.safetensors",
    "train/RUN/metrics.jsonl", "report/report.json", "report/report.md", "report/RUN.json", "report/summary.md",
    "export/RUN/export.json", "export/RUN/model.safetensors", "receipts/plan/KEY.json", "receipts/teacher/KEY.json",
    "receipts/convert/KEY.json", "receipts/train/KEY.json", "receipts/student/KEY.json", "receipts/evaluate/KEY.json",
    "receipts/export/KEY.json", "receipts/document/KEY.json",
)  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finished_run(tmp_path_factory.mktemp("damage"))


@pytest.fixture
def place(finished: Path) -> Iterator[Path]:
    """The folder with the configuration, as the current one; runs are copied to its `run`."""
    before = Path.cwd()
    os.chdir(finished.parent)
    yield finished.parent
    os.chdir(before)


def one_of(finished: Path, name: str) -> str:
    return next(key for key in files(finished) if kind(key) == name)


@pytest.mark.parametrize("damage", [*DAMAGES, *STRANGERS])
@pytest.mark.parametrize("name", [*KINDS, "report/report.html"])
def test_one_damaged_file(finished: Path, place: Path, name: str, damage: str) -> None:
    verdict = examine(finished, place / "run", one_of(finished, name), damage)
    if verdict is None:
        pytest.skip("its neighbour has the same content")
    assert verdict.good, verdict


@pytest.mark.parametrize("damage", [*DAMAGES, *STRANGERS])
def test_every_file_is_looked_after(finished: Path, place: Path, damage: str) -> None:
    """No file of a run is without somebody who vouches for it."""
    unseen = []
    for key in files(finished):
        verdict = examine(finished, place / "run", key, damage, follow=False)
        unseen += [key] if verdict and not verdict.found else []
    assert unseen == []


def test_a_lost_log_is_set_aside_and_said_once(finished: Path, place: Path) -> None:
    examine(finished, place / "run", "config.toml", "missing", follow=False)  # a fresh copy
    run = place / "run"
    assert call("verify --repair")[0] == 0
    key = one_of(finished, "train/RUN/metrics.jsonl")
    assert LOGS.fullmatch(key) and inflict(run, key, "truncated")
    code, text = call("verify --repair")
    assert code == 0 and re.search(rf"forgotten: {key}: nothing depends on it", text)
    assert (run / "set-aside" / key).is_file() and call("verify")[0] == 0
    code, text = call("train")
    assert code == 0 and "nothing to do" in text
