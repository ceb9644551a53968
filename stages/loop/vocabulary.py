"""A tokenizer that somebody has in hand, as exact token bytes."""

import json
import os
from pathlib import Path
from typing import Any

from bytecache.schemas.errors import InputError
from bytecache.schemas.files import cache_folder, scratch_folder
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary


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
    declared = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": str(tokenizer.eos_token)}
    if tokenizer.bos_token is not None:
        declared["bos_token"] = str(tokenizer.bos_token)
    with scratch_folder(cache_folder()) as folder:
        (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(declared), encoding="utf-8")
        vocabulary = load_vocabulary(folder, lm_head_rows=rows, for_student=True)
    return vocabulary, int(tokenizer.eos_token_id)
