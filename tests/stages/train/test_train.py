"""Training: exact resume from a kill anywhere, torn checkpoints passed over, a control that never sees the teacher."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bytecache.schemas import errors
from bytecache.schemas.dataset.index import write_dataset
from bytecache.schemas.settings import Student, Train
from bytecache.schemas.shard import reader as byte_shard
from bytecache.stages.student import student
from bytecache.stages.train import checkpoint
from bytecache.stages.train.objective.marginal import Marginal
from bytecache.stages.train.train import _SupervisedTokens, train
from tests.support.student_data import document, make_dataset, write_split

PAPER = {"head": "parallel", "lambda_kl": 0.1, "byte_reduction": "mean"}
SETTINGS = Train(**PAPER, steps=9, batch=3, window_bytes=96, warmup=2, checkpoint_every=2, learning_rate=3e-3)
SMALL = Student(tokenizer="bpe:300", hidden_size=32, layers=2, heads=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(targets, student folder, sha256 of the weights after an uninterrupted run)."""
    root = tmp_path_factory.mktemp("world")
    targets = make_dataset(root / "targets")
    student.prepare(SMALL, targets, root / "student", seed=1)
    whole = train(SETTINGS, root / "student", targets, root / "whole", name="whole", seed=1, device="cpu")
    return targets, root / "student", whole


def test_stopped_and_resumed_is_bit_identical(world, tmp_path):
    targets, folder, whole = world
    steps: list[int] = []
    for stop_after in (1, 4, 5):
        with pytest.raises(errors.Interrupted, match="rerun"):
            train(
                SETTINGS, folder, targets, tmp_path, name="cut", seed=1, device="cpu",
                stop=lambda limit=stop_after: steps[-1] >= limit, report=lambda r: steps.append(r["step"]),
            )  # fmt: skip
    result = train(SETTINGS, folder, targets, tmp_path, name="cut", seed=1, report=lambda r: steps.append(r["step"]))
    assert steps == list(range(1, 10)) and result["resumed_from"] == 5
    assert result["sha256"] == whole["sha256"] and result["terms"] == whole["terms"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert len(list(tmp_path.glob("*.safetensors"))) == checkpoint.KEEP
    assert not list(tmp_path.glob(".*"))


def test_more_steps_go_on_where_fewer_ended(world, tmp_path):
    """Where no schedule looks at their number; else another number is another run."""
    targets, folder, _ = world
    constant = SETTINGS.model_copy(update={"schedule": "constant", "steps": 6})
    whole = train(constant, folder, targets, tmp_path / "whole", name="whole", seed=1, device="cpu")
    for steps in (3, 6):
        settings = constant.model_copy(update={"steps": steps})
        result = train(settings, folder, targets, tmp_path / "cut", name="cut", seed=1, device="cpu")
    assert result["resumed_from"] == 3
    assert result["sha256"] == whole["sha256"] and result["terms"] == whole["terms"]
    with pytest.raises(errors.ConfigError, match=r"steps \(6, now 4\)"):
        train(constant.model_copy(update={"steps": 4}), folder, targets, tmp_path / "cut", name="cut", seed=1)
    for key, value in (("schedule", "cosine"), ("kl_schedule", "decay")):
        short = constant.model_copy(update={"steps": 2, key: value})
        train(short, folder, targets, tmp_path / key, name="short", seed=1, device="cpu")
        with pytest.raises(errors.ConfigError, match=r"steps \(2, now 3\)"):
            train(short.model_copy(update={"steps": 3}), folder, targets, tmp_path / key, name="short", seed=1)


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
from bytecache.schemas.settings import Train
from bytecache.stages.train import checkpoint
from bytecache.stages.train.objective.marginal import Marginal
from bytecache.stages.train.train import train
import torch
torch.set_num_threads({threads})
publish = checkpoint._publish
calls = 0
def dying(scratch, final):
    global calls
    calls += 1
    if calls == {at} and {early}:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(scratch, final)
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint._publish = dying
train(Train(**{settings!r}), Path({folder!r}), Path({targets!r}), Path({out!r}), name="killed", seed=1, device="cpu")
"""


@pytest.mark.parametrize(
    ("at", "early", "resumed"),
    [
        pytest.param(3, True, 2, marks=pytest.mark.slow),
        pytest.param(
            3, False, 2, marks=pytest.mark.slow
        ),  # the new weights are in place, their receipt is not: the likeliest torn state
        pytest.param(4, False, 4, marks=pytest.mark.slow),
    ],
)
def test_kill_9_around_a_commit_loses_at_most_that_checkpoint(world, tmp_path, at, early, resumed):
    """Publications alternate data and receipt: die before and after the second data, after the second receipt."""
    targets, folder, whole = world
    code = KILLED.format(
        path=[p for p in sys.path if p], at=at, early=early, settings=SETTINGS.model_dump(), folder=str(folder),
        targets=str(targets), out=str(tmp_path), threads=torch.get_num_threads(),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    result = train(SETTINGS, folder, targets, tmp_path, name="killed", seed=1, device="cpu")
    assert result["resumed_from"] == resumed and result["sha256"] == whole["sha256"]


@pytest.mark.parametrize("damage", ["truncate", "zero", "receipt"])
def test_a_damaged_checkpoint_is_passed_over(world, tmp_path, damage):
    targets, folder, whole = world
    steps: list[int] = []
    with pytest.raises(errors.Interrupted):
        train(
            SETTINGS, folder, targets, tmp_path, name="cut", seed=1, device="cpu",
            stop=lambda: steps[-1] >= 5, report=lambda r: steps.append(r["step"]),
        )  # fmt: skip
    newest = sorted(tmp_path.glob("*.safetensors"))[-1]
    if damage == "truncate":
        newest.write_bytes(newest.read_bytes()[:-100])
    elif damage == "zero":
        data = bytearray(newest.read_bytes())
        data[-4096:-2048] = bytes(2048)
        newest.write_bytes(data)
    else:
        newest.with_suffix(".json").write_text("{")
    with pytest.raises(errors.IntegrityError, match=newest.name):
        checkpoint.load(newest)
    result = train(SETTINGS, folder, targets, tmp_path, name="cut", seed=1, device="cpu")
    assert result["resumed_from"] == 4 and newest.name in result["refused_checkpoints"][0]
    assert result["sha256"] == whole["sha256"]


def test_other_settings_are_refused_by_name(world, tmp_path):
    targets, folder, _ = world
    short = SETTINGS.model_copy(update={"steps": 2})
    train(short, folder, targets, tmp_path, name="a", seed=1, device="cpu")
    with pytest.raises(errors.ConfigError, match="steps"):
        train(SETTINGS, folder, targets, tmp_path, name="a", seed=1, device="cpu")
    with pytest.raises(errors.ConfigError, match="lambda_kl"):
        train(short, folder, targets, tmp_path, name="a", seed=1, device="cpu", lambda_kl=0.0)


def test_the_control_never_reads_the_teacher(world, tmp_path, monkeypatch):
    targets, folder, whole = world

    def poisoned(self, lo, hi):
        raise AssertionError("the control read teacher probabilities")

    monkeypatch.setattr(byte_shard.ByteShard, "triples", poisoned)
    result = train(SETTINGS, folder, targets, tmp_path / "control", name="control", seed=1, lambda_kl=0.0, device="cpu")
    assert result["terms"]["byte_kl"] == 0 and result["terms"]["byte_ce"] > 0
    assert result["sha256"] != whole["sha256"]
    bare = SETTINGS.model_copy(update={"lambda_byte": 0.0, "lambda_kl": 0.0})
    alone = train(bare, folder, targets, tmp_path / "ce", name="ce", seed=1, device="cpu")
    assert alone["terms"]["byte_ce"] == 0
    with pytest.raises(AssertionError, match="control read"):
        train(SETTINGS, folder, targets, tmp_path / "kl", name="kl", seed=1, device="cpu")


def test_marginal_resumes_with_the_same_cuts_and_its_control_is_plain_cross_entropy(world, tmp_path, monkeypatch):
    """The counted cuts are part of a checkpoint; the control reads no teacher and ends as CE alone ends."""
    targets, folder, _ = world
    settings = SETTINGS.model_copy(update={"head": "marginal", "lambda_kl": 1.0, "byte_reduction": "sum", "steps": 4})
    whole = train(settings, folder, targets, tmp_path / "whole", name="m", seed=1, device="cpu")
    steps: list[int] = []
    with pytest.raises(errors.Interrupted):
        train(
            settings, folder, targets, tmp_path / "cut", name="m", seed=1, device="cpu",
            stop=lambda: steps[-1] >= 2, report=lambda r: steps.append(r["step"]),
        )  # fmt: skip
    again = train(settings, folder, targets, tmp_path / "cut", name="m", seed=1, device="cpu")
    assert again["sha256"] == whole["sha256"] and again["terms"]["byte_kl"] > 0
    tensors, _ = checkpoint.load(Path(whole["checkpoint"]))
    counted = tensors["term.marginal.segmentation.on"]
    vocabulary = student.load(folder).vocabulary
    assert not torch.equal(counted, Marginal(vocabulary, vocabulary.size).segmentation.on), "no cuts were counted"
    monkeypatch.setattr(byte_shard.ByteShard, "triples", lambda *a: pytest.fail("the control read the teacher"))
    control = train(settings, folder, targets, tmp_path / "control", name="c", seed=1, lambda_kl=0.0, device="cpu")
    bare = settings.model_copy(update={"head": "parallel", "lambda_byte": 0.0})
    alone = train(bare, folder, targets, tmp_path / "ce", name="c", seed=1, lambda_kl=0.0, device="cpu")
    assert control["terms"]["token_nll"] == alone["terms"]["token_nll"] and control["terms"]["byte_kl"] == 0


@pytest.mark.parametrize("head", ["parallel", "marginal"])
def test_losses_fall(world, tmp_path, head):
    targets, folder, _ = world
    records: list[dict] = []
    longer = SETTINGS.model_copy(update={"steps": 40, "learning_rate": 1e-2, "head": head})
    train(longer, folder, targets, tmp_path, name="long", seed=1, device="cpu", report=records.append)
    for term in ("loss", "token_nll", "byte_kl") + (("byte_ce",) if head == "parallel" else ()):
        assert sum(r[term] for r in records[-4:]) < 0.8 * sum(r[term] for r in records[:4])


def test_a_diverging_run_stops_with_a_remedy(world, tmp_path):
    targets, folder, _ = world
    wild = SETTINGS.model_copy(update={"learning_rate": 1e30, "warmup": 0})
    with pytest.raises(errors.ConfigError, match="lower it"):
        train(wild, folder, targets, tmp_path, name="wild", seed=1, device="cpu")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_run_without_a_supervised_token_is_refused(tmp_path: Path) -> None:
    """Its loss is 0, which would look like the best of all runs."""
    folder = tmp_path / "d"
    folder.mkdir()
    texts = [document(seed, 3) for seed in range(6)]
    entries = write_split(folder, "train", texts, 3, lambda n: np.zeros(n, np.uint8))
    write_dataset(folder, entries, {})
    settings = Train(steps=2, batch=2, window_bytes=64, warmup=1, checkpoint_every=1)
    student.prepare(Student(tokenizer="bytes", hidden_size=16, layers=1, heads=1), folder, tmp_path / "s", seed=0)
    with pytest.raises(errors.InputError, match="no position of split 'train' is supervised"):
        train(settings, tmp_path / "s", folder, tmp_path / "out", name="distilled")
    assert not list((tmp_path / "out").glob("step-*"))


def test_supervised_tokens_that_no_row_holds_are_missed(tmp_path: Path) -> None:
    """The manifest promises some; the count over a whole reading is what decides."""
    counted = _SupervisedTokens("distilled", Train(steps=100, batch=4), 0, 8)
    reader = SimpleNamespace(folder="d", skipped_documents=lambda: {"template": 3})
    counted.count(5, 1, reader)
    for step in range(2, 6):
        counted.count(0, step, reader)
    with pytest.raises(errors.InputError, match=r"no supervised token of d in 6 steps.*template.*nothing was learned"):
        counted.count(0, 6, reader)
    short = _SupervisedTokens("distilled", Train(steps=2, batch=4), 0, 1000)
    short.count(0, 1, reader)
    with pytest.raises(errors.InputError, match="in 2 steps"):
        short.count(0, 2, reader)
