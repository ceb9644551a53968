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
