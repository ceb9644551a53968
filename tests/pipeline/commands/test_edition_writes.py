"""`teacher` and `convert` of a second edition stopped after each write in turn: the same again ends what was begun."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.command_line import TEXTS, FakeTeacher, bytecache
from tests.support.stopped_writes import DAMAGE, Killed, files, stopping

SMALL = ("--set", "convert.shard_bytes=2000")


def without_times(content: dict[str, bytes]) -> dict[str, bytes]:
    """Receipts say how long the work took; what they vouch for is the same."""
    kept = {}
    for key, raw in content.items():
        if key.startswith("receipts/"):
            receipt = json.loads(raw)
            numbers = {name: value for name, value in receipt["counts"].items() if "per_s" not in name}
            kept[key] = json.dumps([receipt["files"], receipt["inputs"], receipt["name"], numbers]).encode()
        else:
            kept[key] = raw
    return kept


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stopped", ["teacher", "convert"])
def test_an_edition_stopped_after_any_write(
    world: Path, fake_teacher: type[FakeTeacher], fake_convert: None, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    for command in ("plan", "teacher", "convert"):
        done = bytecache(command, *SMALL)
        assert done.exit_code == 0, done.output
    texts = [*TEXTS[:9], "changed: " + TEXTS[9], *TEXTS[10:], *(f"new {text}" for text in TEXTS[:6])]
    (world / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for command in ("plan", "teacher")[: 1 + (stopped == "convert")]:
        assert bytecache(command, *SMALL).exit_code == 0
    run, begin = world / "run", world / "begin"
    shutil.copytree(run, begin)

    def again() -> None:
        shutil.rmtree(run)
        shutil.copytree(begin, run)

    with monkeypatch.context() as patched:
        writes = stopping(patched, -1)
        whole = bytecache(stopped, *SMALL)
    assert whole.exit_code == 0 and (stopped == "teacher" or "edition 2" in whole.output), whole.output
    expected = without_times(files(run))
    assert len(writes) > 6
    for number, written in enumerate(writes, 1):
        again()
        with monkeypatch.context() as patched:
            stopping(patched, number)
            with pytest.raises(Killed):
                bytecache(stopped, *SMALL)
        status = bytecache("status")
        assert status.exit_code == 0 and "damaged" not in status.output, (number, written, status.output)
        done = bytecache(stopped, *SMALL)
        assert done.exit_code == 0 and not DAMAGE.search(done.output), (number, written, done.output)
        found = without_times(files(run))
        assert found == expected, (number, written, {k for k in found | expected if found.get(k) != expected.get(k)})
    verified = bytecache("verify")
    assert verified.exit_code == 0, verified.output


def test_the_settings_of_finished_work_are_kept_whenever_it_was_killed(
    world: Path, fake_teacher: type[FakeTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last unit and before the configuration: the next call has nothing to make, and says so."""
    for command in ("plan", "teacher"):
        assert bytecache(command, *SMALL).exit_code == 0
    config = world / "run" / "config.toml"
    with monkeypatch.context() as patched:
        writes = stopping(patched, -1)
        assert bytecache("teacher", *SMALL, "--set", "teacher.top_k=9").exit_code == 0
    last = max(number for number, key in enumerate(writes, 1) if key.startswith("receipts/teacher/"))
    with monkeypatch.context() as patched:
        stopping(patched, last)
        with pytest.raises(Killed):
            bytecache("teacher", *SMALL, "--set", "teacher.top_k=10")
    assert "top_k = 9" in config.read_text()
    done = bytecache("teacher", *SMALL, "--set", "teacher.top_k=10")
    assert done.exit_code == 0 and "nothing to do" in done.output and not DAMAGE.search(done.output), done.output
    assert "top_k = 10" in config.read_text() and bytecache("verify").exit_code == 0
