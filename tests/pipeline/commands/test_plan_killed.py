"""`plan` stopped after each of its writes in turn: the same command again heals it without a word."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import bytecache
from tests.support.stopped_writes import DAMAGE, Killed, files, stopping


def corpus(path: Path, first: int, last: int) -> Path:
    texts = [f"document {number} says something, " * (1 + number % 9) for number in range(first, last)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("state", ["empty", "same", "other settings", pytest.param("edition", marks=pytest.mark.slow)])
def test_plan_stopped_after_any_write(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = corpus(tmp_path / "one.jsonl", 0, 30), corpus(tmp_path / "two.jsonl", 0, 45)
    run = tmp_path / "run"

    def plan(source: Path, *more: str) -> Any:
        return bytecache("plan", "--source", source, "--run-dir", run, "--set", "corpus.unit_bytes=2000", *more)

    if state != "empty":
        assert plan(one).exit_code == 0
    begin = tmp_path / "begin"
    shutil.copytree(run, begin) if run.exists() else begin.mkdir()
    more = ["--set", "train.batch=3"] if state == "other settings" else []
    source = two if state == "edition" else one

    def again() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(begin, run)

    again()
    with monkeypatch.context() as patched:
        writes = stopping(patched, -1)
        whole = plan(source, *more)
    assert whole.exit_code == 0, whole.output
    expected = files(run)
    assert (str(source) in expected["config.toml"].decode()) and len(writes) >= (
        5 if state in ("empty", "edition") else 0
    )
    for number in range(1, len(writes) + 1):
        again()
        with monkeypatch.context() as patched:
            stopping(patched, number)
            with pytest.raises(Killed):
                plan(source, *more)
        status = bytecache("status", "--run-dir", run)
        assert status.exit_code == 0 and "damaged" not in status.output, (number, writes[number - 1], status.output)
        done = plan(source, *more)
        assert done.exit_code == 0, (number, writes[number - 1], done.output)
        assert not DAMAGE.search(done.output.replace(str(tmp_path), "")), (number, writes[number - 1], done.output)
        assert files(run) == expected, (number, writes[number - 1])
        verified = bytecache("verify", run)
        assert verified.exit_code == 0, (number, writes[number - 1], verified.output)
