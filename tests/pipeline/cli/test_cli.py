"""The command line: help that teaches, one-line refusals, the configuration."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bytecache.pipeline.cli import app
from tests.support.command_line import bytecache, refusal
from tests.support.places import ROOT

COMMANDS = [
    "plan", "teacher", "convert", "train", "evaluate", "export",
    "run", "status", "verify", "inspect", "fidelity", "probe", "check", "config", "retry", "merge", "mix", "prune",
    "push", "pull", "import",
    "jobs local", "jobs ray", "jobs slurm", "jobs skypilot", "jobs kubernetes", "estimate",
]  # fmt: skip


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
        "import sys\nfrom bytecache.pipeline.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'vllm', 'pyarrow', 'zarr', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("set()\n")


def test_console_script_is_declared() -> None:
    assert 'bytecache = "bytecache.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "bytecache", "config", "--set", "teacher.top_k=-1"],
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
    from bytecache.pipeline.commands import plan as module

    def fail(context: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(module, "plan", fail)
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
    from bytecache.pipeline.config import load_settings

    settings = load_settings(world / "again.toml")
    assert (settings.corpus.unit_bytes, settings.teacher.depth) == (1000, 2)
    assert bytecache("config", "--defaults").output == (ROOT / "pipeline.toml").read_text()
