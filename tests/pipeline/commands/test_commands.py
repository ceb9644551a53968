"""Stage commands in a row: repeatable, never mixing what differs; status, verify and inspect follow them."""

import json
import re
from pathlib import Path

import pytest

from bytecache.schemas.settings import Settings
from tests.support.command_line import TEXTS, FakeTeacher, bytecache, finished_run, refusal
from tests.support.run_outputs import outputs


def test_resolved_configuration_is_kept_beside_the_outputs(world: Path, fake_teacher: type[FakeTeacher]) -> None:
    bytecache("plan", "--run-dir", "elsewhere")
    bytecache("teacher", "--run-dir", "elsewhere", "--set", "teacher.top_k=3")
    from bytecache.pipeline.config import load_settings

    kept = load_settings(world / "elsewhere/teacher/config.toml")
    assert (kept.run.dir, kept.teacher.top_k, kept.corpus.unit_bytes) == ("elsewhere", 3, 1000)
    assert load_settings(world / "elsewhere/plan/config.toml").teacher.top_k == Settings().teacher.top_k
    assert (world / "elsewhere/config.toml").read_text() == (world / "elsewhere/teacher/config.toml").read_text()


# ---- stages


def test_stages_repeat_without_work(world: Path, fake_teacher: type[FakeTeacher], fake_convert: None) -> None:
    assert "plan: new, 40 documents" in bytecache("plan").stdout
    assert "plan: unchanged" in bytecache("plan").stdout
    first = bytecache("teacher")
    assert first.exit_code == 0, first.output
    assert "units made, 0 were already whole" in first.stdout
    assert "set aside because its tokenizer cannot reproduce them (normaliser: " in first.stdout
    assert len([line for line in first.stderr.splitlines() if json.loads(line)["stage"] == "teacher"]) >= 4
    assert "teacher: nothing to do" in bytecache("teacher").stdout
    assert fake_teacher.opened == 1
    first = bytecache("convert", "--set", "convert.shard_bytes=2500")
    assert first.exit_code == 0, first.output
    stamps = {path: path.stat().st_mtime_ns for path in (world / "run").rglob("*") if path.is_file()}
    again = bytecache("convert", "--set", "convert.shard_bytes=2500")
    assert "convert: nothing to do" in again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in (world / "run").rglob("*") if path.is_file()}

    from bytecache.schemas.dataset.index import read_dataset

    dataset = read_dataset(world / "run/targets")
    assert {entry.split for entry in dataset.entries} == {"train", "heldout"}
    assert sum(entry.n_bytes for entry in dataset.entries) == sum(len(text.encode()) for text in TEXTS)
    assert all(entry.n_bytes <= 2500 for entry in dataset.entries)
    assert dataset.info["creation"]["set_aside"]["normaliser"] > 0


def test_the_teacher_command_keeps_the_configured_backend(world: Path, fake_teacher: type[FakeTeacher]) -> None:
    from bytecache.pipeline.config import load_settings

    bytecache("plan")
    assert bytecache("teacher").exit_code == 0
    assert load_settings(world / "run/teacher/config.toml").teacher.backend == Settings().teacher.backend


def test_a_failing_unit_keeps_the_others(world: Path, fake_teacher: type[FakeTeacher]) -> None:
    bytecache("plan")
    fake_teacher.fail_at = 2
    assert "poisoned unit" in refusal(bytecache("teacher"), 3)
    assert len(list((world / "run/teacher").glob("*.parquet"))) == 2
    message = refusal(bytecache("convert"), 3)
    assert re.search(r"holds 2 of \d+ dump parts; run `bytecache teacher`", message)
    fake_teacher.fail_at = -1
    assert "2 were already whole" in bytecache("teacher").stdout


def test_convert_finds_its_dump_among_others_and_never_mixes(
    world: Path, fake_teacher: type[FakeTeacher], fake_convert: None
) -> None:
    bytecache("plan")
    bytecache("teacher", "--set", "teacher.top_k=3")
    assert "top_k: 3 -> 16" in refusal(bytecache("convert", "--set", "teacher.top_k=16"), 2)
    bytecache("teacher", "--set", "teacher.top_k=16")
    assert bytecache("convert").exit_code == 0
    message = refusal(bytecache("convert", "--set", "teacher.top_k=3"), 2)
    assert "settings.top_k: 16 -> 3" in message
    assert "new run.dir" in message
    assert "prune" in refusal(bytecache("convert", "--set", "convert.prune=1e-2"), 2)


def test_another_version_of_the_conversion_code_never_mixes_into_a_data_set(
    world: Path, fake_teacher: type[FakeTeacher], fake_convert: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bytecache.pipeline.units import receipts

    bytecache("plan")
    bytecache("teacher")
    bytecache("convert")
    before = outputs(world / "run")
    monkeypatch.setattr(receipts, "code_fingerprint", lambda *modules: "other code")
    assert "conversion_code" in refusal(bytecache("convert"), 2)
    assert outputs(world / "run") == before
    # Not published yet: shards of the other code are made anew, and none of the old ones is kept or listed.
    for path in (world / "run/targets").glob("*[!p]"):
        path.unlink()
    assert "0 were already whole" in bytecache("convert").stdout
    assert not {key for key in before if key.endswith(".zip")} & set(outputs(world / "run"))
    assert bytecache("verify").exit_code == 0


def test_changed_plan_settings_are_refused_by_later_stages(world: Path, fake_teacher: type[FakeTeacher]) -> None:
    bytecache("plan")
    assert "unit_bytes: 1000 -> 2000" in refusal(bytecache("teacher", "--set", "corpus.unit_bytes=2000"), 2)
    assert "seed: 0 -> 1" in refusal(bytecache("plan", "--set", "run.seed=1"), 2)


def test_a_damaged_dump_is_refused_by_convert_and_repaired_by_teacher(
    world: Path, fake_teacher: type[FakeTeacher], fake_convert: None
) -> None:
    bytecache("plan")
    bytecache("teacher")
    victim = sorted((world / "run/teacher").glob("*.parquet"))[1]
    before = victim.read_bytes()
    victim.write_bytes(before[:-1])
    assert f"{len(before) - 1} bytes, its receipt says {len(before)}" in refusal(bytecache("convert"), 4)
    repaired = bytecache("teacher")
    assert "teacher: 1 units made" in repaired.stdout
    assert "will be redone" in repaired.stderr
    assert victim.read_bytes() == before
    assert bytecache("convert").exit_code == 0


def test_a_slice_that_changed_under_the_teacher(world: Path, fake_teacher: type[FakeTeacher]) -> None:
    bytecache("plan")
    piece = sorted((world / "run/plan/slices").iterdir())[0]
    piece.write_bytes(piece.read_bytes() + b"x")
    assert "run `bytecache plan`" in refusal(bytecache("teacher"), 4)
    assert bytecache("plan").exit_code == 0
    assert bytecache("teacher").exit_code == 0


# ---- looking


def test_status_and_verify_follow_the_work(world: Path, fake_teacher: type[FakeTeacher], fake_convert: None) -> None:
    assert "run `bytecache plan`" in bytecache("status").stdout
    assert not (world / "run").exists()
    bytecache("plan")
    fake_teacher.fail_at = 2
    bytecache("teacher")
    rows = {row["stage"]: row for row in json.loads(bytecache("status", "--json").stdout)["stages"]}
    total = rows["teacher"]["total"]
    assert total > 3
    assert (rows["plan"]["done"], rows["teacher"]["done"], rows["convert"]["done"]) == (1, 2, 0)
    fake_teacher.fail_at = -1
    bytecache("teacher")
    bytecache("convert")
    rows = {row["stage"]: row for row in json.loads(bytecache("status", "--json").stdout)["stages"]}
    assert (rows["teacher"]["done"], rows["convert"]["done"]) == (total, rows["convert"]["total"])
    assert f"{total}/{total}" in bytecache("status").stdout
    assert "top_k: 16 -> 3" in bytecache("status", "--set", "teacher.top_k=3").stdout
    whole = bytecache("verify")
    assert whole.exit_code == 0, whole.output
    assert "files match their hashes" in whole.stdout


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plan/plan.json", "plan"),
        ("plan/units/*", "run `bytecache plan`"),
        ("plan/slices/*", "run `bytecache plan`"),
        ("teacher/*.parquet", "teacher 0000"),
        ("targets/*.zarr.zip", "targets heldout-00000"),
        ("targets/manifest.parquet", "manifest.parquet"),
        ("receipts/teacher/*", "receipt"),
    ],
)
def test_verify_lists_every_flipped_byte(
    world: Path, fake_teacher: type[FakeTeacher], fake_convert: None, kept_runs: Path, pattern: str, expected: str
) -> None:
    victim = sorted(finished_run(world, kept_runs).glob(pattern))[0]
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 0x80
    victim.write_bytes(raw)
    result = bytecache("verify")
    assert "rerun the stage" in refusal(result, 4)
    assert expected in result.stdout
    report = json.loads(bytecache("verify", "--json").stdout)
    assert report["problems"]


def test_verify_takes_a_data_set_alone(world: Path, fake_teacher: type[FakeTeacher], fake_convert: None) -> None:
    for command in ("plan", "teacher", "convert"):
        bytecache(command)
    assert "files match" in bytecache("verify", "run/targets").stdout
    victim = next((world / "run/targets").glob("*.zarr.zip"))
    victim.unlink()
    assert "1 problems" in refusal(bytecache("verify", "run/targets"), 4)
    (world / "empty").mkdir()
    assert "holds nothing with a receipt" in refusal(bytecache("verify", "empty"), 3)


def test_inspect_shows_a_shard(world: Path, fake_teacher: type[FakeTeacher], fake_convert: None) -> None:
    for command in ("plan", "teacher", "convert"):
        bytecache(command)
    shard = sorted((world / "run/targets").glob("train*.zarr.zip"))[0]
    report = json.loads(bytecache("inspect", shard, "--json", "--limit", "1000", "--top", "2").stdout)
    rows = report["positions"]
    text = bytes(row["symbol"] for row in rows[:-1]).decode()
    assert text in TEXTS
    assert rows[-1]["symbol"] == 256
    assert all(row["top"][0][0] == row["symbol"] and abs(row["p"] - 0.9) < 0.02 for row in rows[:-1])
    assert all(row["tail"] < 0.12 for row in rows)
    shown = bytecache("inspect", shard, "--start", "3", "--limit", "2").stdout
    assert f"{text[3]!r}" in shown
    assert f"document {report['document']!r}" in shown
    assert "no document 'none'" in refusal(bytecache("inspect", shard, "--document", "none"), 3)
    shard.write_bytes(shard.read_bytes()[:-100])
    refusal(bytecache("inspect", shard), 4)
