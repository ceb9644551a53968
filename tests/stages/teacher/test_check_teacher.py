"""What could come of no teacher is refused before an engine starts, each time with a remedy that then passes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.schemas.errors import BytecacheError
from bytecache.schemas.settings import Teacher
from bytecache.stages.teacher import check
from bytecache.stages.teacher.check import check_teacher
from tests.support.quantised_models import quantise
from tests.support.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole") / "whole")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "device_kind", lambda: "cpu")


def settings(model: Path, **changes: Any) -> Teacher:
    given = {"model": str(model), "backend": "vllm", "dtype": "bfloat16", "context": 64, "overlap": 16}
    return Teacher.model_validate({**given, **changes})


def refused(asked: Teacher, words: str) -> None:
    with pytest.raises(BytecacheError, match=words):
        check_teacher(asked)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors int4"])
def test_four_bits_in_float32_are_known_before_an_engine_starts(
    whole: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised, _ = quantise(whole, kind, tmp_path)
    for dtype in ("auto", "float32"):
        refused(settings(quantised, dtype=dtype), rf'teacher\.dtype = \'{dtype}\'.*set teacher\.dtype = "bfloat16"')
    assert check_teacher(settings(quantised)) == quantised
    monkeypatch.setattr(check, "device_kind", lambda: "A GPU")
    assert check_teacher(settings(quantised, dtype="float32")) == quantised, "a GPU's kernels are the engine's matter"


@pytest.mark.parametrize("kind", ["compressed-tensors fp8", "compressed-tensors int8"])
def test_eight_bits_that_a_cpu_computes_pass_in_every_precision(whole: Path, tmp_path: Path, kind: str) -> None:
    quantised, _ = quantise(whole, kind, tmp_path)
    for dtype in ("auto", "float32", "float16"):
        assert check_teacher(settings(quantised, dtype=dtype)) == quantised


def test_a_kernel_that_a_cpu_lacks_is_known_too(whole: Path, tmp_path: Path) -> None:
    quantised, meant = quantise(whole, "fp8", tmp_path)
    for dtype in ("auto", "bfloat16"):
        refused(settings(quantised, dtype=dtype), r"quantised \(fp8\).*GPU, or name the model's own weights")
    assert check_teacher(settings(meant)) == meant


def test_noise_that_cannot_be_measured_is_known_before_work_begins(whole: Path, tmp_path: Path) -> None:
    quantised, meant = quantise(whole, "awq", tmp_path)
    own = r"which cannot be computed in float32; set teacher\.noise to the weights that they were made of"
    refused(settings(quantised, noise="self"), rf"teacher\.noise = 'self'.*quantised \(awq\), {own}")
    refused(settings(meant, noise=str(quantised)), rf"teacher\.noise = '.*quantised'.*\(awq\), {own}")
    refused(settings(quantised, noise=str(tmp_path / "none")), r"teacher\.noise = .*no such folder")
    refused(settings(quantised, noise=str(whole), sample_tokens=0), r"teacher\.sample_tokens = 0; set it to")
    assert check_teacher(settings(quantised, noise=str(whole))) == quantised
    assert check_teacher(settings(whole, noise="self")) == whole


def test_a_vocabulary_that_differs_by_its_ends_alone_has_another_remedy(whole: Path, tmp_path: Path) -> None:
    other = shutil.copytree(whole, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": [0, 1]}))
    refused(settings(other, noise=str(whole)), r"another start or end token.*set teacher\.start and teacher\.end")
    assert check_teacher(settings(other, noise=str(whole), end="<|end|>")) == other
    sentencepiece = make_checkpoint(tmp_path / "sentencepiece", family="sentencepiece")
    refused(settings(whole, noise=str(sentencepiece)), "another vocabulary.*name the weights that it was made of")


def test_settings_that_a_server_would_leave_out_are_refused(whole: Path) -> None:
    for backend in ("server", "vllm-server"):
        served = {"backend": backend, "server": "http://127.0.0.1:9/v1"}
        refused(settings(whole, adapter="lora", **served), r"teacher\.adapter = 'lora' .*merge it into what is served")
    refused(settings(whole, noise="self", backend="server", server="http://127.0.0.1:9/v1"), r"leave teacher\.noise")


@pytest.mark.parametrize("backend", ["server", "vllm-server"])
def test_a_server_without_a_usable_address_is_known_before_the_corpus_is_read(whole: Path, backend: str) -> None:
    refused(settings(whole, backend=backend), rf'teacher\.backend = "{backend}" needs teacher\.server, the address')
    refused(settings(whole, backend=backend, server="127.0.0.1:8000"), "give an address like http")
    refused(settings(whole, backend=backend, server="http://me:secret@127.0.0.1/v1"), "put a key into")
    assert check_teacher(settings(whole, backend=backend, server="http://127.0.0.1:9/v1")) == whole, "nobody is asked"


def test_a_tokenizer_alone_is_enough_behind_a_server(whole: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(whole, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    served = {"backend": "vllm-server", "server": "http://127.0.0.1:9/v1"}
    assert check_teacher(settings(bare, **served)) == bare
    refused(settings(bare), r"no \*\.safetensors weights")
    refused(settings(bare, noise="self", **served), r"needs the weights of teacher\.model .* here as well")


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_adapter_on_quantised_weights_is_refused_before_the_corpus_is_read(
    whole: Path, tmp_path: Path, command: str
) -> None:
    quantised, _ = quantise(whole, "awq", tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a text"}\n' * 3)
    given = [
        f"run.dir={tmp_path / 'run'}", f"corpus.source={tmp_path / 'corpus.jsonl'}", f"teacher.model={quantised}",
        "teacher.backend=vllm", "teacher.dtype=bfloat16", f"teacher.adapter={whole}", "student.model=",
        "student.tokenizer=bpe:300",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [command, *(part for each in given for part in ("--set", each))])
    assert done.exit_code == 2 and "name the unquantised weights that the adapter was trained on" in done.stderr
    assert not (tmp_path / "run" / "plan").exists()
