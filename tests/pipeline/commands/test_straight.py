"""`teacher.keep` = "targets": shards straight from the teacher, the bytes that a dump would give, and nothing else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.commands.convert import convert
from bytecache.pipeline.commands.merge import merge
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.repair import repair_run
from bytecache.pipeline.commands.run import run
from bytecache.pipeline.commands.status import status
from bytecache.pipeline.commands.straight import summed, teach
from bytecache.pipeline.commands.verify import verify
from bytecache.pipeline.commands.workers import convert_worker, teacher_worker
from bytecache.pipeline.config_text import render_template
from bytecache.pipeline.context import Context, open_context
from bytecache.pipeline.stores import LocalStore
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.errors import ConfigError, InputError, Interrupted
from bytecache.schemas.files import file_sha256
from bytecache.schemas.settings import Settings
from tests.support.places import ROOT
from tests.support.small_run import small_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A small corpus and a tiny teacher, with branches, static rows and reference windows."""
    made = small_settings(tmp_path_factory.mktemp("straight"), documents=30)
    teacher = made.teacher.model_copy(update={"sample_tokens": 16, "start": "<|begin|>"})
    return made.model_copy(update={"teacher": teacher})


def context_of(settings: Settings, folder: Path, said: list[str] | None = None, **changes: Any) -> Context:
    """A run in `folder` with some keys changed, as `section__key`."""
    values = settings.model_dump()
    values["run"]["dir"] = str(folder)
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return open_context(Settings.model_validate(values), say=(said if said is not None else []).append)


def shards(folder: Path) -> dict[str, str]:
    """Hash of every shard, by its name without its key."""
    return {path.name.rpartition("-")[0]: file_sha256(path) for path in (folder / "targets").glob("*.zarr.zip")}


@pytest.fixture(scope="module")
def dumped(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by way of the dump."""
    folder = tmp_path_factory.mktemp("dumped") / "run"
    context = context_of(settings, folder)
    plan(context)
    teach(context)
    convert(context)
    return folder


@pytest.fixture(scope="module")
def straight(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, straight to targets."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    context = context_of(settings, folder, teacher__keep="targets")
    plan(context)
    teach(context)
    convert(context)
    return folder


def test_shards_are_those_of_the_dump_and_nothing_else_is_written(dumped: Path, straight: Path) -> None:
    assert len(shards(dumped)) > 2
    assert shards(straight) == shards(dumped)
    one, two = read_dataset(dumped / "targets"), read_dataset(straight / "targets")
    assert one.fidelity == two.fidelity and one.fidelity is not None and one.fidelity["sample"]["positions"] > 0
    assert one.info["creation"]["set_aside"] == two.info["creation"]["set_aside"]
    visible = {path.name for path in straight.iterdir() if not path.name.startswith(".")}
    assert visible == {"plan", "targets", "receipts", "config.toml"}
    assert not list((straight / "receipts").glob("teacher*"))
    assert verify(LocalStore(straight))[0] == []


def test_a_second_call_starts_no_engine(settings: Settings, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bytecache.stages.teacher import teacher

    monkeypatch.setattr(teacher, "open_teacher", lambda settings: pytest.fail("an engine was started"))
    said: list[str] = []
    context = context_of(settings, straight, said, teacher__keep="targets")
    assert teach(context).made == 0
    assert convert(context).made == 0
    rows = {row["stage"]: row for row in status(context)["stages"]}
    assert rows["teacher"]["done"] == rows["teacher"]["total"] > 2
    assert "straight to targets" in rows["teacher"]["note"]
    assert rows["convert"]["done"] == rows["convert"]["total"] == len(shards(straight))


def test_other_settings_are_refused(settings: Settings, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made otherwise"):
        teach(context_of(settings, straight, teacher__keep="targets", convert__precision="small"))
    copied = tmp_path / "run"
    shutil.copytree(straight, copied)
    (copied / "targets" / "dataset.json").unlink()
    with pytest.raises(ConfigError, match=r"shards of other settings only \(convert\)"):
        convert(context_of(settings, copied, teacher__keep="targets", convert__precision="small"))
    with pytest.raises(ConfigError, match="keeps none"):
        run(context_of(settings, tmp_path / "new", teacher__keep="targets", train__head="uld"))


def test_a_stop_between_windows_publishes_nothing_and_costs_nothing(
    settings: Settings, straight: Path, tmp_path: Path
) -> None:
    context = context_of(settings, tmp_path / "run", teacher__keep="targets")
    plan(context)
    with pytest.raises(InputError, match="0 of"):
        convert(context)
    asked = 0

    def stop_after_a_while() -> bool:
        nonlocal asked
        asked += 1
        return asked > 40

    context.stop = stop_after_a_while  # type: ignore[assignment]
    with pytest.raises(Interrupted):
        teach(context)
    assert len(shards(tmp_path / "run")) < len(shards(straight))
    again = context_of(settings, tmp_path / "run", teacher__keep="targets")
    teach(again)
    convert(again)
    assert shards(tmp_path / "run") == shards(straight)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_loses_the_shard_in_flight_at_most(
    settings: Settings, straight: Path, tmp_path: Path, sign: signal.Signals
) -> None:
    context = context_of(settings, tmp_path / "run", teacher__keep="targets")
    plan(context)
    config = tmp_path / "pipeline.toml"
    config.write_text(render_template(context.settings))
    command = [sys.executable, "-m", "bytecache", "teacher", "--worker", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not shards(tmp_path / "run"):
        time.sleep(0.01)
    process.send_signal(sign)
    _, said = process.communicate(timeout=120)
    assert process.returncode in ({-signal.SIGKILL} if sign == signal.SIGKILL else {0, 75}), said
    share = teacher_worker(context_of(settings, tmp_path / "run", teacher__keep="targets", fleet__lease_s=0.5))
    assert share.made <= len(shards(straight))
    convert_worker(context_of(settings, tmp_path / "run", teacher__keep="targets"))
    assert shards(tmp_path / "run") == shards(straight)
    assert not verify(LocalStore(tmp_path / "run"))[0]


def test_a_damaged_shard_is_left_to_the_teacher(settings: Settings, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    victim = sorted((folder / "targets").glob("train*.zip"))[1]
    victim.write_bytes(victim.read_bytes()[:-7])
    assert any(victim.name in line for line in verify(LocalStore(folder))[0])
    context = context_of(settings, folder, teacher__keep="targets")
    done = repair_run(context)
    assert any(line.startswith("left: ") and "`bytecache teacher`" in line for line in done), done
    assert teach(context).made == 1
    convert(context)
    assert shards(folder) == shards(straight)
    assert not verify(LocalStore(folder))[0]


def test_partial_runs_are_merged(settings: Settings, straight: Path, tmp_path: Path) -> None:
    halves = []
    for number in (0, 1):
        folder = tmp_path / f"half-{number}"
        shutil.copytree(straight, folder)
        (folder / "targets" / "dataset.json").unlink()
        for at, receipt in enumerate(sorted((folder / "receipts" / "convert").iterdir())):
            if at % 2 == number:
                (folder / json.loads(receipt.read_text())["files"][0]["path"]).unlink()
                receipt.unlink()
        halves.append(LocalStore(folder))
    merged = merge(LocalStore(tmp_path / "whole"), halves)
    assert merged.copied["convert"] == len(shards(straight)) and not merged.skipped
    convert(context_of(settings, tmp_path / "whole", teacher__keep="targets"))
    assert shards(tmp_path / "whole") == shards(straight)


@pytest.mark.parametrize("fault", ["window", "write"])
def test_a_fault_of_the_conversion_is_told_as_its_own(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """It happens in the child; the parent raises it with the child's words, and the next shard goes well."""
    from bytecache.schemas.errors import IntegrityError
    from bytecache.stages.convert.beside import ConversionBeside, PartBeside

    context = context_of(settings, tmp_path / "run", teacher__keep="targets")
    plan(context)
    append: Callable[..., None] = PartBeside.append
    if fault == "window":
        monkeypatch.setattr(PartBeside, "append", lambda self, window: append(self, with_nan(window)))
        with pytest.raises(IntegrityError, match="inconsistent"):
            teach(context)
    else:
        begin = ConversionBeside.begin
        monkeypatch.setattr(
            ConversionBeside, "begin", lambda self, out, attrs: begin(self, Path("/proc/nowhere/shard"), attrs)
        )
        with pytest.raises(Exception, match="nowhere"):
            teach(context)
    assert not shards(tmp_path / "run")


def with_nan(window: Any) -> Any:
    window.entry_mass = window.entry_mass * float("nan")
    return window


def test_counts_of_several_units_are_added() -> None:
    one = {"bytes": 3, "canonical_nll": 0.5, "set_aside": {"a": 1}, "set_aside_documents": [["x", "a"]]}
    two = {"bytes": 4, "canonical_nll": 0.25, "set_aside": {"a": 2, "b": 1}, "set_aside_documents": []}
    assert summed([one, two]) == {
        "bytes": 7, "canonical_nll": 0.75, "set_aside": {"a": 3, "b": 1}, "set_aside_documents": [["x", "a"]],
    }  # fmt: skip
