"""Work that never ends, takes all memory or ends its process costs one document, and nobody else's tokens change."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from bytecache.schemas.errors import ConfigError, InputError
from bytecache.stages.tokens import chat, guard
from bytecache.stages.tokens.chat import Template
from bytecache.stages.tokens.cutters import TAME, HfCutter, is_tame
from bytecache.stages.tokens.guard import MIB, Failure, Guard, Limits, tokens_of
from bytecache.stages.tokens.vocab import Encoded, Misfit, load_vocabulary

GIVES_UP = r"(a+)+$"
"""Exponential on many a and a b: the library panics when it has tried often enough."""
GOES_ON = r"a{1,40}?b?a{1,40}?b?a{1,40}?b?a{1,40}?b?c"
"""Never gives up: polynomial of a high degree at every position."""


def tokenizer(*patterns: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return made


def folder_of(made: Tokenizer, folder: Path, template: str = "") -> Path:
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    text = json.dumps(names | ({"chat_template": template} if template else {}))
    (folder / "tokenizer_config.json").write_text(text)
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds where there are more; the machine may be busy, the clock counts only the child's own time."""
    monkeypatch.setattr(guard, "encoding_limits", lambda texts: Limits(2.0, 512 * MIB))


@pytest.mark.parametrize("pattern", [GIVES_UP, pytest.param(GOES_ON, marks=pytest.mark.slow)])
def test_a_text_that_a_regular_expression_cannot_cope_with_is_set_aside_alone(
    pattern: str, tmp_path: Path, impatient: None
) -> None:
    vocabulary = load_vocabulary(folder_of(tokenizer(pattern), tmp_path))
    bad = "a" * (40 if pattern == GIVES_UP else 200_000) + "b"
    good = ["one", "a", "naïve \u0001 text", "", "aab c", "x" * 1000]
    texts = [*good[:3], bad, *good[3:], bad]
    found = vocabulary.encode_batch(texts)
    for text, result in zip(texts, found, strict=True):
        if text == bad:
            assert isinstance(result, Misfit) and result.reason.startswith("tokenizer: "), result
        else:
            assert isinstance(result, Encoded) and result.data == text.encode()


@pytest.mark.slow
def test_the_child_and_this_process_cut_alike() -> None:
    spec = json.loads(tokenizer(r"\p{N}{1,3}").to_str())
    here = HfCutter(spec, "one")
    assert is_tame(spec)
    away = Guard("two", {"kind": "tokenizer", "spec": json.dumps(spec), "seal": True})
    texts = ["", "a", "12345 <|end|> 6", "日本語", "x y" * 5000, "\ud7ff\U0010ffff"] * 20
    assert tokens_of(away, texts) == here.cut(texts)
    here.cut(["a" * (1 << 22) + "b"])  # a long text goes to the child
    assert here._guard is not None and here.cut(["a" * ((1 << 22) + 1)])[0] == here.cut(["a"])[0] * ((1 << 22) + 1)


def test_control_tokens_are_sealed_in_the_child_as_here(tmp_path: Path) -> None:
    spec = json.loads(tokenizer("(x|y)+z").to_str())
    spec["added_tokens"][0]["special"] = True
    for seal in (True, False):
        (ids,) = HfCutter(spec, "one", seal=seal).cut(["<|end|>"])
        assert (len(ids) == 1) is not seal


def blown_up(steps: int) -> dict[str, Any]:
    """A tokenizer whose normaliser doubles every a, `steps` times over."""
    spec = json.loads(tokenizer().to_str())
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [doubling] * steps}
    return dict(spec)


@pytest.mark.slow
def test_a_normaliser_that_blows_text_up_works_in_the_child(impatient: None) -> None:
    """Thirty doublings of one letter are a thousand million: the library then ends the process it is in."""
    assert is_tame(blown_up(3)) and not is_tame(blown_up(4))
    found = HfCutter(blown_up(30), "one").cut(["b", "aaaaaaaa", "c"])
    assert [isinstance(ids, Failure) for ids in found] == [False, True, False]


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 8}},
    {"normalizer": {"type": "Prepend", "prepend": "x" * 1000}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}},
    {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["u", 0.0], ["a" * 1000, -1.0]], "byte_fallback": False}},
], ids=str)  # fmt: skip
def test_what_may_take_for_ever_is_not_tame(change: dict[str, Any]) -> None:
    assert not is_tame(json.loads(tokenizer().to_str()) | change)


@pytest.mark.slow
def test_published_expressions_cut_here_and_others_do_not() -> None:
    assert is_tame(json.loads(tokenizer().to_str())) and not is_tame(json.loads(tokenizer(GIVES_UP).to_str()))
    assert r"\s+" in TAME and GIVES_UP not in TAME
    spaces = " " * 300_000
    for pattern in sorted(TAME):  # linear, or this would take for ever
        made = Tokenizer(models.BPE({"a": 0}, []))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        started = time.process_time()
        for text in (spaces, "a" * 300_000, "1" * 300_000, "'" * 300_000, "aA" * 150_000, " \n" * 150_000 + "x"):
            made.encode(text)
        assert time.process_time() - started < 20, pattern


def test_a_child_that_somebody_ends_does_its_work_again() -> None:
    child = Guard("one", {"kind": "tokenizer", "spec": tokenizer("(x|y)+z").to_str(), "seal": True})
    first = tokens_of(child, ["abc"])
    for number in (signal.SIGKILL, signal.SIGSEGV):
        assert child._child is not None
        os.kill(child._child.pid, number)
        assert tokens_of(child, ["abc"]) == first


@pytest.mark.slow
def test_what_ends_every_child_is_refused_in_the_end(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    monkeypatch.setattr(guard, "MOST_DEATHS", 2)
    child = Guard("the tokenizer of x", {"kind": "tokenizer", "spec": tokenizer(GOES_ON).to_str(), "seal": True})
    bad = "a" * 200_000 + "b"
    assert tokens_of(child, [bad]) == ["tokenizer: too slow"]
    with pytest.raises(InputError, match=r"the tokenizer of x: too slow in 2 documents; .*choose"):
        tokens_of(child, [bad])


def test_what_cannot_be_opened_is_named() -> None:
    with pytest.raises(InputError, match=r"the tokenizer of x: .* while it was opened; fetch it again"):
        tokens_of(Guard("the tokenizer of x", {"kind": "tokenizer", "spec": "{}", "seal": True}), ["a"])


def test_a_signal_to_the_group_does_not_end_the_child() -> None:
    child = Guard("one", {"kind": "tokenizer", "spec": tokenizer("(x|y)+z").to_str(), "seal": True})
    tokens_of(child, ["abc"])
    assert child._child is not None
    before = child._child.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before, number)
    assert tokens_of(child, ["abc"]) and child._child is not None and child._child.pid == before


# ---- chat templates

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"
LOOPS = 3 * LOOP + 3 * END
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(33) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
HOSTILE = {
    "nested loops": LOOPS,
    "a wide number": "{{ '%2000000000d' % 1 }}",
    "a doubling string": DOUBLING,
    "a long repetition": "{{ 'x' * 8000000000 }}",
    "a long list": "{{ ([0] * 8000000000) | length }}",
    "a huge power": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "much text": "{% for i in range(99999) %}{{ 'y' * 100 }}{% endfor %}",
    "an attribute": "{{ ''.__class__.__mro__ }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_a_refusal(name: str, tmp_path: Path) -> None:
    folder = folder_of(tokenizer(), tmp_path, HOSTILE[name] + PLAIN)
    started = time.process_time()
    with pytest.raises(ConfigError, match="chat template cannot be used"):
        Template.open(folder, load_vocabulary(folder), setting="teacher.model")
    assert time.process_time() - started < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nested loops", "a wide number", "a doubling string"])
def test_a_template_that_turns_on_one_document_costs_that_document(name: str, tmp_path: Path) -> None:
    template = "{% if 'trigger' in messages[0]['content'] %}" + HOSTILE[name] + "{% endif %}" + PLAIN
    folder = folder_of(tokenizer(), tmp_path, template)
    vocabulary = load_vocabulary(folder)
    opened = Template.open(folder, vocabulary, setting="teacher.model")
    found = []
    for words in ("hello", "trigger", "goodbye"):
        context = json.dumps([{"role": "user", "content": words}])
        found.append(chat.encode_answer(vocabulary, opened, context, "fine"))
    assert isinstance(found[0], Encoded) and isinstance(found[2], Encoded)
    assert isinstance(found[1], Misfit) and found[1].reason in ("template: too slow", "template: out of memory")


def test_a_rendering_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = folder_of(tokenizer(), tmp_path, "{{ strftime_now('%Y') }}{{ messages | tojson }}" + PLAIN)
    plain = AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": "ä <|end|>\n"}, {"role": "assistant", "content": "x"}]
    expected = [
        plain.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, strftime_now=chat.DATE.strftime
        )
        for prompt in (True, False)
    ]
    child = chat._renderer("x", str(plain.get_chat_template()), json.dumps(chat._facts(folder, "x").names))
    answer = child.call(
        {"renderings": [(messages, True), (messages, False)], "longest": 10_000}, Limits(20.0, 512 * MIB)
    )
    assert not isinstance(answer, Failure) and answer[0] == expected and expected[0].startswith("2026[")
