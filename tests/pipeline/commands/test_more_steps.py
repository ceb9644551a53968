"""`train.steps` extends a finished run where the result is that of one in one go, and says so where it is not."""

from pathlib import Path

import pytest

from bytecache.schemas.files import file_sha256
from tests.support.command_line import bytecache
from tests.support.student_data import make_dataset

SMALL = ("student.model=", "student.tokenizer=bpe:300", "student.hidden_size=16", "student.layers=1", "student.heads=2",
         "train.batch=2",
         "train.window_bytes=96", "train.warmup=1", "train.checkpoint_every=2", "train.control=false")  # fmt: skip


def train(folder: Path, run: str, *more: str) -> str:
    settings = [f"run.dir={folder / run}", f"dataset.source={folder / 'targets'}", *SMALL, *more]
    result = bytecache("train", *(word for setting in settings for word in ("--set", setting)))
    assert result.exit_code == 0, result.output
    return result.output


def last(folder: Path, run: str, step: int) -> str:
    (place,) = (folder / run).glob(f"train/distilled-*/step-{step:08d}.safetensors")
    return file_sha256(place)


@pytest.mark.slow
def test_a_finished_run_is_extended(tmp_path: Path) -> None:
    make_dataset(tmp_path / "targets")
    constant = "train.schedule=constant"
    train(tmp_path, "cut", constant, "train.steps=3")
    said = train(tmp_path, "cut", constant, "train.steps=5")
    assert "train distilled: goes on after the 3 steps of train/distilled-" in said
    train(tmp_path, "whole", constant, "train.steps=5")
    assert last(tmp_path, "cut", 5) == last(tmp_path, "whole", 5)
    assert "nothing to do, 3 steps are done" in train(tmp_path, "cut", constant, "train.steps=3")
    logs = sorted((tmp_path / "cut").glob("train/distilled-*/metrics.jsonl"))
    assert sorted(log.read_text().count("\n") for log in logs) == [3, 5]
    assert bytecache("verify", "--set", f"run.dir={tmp_path / 'cut'}").exit_code == 0


@pytest.mark.slow
def test_why_a_run_begins_anew_is_said(tmp_path: Path) -> None:
    make_dataset(tmp_path / "targets")
    train(tmp_path, "run", "train.steps=2")
    said = train(tmp_path, "run", "train.steps=3")
    assert 'begins anew instead of after the 2 steps that are done, since train.schedule = "cosine"' in said
