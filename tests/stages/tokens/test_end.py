"""END: what a teacher says where a text or an answer ends, whatever its configuration calls the token, or tokens."""

import json
from typing import Any

import numpy as np
import pytest

from bytecache.schemas.errors import ConfigError
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.tokens.chat import Template, encode_answer
from bytecache.stages.tokens.vocab import Misfit, load_vocabulary
from tests.support.conversations import PLAIN, say
from tests.support.function_model import FunctionEngine, function_teacher
from tests.support.oracle import exact_distributions
from tests.support.tiny_models import make_checkpoint
from tests.support.vocab_models import byte_level, checkpoint

TEXT, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2 of byte_level()
EVERY_COVER = {"tau": 0.0, "depth": 64}
NAMED = {"bos_token": START, "eos_token": STOP}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, set[int]]] = {
    # config.json, generation_config.json, tokenizer_config.json, teacher.end: ids that END pools
    "one id": ({"eos_token_id": 2}, {}, {}, "auto", {2}),
    "several ids": ({"eos_token_id": [0, 2]}, {}, {}, "auto", {0, 2}),
    "more when it generates": ({"eos_token_id": 2}, {"eos_token_id": [2, 0]}, NAMED, "auto", {0, 2}),
    "the tokenizer's alone": ({}, {}, NAMED, "auto", {2}),
    "the tokenizer names another": ({"eos_token_id": 0}, {}, NAMED, "auto", {0, 2}),
    "pad is end": ({"eos_token_id": 2, "pad_token_id": 2}, {"pad_token_id": 2}, {"pad_token": STOP}, "auto", {2}),
    "pad is one of the ends": ({"eos_token_id": [2, 0], "pad_token_id": 0}, {}, {"pad_token": TEXT}, "auto", {0, 2}),
    "start is end": ({"bos_token_id": 0, "eos_token_id": 0}, {}, {}, "auto", {0}),
    "named": ({"eos_token_id": 2}, {}, NAMED, TEXT, {0}),
    "two are named": ({"eos_token_id": 2}, {}, NAMED, f"{TEXT} {STOP}", {0, 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_end_pools_every_token_that_ends_a_text(tmp_path, case):
    """The ids, and the value: at every byte the sum of what brute force gives each of them alone."""
    config, generation, tokenizer, end, ids = CASES[case]
    checkpoint(tmp_path, byte_level(), config=config, generation_config=generation, tokenizer_config=tokenizer)
    start = "auto" if "bos_token_id" in config or "bos_token" in tokenizer else START
    vocabulary = load_vocabulary(tmp_path, start=start, end=end)
    assert set(vocabulary.end_ids.tolist()) == ids
    teacher = function_teacher(vocabulary, **EVERY_COVER)
    ((window,),) = teacher.windows([("d", 0, vocabulary.encode("a  b"))])
    found = Lattice(window).targets()
    assert isinstance(teacher.engine, FunctionEngine)
    total = np.zeros(len(found.tail))
    for alone in sorted(ids):
        other = load_vocabulary(tmp_path, start=start, end={0: TEXT, 2: STOP}[alone])
        # Where one id ends a text, the others are control tokens, whose mass nobody is given.
        total += exact_distributions(other, teacher.engine.next_token, b"a  b")[:, 256]
    np.testing.assert_allclose(found.probs[:, 256], total, atol=1e-6)
    assert total.min() > 0
    np.testing.assert_allclose(found.probs.sum(1) + found.tail, 1, atol=1e-6)


TOOLS = "{% if tools %}<|begin|>tools\n{{ tools | tojson }}<|end|>\n{% endif %}" + PLAIN.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'tool' %}{{ '<r>\n' }}{{ m['content'] }}{{ '\n</r>' }}{% else %}{{ m['content'] }}{% endif %}",
)
THINKING = PLAIN.replace("{{ m['content'] }}", "{{ '<t>\n\n</t>\n' if m['role'] == 'assistant' }}{{ m['content'] }}")
NEWLINE = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}{{ '\n' if m['role'] == 'assistant' }}")
TOOL_TALK = [
    *say("What is the tide?"),
    {"role": "assistant", "content": "<c>tide()</c>"},
    {"role": "tool", "content": "4 m"},
]
TEMPLATES = {
    # template, messages before the answer, whether the template says where an answer ends
    "plain": (PLAIN, say("What is 2+2?"), True),
    "an empty thought before an answer": (THINKING, say("What is 2+2?"), True),
    "several turns": (THINKING, say("hi", "hello", "and?"), True),
    "a tool's result": (TOOLS, TOOL_TALK, True),
    "text after an answer": (NEWLINE, say("What is 2+2?"), False),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_an_answer_ends_with_its_template_s_token(tmp_path, case):
    """END after the answer is the mass of the END ids after the tokens that the model would have read."""
    template, messages, says = TEMPLATES[case]
    folder = make_checkpoint(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    vocabulary = load_vocabulary(folder)
    opened = Template.open(folder, vocabulary, setting="x")
    assert (opened.end_id is not None) is says
    if says:
        opened.require_end(vocabulary)
        assert opened.end_id in vocabulary.end_ids
    encoded = encode_answer(vocabulary, opened, json.dumps(messages), "the notes")
    assert not isinstance(encoded, Misfit), encoded.reason
    teacher = function_teacher(vocabulary, tau=1.0, depth=0)
    ((window,),) = teacher.windows([("d", 0, encoded)])
    history = (*encoded.prefix.tolist(), *encoded.ids.tolist())
    assert isinstance(teacher.engine, FunctionEngine)
    mass = teacher.engine.next_token(history)[vocabulary.end_ids].sum()
    assert window.is_last and window.end[-1] == pytest.approx(mass, rel=1e-5)
    assert Lattice(window).targets().probs[-1, 256] > 0


def test_a_template_that_ends_answers_otherwise_is_refused_until_told(tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": PLAIN}))
    other = next(name for name in load_vocabulary(folder).control_names if name != "<|end|>")
    vocabulary = load_vocabulary(folder, end=other)
    opened = Template.open(folder, vocabulary, setting="x")
    with pytest.raises(ConfigError, match=r"set teacher\.end = '<\|end\|>'"):
        opened.require_end(vocabulary)
