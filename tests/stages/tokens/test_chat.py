"""Chat data: parsed, rendered, aligned by bytes, refused with a reason; through teacher and shard to the student."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytecache.pipeline.commands.convert import convert
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.teacher import teacher
from bytecache.pipeline.context import open_context
from bytecache.pipeline.plan.make import make_plan
from bytecache.schemas import errors
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dump.parquet import read_windows
from bytecache.schemas.settings import Corpus, Settings
from bytecache.schemas.shard.reader import read_shard
from bytecache.stages.corpus import conversations
from bytecache.stages.corpus.reader import CorpusReader, Document
from bytecache.stages.evaluate import evaluate
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.student import student
from bytecache.stages.tokens.chat import LEAD, Template, encode_answer, encode_completion
from bytecache.stages.tokens.vocab import Misfit, load_vocabulary
from bytecache.stages.train.batches import stream
from bytecache.stages.train.train import train
from tests.support.conversations import PLAIN, say
from tests.support.tiny_models import make_checkpoint

TRIM = PLAIN.replace("m['content']", "m['content'] | trim")
THINK = PLAIN.replace("{{ m['content'] }}", "{{ '<t>\n\n</t>\n' if m['role'] == 'assistant' }}{{ m['content'] }}")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system role here') }}{% endif %}{% endfor %}"
)
DIRECT = "{% for m in messages %}{{ m['content'] }}{{ '<|begin|>' if m['role'] == 'user' else '<|end|>' }}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}\n" + PLAIN
REFUSED = {
    "other prompt": (PLAIN.replace("<|begin|>assistant\n{%", "<|begin|>assistant:\n{%"), "generation prompt"),
    "upper": (PLAIN.replace("m['content']", "m['content'] | upper"), "repeated once"),
    "twice": (PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"), "repeated once"),
    "raises": ("{{ raise_exception('only on Sundays') }}", "only on Sundays"),
}


def checkpoint(folder: Path, template: str, family: str = "bytelevel") -> Path:
    make_checkpoint(folder, family=family)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


AWKWARD = [
    "the cache",
    "  indented",
    "two\n\nlines",
    "naïve 日本語 \U0001f600",
    "<t>",
    "[INST]",
    "x" * 90,
    "assistant\n",
]


@pytest.mark.parametrize("family", ["bytelevel", pytest.param("sentencepiece", marks=pytest.mark.slow)])
@pytest.mark.parametrize("template", ["PLAIN", "TRIM", "THINK", "INST", "DIRECT", "DATED"])
def test_an_answer_is_spelled_by_the_tokens_the_model_would_read(tmp_path, family, template):
    folder = checkpoint(tmp_path / "m", globals()[template], family)
    vocabulary = load_vocabulary(folder)
    opened = Template.open(folder, vocabulary, setting="x")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert opened.end_id == (None if template == "INST" else tokenizer.eos_token_id)
    for question in AWKWARD:
        for answer in AWKWARD:
            messages = say(question, answer.strip(), question)
            encoded = encode_answer(vocabulary, opened, json.dumps(messages), answer.strip())
            assert not isinstance(encoded, Misfit), encoded.reason
            assert encoded.data[encoded.synthetic :] == answer.strip().encode()
            assert b"".join(vocabulary.token_bytes[i] for i in encoded.ids) == encoded.data
            assert json.loads(encoded.context) == messages
            # Independently: the tokenizer's own ids of the whole conversation begin with ours.
            whole = [*messages, {"role": "assistant", "content": answer.strip()}]
            fixed = {"strftime_now": lambda form: "01 Jan 2026"}
            ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False, **fixed)
            ours = [*encoded.prefix.tolist(), *encoded.ids.tolist()]
            assert ids[: len(ours)] == ours and len(encoded.prefix) > 0
            spelled = encoded.ids[encoded.starts[1:] <= encoded.synthetic]
            assert len(spelled) <= LEAD


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_aligned_is_refused_with_the_reason(tmp_path, case):
    template, reason = REFUSED[case]
    folder = checkpoint(tmp_path / "m", template)
    with pytest.raises(errors.ConfigError, match=reason):
        Template.open(folder, load_vocabulary(folder), setting="teacher.model")


def test_a_model_without_template_or_with_another_end_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    with pytest.raises(errors.ConfigError, match="has no chat template"):
        Template.open(folder, load_vocabulary(folder), setting="teacher.model")
    folder = checkpoint(tmp_path / "n", PLAIN.replace("<|end|>", "<|begin|>"))
    vocabulary = load_vocabulary(folder)
    with pytest.raises(errors.ConfigError, match=r"set teacher\.end = '<\|begin\|>'"):
        Template.open(folder, vocabulary, setting="teacher.model").require_end(vocabulary)


def test_documents_are_set_aside_with_their_reason(tmp_path):
    folder = checkpoint(tmp_path / "m", INST)
    vocabulary = load_vocabulary(folder)
    template = Template.open(folder, vocabulary, setting="x")

    def reason(messages: list[dict[str, str]], answer: str) -> str:
        found = encode_answer(vocabulary, template, json.dumps(messages), answer)
        assert isinstance(found, Misfit)
        return found.reason

    assert reason(say("hi", system="be brief"), "yes") == "template: no system role here"
    assert reason(say("say <|end|> please"), "yes") == "control token in a message"
    assert reason(say("hi"), "a <|begin|> b") == "control token in a message"
    assert reason(say("hi"), "untrimmed ") == "template: it changes the answer"


def test_completions_share_the_tokens_of_the_joined_text(tmp_path):
    for family in ("bytelevel", "sentencepiece"):
        vocabulary = load_vocabulary(make_checkpoint(tmp_path / family, family=family))
        for prompt in ("", "Q", "the cache is a promise " * 9):
            (encoded,) = encode_completion(vocabulary, [prompt], [" the teacher reads"])
            whole = vocabulary.encode(prompt + " the teacher reads")
            assert [*encoded.prefix.tolist(), *encoded.ids.tolist()] == [vocabulary.start_id, *whole.ids.tolist()]
            assert encoded.data[encoded.synthetic :] == b" the teacher reads" and encoded.context == prompt.encode()
            assert len(encoded.ids) <= LEAD + 2 + len(vocabulary.encode(" the teacher reads").ids)


# The corpus.


def read(path: Path, kind: str = "chat", **keys: object) -> list[Document]:
    return list(CorpusReader(Corpus.model_validate({"source": str(path), "max_bytes": 0, "kind": kind, **keys})))


def test_conversations_become_one_document_an_answer(tmp_path):
    talk = say("Hi", " Hello! ", "More?", "No.", system="Be kind")
    records = [
        {"id": "a", "messages": talk},
        {"question": "1+1?", "answer": "#### 2"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "content": ""},
            ]
        },
        {"prompt": "p", "completion": "c"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = read(tmp_path / "c.jsonl")
    assert [(d.doc_id, d.text, json.loads(d.context)) for d in found] == [
        ("a/1", "Hello!", talk[:2]), ("a/2", "No.", talk[:4]), (found[2].doc_id, "#### 2", say("1+1?")),
        (found[3].doc_id, "c", say("p")),
    ]  # fmt: skip
    assert conversations.opening(found[0].context, "chat") == conversations.opening(found[1].context, "chat")
    plain = read_pairs(tmp_path)
    assert [document[1:] for document in plain] == [(" two ", "one"), ("four", "three")]
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as f:
        f.write(json.dumps(records[0]))
    assert [d.text for d in read(tmp_path / "z.jsonl.gz")] == ["Hello!", "No."]
    pq.write_table(pa.Table.from_pylist([{"messages": talk, "other": 1}]), tmp_path / "c.parquet")
    assert [(d.text, d.context) for d in read(tmp_path / "c.parquet")] == [(d.text, d.context) for d in found[:2]]


def read_pairs(folder: Path) -> list[Document]:
    records = [{"instruction": "one", "output": " two "}, {"prompt": "three", "response": "four"}]
    (folder / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return read(folder / "q.jsonl", "completion")


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"text": "x"}, "prompt and response"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "user"}]}, "`content` is NoneType"),
        ({"messages": ["hi"]}, "no object with `role`"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"prompt": "x", "response": 3}, "must be text"),
    ],
)
def test_records_without_a_conversation_are_refused(tmp_path, record, match):
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(errors.InputError, match=match):
        read(tmp_path / "c.jsonl")


def test_plain_text_settings_point_at_chat_data(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": say("a", "b")}) + "\n")
    with pytest.raises(errors.InputError, match=r'corpus\.kind = "chat"'):
        read(tmp_path / "c.jsonl", "text")
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(errors.InputError, match="needs JSONL or Parquet"):
        read(tmp_path / "c.txt")
    with pytest.raises(errors.ConfigError, match="plain text"):
        list(CorpusReader(Corpus(kind="chat")))


# From conversations to a trained student.

TALKS = [
    say(f"Question {i}: what is the cache?", f"A promise {i} kept in advance.", "And then?", f"Then {i} notes.")
    for i in range(8)
] + [say("Nothing", "said", system="quiet"), say("break <|end|> it", "never")]


def settings_for(tmp_path: Path, kind: str, teacher: Path, **student_keys: object) -> Settings:
    with (tmp_path / "talks.jsonl").open("w") as f:
        for talk in TALKS:
            record = (
                {"messages": talk}
                if kind == "chat"
                else {"prompt": talk[-2]["content"], "response": talk[-1]["content"]}
            )
            f.write(json.dumps(record) + "\n")
    return Settings.model_validate(
        {
            "run": {"dir": str(tmp_path / "run")},
            "corpus": {"source": str(tmp_path / "talks.jsonl"), "kind": kind, "max_bytes": 0, "heldout_fraction": 0.2},
            "teacher": {
                "model": str(teacher),
                "backend": "hf",
                "tau": 0.05,
                "depth": 1,
                "static": 0.0,
                "rounding": 0.0,
            },
            "convert": {"prune": 0.0},
            "student": student_keys
            or {"model": "", "tokenizer": "bpe:300", "hidden_size": 32, "layers": 1, "heads": 2},
        }
    )


def dataset_of(settings: Settings) -> tuple[Path, list[str]]:
    said: list[str] = []
    context = open_context(settings, said.append)
    plan(context)
    teacher(context)
    convert(context)
    return Path(settings.run.dir) / "targets", said


def documents(targets: Path) -> list[tuple[str, bytes, bytes, object, int, int]]:
    found = []
    for entry in read_dataset(targets).entries:
        shard = read_shard(targets / entry.file)
        for d, name in enumerate(shard.doc_id):
            lo, hi = int(shard.doc_start[d]), int(shard.doc_start[d + 1])
            mask = np.asarray(shard.mask[lo:hi])
            first = int(np.argmax(np.append(mask, 1)))
            text = shard.document(d)
            found.append((name, text[:first], text[first:], shard, lo + first, hi))
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("template", ["DIRECT", pytest.param("PLAIN", marks=SLOW), pytest.param("INST", marks=SLOW)])
def test_teacher_targets_are_those_after_the_rendered_context(tmp_path, template):
    """Byte for byte the corpus's answers; the first byte and END as the model itself says after its own rendering."""
    teacher = checkpoint(tmp_path / "m", globals()[template])
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # a flat teacher: no END below the floor
    model.save_pretrained(teacher)
    targets, said = dataset_of(settings_for(tmp_path, "chat", teacher))
    aside = 1 + (template == "INST")  # the control token; the system role
    assert any("set aside" in line and "control token in a message: 1" in line for line in said)
    found = documents(targets)
    assert len(found) == 18 - aside
    vocabulary = load_vocabulary(teacher)
    said_of = {}  # what the teacher said of a document, before the shard rounds it
    for part in (tmp_path / "run/teacher").glob("*.parquet"):
        for window in read_windows(part, top_k=False):
            if not window.reference:
                assert window.is_last
                said_of[window.doc_id] = Lattice(window).targets().probs
    answers = {json.dumps(t[:i]): t[i]["content"] for t in TALKS for i in range(len(t)) if t[i]["role"] == "assistant"}
    for name, context, answer, shard, first, hi in found:
        messages = json.loads(context)
        assert answers[json.dumps(messages)].encode() == answer
        assert np.asarray(shard.mask[first:hi]).tolist() == [1] * len(answer) + [int(template != "INST")]
        assert (np.asarray(shard.tail[first - len(context) : first]) == 1).all()
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.encode(
            prompt + (" " if template == "INST" else "") + answer.decode(), add_special_tokens=False
        )
        with torch.no_grad():
            end = torch.softmax(model(torch.tensor([whole])).logits[0, -1].double(), -1)[tokenizer.eos_token_id]
        # Tokens that would go on beyond the answer hold the rest of the probability.
        assert len(said_of[name]) == len(answer) + 1 and 0 < said_of[name][-1, 256] <= float(end) * 1.001
        if template == "DIRECT":
            # The context ends with a control token: nothing straddles, the first byte is one sum over the vocabulary.
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            with torch.no_grad():
                p = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()
            want = np.zeros(256)
            for i, spelled in enumerate(vocabulary.token_bytes):
                if spelled:
                    want[spelled[0]] += p[i]
            np.testing.assert_allclose(said_of[name][0, :256], want, rtol=2e-3, atol=2**-15)
    held = {e.file for e in read_dataset(targets).entries if e.split == "heldout"}
    by_talk: dict[str, set[bool]] = {}
    for name, _, _, shard, _, _ in found:
        by_talk.setdefault(name.split("/")[0], set()).add(Path(shard.path).name in held)
    assert all(len(splits) == 1 for splits in by_talk.values()) and held


def supervised_text(source: stream.TokenShard, vocabulary) -> dict[int, bytes]:
    """What the supervised tokens of each document spell."""
    spelled: dict[int, bytes] = {}
    for i in np.flatnonzero(source.supervised):
        d = int(source.row[i])
        token = vocabulary.token_bytes[int(source.ids[i])] or b""
        spelled[d] = spelled.get(d, b"") + token[int(source.skip[i]) :]
    return spelled


@pytest.mark.parametrize(
    ("kind", "own"), [("chat", "builtin"), pytest.param("chat", "INST", marks=SLOW), ("completion", "builtin")]
)
def test_a_student_learns_the_answers_and_nothing_else(tmp_path, kind, own):
    """Whatever the student's tokenizer and template: rows hold the whole conversation, labels spell the answer."""
    teacher = checkpoint(tmp_path / "m", PLAIN)
    extra = {} if own == "builtin" else {"model": str(checkpoint(tmp_path / "s", globals()[own], "sentencepiece"))}
    settings = settings_for(tmp_path, kind, teacher, **extra)
    targets, _ = dataset_of(settings)
    student.prepare(settings.student, targets, tmp_path / "student", seed=0)
    opened = student.load(tmp_path / "student")
    dataset = read_dataset(targets)
    reader = stream.ShardReader(
        targets, dataset, "train", opened.vocabulary, opened.end_id,
        template=opened.template, max_tokens=opened.max_tokens,
    )  # fmt: skip
    source = reader[0]
    ends = own != "INST"
    spelled = supervised_text(source, opened.vocabulary)
    assert len(spelled) >= 5
    for d, text in spelled.items():
        lo, hi = int(source.shard.doc_start[d]), int(source.shard.doc_start[d + 1])
        mask = np.asarray(source.shard.mask[lo:hi])
        assert text.endswith(source.shard.document(d)[int(np.argmax(mask)) :])
        tokens = np.flatnonzero(source.row == d)
        assert (source.ids[tokens[-1]] == opened.end_id) == ends
        if kind == "chat":
            first = int(np.argmax(mask))
            messages = [
                *json.loads(source.shard.document(d)[:first]),
                {"role": "assistant", "content": source.shard.document(d)[first:].decode()},
            ]
            want = opened.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            ours = [int(source.before[tokens[0]]), *source.ids[tokens].tolist()]
            assert want[: len(ours)] == ours
    # However small the windows, no row begins inside a conversation.
    rows = [r for lo in range(0, len(source.symbol), 40) for r in stream.cut(source, lo, lo + 40, opened.max_tokens)]
    assert [i for r in rows for i in range(r.first, r.last)] == list(range(len(source.ids)))
    assert all(r.first == 0 or source.row[r.first - 1] != source.row[r.first] for r in rows)
    # Every step sees all windows: the order follows from the targets' hash, which another CPU changes, and a step on
    # the refused conversation alone would have nothing to learn from.
    train_settings = st.Train(steps=3, batch=8, window_bytes=200, warmup=1, lambda_kl=0.5, tensorboard=False)
    result = train(train_settings, tmp_path / "student", targets, tmp_path / "out", name="chat", device="cpu")
    assert result["terms"]["byte_kl"] > 0 and result["skipped_documents"].get("template: no system role here", 0) <= 1
    measured = evaluate.evaluate(train_settings, tmp_path / "student", targets, Path(result["checkpoint"]), name="chat")
    held = [(context, answer) for _, context, answer, shard, _, _ in documents(targets) if "heldout" in shard.path]
    read = [answer for context, answer in held if ends or b'"system"' not in context]
    assert measured["text_bytes"] == sum(map(len, read)) and read


def test_conversations_longer_than_a_model_are_set_aside(tmp_path):
    teacher = checkpoint(tmp_path / "m", PLAIN)
    settings = settings_for(tmp_path, "chat", teacher)
    with (tmp_path / "talks.jsonl").open("a") as f:
        f.write(json.dumps({"messages": say("word " * 200, "short")}) + "\n")
    _, said = dataset_of(settings)
    assert any("context longer than the teacher's: 1" in line for line in said)


def test_a_plan_of_another_kind_is_refused(tmp_path):
    teacher = checkpoint(tmp_path / "m", PLAIN)
    settings = settings_for(tmp_path, "chat", teacher)
    context = open_context(settings)
    make_plan(context.store, settings)
    other = settings_for(tmp_path, "completion", teacher)
    with pytest.raises(errors.ConfigError, match="kind"):
        make_plan(context.store, other)
