"""The command line: help that teaches, one-line refusals, repeatable stages."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from run_outputs import outputs
from typer.testing import CliRunner, Result

from pipeline.cli import app
from schemas.errors import InputError
from schemas.settings import Settings

ROOT = Path(__file__).parent.parent
COMMANDS = [
    "plan", "teacher", "convert", "train", "evaluate", "export",
    "run", "status", "verify", "inspect", "fidelity", "probe", "config", "retry", "merge", "torture",
    "jobs local", "jobs ray", "jobs slurm", "jobs skypilot", "jobs kubernetes", "estimate",
]  # fmt: skip
TEXTS = [f"{i}: " + "the student reads the notes as often as it likes, " * (1 + i % 3) for i in range(40)]


def bytecache(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(result: Result, code: int) -> str:
    assert result.exit_code == code, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a corpus and a pipeline.toml; the run folder is `run`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "pipeline.toml").write_text(
        '[run]\ndir = "run"\n[corpus]\nsource = "corpus.jsonl"\nunit_bytes = 1000\nheldout_fraction = 0.1\n'
    )
    return tmp_path


class FakeTeacher:
    """Stands in for an engine: its dump of a slice is the slice."""

    opened = 0
    fail_at = -1

    def __init__(self, settings: Any) -> None:
        type(self).opened += 1
        self.settings = settings
        self.units = 0

    def identity(self) -> dict[str, Any]:
        return fake_identity(self.settings)

    def dump_unit(
        self, piece: Path, out: Path, key: str, stop: Callable[[], bool], tick: Callable[[dict], None]
    ) -> dict:
        if self.units == self.fail_at:
            raise InputError("poisoned unit; remove it")
        self.units += 1
        out.write_bytes(piece.read_bytes())
        tick({"bytes": 1, "tokens": 2, "branches": 0})
        return {"bytes": 1, "tokens": 2, "branches": 0, "set_aside": {"normaliser": 1}}

    def close(self) -> None:
        pass


def fake_identity(settings: Any) -> dict[str, Any]:
    effort = {name: getattr(settings.resolved(), name) for name in ("tau", "depth", "static")}
    shown = {"top_k": settings.top_k, **effort}
    return {"model": settings.model, "revision": settings.revision, "settings": shown, "vocabulary": "v"}


@pytest.fixture
def fake_teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeTeacher]]:
    from stages import identity, teacher

    monkeypatch.setattr(identity, "teacher_identity", fake_identity)
    monkeypatch.setattr(teacher, "open_teacher", FakeTeacher)
    FakeTeacher.opened, FakeTeacher.fail_at = 0, -1
    yield FakeTeacher
    FakeTeacher.fail_at = -1


@pytest.fixture
def fake_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards with certain targets from dumps that are slices."""
    from schemas.byte_shard import ShardBuilder
    from stages import convert

    def convert_units(parts: list[Path], out: Path, settings: Any, attrs: dict, stop: Any, tick: Any) -> dict[str, Any]:
        builder = ShardBuilder(prune=settings.prune)
        for part in parts:
            table = pq.read_table(part)
            for doc_id, text in zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True):
                data = np.frombuffer(text.encode(), np.uint8)
                probs = np.zeros((len(data) + 1, 257), np.float32)
                probs[np.arange(len(data)), data] = 0.9
                probs[:, 256] += 0.05
                probs[-1, 256] = 0.95
                builder.append(data, probs, np.full(len(probs), 0.05, np.float32))
                builder.end_document(doc_id)
        return dict(builder.write(out, attrs))

    monkeypatch.setattr(convert, "convert_units", convert_units)


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_is_read_and_written_with_an_example(command: str) -> None:
    text = re.sub(r"\s+", " ", bytecache(*command.split(), "--help").output)
    assert "Reads:" in text
    assert "Write" in text
    assert f"Example: bytecache {command}" in text


def test_examples_name_options_that_exist() -> None:
    import typer.main

    def commands(group: object, prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            inner = hasattr(command, "commands")
            found |= commands(command, f"{prefix}{name} ") if inner else {prefix + name: command}
        return found

    group = commands(typer.main.get_command(app))
    for name, command in group.items():
        known = {option for parameter in command.params for option in parameter.opts}
        used = set(re.findall(r"(?<!\w)--[a-z-]+", command.help.split("Example:")[1]))
        assert used <= known, name
    assert sorted(group) == sorted(COMMANDS)


def test_help_does_not_load_the_engine() -> None:
    code = (
        "import sys\nfrom pipeline.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'vllm', 'pyarrow', 'zarr', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("set()\n")


def test_console_script_is_declared() -> None:
    assert 'bytecache = "pipeline.cli:main"' in (ROOT / "pyproject.toml").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "config", "--set", "teacher.top_k=-1"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: teacher.top_k = -1 from --set teacher.top_k=-1: expected an integer >= 0 (default 16)\n"
    )


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["plan", "--set", "corpus.unit_byte=5000"], 2, "did you mean unit_bytes?"),
        (["plan", "--config", "none.toml"], 2, "none.toml does not exist"),
        (["plan", "--source", "none.jsonl"], 3, "'none.jsonl' does not exist"),
        (["teacher", "--tau", "2"], 2, "teacher.tau = 2 from --set teacher.tau=2: expected a number >= -1 and <= 1"),
        (["teacher"], 3, "run `bytecache plan`"),
        (["convert"], 3, "run `bytecache plan`"),
        (["train"], 3, "run `bytecache convert`"),
        (["evaluate"], 3, "run `bytecache convert`"),
        (["export"], 3, "run `bytecache convert`"),
        (["verify"], 3, "is not a folder"),
        (["inspect", "none.parquet"], 3, "does not exist"),
        (["inspect", "corpus.jsonl"], 3, "unknown kind of file"),
        (["probe", "--text-file", "none.txt", "--out", "o.npz"], 3, "none.txt cannot be read"),
        (["probe", "--text-file", "corpus.jsonl", "--out", "no/o.npz"], 3, "folder no of --out"),
        (["probe", "--text-file", "corpus.jsonl", "--out", "."], 3, "--out . is a folder"),
    ],
)
def test_refusals_are_one_line_with_a_code_and_leave_nothing(
    world: Path, arguments: list[str], code: int, expected: str
) -> None:
    before = sorted(path.name for path in world.iterdir())
    assert expected in refusal(bytecache(*arguments), code)
    left = sorted(path.name for path in world.iterdir())
    assert [name for name in left if name != "run"] == before
    assert not (world / "run" / "receipts").exists()


def test_unexpected_faults_keep_their_traceback(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import commands_data

    def fail(context: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(commands_data, "plan", fail)
    assert isinstance(bytecache("plan").exception, ZeroDivisionError)


def test_a_run_folder_that_cannot_be_written(world: Path) -> None:
    (world / "run").write_text("a file")
    assert "not a folder" in refusal(bytecache("plan"), 6)


def test_probe_refuses_undecodable_and_empty_text(world: Path) -> None:
    (world / "a.txt").write_bytes(b"ab\xff")
    assert "not UTF-8 at byte 2" in refusal(bytecache("probe", "--text-file", "a.txt", "--out", "o.npz"), 3)
    (world / "a.txt").write_bytes(b"")
    assert "is empty" in refusal(bytecache("probe", "--text-file", "a.txt", "--out", "o.npz"), 3)


# ---- configuration


def test_config_prints_what_the_stages_will_use(world: Path) -> None:
    done = bytecache("config", "--set", "teacher.depth=2")
    assert done.exit_code == 0
    (world / "again.toml").write_text(done.output)
    from pipeline.config import load_settings

    settings = load_settings(world / "again.toml")
    assert (settings.corpus.unit_bytes, settings.teacher.depth) == (1000, 2)
    assert bytecache("config", "--defaults").output == (ROOT / "pipeline.toml").read_text()


def test_resolved_configuration_is_kept_beside_the_outputs(world: Path, fake_teacher: type[FakeTeacher]) -> None:
    bytecache("plan", "--run-dir", "elsewhere")
    bytecache("teacher", "--run-dir", "elsewhere", "--set", "teacher.top_k=3")
    from pipeline.config import load_settings

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

    from schemas.manifest import read_dataset

    dataset = read_dataset(world / "run/targets")
    assert {entry.split for entry in dataset.entries} == {"train", "heldout"}
    assert sum(entry.n_bytes for entry in dataset.entries) == sum(len(text.encode()) for text in TEXTS)
    assert all(entry.n_bytes <= 2500 for entry in dataset.entries)
    assert dataset.info["creation"]["set_aside"]["normaliser"] > 0


def test_the_teacher_command_keeps_the_configured_backend(world: Path, fake_teacher: type[FakeTeacher]) -> None:
    from pipeline.config import load_settings

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
    assert "top_k: 3 -> 16" in refusal(bytecache("convert"), 2)
    bytecache("teacher")
    assert bytecache("convert").exit_code == 0
    message = refusal(bytecache("convert", "--set", "teacher.top_k=3"), 2)
    assert "settings.top_k: 16 -> 3" in message
    assert "new run.dir" in message
    assert "prune" in refusal(bytecache("convert", "--set", "convert.prune=1e-2"), 2)


def test_another_version_of_the_conversion_code_never_mixes_into_a_data_set(
    world: Path, fake_teacher: type[FakeTeacher], fake_convert: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import receipts

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
    world: Path, fake_teacher: type[FakeTeacher], fake_convert: None, pattern: str, expected: str
) -> None:
    for command in ("plan", "teacher", "convert"):
        assert bytecache(command).exit_code == 0
    victim = sorted((world / "run").glob(pattern))[0]
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
