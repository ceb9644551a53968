"""A teacher's own noise: nothing in float32, something in half precision, and a line of the certificate."""

import json
from pathlib import Path
from typing import Any

import pytest

from bytecache.schemas.errors import ConfigError
from bytecache.stages.fidelity.certificate import summary_line
from bytecache.stages.fidelity.noise import Noise
from tests.support.small_run import certified
from tests.support.tiny_models import make_checkpoint


@pytest.mark.slow
def test_half_precision_has_noise_and_float32_has_none(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "whole").mkdir()
    half = certified(tmp_path / "half", "teacher.dtype=bfloat16", "teacher.noise=self")
    assert half["noise"]["against"]["dtype"] == "float32" and half["noise"]["against"]["model"] == "teacher"
    assert 1e-7 < half["noise"]["kl"]["mean"] < 0.1
    assert half["noise"]["positions"] == half["sample"]["positions"]
    assert "the teacher's own noise: KL" in summary_line(half)
    whole = certified(tmp_path / "whole", "teacher.noise=self")
    assert whole["noise"]["kl"]["mean"] < 1e-9
    assert str(tmp_path) not in json.dumps(half)


def test_without_the_setting_there_is_no_line(tmp_path: Path) -> None:
    found = certified(tmp_path)
    assert "noise" not in found and "noise" not in summary_line(found)


def test_another_model_is_no_reference(tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", family="sentencepiece")
    assert (
        "has another vocabulary than teacher.model" in certified(tmp_path, f"teacher.noise={other}", code=3)["refused"]
    )


def test_noise_against_two_models_is_not_added_up() -> None:
    def state(model: str) -> dict[str, Any]:
        noise = Noise()
        noise.against = {"model": model}
        return noise.state()

    assert Noise([state("a"), None, state("a")]).summary() is None
    with pytest.raises(ConfigError, match="different models"):
        Noise([state("a"), state("b")])
