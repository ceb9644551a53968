"""Chat templates as files: what is wrong with one is said of it, before anything reads it whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from bytecache.schemas.errors import BytecacheError, ConfigError, InputError
from bytecache.stages.student.tokenizer_files import open_kept
from bytecache.stages.tokens.chat import Template, template_sha256
from bytecache.stages.tokens.template_files import MAX_TEMPLATE, refuse_unusable
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.conversations import PLAIN
from tests.support.tiny_models import make_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def declare(folder: Path, template: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


def opened(folder: Path) -> Template:
    return Template.open(folder, load_vocabulary(folder), setting="teacher.model")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_that_is_no_text_is_called_one(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"{{ x }}\xff\xfe")
    for use in (opened, template_sha256, open_kept):
        with pytest.raises(InputError, match=rf"chat template {path.name} is not UTF-8 .byte 0xff at 7.; save"):
            use(folder)
    path.write_text(PLAIN)
    (folder / "chat_template.jinja").write_text(PLAIN)
    assert opened(folder).end_id is not None


def test_of_several_templates_the_default_is_taken(folder: Path) -> None:
    others = [{"name": "rag", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    declare(folder, [*others, {"name": "default", "template": PLAIN}])
    assert opened(folder).end_id is not None
    declare(folder, others)
    words = r"teacher.model = .* called 'rag', 'tool_use', and none called 'default'.*chat_template\.jinja"
    with pytest.raises(ConfigError, match=words):
        opened(folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    assert opened(folder).end_id is not None, "what the message advises helps"


@pytest.mark.parametrize("declared", [
    ["{{ x }}"], [{"name": "default"}], [{"template": "x"}], [{"name": 3, "template": "x"}], 5, {"default": "x"},
    [None],
    [{"name": "default", "template": ["x"]}], [{"name": str(n), "template": "x"} for n in range(100)], True,
])  # fmt: skip
def test_other_forms_are_a_refusal_in_words(folder: Path, declared: Any) -> None:
    declare(folder, declared)
    with pytest.raises(InputError, match=r"chat_template in tokenizer_config\.json must be a text, or a list"):
        opened(folder)
    declare(folder, [{"name": "a", "template": "x"}] * 2)
    with pytest.raises(InputError, match="two chat templates called 'a'"):
        opened(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja", "tokenizer_config.json"])
def test_a_long_one_is_not_read(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.truncate(64 << 30)  # of nothing: it takes no room on the disk, and all memory where it is read
    for use in (opened, template_sha256, open_kept, load_vocabulary):
        with pytest.raises(BytecacheError, match=rf"{path.name} has {64 << 30} bytes, .* at most"):
            use(folder)


def test_a_long_text_in_the_configuration_is_refused(folder: Path) -> None:
    declare(folder, "x" * (MAX_TEMPLATE + 1))
    with pytest.raises(InputError, match=f"has {MAX_TEMPLATE + 1} characters, at most {MAX_TEMPLATE}"):
        refuse_unusable(folder, "the tokenizer")
