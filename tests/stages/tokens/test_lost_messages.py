"""A template that renders a conversation without one of its messages sets it aside, by the role that was lost."""

import json
from pathlib import Path

import pytest

from bytecache.stages.tokens.chat import Template, encode_answer
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary, load_vocabulary
from tests.support.conversations import PLAIN, say
from tests.support.tiny_models import make_checkpoint

KNOWN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|begin|>user\n{{ m['content'] }}<|end|>\n"
    "{% elif m['role'] == 'assistant' %}<|begin|>assistant\n{{ m['content'].split('</think>')[-1] }}<|end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
TRIMMED = PLAIN.replace("m['content']", "m['content'] | trim")


def opened(folder: Path, template: str) -> tuple[Vocabulary, Template]:
    make_checkpoint(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    vocabulary = load_vocabulary(folder)
    return vocabulary, Template.open(folder, vocabulary, setting="teacher.model")


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    vocabulary, template = opened(tmp_path / "m", KNOWN)

    def answer(messages: list[dict[str, str]]) -> Encoded | Misfit:
        return encode_answer(vocabulary, template, json.dumps(messages), "Yes.")

    assert isinstance(answer(say("Hello?")), Encoded)
    assert isinstance(answer(say("Hello?", "<think>a</think>Hi.", "And?")), Encoded)
    for messages, words in (
        (say("Hello?", system="Be brief."), "role system"),
        ([{"role": "narrator", "content": "Night."}, *say("Hello?")], "role it does not know"),
    ):
        found = answer(messages)
        assert isinstance(found, Misfit) and found.reason.startswith("template:") and words in found.reason


@pytest.mark.parametrize("template", [PLAIN, TRIMMED])
def test_a_template_that_shows_all_is_as_before(tmp_path: Path, template: str) -> None:
    vocabulary, found = opened(tmp_path / "m", template)
    messages = [{"role": "narrator", "content": " Night. "}, *say("  Hello?\n", system="\nBe brief. ")]
    assert isinstance(encode_answer(vocabulary, found, json.dumps(messages), "Yes."), Encoded)


TOOLS = (
    "{% for t in tools or [] %}<|begin|>tools\n{{ t['function']['name'] }}<|end|>\n{% endfor %}"
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] }}({{ c['function']['arguments']['city'] }}){% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
CALLED = [
    {"role": "user", "content": "Weather?", "tools": [{"type": "function", "function": {"name": "weather"}}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12 degrees"},
]


@pytest.mark.slow
def test_calls_of_tools_are_rendered_or_their_record_is_set_aside(tmp_path: Path) -> None:
    vocabulary, template = opened(tmp_path / "tools", TOOLS)
    context = json.dumps(CALLED)
    encoded = encode_answer(vocabulary, template, context, "Twelve.")
    assert isinstance(encoded, Encoded) and encoded.data.endswith(b"Twelve.")
    assert "weather(Ulm)" in template.around(CALLED, "Twelve.")[0]
    vocabulary, plain = opened(tmp_path / "plain", PLAIN)
    found = encode_answer(vocabulary, plain, context, "Twelve.")
    assert isinstance(found, Misfit) and found.reason == "template: it leaves out the tools"
    without = [{k: v for k, v in m.items() if k != "tools"} for m in CALLED]
    found = encode_answer(vocabulary, plain, json.dumps(without), "Twelve.")
    assert isinstance(found, Misfit) and found.reason == "template: it leaves out a call of a tool"
    spelled = json.loads(context.replace("Ulm", "<|end|>"))
    found = encode_answer(vocabulary, template, json.dumps(spelled), "Twelve.")
    assert isinstance(found, Misfit) and found.reason == "control token in a message"
