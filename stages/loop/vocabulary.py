"""A tokenizer that somebody has in hand, as exact token bytes, and its chat template."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bytecache.schemas.errors import InputError
from bytecache.schemas.files import cache_folder, scratch_folder
from bytecache.stages.tokens.chat import Template
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary
from bytecache.stages.train.batches.answers import TemplateSource


def student_vocabulary(tokenizer: Any, rows: int) -> tuple[Vocabulary, int]:
    """(token bytes, id of the end token) of a student.

    Args:
        tokenizer: a folder, or a fast tokenizer of transformers; what the object holds counts, not where it came from.
        rows: width of the student's logits.

    Raises:
        InputError: a slow tokenizer, one without an end token, or one whose tokens do not spell the text.
    """
    if isinstance(tokenizer, str | os.PathLike):
        vocabulary = load_vocabulary(Path(tokenizer), lm_head_rows=rows, for_student=True)
        return vocabulary, int(vocabulary.end_ids[0])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__}: bytes of tokens need a fast tokenizer; pass its folder, or use_fast"
        )
    if tokenizer.eos_token is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no EOS token, so documents cannot end; set tokenizer.eos_token"
        )
    with _saved(tokenizer) as folder:
        vocabulary = load_vocabulary(folder, lm_head_rows=rows, for_student=True)
    return vocabulary, int(tokenizer.eos_token_id)


def student_template(tokenizer: Any, vocabulary: Vocabulary) -> TemplateSource:
    """Opens the student's chat template when the first conversation asks for it; raises ConfigError then."""
    return partial(_open_template, tokenizer, vocabulary)


def _open_template(tokenizer: Any, vocabulary: Vocabulary) -> Template:
    if isinstance(tokenizer, str | os.PathLike):
        return Template.open(Path(tokenizer), vocabulary, setting="tokenizer")
    with _saved(tokenizer) as folder:
        return Template.open(folder, vocabulary, setting="tokenizer")


@contextmanager
def _saved(tokenizer: Any) -> Iterator[Path]:
    """A folder with what a fast tokenizer holds, for the length of a block."""
    declared = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is not None:
            declared[name] = str(getattr(tokenizer, name))
    if getattr(tokenizer, "chat_template", None):
        declared["chat_template"] = tokenizer.chat_template
    with scratch_folder(cache_folder()) as folder:
        (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(declared), encoding="utf-8")
        yield folder
