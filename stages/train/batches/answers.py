"""Documents that answer something, as student tokens: prompts read whole and never learned (SPEC.md, "Prompts").

An answer and everything before it form one row, placed in the window that holds the answer's first byte, so no window
cuts a prompt from its answer. In a "chat" shard the masked head is a JSON array of messages, rendered by the student's
own template; its tokens have no position of their own and sit, without width, at the document's first one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bytecache.schemas.arrays import I64
from bytecache.schemas.shard.reader import ByteShard
from bytecache.stages.tokens.chat import Template, encode_answer
from bytecache.stages.tokens.vocab import Misfit, Vocabulary


class Columns(NamedTuple):
    """One document's tokens: id, predecessor, first and last position, bytes in front of the text; int64 [K] each."""

    ids: I64
    before: I64
    start: I64
    end: I64
    skip: I64


def answer_start(shard: ByteShard, lo: int, hi: int) -> int:
    """First supervised position of the document at positions [lo, hi); its last one where there is none."""
    return min(lo + int(np.argmax(np.append(np.asarray(shard.mask[lo:hi]), 1))), hi - 1)


def chat_columns(
    shard: ByteShard, lo: int, hi: int, vocabulary: Vocabulary, template: Template, max_tokens: int
) -> Columns | Misfit:
    """The document at positions [lo, hi) of a chat shard, rendered for the student.

    Returns:
        Columns, the first token being the second of the rendering (nothing precedes the first); or a Misfit, also for
        a conversation of more than `max_tokens` tokens.
    """
    at = answer_start(shard, lo, hi)
    text = np.asarray(shard.text)
    try:
        context, answer = text[lo:at].tobytes().decode("utf-8"), text[at : hi - 1].tobytes().decode("utf-8")
        encoded = encode_answer(vocabulary, template, context, answer)
    except (ValueError, TypeError, KeyError):
        return Misfit("no messages before the answer")
    if isinstance(encoded, Misfit):
        return encoded
    edge = encoded.starts - encoded.synthetic
    # Tokens of the template have no byte of the answer.
    inside = edge[1:] > 0
    start = np.where(inside, at + np.maximum(edge[:-1], 0), lo)
    end = np.where(inside, at + edge[1:], lo)
    skip = np.where(inside, np.clip(-edge[:-1], 0, None), 0)
    blank = np.full(len(encoded.prefix), lo, np.int64)
    ids = np.concatenate([encoded.prefix, encoded.ids]).astype(np.int64)
    start, end, skip = (np.concatenate(c) for c in ((blank, start), (blank, end), (blank * 0, skip)))
    if template.end_id is not None:
        ids = np.append(ids, template.end_id)
        start, end, skip = np.append(start, hi - 1), np.append(end, hi), np.append(skip, 0)
    if len(ids) - 1 > max_tokens:
        return Misfit("longer than the student's context")
    return Columns(ids[1:], ids[:-1], start[1:], end[1:], skip[1:])


TemplateSource = Callable[[], Template]
"""Opens the student's template when the first chat shard asks for it."""
