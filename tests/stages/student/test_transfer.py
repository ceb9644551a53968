"""Another tokenizer for a trained model, byte students, and the recipes that use them, end to end and tiny."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytecache.pipeline.commands import run as chain
from bytecache.pipeline.config import load_settings
from bytecache.pipeline.context import open_context
from bytecache.schemas.settings import Student, Train
from bytecache.stages import export
from bytecache.stages.evaluate.evaluate import load_trained
from bytecache.stages.student import student
from bytecache.stages.student.transfer import old_tokens
from bytecache.stages.tokens.vocab import load_vocabulary
from bytecache.stages.train.train import train
from tests.support.conversations import PLAIN, say
from tests.support.places import ROOT
from tests.support.student_data import document, make_dataset
from tests.support.tiny_models import make_checkpoint

RECIPES = ROOT / "benchmarks/recipes"


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_new_embeddings_are_means_of_the_old(tmp_path, tokenizer, tied):
    targets = make_dataset(tmp_path / "targets")
    old_folder = make_checkpoint(tmp_path / "old", vocabulary=400)
    if tied:
        model = AutoModelForCausalLM.from_pretrained(old_folder)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(old_folder)
    info = student.prepare(Student(model=str(old_folder), tokenizer=tokenizer), targets, tmp_path / "new", seed=0)
    opened = student.load(tmp_path / "new")
    old = AutoModelForCausalLM.from_pretrained(old_folder)
    vocabulary = load_vocabulary(old_folder)
    assert sum(info["transfer"].values()) == info["vocabulary"] == opened.vocabulary.size
    assert info["transfer"]["unmatched"] == 0 and (info["transfer"]["averaged"] > 0) == (tokenizer != "bytes")
    pairs = [(opened.model.get_input_embeddings().weight, old.get_input_embeddings().weight)]
    pairs.append((opened.model.get_output_embeddings().weight, old.get_output_embeddings().weight))
    assert (pairs[0][0] is pairs[1][0]) == tied
    by_bytes = {b: i for i, b in reversed(list(enumerate(vocabulary.token_bytes))) if b is not None}
    for i, spelled in enumerate(opened.vocabulary.token_bytes):
        if spelled is None:
            want = [vocabulary.start_id if i == opened.vocabulary.start_id else int(vocabulary.end_ids[0])]
        elif spelled in by_bytes:
            want = [by_bytes[spelled]]
        else:
            try:
                want = vocabulary.encode(spelled.decode()).ids.tolist()
            except UnicodeDecodeError:
                want = []
        for new_rows, old_rows in pairs:
            if want:
                torch.testing.assert_close(new_rows[i], old_rows[want].mean(0), rtol=1e-5, atol=1e-6)
    # The rest of the model is the old one.
    body = {n: p for n, p in old.named_parameters() if "embed_tokens" not in n and "lm_head" not in n}
    now = dict(opened.model.named_parameters())
    assert body and all(torch.equal(p, now[n]) for n, p in body.items())


def test_the_same_vocabulary_is_carried_over_unchanged(tmp_path):
    folder = make_checkpoint(tmp_path / "old")
    vocabulary = load_vocabulary(folder)
    found = old_tokens(vocabulary, vocabulary)
    named = {i for i in range(vocabulary.size) if vocabulary.token_bytes[i] is not None}
    named |= set(vocabulary.control_names.values())
    assert found == [[i] if i in named else [] for i in range(vocabulary.size)] and len(named) > 256


def test_a_byte_tokenizer_has_a_token_for_every_byte(tmp_path):
    targets = make_dataset(tmp_path / "targets")
    sizes = {"hidden_size": 32, "layers": 1, "heads": 2}
    info = student.prepare(Student(tokenizer="bytes", **sizes), targets, tmp_path / "s", seed=0)
    opened = student.load(tmp_path / "s")
    text = document(3, 4) + "\tnaïve \U0001f600 <|eos|> é\r\n"
    encoded = opened.vocabulary.encode(text)
    assert encoded.ids.tolist() == [2 + b for b in text.encode()] and info["vocabulary"] == 258
    assert not opened.vocabulary.missing_bytes
    assert AutoTokenizer.from_pretrained(tmp_path / "s").decode(encoded.ids) == text
    assert opened.template().end_id == opened.end_id


@pytest.mark.parametrize("embeddings", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adapters_are_merged_at_export(tmp_path, embeddings):
    targets = make_dataset(tmp_path / "targets")
    student.prepare(Student(tokenizer="bpe:300", hidden_size=32, layers=2, heads=2), targets, tmp_path / "s", seed=1)
    settings = Train(
        steps=4, batch=2, window_bytes=200, warmup=1, learning_rate=2e-2, lora_rank=4, lora_embeddings=embeddings,
        tensorboard=False,
    )  # fmt: skip
    done = train(settings, tmp_path / "s", targets, tmp_path / "run", name="lora", device="cpu")
    result = export.export(tmp_path / "s", Path(done["checkpoint"]), tmp_path / "plain")
    assert result["merge_difference"] <= export.MERGED and result["max_abs_difference"] <= export.TOLERANCE
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "s").eval()
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in start.named_parameters()}
    run = load_trained(tmp_path / "s", Path(done["checkpoint"]))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        want = run.student.model(ids).logits
        torch.testing.assert_close(plain(ids).logits, want, rtol=1e-4, atol=1e-4)
        assert float((start(ids).logits - want).abs().max()) > 1e-3


def check_transfer(arms: dict[str, Any], run: Path, said: list[str]) -> None:
    """Both ends of the way, from the same text; what the run ends with."""
    bits = {name: arm["token_bits_per_byte"] for name, arm in arms.items()}
    assert set(bits) == {"before", "control", "distilled", "original"} and len(set(bits.values())) == 4
    assert len({arm["text_bytes"] for arm in arms.values()}) == 1
    # All are asked of the choices that the same text's cuts leave to the teacher, so their divergences compare.
    divergence = {name: arm["kl_nats_per_byte"] for name, arm in arms.items()}
    assert divergence["original"] < divergence["distilled"] < divergence["control"] < divergence["before"]
    page = (run / "report/report.html").read_text()
    assert all(f">{value:.4f}<" in page for value in bits.values()) and page.count("<polyline") == 4
    passage = json.loads(next((run / "report").glob("passage-*.json")).read_text())
    size = len(passage["text"].encode())
    assert {name: len(entropy) for name, entropy in passage["entropy"].items()} == {
        "teacher": size, "control": size, "distilled": size,
    } and not passage["refused"]  # fmt: skip
    imported, sampled = (line.strip() for line in said[-2:])
    assert imported == "from transformers import pipeline"
    scope: dict[str, Any] = {"print": lambda text: scope.setdefault("said", text)}
    exec(f"{imported}\n{sampled}", scope)
    assert scope["said"].startswith("The `import` statement")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["cross_model", "tokenizer_transfer", "byte_student", "chat"])
def test_recipes_run(tmp_path, monkeypatch, recipe):
    """The three tasks of the paper, and chat data, from corpus to plain checkpoint, with tiny models."""
    model = make_checkpoint(tmp_path / "model")
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": PLAIN}))
    with (tmp_path / "c.jsonl").open("w") as f:
        for i in range(16):
            talk = {"messages": say(document(i, 2), document(i + 50, 2))}
            f.write(json.dumps(talk if recipe == "chat" else {"text": document(i, 8)}) + "\n")
    override = {
        "run.dir": tmp_path / "run", "corpus.source": tmp_path / "c.jsonl", "teacher.model": model,
        "teacher.backend": "hf", "teacher.preset": "fast", "train.steps": 4, "train.batch": 2, "train.warmup": 1,
        "train.control": "false",
    }  # fmt: skip
    if recipe == "cross_model":
        override |= {"student.tokenizer": "bpe:300", "student.hidden_size": 32, "student.layers": 1, "student.heads": 2}
    elif recipe == "chat":
        # A recipe for a new student, whose sizes a model beside them must not have.
        sizes = {f"student.{key}": getattr(Student(), key) for key in ("hidden_size", "layers", "heads")}
        override |= {"corpus.kind": "chat", "student.model": model, **sizes}
    else:
        override |= {"student.model": model}
    if recipe == "tokenizer_transfer":  # and with a control
        override |= {"student.tokenizer": "bpe:300", "train.control": "true"}
    file = RECIPES / f"{'cross_model' if recipe == 'chat' else recipe}.toml"
    if recipe == "chat":
        override |= {"student.tokenizer": ""}
    settings = load_settings(file, [f"{key}={value}" for key, value in override.items()])
    said: list[str] = []
    assert chain.run(open_context(settings, said.append))
    (plain,) = [p for p in (tmp_path / "run/export").iterdir() if p.is_dir()]
    tokenizer, exported = AutoTokenizer.from_pretrained(plain), AutoModelForCausalLM.from_pretrained(plain)
    assert exported.config.vocab_size >= len(tokenizer)
    if recipe == "byte_student":
        assert len(tokenizer) == exported.config.vocab_size == 258
    if recipe != "cross_model":
        assert exported.config.hidden_size == 64
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "run/report/report.json").read_text())}
    report = arms["distilled"]
    if recipe == "tokenizer_transfer":
        check_transfer(arms, tmp_path / "run", said)
    assert report["kl_nats_per_byte"] > 0 and 0 < report["calibration_error"] < 1
    assert 0 <= report["agreement"] <= 1
    if recipe != "chat":
        assert report["text_bytes"] > 0 and (recipe != "byte_student" or report["tokens"] > report["text_bytes"])
    assert not chain.run(open_context(settings, said.append)), "a second run does nothing"
