"""One shard through the student's tokenizer: flat arrays of tokens with their places in the text.

Documents that the tokenizer cannot map to their own bytes are skipped and counted by reason, never misaligned.
Answers and their prompts are `answers`' business. Price: 1-3 MB of text/s/core, about 9 bytes per text byte.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bytecache.schemas.arrays import I64
from bytecache.schemas.errors import InputError
from bytecache.schemas.shard.reader import ByteShard
from bytecache.stages.tokens.vocab import Misfit, Vocabulary
from bytecache.stages.train.batches.answers import Columns, TemplateSource, answer_start, chat_columns
from bytecache.stages.train.batches.teacher_tokens import TeacherTokens


@dataclass(frozen=True)
class TokenShard:
    """One shard seen through the student's tokenizer: K tokens of all its alignable documents, in position order.

    ids, before int32 [K]: token and its predecessor in the document (start token at its head).
    start, end int64 [K]: positions of the token's text bytes; an EOS owns its document's END position.
    skip int64 [K]: bytes of the token in front of the text (a synthetic prefix space); they have no position.
    row int32 [K]: index of the token's document. symbol int16 [N]: the text's own symbol per position, END included.
    """

    shard: ByteShard
    ids: npt.NDArray[np.int32]
    before: npt.NDArray[np.int32]
    start: I64
    end: I64
    skip: I64
    row: npt.NDArray[np.int32]
    symbol: npt.NDArray[np.int16]
    supervised: npt.NDArray[np.bool_]
    skipped: Counter[str]
    place: I64 | None = None
    """int64 [K]: position that decides a token's window, where documents are not cut (`answers`); None: `start`."""
    teacher: TeacherTokens | None = None
    """The teacher's tokens, where a baseline asks for them."""


def tokenise(
    shard: ByteShard, vocabulary: Vocabulary, end_id: int, *,
    template: TemplateSource | None = None, max_tokens: int = 1 << 40,
) -> TokenShard:  # fmt: skip
    """Flatten a shard's documents into student tokens (see `TokenShard`).

    Args:
        template: of the student, asked for by chat shards. max_tokens: longest conversation the student can read.
    """
    n_docs = len(shard.doc_id)
    kind = shard.attrs.get("kind", "text")
    offsets = np.asarray(shard.doc_start, dtype=np.int64)
    text = np.asarray(shard.text)
    symbol = shard.symbols(0, len(shard)).astype(np.int16)
    skipped: Counter[str] = Counter()
    documents: list[tuple[int, Columns]] = []
    if kind == "chat":
        if template is None:
            raise InputError(f"{shard.path}: a chat shard, and no template to read it with; pass the student's")
        opened = template()
        for d in range(n_docs):
            lo, hi = int(offsets[d]), int(offsets[d + 1])
            columns = chat_columns(shard, lo, hi, vocabulary, opened, max_tokens)
            if isinstance(columns, Misfit):
                skipped[columns.reason] += 1
            else:
                documents.append((d, columns))
    else:
        documents = _plain_columns(text, offsets, vocabulary, end_id, skipped)
    count = [len(columns.ids) for _, columns in documents]
    row = np.repeat([d for d, _ in documents], count).astype(np.int32)
    ids, before, start, end, lead = (
        [np.concatenate(c) for c in zip(*(c for _, c in documents), strict=True)]
        if documents
        else [np.zeros(0, np.int64)] * 5
    )
    place = None
    if kind != "text":
        heads = [answer_start(shard, int(offsets[d]), int(offsets[d + 1])) for d, _ in documents]
        place = np.repeat(heads, count).astype(np.int64)
    mask = np.concatenate([[0], np.cumsum(np.asarray(shard.mask) != 0)])
    # A token is supervised when any of its bytes is: the first token of a response may begin in the prompt.
    supervised = mask[np.maximum(end, np.minimum(start + 1, text.size))] > mask[start]
    return TokenShard(
        shard, ids.astype(np.int32), before.astype(np.int32), start, end, lead, row, symbol, supervised, skipped, place
    )


def _plain_columns(
    text: npt.NDArray[np.uint8], offsets: I64, vocabulary: Vocabulary, end_id: int, skipped: Counter[str]
) -> list[tuple[int, Columns]]:
    texts, members = [], []
    for d, (lo, hi) in enumerate(pairwise(offsets.tolist())):
        try:
            texts.append(text[lo : hi - 1].tobytes().decode("utf-8"))
            members.append(d)
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
    documents = []
    for d, encoded in zip(members, vocabulary.encode_batch(texts), strict=True):
        if isinstance(encoded, Misfit):
            skipped[encoded.reason] += 1
            continue
        ids = np.append(encoded.ids, end_id)
        # Bytes of `data` in front of the text have no position: clamp them to the document's first.
        edge = np.append(encoded.starts, encoded.starts[-1] + 1) - encoded.synthetic
        at = offsets[d] + np.maximum(edge, 0)
        lead = np.clip(-edge[:-1], 0, None) - np.clip(-edge[1:], 0, None)
        before = np.concatenate([[vocabulary.start_id], ids[:-1]])
        documents.append((d, Columns(ids, before, at[:-1], at[1:], lead)))
    return documents
