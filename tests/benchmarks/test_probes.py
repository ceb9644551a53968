"""Probes of a student: items that are what their rules say, and bits that are those of every string read alone."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import probe_items, probes
from benchmarks.transfer_study import keep_as_cast
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.errors import InputError
from bytecache.schemas.settings import Train
from bytecache.stages.student import student
from bytecache.stages.train.batches import stream
from bytecache.stages.train.run import start_run
from tests.support.student_data import make_dataset
from tests.support.tiny_models import make_checkpoint

NOUNS = ("teacher", "student", "passage", "sentence", "library", "machine", "history", "picture", "mountain", "garden")
PROSE = " ".join(
    f"There is a {a} beside the old {b}, and this one has been standing near a large {c}."
    for a, b, c in (random.Random(n).sample(NOUNS, 3) for n in range(40))
)
CODE = "".join(
    f"def read_{noun}(source, number={n}):\n    if source.{noun} == number:\n        total = len({noun})\n"
    f"    return source.close({noun}_{n})\n\n"
    for n, noun in enumerate(NOUNS * 3)
)
TEXTS = [("prose test 0 x", PROSE), ("prose test 1 y", PROSE[: len(PROSE) // 2]), ("code test 0 z", CODE)]


@pytest.fixture(params=["bytelevel", "sliding"])
def opened(request, tmp_path) -> student.Student:
    """A model whose rows may share a beginning, and one whose may not: its window is four tokens long."""
    return student.load(make_checkpoint(tmp_path / "student", family=request.param))


def bits_alone(opened: student.Student, text: str) -> np.ndarray:
    ids = torch.tensor([[opened.vocabulary.start_id, *opened.vocabulary.encode(text).ids.tolist()]])
    with torch.no_grad():
        logp = opened.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -logp.gather(1, ids[0, 1:, None])[:, 0].numpy() / np.log(2)


GROUPS = [
    ["A cache is a promise.", "A cache is a teacher.", "A cache is gone."],
    ["Nothing is lost."],
    ["The teacher reads the text once, and the notes.", "The teacher reads the text", "The teacher reads the text."],
    ["one", "two"],
]


def test_bits_are_those_of_every_string_alone(opened):
    found = probes.scores(opened, GROUPS, "float32")
    for group, scored in zip(GROUPS, found, strict=True):
        for text, one in zip(group, scored, strict=True):
            assert one.bits == pytest.approx(bits_alone(opened, text), rel=1e-4)
            assert one.starts.tolist() == opened.vocabulary.encode(text).starts[:-1].tolist()


def test_a_window_that_slides_is_noticed(tmp_path):
    for family, can in {"bytelevel": True, "sliding": False}.items():
        model = student.load(make_checkpoint(tmp_path / family, family=family))
        assert probes.can_share(model, GROUPS[0], "float32") == can


def test_strings_share_a_row_up_to_where_they_differ():
    tree = probes.tree_of(9, [[1, 2, 3, 4], [1, 2, 5]])
    assert (tree.inputs, tree.depth, tree.branch) == ([9, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 1])
    assert tree.rows == [[0, 1, 2, 3], [0, 1, 2]]
    same = probes.tree_of(9, [[1, 2], [1, 2]])
    assert (same.inputs, same.rows) == ([9, 1], [[0, 1], [0, 1]])


def test_last_words_stand_against_words_of_their_kind_that_the_context_lacks():
    made = probes.make_probes(TEXTS, each=10)
    assert Counter(item.kind for item in made.cloze) == {"prose": 10, "code": 10}
    for item in made.cloze:
        true, *others = item.strings
        assert len(others) == 3 and len(set(item.strings)) == 4
        common = next(n for n in range(len(true)) if any(other[n] != true[n] for other in others))
        context = re.sub(r"\w+$", "", true[:common])
        assert 60 <= len(context.encode()) <= probe_items.CONTEXT
        words = [re.match(r"\w+", text[len(context) :])[0] for text in item.strings]
        assert not set(words) & set(re.findall(r"\w+", context))
        assert len({text[len(context) + len(word) :] for text, word in zip(item.strings, words, strict=True)}) == 1
        text = CODE if item.kind == "code" else PROSE
        assert true in text and all(re.search(rf"\b{word}\b", text) for word in words)
    assert probes.make_probes(TEXTS, each=10).digest == made.digest != probes.make_probes(TEXTS, 1, each=10).digest


def test_others_are_the_nearest_in_length_and_frequency():
    frequency = Counter(gate=8, door=8, wall=9, arch=7, roof=1, corridor=8)
    others = probe_items.nearest("gate", sorted(frequency), frequency, random.Random(0))
    assert sorted(others) == ["arch", "door", "wall"]


@pytest.mark.parametrize(
    ("kind", "sentence", "expected"),
    [
        ("prose", "It is a test.", {"a/an": "It is an test.", "is/are": "It are a test."}),
        ("prose", "These were his.", {"was/were": "These was his.", "swap": "These his were."}),
        ("prose", "A has-been ate.", {}),
        ("prose", "We have, in this, won.", {
            "has/have": "We has, in this, won.", "this/these": "We have, in these, won.",
            "swap": "We have, this in, won."}),
        ("code", "    if a == b:", {"colon": "    if a == b", "equals": "    if a = b:"}),
        ("code", "total = 1", {"equals": "total == 1"}),
        ("code", "f(a, b=1)", {"bracket": ("f(a, b=1]", "f(a, b=1}")}),
        ("code", "])", {}),
        ("code", "it: set = []", {"equals": "it: set == []", "bracket": ("it: set = [)", "it: set = [}")}),
    ],
)  # fmt: skip
def test_a_change_is_what_its_rule_says(kind, sentence, expected):
    found = {}
    for seed in range(20):
        for rule, changed in probe_items.changes(kind, sentence, random.Random(seed)):
            found.setdefault(rule, set()).add(changed)
    assert found.keys() == expected.keys()
    for rule, changed in expected.items():
        wanted = {changed} if isinstance(changed, str) else set(changed)
        assert wanted <= found[rule]
        assert rule == "swap" or found[rule] == wanted
        assert sentence not in found[rule]


def test_rules_take_turns_and_no_sentence_comes_twice():
    made = probes.make_probes(TEXTS, each=12)
    rules = Counter(item.rule for item in made.pairs if item.kind == "prose")
    assert set(rules) == {"swap", "a/an", "is/are", "has/have", "this/these"} and max(rules.values()) <= 3
    assert {item.rule for item in made.pairs if item.kind == "code"} == {"colon", "bracket", "equals"}
    first = [item.strings[0] for item in made.pairs]
    assert len(set(first)) == len(first)
    assert all(len(item.strings) == 2 and (item.strings[0] in PROSE or item.strings[0] in CODE) for item in made.pairs)


def test_items_are_spread_over_the_texts():
    texts = [(f"prose test {n} x", PROSE.replace("There", f"There{'abcd'[n]}")) for n in range(4)]
    made = probes.make_probes(texts, each=4)
    assert {re.search("There([abcd])", item.strings[0])[1] for item in made.cloze} == set("abcd")


def test_texts_without_items_are_refused():
    with pytest.raises(ValueError, match="give longer ones"):
        probes.make_probes([("prose test 0 x", "Short.")])


def test_a_record_has_the_bits_of_its_items(opened):
    made = probes.make_probes(TEXTS, each=3, copies=2)
    record = json.loads(json.dumps(probes.measure(opened, made, sample=5)))
    for part in ("cloze", "pairs"):
        for item, bits in zip(getattr(made, part), record[part]["bits"], strict=True):
            assert bits == pytest.approx([bits_alone(opened, text).sum() for text in item.strings], abs=0.01)
    assert record["copy"]["kind"] == ["words", "words", "identifiers", "identifiers", "numbers", "numbers"]
    for item, size, (first, second) in zip(made.copies, record["copy"]["bytes"], record["copy"]["bits"], strict=True):
        line = item.strings[0] + "\n"
        assert size == len(line.encode()) > probe_items.COPY
        each = bits_alone(opened, line * 2)
        assert first + second == pytest.approx(each.sum(), abs=0.01)
        assert first == pytest.approx(bits_alone(opened, line).sum(), rel=0.01)
    right = np.mean([bits[0] < min(bits[1:]) for bits in record["cloze"]["bits"]])
    assert f"| cloze | 6 | {right:.1%} [" in probes.table({"it": [record]})


def test_right_is_what_has_the_fewest_bits():
    record = {
        "probes": "x",
        "cloze": {"kind": ["a", "a", "b"], "bits": [[1, 2, 3, 4], [2.5, 2, 3, 4], [1, 5, 6, 7]]},
        "copy": {"kind": ["words"], "bytes": [4], "bits": [[8, 2]]},
    }
    assert probes.values(record, "cloze").tolist() == [1, 0, 1]
    assert probes.values(record, "cloze", "a").tolist() == [1, 0]
    assert probes.values(record, "cloze margin").tolist() == [1, -0.5, 4]
    assert probes.values(record, "copy, first").tolist() == [2] and probes.values(record, "copy, second").tolist() == [
        0.5
    ]


def test_an_interval_is_over_items_of_the_mean_over_seeds():
    mean, low, high = probes.interval([[1.0] * 50 + [0.0] * 50, [0.0] * 50 + [1.0] * 50])
    assert (mean, low, high) == (0.5, 0.5, 0.5)  # each item is right half of the time
    mean, low, high = probes.interval([1.0] * 50 + [0.0] * 50)
    assert mean == 0.5 and high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)


def test_a_lead_is_of_the_same_items():
    def record(bits, digest="x"):
        return {"probes": digest, "pairs": {"kind": ["a"] * len(bits), "bits": bits}}

    ours, control = record([[1, 2]] * 3), record([[2, 1], [1, 2], [1, 2]])
    assert probes.lead([ours], [control], "pairs")[0] == pytest.approx(1 / 3)
    assert probes.lead([ours], [control], "pairs margin")[0] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="different probes"):
        probes.lead([ours], [record([[1, 2]] * 3, "y")], "pairs")


def test_samples_are_what_each_prompt_alone_would_give(opened):
    prompts = ("A cache is", "Nothing is guessed twice, nothing", "def")
    found = probes.samples(opened, "float32", 24, prompts=prompts)
    ends = set(opened.vocabulary.end_ids.tolist())
    for prompt, one in zip(prompts, found, strict=True):
        ids = [opened.vocabulary.start_id, *opened.vocabulary.encode(prompt).ids.tolist()]
        written = b""
        while len(written) < 24:
            with torch.no_grad():
                ids.append(int(opened.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
            written += opened.vocabulary.token_bytes[ids[-1]] or b""
            if len(ids) > 60:
                break
        assert written.decode(errors="replace").startswith(one["greedy"]) and (one["greedy"] or not written)
    assert found == probes.samples(opened, "float32", 24, prompts=prompts)
    others = probes.samples(opened, "float32", 24, prompts=prompts, seed=1)
    assert [one["greedy"] for one in found] == [one["greedy"] for one in others]
    assert [one["drawn"] for one in found] != [one["drawn"] for one in others]


def test_what_a_tokenizer_cannot_spell_is_named(opened):
    with pytest.raises(InputError, match="cannot spell"):
        probes.scores(opened, [["lone \ud800 surrogate"]], "float32")


def test_the_command_measures_folders(tmp_path, monkeypatch, capsys):
    make_checkpoint(tmp_path / "small")
    lines = [{"id": name, "text": text} for name, text in [*TEXTS, ("prose train 0 w", "Not this.")]]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = [tmp_path / "small", "--texts", tmp_path / "corpus.jsonl", "--out", tmp_path / "out.json", "--each", 2]
    monkeypatch.setattr("sys.argv", ["probes", *map(str, options), "--sample", "4"])
    probes.main()
    record = json.loads((tmp_path / "out.json").read_text())["small"]
    assert record["probes"] == probes.make_probes(TEXTS, each=2).digest and len(record["cloze"]["bits"]) == 4
    assert "| pairs | 4 |" in capsys.readouterr().out


def test_a_student_in_training_is_measured_as_it_is(tmp_path):
    """With adapters, and with what is frozen kept in half precision, as the study of transfer trains it."""
    targets = make_dataset(tmp_path / "targets", sentences=3)
    small = st.Student(tokenizer="bpe:300", hidden_size=32, layers=1, heads=2)
    student.prepare(small, targets, tmp_path / "student", seed=0)
    made = probes.make_probes(TEXTS, each=2, copies=1)
    opened = student.load(tmp_path / "student")
    before = probes.measure(opened, made, "bfloat16", sample=4)
    reader = stream.ShardReader(targets, read_dataset(targets), "train", opened.vocabulary, opened.end_id)
    settings = Train(lora_rank=2, lora_embeddings=True, dtype="bfloat16")
    run = start_run(opened, settings, 0, torch.device("cpu"), reader=reader)
    keep_as_cast(run.student.model)
    after = probes.measure(run.student, made, "bfloat16", sample=4)
    for part in ("cloze", "pairs"):  # adapters begin as nothing, so the figures are those of before
        assert np.array(after[part]["bits"]) == pytest.approx(np.array(before[part]["bits"]), rel=0.01)
