"""A whole small run as a user makes it, in processes of its own: repeated, killed at every stage, drained, probed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from tests.support.places import ROOT
from tests.support.run_outputs import outputs
from tests.support.tiny_models import make_checkpoint

TEXTS = [f"{i}: " + "the student reads the notes as often as it likes, " * (1 + i % 3) for i in range(40)]


def write_config(folder: Path, run: str, backend: str = "hf") -> Path:
    path = folder / f"{run}.toml"
    path.write_text(
        f'[run]\ndir = "{folder / run}"\n'
        f'[corpus]\nsource = "{folder / "corpus.jsonl"}"\nunit_bytes = 1000\nheldout_fraction = 0.1\n'
        f'[teacher]\nmodel = "{folder / "teacher"}"\nbackend = "{backend}"\n'
        "context = 128\noverlap = 32\ndepth = 1\ntau = 0.01\n"
        "[convert]\nshard_bytes = 2000\n"
        '[student]\nmodel = ""\ntokenizer = "bpe:300"\nhidden_size = 32\nlayers = 1\nheads = 2\n'
        "[train]\nsteps = 12\nbatch = 2\nwindow_bytes = 128\nwarmup = 2\ncheckpoint_every = 2\n"
    )
    return path


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bytecache", *arguments, "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(config: Path, *arguments: str, code: int = 0) -> str:
    process = start(config, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a tiny teacher, and one undisturbed run."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    make_checkpoint(folder / "teacher")
    output = finish(write_config(folder, "reference"), "run")
    assert "held out, student distilled: tokens" in output
    assert "held out, student control: tokens" in output
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_run_does_nothing_and_says_so(small: Path) -> None:
    before = outputs(small / "reference")
    output = finish(small / "reference.toml", "run")
    assert "run: nothing to do" in output
    assert outputs(small / "reference") == before
    assert "files match their hashes" in finish(small / "reference.toml", "verify")
    dump = sorted((small / "reference/teacher").glob("*.parquet"))[0]
    shown = CliRunner().invoke(app, ["inspect", str(dump), "--limit", "5"])
    assert shown.exit_code == 0, shown.output
    assert "token dump" in shown.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_during_every_stage_then_rerun_gives_the_same_hashes(small: Path) -> None:
    config = write_config(small, "killed")
    folder = small / "killed"
    generator = random.Random(3)
    signs = ["teacher/*.parquet", "targets/*.zarr.zip", "train/distilled-*/step-*.json", "train/control-*/step-*.json"]
    for sign in signs:
        process = start(config, "run")
        while process.poll() is None and not list(folder.glob(sign)):
            time.sleep(0.005)
        time.sleep(generator.random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL, sign
        assert process.stdout is not None
        process.stdout.close()
    finish(config, "run")
    assert outputs(folder) == outputs(small / "reference")
    assert "files match their hashes" in finish(config, "verify")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_drains_with_code_75_in_teacher_and_train(small: Path) -> None:
    config = write_config(small, "drained")
    folder = small / "drained"
    for sign in ("teacher/*.parquet", "train/distilled-*/step-*.json"):
        process = start(config, "run")
        while process.poll() is None and not list(folder.glob(sign)):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 75, output
        assert "error: " in output
        assert "rerun" in output
    finish(config, "run")
    assert outputs(folder) == outputs(small / "reference")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_probe_writes_distributions(small: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXTS[0])
    output = finish(
        small / "reference.toml", "probe", "--text-file", str(tmp_path / "t.txt"), "--out", str(tmp_path / "p.npz")
    )
    assert "bits/byte, mean tail" in output
    with np.load(tmp_path / "p.npz") as found:
        n = len(TEXTS[0].encode())
        assert found["probs"].shape == (n + 1, 257)
        assert found["probs"].dtype == found["tail"].dtype == np.float32
        assert found["text"].tobytes() == TEXTS[0].encode()
        np.testing.assert_allclose(found["probs"].sum(1) + found["tail"], 1, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.npz", "t.txt"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_of_the_real_engine_gives_the_same_dump(small: Path) -> None:
    """vLLM: killed with units done and one in flight, then rerun; the parts equal those of an undisturbed run."""
    reference, killed = (write_config(small, name, "vllm") for name in ("vllm-reference", "vllm-killed"))
    for config in (reference, killed):
        finish(config, "plan")
    finish(reference, "teacher")
    process = start(killed, "teacher")
    while process.poll() is None and len(list((small / "vllm-killed").glob("teacher/*.parquet"))) < 2:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()
    assert "were already whole" in finish(killed, "teacher")
    assert outputs(small / "vllm-killed") == outputs(small / "vllm-reference")
