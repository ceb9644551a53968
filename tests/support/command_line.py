"""The command line in this process, a small corpus to run it on, and stand-ins for engine and converter."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from bytecache.pipeline.cli import app
from bytecache.schemas.errors import InputError

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


@pytest.fixture(scope="session")
def kept_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `finished_run` keeps what it made."""
    return tmp_path_factory.mktemp("runs")


def finished_run(world: Path, kept_runs: Path, *options: str) -> Path:
    """`world/run`, planned, taught and converted; of the same inputs made once, then a copy, times of files and all."""
    inputs = [(world / name).read_bytes() for name in ("corpus.jsonl", "pipeline.toml")]
    kept = kept_runs / hashlib.sha256(repr((inputs, options)).encode()).hexdigest()[:16]
    if kept.exists():
        return Path(shutil.copytree(kept, world / "run"))
    for command in ("plan", "teacher", "convert"):
        done = bytecache(command, *options)
        assert done.exit_code == 0, (done.output, done.exception)
    shutil.copytree(world / "run", kept)
    return world / "run"


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
    from bytecache.pipeline.commands import teacher as command
    from bytecache.stages.teacher import teacher

    monkeypatch.setattr(command, "find_identity", lambda settings, kind: (fake_identity(settings), {}))
    monkeypatch.setattr(teacher, "open_teacher", FakeTeacher)
    monkeypatch.setattr(command, "settle_start", lambda context, kind: context.settings.teacher)
    FakeTeacher.opened, FakeTeacher.fail_at = 0, -1
    yield FakeTeacher
    FakeTeacher.fail_at = -1


@pytest.fixture
def fake_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards with certain targets from dumps that are slices."""
    from bytecache.schemas.shard.builder import ShardBuilder
    from bytecache.stages.convert import convert

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
