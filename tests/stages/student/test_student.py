"""The student's folder, its evaluation against hand sums, and an export that needs none of our code."""

import json
import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bytecache.schemas import errors
from bytecache.schemas.settings import Student, Train
from bytecache.schemas.shard.reader import read_shard
from bytecache.stages import export
from bytecache.stages.evaluate import evaluate
from bytecache.stages.student import new_tokenizer, student
from bytecache.stages.train.train import train
from tests.support.student_data import document, make_dataset

SETTINGS = Train(head="parallel", lambda_kl=0.1, byte_reduction="mean", steps=4, batch=3, window_bytes=4000, warmup=1)
SMALL = Student(tokenizer="bpe:300", hidden_size=32, layers=1, heads=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    targets = make_dataset(root / "targets")
    student.prepare(SMALL, targets, root / "student", seed=1)
    trained = train(SETTINGS, root / "student", targets, root / "run", name="run", seed=1, device="cpu")
    return root, targets, root / "student", Path(trained["checkpoint"])


def test_prepare_is_deterministic_and_idempotent(world, tmp_path):
    _, targets, folder, _ = world
    again = student.prepare(SMALL, targets, tmp_path / "again", seed=1)
    assert again["files"] == json.loads((folder / "student.json").read_text())["files"]
    assert student.prepare(SMALL, targets, tmp_path / "again", seed=1) == again
    other = student.prepare(SMALL, targets, tmp_path / "other", seed=2)
    changed = {k for k in again["files"] if again["files"][k] != other["files"][k]}
    assert changed == {"model.safetensors"}
    with pytest.raises(errors.ConfigError, match="other settings"):
        student.prepare(SMALL, targets, tmp_path / "again", seed=2)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(errors.IntegrityError, match=r"student\.json"):
        student.load(tmp_path / "other")


def test_bpe_tokenizer_is_ordinary_and_spells_everything(world):
    _, _, folder, _ = world
    opened = student.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = document(3, 5) + "\tunseen \u00e9\U0001f600 <|eos|>"
    assert (
        tokenizer.bos_token == new_tokenizer.BOS and tokenizer.eos_token == new_tokenizer.EOS and len(tokenizer) <= 300
    )
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id
    encoded = opened.vocabulary.encode(text)
    assert encoded.data == text.encode() and len(encoded.ids) < len(text.encode())
    assert opened.end_id == tokenizer.eos_token_id and opened.vocabulary.start_id == tokenizer.bos_token_id
    assert opened.end_id not in encoded.ids


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (Student(tokenizer="bpe:10"), "raise N"),
        (Student(tokenizer="bpe:many"), "bpe:N"),
        (Student(tokenizer="bpe:300", hidden_size=30, heads=4), "student.heads"),
    ],
)
def test_impossible_students_are_refused(world, tmp_path, settings, match):
    with pytest.raises(errors.ConfigError, match=match):
        student.prepare(settings, world[1], tmp_path / "s", seed=0)
    assert not list(tmp_path.iterdir())


def test_an_existing_model_is_copied(world, tmp_path):
    _, targets, folder, _ = world
    student.prepare(Student(model=str(folder)), targets, tmp_path / "copy", seed=0)
    a, b = student.load(folder), student.load(tmp_path / "copy")
    ids = torch.arange(20)[None]
    assert torch.equal(a.forward(ids)[0], b.forward(ids)[0]) and a.vocabulary.fingerprint == b.vocabulary.fingerprint
    with pytest.raises(errors.InputError, match="nowhere"):
        student.prepare(Student(model=str(tmp_path / "nowhere")), targets, tmp_path / "x", seed=0)


@pytest.mark.parametrize(
    ("rewrite", "match"),
    [
        (lambda file, weights: save_file(_without(weights, "model.norm.weight"), file), "model.norm.weight among them"),
        (lambda file, weights: torch.save(weights, file.with_name("pytorch_model.bin")), "safetensors"),
    ],
)
def test_a_model_is_opened_whole_and_from_safetensors_alone(world, tmp_path, rewrite, match):
    _, targets, folder, _ = world
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "student.json").unlink()
    file = copy / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    rewrite(file, weights)
    with pytest.raises(errors.InputError, match=match):
        student.prepare(Student(model=str(copy)), targets, tmp_path / "out", seed=0)


def _without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def test_evaluation_equals_hand_sums(world):
    """Windows longer than the documents: every figure again, document by document, densely."""
    _, targets, folder, path = world
    result = evaluate.evaluate(SETTINGS, folder, targets, path, name="run")
    run = evaluate.load_trained(folder, path)
    shard = read_shard(next(targets.glob("heldout-*")))
    token = head = kl = teacher = 0.0
    n_bytes = n_slots = 0
    for d in range(len(shard.doc_id)):
        lo, hi = int(shard.doc_start[d]), int(shard.doc_start[d + 1])
        text = shard.text[lo : hi - 1].tobytes()
        encoded = run.student.vocabulary.encode(text.decode())
        ids = [run.student.vocabulary.start_id, *encoded.ids.tolist(), run.student.end_id]
        with torch.no_grad():
            logits, hidden = run.student.forward(torch.tensor([ids[:-1]]))
            token -= float(torch.log_softmax(logits[0], -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())
            slots = (
                torch.einsum("th,ksh->tks", hidden[0], run.objective.term.head.weight) + run.objective.term.head.bias
            )
            log_q = torch.log_softmax(slots.double(), -1).numpy()
        dense, tail = shard.dense(lo, hi).astype(np.float64), shard.tail[lo:hi].astype(np.float64)
        true = [*text, 256]
        for i, symbol in enumerate(true):
            p = dense[i, symbol] or tail[i] / (dense[i] == 0).sum()
            teacher -= math.log(max(p, 2.0**-24))
        edges = [*encoded.starts.tolist(), len(text) + 1]
        for t, (a, b) in enumerate(pairwise(edges)):
            for k, i in enumerate(range(a, min(b, a + 10))):
                q, p = log_q[t, k], dense[i]
                head -= q[true[i]]
                listed = np.flatnonzero(p)
                rest = np.log(np.exp(np.delete(q, listed)).sum())
                kl += float((p[listed] * (np.log(p[listed]) - q[listed])).sum()) + tail[i] * (np.log(tail[i]) - rest)
                n_slots += 1
        n_bytes += len(text)
    bits = 1 / math.log(2)
    assert result["text_bytes"] == n_bytes and result["covered_share"] == pytest.approx(n_slots / (n_bytes + 3))
    assert result["token_bits_per_byte"] == pytest.approx(token * bits / n_bytes, rel=1e-5)
    assert result["head_bits_per_byte"] == pytest.approx(head * bits / n_slots, rel=1e-5)
    assert result["kl_nats_per_byte"] == pytest.approx(kl / n_slots, rel=1e-5)
    assert result["teacher_bits_per_byte"] == pytest.approx(teacher * bits / n_bytes, rel=1e-5)
    assert result["head_parameters"] == 10 * 260 * 33 and 0 < result["head_flops_share"] < 1
    table = evaluate.report_table([result, {**result, "name": "control"}])
    assert {line.count("|") for line in table.splitlines()} == {4}
    assert table.count("\n") == len(evaluate.ROWS) + 2 and "| held out | run | control |" in table


def test_evaluation_does_not_depend_on_the_batch(world):
    _, targets, folder, path = world
    narrow = SETTINGS.model_copy(update={"window_bytes": 64, "batch": 5})
    wide = narrow.model_copy(update={"batch": 16})
    a = evaluate.evaluate(narrow, folder, targets, path, name="a")
    b = evaluate.evaluate(wide, folder, targets, path, name="a")
    assert a["text_bytes"] == b["text_bytes"] and a["tokens"] == b["tokens"]


def test_unlisted_truth_gets_a_share_of_the_tail():
    row, symbol = np.array([0, 0, 1]), np.array([65, 66, 65])
    prob, tail = np.array([0.5, 0.4, 1.0], np.float32), np.array([0.1, 0.0], np.float32)
    nats, listed = evaluate.true_nats(row, symbol, prob, tail, np.array([67, 66]))
    np.testing.assert_allclose(nats, [-math.log(0.1 / 255), 24 * math.log(2)], rtol=1e-6)
    assert not listed.any()


LOADED_ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("the cache reads", return_tensors="pt")["input_ids"]
out = model.generate(ids, max_new_tokens=4, do_sample=False)
logits = model(ids).logits
print(json.dumps([ids.tolist(), logits[0, -1].tolist(), out.shape[1]]))
"""


@pytest.mark.slow
def test_export_loads_without_our_code(world, tmp_path):
    _, _, folder, path = world
    result = export.export(folder, path, tmp_path / "plain")
    assert result["max_abs_difference"] <= export.TOLERANCE
    assert export.export(folder, path, tmp_path / "plain") == result
    done = subprocess.run(
        [sys.executable, "-c", LOADED_ALONE, str(tmp_path / "plain")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-1000:]
    ids, last, length = json.loads(done.stdout.splitlines()[-1])
    run = evaluate.load_trained(folder, path)
    with torch.no_grad():
        want = run.student.model(torch.tensor(ids)).logits[0, -1]
    torch.testing.assert_close(torch.tensor(last), want, rtol=0, atol=1e-6)
    assert length > len(ids[0])
    assert not any("head" in k and "lm_head" not in k for k in run.student.model.state_dict())


def test_export_refuses_what_does_not_come_back_equal(world, tmp_path, monkeypatch):
    _, _, folder, path = world
    monkeypatch.setattr(export, "compare", lambda opened, place: float("nan"))
    with pytest.raises(errors.IntegrityError, match="differ"):
        export.export(folder, path, tmp_path / "plain")
    assert not list(tmp_path.iterdir())
