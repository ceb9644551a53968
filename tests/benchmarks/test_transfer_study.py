"""The study of tokenizer transfer: its texts, its counts and its intervals."""

import json
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import transfer_cause, transfer_gain, transfer_texts
from benchmarks.count_targets import Counts, write_counts, write_part, write_silent
from bytecache.pipeline.plan.make import make_plan
from bytecache.pipeline.stores import open_store
from bytecache.schemas import settings as st
from bytecache.schemas.arrays import END
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.settings import Settings, Train
from bytecache.stages.student import student
from bytecache.stages.targets.order import Order
from bytecache.stages.targets.source import load_shard
from bytecache.stages.train.batches import stream
from bytecache.stages.train.run import micro_loss, start_run
from tests.support.student_data import make_dataset


def test_counts_leave_out_the_place_that_they_predict():
    """With one document nothing repeats, so no place may know its own symbol; a stranger may know the document."""
    text = bytes(range(65, 91))
    counts = Counts([text])
    symbols = [*text, END]
    seen, unseen = counts.rows(text, seen=True), counts.rows(text, seen=False)
    assert np.allclose(seen.sum(1), 1) and np.allclose(unseen.sum(1), 1)
    blind, told = (rows[np.arange(len(symbols)), symbols] for rows in (seen, unseen))
    assert blind.max() < 1 / 100
    assert told[5:].min() > 0.8


def test_counts_know_what_training_text_repeats():
    text = b"abc" * 100
    counts = Counts([text])
    assert counts.rows(text, seen=True)[99, ord("a")] > 0.9


def test_count_targets_are_a_data_set_of_the_same_documents(tmp_path):
    exact = make_dataset(tmp_path / "exact", sentences=3)
    write_counts(exact, tmp_path / "counts")
    write_silent(exact, {"more": b"further text"}, tmp_path / "silent")
    names = {}
    write_part(exact, tmp_path / "part", lambda name: name.endswith("1"))
    for place in (exact, *(tmp_path / name for name in ("counts", "silent", "part"))):
        dataset = read_dataset(place)
        names[place.name] = {
            split: [name for entry in dataset.split(split) for name in load_shard(dataset, entry).doc_id]
            for split in ("train", "heldout")
        }
    assert names["counts"] == names["exact"]
    assert names["part"] == {**names["exact"], "train": ["train-1", "train-11"]}
    assert names["silent"] == {**names["exact"], "train": [*names["exact"]["train"], "more"]}


@pytest.fixture
def corpora(tmp_path):
    """Nine books, many articles and many modules of made-up words."""
    rng = np.random.default_rng(0)

    def words(n):
        letters = rng.integers(97, 123, (n, 6)).astype(np.uint8)
        return " ".join(bytes(word).decode() for word in letters)

    (tmp_path / "english_prose").mkdir()
    for name in sum(transfer_texts.BOOKS.values(), ()):
        text = "\n\n".join(words(30) for _ in range(60))
        (tmp_path / "english_prose" / f"{name}.txt").write_text(text)
    articles = "".join(f"= Title {i} =\n{words(140)}\n" for i in range(60))
    (tmp_path / "wiki_vital_en.txt").write_text(articles)
    modules = "".join(
        f"# ===== Lib/m{i}.py =====\n" + "\n\n\n".join(words(40) for _ in range(20)) + "\n" for i in range(40)
    )
    (tmp_path / "code_python_stdlib.txt").write_text(modules)
    return tmp_path


def test_no_source_lends_to_two_uses(corpora, tmp_path, monkeypatch):
    sizes = ["--train", "3", "--validation", "1", "--test", "2", "--raw", "3"]
    monkeypatch.setattr("sys.argv", ["transfer_texts", str(corpora), str(tmp_path / "out"), *sizes])
    transfer_texts.main()
    lines = [json.loads(line) for line in (tmp_path / "out" / "corpus.jsonl").read_text().splitlines()]
    uses = {}
    for line in lines:
        kind, use, _, source = line["id"].split(" ", 3)
        uses.setdefault((kind, source), set()).add(use)
        # Where a run holds it out is where its id says it belongs.
        assert transfer_texts.held_out(line["text"]) == (use != "train")
    assert {kind for kind, _ in uses} == {"prose", "encyclopedia", "code"}
    assert all(len(each) == 1 for each in uses.values())
    summary = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert all(each.get("repeated_windows", 0) == 0 for each in summary.values())


def test_the_split_of_the_texts_is_the_plans(corpora, tmp_path, monkeypatch):
    """A run of these texts trains on what is for training and on nothing else."""
    sizes = ["--train", "3", "--validation", "1", "--test", "2", "--raw", "3"]
    monkeypatch.setattr("sys.argv", ["transfer_texts", str(corpora), str(tmp_path / "out"), *sizes])
    transfer_texts.main()
    settings = Settings.model_validate(
        {
            "run": {"dir": str(tmp_path / "run")},
            "corpus": {"source": str(tmp_path / "out" / "corpus.jsonl"), "max_bytes": 0, "heldout_fraction": 0.5},
        }
    )
    plan, _ = make_plan(open_store(str(tmp_path / "run")), settings)
    uses = {"train": {"train"}, "heldout": {"validation", "test"}}
    for unit in plan.units:
        names = pq.read_table(tmp_path / "run" / unit.slice)["doc_id"].to_pylist()
        found = {name.split()[1] for name in names}
        assert found and found <= uses[unit.split]


def test_a_repeated_passage_is_seen():
    text = "".join(chr(97 + i * i % 26) for i in range(200))
    assert transfer_texts.repeated([text], ["before " + text + " after"]) == 1


def test_intervals_are_of_paired_differences():
    def runs(shift):
        return [
            {"seed": seed, "documents": {f"prose test {d}": {"bytes": 100, "bits": 100 + seed + d + shift(seed)}
                                         for d in range(4)}}
            for seed in range(3)
        ]  # fmt: skip

    mean, half, low, high = transfer_gain.paired(runs(lambda seed: -5 + seed), runs(lambda seed: 0), "test", "prose")
    assert mean == pytest.approx(-0.04)
    assert half == pytest.approx(4.30 * 0.01 / np.sqrt(3), rel=1e-3)
    assert low == pytest.approx(-0.04) and high == pytest.approx(-0.04)  # documents agree


def test_signal_is_what_different_steps_agree_on():
    """Of two steps: their product, and half the squared distance between them; a mean's own square would have both."""
    ce = [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0])]
    cache = [torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.0])]
    (of_ce, of_cache), cosine = transfer_cause.signal_and_noise([ce, cache])
    assert of_ce == pytest.approx({"signal": 3.0, "noise": 4.0})
    assert of_cache == pytest.approx({"signal": 4.0, "noise": 0.5})
    assert cosine == pytest.approx((6.0 + 4.0) / 2 / np.sqrt(12.0))  # by hand: 3*2 and 1*2 + 2*1


def test_choices_divide_the_loss_of_the_tokens_among_them(tmp_path):
    """The groups and what is left to the text are every choice once: their cross-entropies sum to the tokens'."""
    targets = make_dataset(tmp_path / "targets", sentences=3)
    small = st.Student(tokenizer="bpe:300", hidden_size=32, layers=1, heads=2)
    student.prepare(small, targets, tmp_path / "student", seed=0)
    opened = student.load(tmp_path / "student")
    dataset = read_dataset(targets)
    reader = stream.ShardReader(targets, dataset, "train", opened.vocabulary, opened.end_id)
    run = start_run(opened, Train(lora_rank=2, lora_embeddings=True), 0, torch.device("cpu"), reader=reader)
    order = Order(dataset.content_sha256, reader.positions, 256, 0)
    batching = stream.Batching(2, opened.max_tokens, byte_reduction="sum", limit=64)
    steps = list(islice(stream.steps(order, reader, batching), 2))
    found = transfer_cause.divergences(run.student, run.objective.term, steps)
    with torch.no_grad():
        nats = sum(float(micro_loss(run, micro).token) for step in steps for micro in step.micro)
    n_bytes = sum(step.n_bytes for step in steps)
    assert sum(group["ce"] for group in found.values()) == pytest.approx(nats / n_bytes / np.log(2), abs=1e-3)
    assert all(found[name]["kl"] > 0 for name in ("settled", "free") if found[name]["choices"])
    measured = transfer_cause.gradients(run, steps)
    assert all(measured["adapters"][loss]["noise"] > 0 for loss in transfer_cause.LOSSES)
