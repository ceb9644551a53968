"""A teacher's own noise: nothing in float32, something in half precision, and a line of the certificate."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.errors import ConfigError
from bytecache.stages.fidelity.certificate import summary_line
from bytecache.stages.fidelity.noise import Noise
from tests.support.small_run import small_settings
from tests.support.tiny_models import make_checkpoint


def run(folder: Path, *more: str, code: int = 0) -> dict[str, Any]:
    """The certificate of a small run."""
    settings = small_settings(folder, documents=12)
    teacher, corpus = settings.teacher, settings.corpus
    arguments = [
        f"run.dir={folder / 'run'}", f"corpus.source={corpus.source}", "corpus.unit_bytes=1000",
        f"teacher.model={teacher.model}", "teacher.backend=hf", "teacher.context=128", "teacher.overlap=32",
        "teacher.sample_tokens=24", "teacher.start=<|begin|>", *more,
    ]  # fmt: skip
    for command in ("plan", "teacher", "convert"):
        done = CliRunner().invoke(app, [command, *(part for each in arguments for part in ("--set", each))])
        if done.exit_code != 0:
            assert done.exit_code == code, done.output
            return {"refused": done.stderr}
    assert code == 0
    fidelity = read_dataset(folder / "run" / "targets").fidelity
    assert fidelity is not None
    return fidelity


def test_half_precision_has_noise_and_float32_has_none(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "whole").mkdir()
    half = run(tmp_path / "half", "teacher.dtype=bfloat16", "teacher.noise=self")
    assert half["noise"]["against"]["dtype"] == "float32" and half["noise"]["against"]["model"] == "teacher"
    assert 1e-7 < half["noise"]["kl"]["mean"] < 0.1
    assert half["noise"]["positions"] == half["sample"]["positions"]
    assert "the teacher's own noise: KL" in summary_line(half)
    whole = run(tmp_path / "whole", "teacher.noise=self")
    assert whole["noise"]["kl"]["mean"] < 1e-9
    assert str(tmp_path) not in json.dumps(half)


def test_without_the_setting_there_is_no_line(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert "noise" not in found and "noise" not in summary_line(found)


def test_another_model_is_no_reference(tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", family="sentencepiece")
    assert "has another vocabulary than teacher.model" in run(tmp_path, f"teacher.noise={other}", code=3)["refused"]


def test_noise_against_two_models_is_not_added_up() -> None:
    def state(model: str) -> dict[str, Any]:
        noise = Noise()
        noise.against = {"model": model}
        return noise.state()

    assert Noise([state("a"), None, state("a")]).summary() is None
    with pytest.raises(ConfigError, match="different models"):
        Noise([state("a"), state("b")])
