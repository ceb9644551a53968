"""A command begins from the settings that the run folder was used with last; what is said aloud goes on top."""

import json
import tomllib
from pathlib import Path

import pytest

from bytecache.pipeline.cli.options import Given
from bytecache.pipeline.config import PERMISSIONS, load_settings
from bytecache.pipeline.config_text import render_template
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import TRANSFER, Settings, Train
from tests.support.command_line import FakeTeacher, bytecache, refusal


def said(result: object) -> dict[str, object]:
    """What stderr says of the settings, as a program reads it."""
    lines = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]  # type: ignore[attr-defined]
    return next((line for line in lines if line["stage"] == "settings"), {})


def test_later_commands_work_with_the_settings_of_the_run(
    world: Path, fake_teacher: type[FakeTeacher], fake_convert: None
) -> None:
    assert bytecache("plan", "--set", "run.seed=3").exit_code == 0
    assert bytecache("teacher", "--preset", "fast").exit_code == 0
    converted = bytecache("convert")
    assert converted.exit_code == 0, converted.output
    assert said(converted)["values"] == ["run.seed = 3", 'teacher.preset = "fast"']
    rows = json.loads(bytecache("status", "--json").stdout)["stages"]
    assert not any("other settings" in row["note"] for row in rows)
    assert "was planned otherwise" in refusal(bytecache("convert", "--fresh"), 2)


def test_what_is_said_aloud_goes_on_top(world: Path) -> None:
    bytecache("plan", "--set", "teacher.top_k=3", "--set", "teacher.preset=fast", "--set", "train.steps=7")
    assert Given(None, []).settings().teacher.top_k == 3
    assert Given(None, ["teacher.top_k=5"]).settings().teacher.top_k == 5
    assert Given(None, [], preset="exact").settings().teacher.preset == "exact"
    # A pipeline.toml that nobody named says of this run what is not the default in it.
    (world / "pipeline.toml").write_text(render_template(load_settings(overrides=["train.steps=9"])))
    settings = Given(None, []).settings()
    assert (settings.teacher.top_k, settings.train.steps) == (3, 9)
    # One that was named says it all.
    named = Given(world / "pipeline.toml", []).settings()
    assert (named.teacher.top_k, named.train.steps) == (Settings().teacher.top_k, 9)
    assert Given(None, [], fresh=True).settings() == load_settings()


def test_another_kind_of_student_gets_its_own_training(world: Path) -> None:
    bytecache("plan", "--set", "train.final_rate=0.5", "--set", "train.batch=7")
    assert tomllib.loads((world / "run/config.toml").read_text())["train"]["lora_rank"] == TRANSFER["lora_rank"]
    train = Given(None, ["student.model=", "student.tokenizer="]).settings().train
    assert train == Train(final_rate=0.5, batch=7)
    assert Given(None, ["student.tokenizer=bytes"]).settings().train == Settings(train=train).train


def test_nothing_is_said_where_nothing_differs(world: Path) -> None:
    assert said(bytecache("plan")) == {}
    assert said(bytecache("plan")) == {}
    assert said(bytecache("status", "--json")) == {}


def test_a_folder_that_moved_is_the_run(world: Path) -> None:
    bytecache("plan", "--set", "teacher.top_k=3")
    (world / "run").rename(world / "moved")
    settings = Given(None, [], run_dir="moved").settings()
    assert (settings.run.dir, settings.teacher.top_k) == ("moved", 3)
    assert Given(None, []).settings().teacher.top_k == Settings().teacher.top_k


@pytest.mark.parametrize(
    "raw", [b"\xff", b"[teacher", b"[teacher]\nnone = 1\n", b"[teacher]\ntop_k = 'x'\n", b"#" * (1 << 21)]
)
def test_a_damaged_configuration_is_refused_with_the_way_out(world: Path, raw: bytes) -> None:
    bytecache("plan")
    (world / "run/config.toml").write_bytes(raw)
    message = refusal(bytecache("status"), 2)
    assert "run/config.toml" in message
    assert bytecache("status", "--fresh").exit_code == 0
    (world / "run/config.toml").unlink()
    assert bytecache("status").exit_code == 0


def test_a_folder_in_the_configurations_place_is_refused(world: Path) -> None:
    (world / "run/config.toml").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run/config\.toml cannot be read.*delete it"):
        Given(None, []).settings()


def test_secrets_come_from_the_environment_also_to_a_run_that_was_saved(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "https://me:secret@example.invalid/data"
    bytecache("plan", "--set", f"dataset.source={address}")
    saved = tomllib.loads((world / "run/config.toml").read_text())
    assert "secret" not in saved["dataset"]["source"]
    monkeypatch.setenv("BYTECACHE_DATASET_SOURCE", address)
    assert Given(None, []).settings().dataset.source.reveal() == address


def test_a_run_folder_gives_no_permission(world: Path) -> None:
    given = [".".join(place) for place in PERMISSIONS]
    bytecache("plan", *(part for key in given for part in ("--set", f"{key}=true")))
    saved = tomllib.loads((world / "run/config.toml").read_text())
    for section, key in PERMISSIONS:
        assert saved[section][key] is True
        assert getattr(getattr(Given(None, []).settings(), section), key) is False
