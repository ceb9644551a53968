"""Which of vLLM's architectures can be teachers here, and one that wants torchvision, end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bytecache.schemas import settings as st
from bytecache.schemas.errors import EngineError
from tests.support.places import ROOT
from tests.support.tiny_gemma3 import make_gemma3, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
VISION = Path(sys.prefix) / "vision"
"""Where `make vision` puts torchvision: out of sight of all who would import it, a CUDA build, beside a CPU torch."""
OTHERS = {"terratorch", "timm", "torchaudio"}
"""Modules of single architectures that no lock holds for a CPU."""
GPU_ONLY = {"Dots3NoteForCausalLM", "Dots3NoteMTPModel"}
"""Architectures that import a kernel which the CPU build of vLLM has not."""


def run(module: str, *arguments: str, vision: bool) -> str:
    """Last line that a program of tests/support says."""
    path = [str(ROOT)] + ([str(ROOT / "tests" / "support" / "vision"), str(VISION)] if vision else [])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}", *arguments],
        env=env, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def need_vision() -> None:
    if not (VISION / "torchvision").is_dir():
        pytest.skip(f"{VISION} holds no torchvision: run `make vision`")


@pytest.mark.parametrize("vision", [True, False])
def test_every_registered_architecture_can_be_imported(vision):
    """Without torchvision, what cannot be imported lacks that and nothing else."""
    if vision:
        need_vision()
    found = json.loads(run("vllm_architectures", vision=vision))
    lacking = {name: why for name, why in found["broken"].items() if name not in GPU_ONLY and why not in OTHERS}
    assert found["registered"] > 300
    assert set(lacking.values()) <= (set() if vision else {"torchvision"}), lacking
    assert "LlamaForCausalLM" not in lacking


def test_a_model_with_eyes_gives_the_rows_of_the_other_engine(tmp_path):
    """Gemma3ForConditionalGeneration, whose eye is not loaded: the text's model alone, through both engines."""
    need_vision()
    folder = make_gemma3(tmp_path / "gemma")
    through_vllm = json.loads(run("tiny_gemma3", str(folder), "vllm", vision=True))
    through_hf = rows(folder, "hf")
    assert len(through_vllm) == len(through_hf) > 1
    for ours, theirs in zip(through_vllm, through_hf, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        np.testing.assert_allclose(ours["log_norm"], theirs["log_norm"], atol=1e-3)


def test_without_torchvision_the_refusal_names_it(tmp_path):
    from bytecache.stages.engines.vllm_start import start_engine

    folder = make_gemma3(tmp_path / "gemma")
    with pytest.raises(EngineError, match="this architecture needs torchvision"):
        start_engine(folder, st.Teacher(model=str(folder), context=128).resolved(), 130)
