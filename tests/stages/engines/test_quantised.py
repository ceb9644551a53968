"""Quantised checkpoints under vLLM on a CPU: which compute what their integers stand for, and which are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")
from bytecache.pipeline.cli import app
from bytecache.schemas import settings as st
from bytecache.schemas.errors import BytecacheError
from bytecache.stages.fidelity.measuring import noise_between
from bytecache.stages.fidelity.noise import Noise
from bytecache.stages.teacher.teacher import open_teacher
from tests.support.quantised_models import quantise
from tests.support.small_run import certified
from tests.support.tiny_models import PROSE, make_checkpoint

pytestmark = pytest.mark.slow
BASE = {"context": 64, "overlap": 16, "tau": 0.01, "depth": 1, "static": 0.0, "sample_tokens": 0, "floor": 1e-7}


def windows(folder: Path, **more: Any) -> tuple[list[Any], dict[str, Any]]:
    teacher = open_teacher(st.Teacher.model_validate({**BASE, "model": str(folder), **more}))
    try:
        encoded = teacher.vocabulary.encode(PROSE[:120])
        return [window for group in teacher.windows([("d", 0, encoded)]) for window in group], teacher.identity()
    finally:
        teacher.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole") / "whole")


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_integers_compute_what_they_stand_for(whole: Path, tmp_path: Path, kind: str) -> None:
    quantised, meant = quantise(whole, kind, tmp_path)
    found, identity = windows(quantised, backend="vllm", dtype="float16")
    wanted, _ = windows(meant, backend="hf")
    original, _ = windows(whole, backend="hf")
    rounding, arithmetic = Noise(), Noise()
    for one, other, exact in zip(found, wanted, original, strict=True):
        arithmetic.add(noise_between(other, one))
        rounding.add(noise_between(exact, one))
    arithmetic.against = rounding.against = {"model": "whole"}
    told = [noise.summary() for noise in (arithmetic, rounding)]
    assert told[0] and told[1] and told[0]["kl"]["mean"] < 0.2 * told[1]["kl"]["mean"]
    assert identity["quantization"] == kind.split()[0] and identity["head_dtype"] == "float32"


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors int4"])
def test_a_precision_that_the_kernels_do_not_take_is_refused_with_one_that_they_do(
    whole: Path, tmp_path: Path, kind: str
) -> None:
    quantised, _ = quantise(whole, kind, tmp_path)
    with pytest.raises(BytecacheError, match=r'float32 on a CPU.*set teacher\.dtype = "bfloat16"'):
        windows(quantised, backend="vllm")
    assert windows(quantised, backend="vllm", dtype="bfloat16")[1]["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["awq", "compressed-tensors fp8"])
def test_noise_of_a_quantised_teacher_goes_from_plan_to_fidelity(whole: Path, tmp_path: Path, kind: str) -> None:
    """Far from what was rounded, near to what its integers stand for; in the certificate, the card and `fidelity`."""
    quantised, meant = quantise(whole, kind, tmp_path)
    given = [f"teacher.model={quantised}", "teacher.backend=vllm", "teacher.dtype=float16"]
    kl = {}
    for name, exact in (("against whole", whole), ("against meant", meant)):
        (tmp_path / name).mkdir()
        certificate = certified(tmp_path / name, *given, f"teacher.noise={exact}")
        assert certificate["noise"]["against"]["model"] == exact.name
        kl[name] = certificate["noise"]["kl"]["mean"]
    assert (
        1e-6 < kl["against whole"] < 0.1 and kl["against meant"] < (0.2 if kind == "awq" else 0.9) * kl["against whole"]
    )
    run = tmp_path / "against whole" / "run"
    assert "noise, its precision against float32" in (run / "targets" / "README.md").read_text()
    report = tmp_path / "fidelity.json"
    measure = ["fidelity", str(run), "--teacher", str(quantised), "--backend", "vllm", "--out", str(report)]
    done = CliRunner().invoke(app, [*measure, "--sample", "4", "--tokens", "24"])
    assert done.exit_code == 0, done.output
    assert "own noise is not measured again" in done.output
    assert json.loads(report.read_text())["claimed"]["noise"]["kl"]["mean"] == kl["against whole"]
