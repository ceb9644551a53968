"""What the teacher stage is given: a slice of the corpus as token sequences, plain documents and answers alike.

A slice's Parquet metadata says its `corpus.kind`. Plain text is encoded whole. An answer ("chat", "completion") is
encoded after its rendered context (`stages.tokens.chat`), whose tokens are evaluated with it and dumped nowhere: the
dump holds the answer's bytes and, as `context`, the bytes that stand before them in the shard, unsupervised.
"""

from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from bytecache.schemas.errors import InputError
from bytecache.schemas.files import arrow_path
from bytecache.stages.corpus.conversations import KIND_KEY
from bytecache.stages.tokens.chat import Template, encode_answer, encode_completion
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary


class Inputs(NamedTuple):
    """A slice as the teacher reads it."""

    kind: str
    ends: bool
    """Whether the teacher says where an answer ends: its template puts an end token right after it."""
    ids: list[str]
    documents: list[Encoded | Misfit]


def read_inputs(slice_path: Path, vocabulary: Vocabulary, model: Path, *, max_context: int) -> Inputs:
    """Encode a slice.

    Args:
        model: folder of the teacher, for its chat template. max_context: tokens that a rendered context may have.

    Raises:
        ConfigError: a chat slice and a teacher whose template cannot be used (see `stages.tokens.chat`).
    """
    table = pq.read_table(arrow_path(slice_path))
    kind = (table.schema.metadata or {}).get(KIND_KEY, b"text").decode()
    ids, texts = table.column("doc_id").to_pylist(), table.column("text").to_pylist()
    if kind == "text":
        return Inputs(kind, True, ids, vocabulary.encode_batch(texts))
    contexts = table.column("context").to_pylist()
    if kind == "completion":
        encoded = encode_completion(vocabulary, contexts, texts)
        return Inputs(kind, True, ids, [_bounded(e, max_context) for e in encoded])
    if kind != "chat":
        raise InputError(f"{slice_path}: unknown corpus.kind {kind!r}; plan again with this release")
    template = Template.open(model, vocabulary, setting="teacher.model")
    if template.end_id is not None:
        template.require_end(vocabulary)
    answers = [
        encode_answer(vocabulary, template, context, text) for context, text in zip(contexts, texts, strict=True)
    ]
    return Inputs(kind, template.end_id is not None, ids, [_bounded(e, max_context) for e in answers])


def _bounded(encoded: Encoded | Misfit, limit: int) -> Encoded | Misfit:
    if isinstance(encoded, Encoded) and len(encoded.prefix) > limit:
        return Misfit("context longer than the teacher's")
    return encoded
