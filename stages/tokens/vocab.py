"""A teacher's vocabulary as bytes: what every id spells, which ids start and end documents, and text -> aligned tokens.

Every id gets its exact bytes or none (token_bytes.py). A document is encoded the model's own way, then the bytes of
its tokens are joined and compared with the text: equal, or equal after one synthetic leading space, it is aligned; else
it is encoded once more without the steps that change text (Unicode normalisation, injected spaces) and compared again;
else it is a `Misfit` with a reason. Nothing misaligned ever leaves this module.
Price: loading 50k ids 1 s, 150k 2.5 s, 262k 7 s, most of it parsing; encoding 1-3 MB of text per second and core.
"""

import hashlib
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.byte_trie import Trie, build_trie, sort_tokens
from bytecache.stages.tokens.encoders import Encoder
from bytecache.stages.tokens.guard import Failure
from bytecache.stages.tokens.token_bytes import room_for
from bytecache.stages.tokens.token_files import TokenizerFiles, as_ids, open_tokenizer

__all__ = ["Encoded", "Misfit", "Trie", "Vocabulary", "load_vocabulary"]


class Encoded(NamedTuple):
    """A document as tokens: the bytes of `ids`, joined, are `data`, always."""

    ids: NDArray[np.int32]
    """[T] token ids; no start token, no end token."""
    starts: NDArray[np.int64]
    """[T + 1] byte offset of each token in `data`; the last entry is len(data)."""
    data: bytes
    """`synthetic` bytes that the tokenizer puts in front, then the text in UTF-8."""
    synthetic: int
    """0, or 1 for the leading space of SentencePiece; in front of an answer, the end of its rendered context."""
    prefix: NDArray[np.int32] = np.zeros(0, np.int32)
    """Tokens before `ids`, whose bytes are not asked for: an answer's context, start token included. Empty: none."""
    context: bytes = b""
    """Bytes that stand before the text in a shard, unsupervised (`stages.corpus.conversations`)."""


class Misfit(ValueError):  # noqa: N818 -- a verdict on a text, returned as often as raised
    """A text that this vocabulary cannot spell; `reason` is short, names the cause, and is what reports count by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} {detail}".strip())
        self.reason = reason


class Vocabulary:
    """The ids of a teacher's lm_head as bytes. Build with `load_vocabulary`."""

    def __init__(
        self,
        token_bytes: list[bytes | None],
        *,
        start_id: int,
        end_ids: Sequence[int],
        encoder: Encoder,
        family: str = "custom",
        unknown: frozenset[int] = frozenset(),
        names: dict[str, int] | None = None,
    ) -> None:
        """`token_bytes` has one entry per lm_head row; `start_id` and `end_ids` must be among them."""
        self.size = len(token_bytes)
        self.token_bytes = token_bytes
        self.start_id = start_id
        self.end_ids: NDArray[np.int64] = np.unique(np.asarray(end_ids, dtype=np.int64))
        self.family = family
        self.order: NDArray[np.int32] = sort_tokens(token_bytes)
        self.trie: Trie = build_trie(token_bytes, self.order)
        self._encoder = encoder
        self._unknown = unknown
        self._names = names or {}
        self._lengths = np.fromiter((-1 if t is None else len(t) for t in token_bytes), np.int64, count=self.size)
        self.missing_bytes = sorted(set(range(256)) - {t[0] for t in token_bytes if t is not None and len(t) == 1})
        self.fingerprint = self._fingerprint()

    def encode(self, text: str) -> Encoded:
        """Tokens of one document, without start or end tokens; raises Misfit where they cannot spell it."""
        result = self.encode_batch([text])[0]
        if isinstance(result, Misfit):
            raise result
        return result

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded | Misfit]:
        """One result per text, in order; a text that cannot be spelt gives its Misfit instead of raising."""
        raw: list[bytes | None] = []
        for text in texts:
            try:
                raw.append(text.encode())
            except UnicodeEncodeError:
                raw.append(None)
        # Lone surrogates have no UTF-8; an empty text is no tokens, whatever prefix a tokenizer would put there.
        batch = iter(self._encoder.canonical(list(compress(texts, raw))))
        results: list[Encoded | Misfit] = []
        for text, data in zip(texts, raw, strict=True):
            if data is None:
                results.append(Misfit("lone surrogate"))
            else:
                results.append(self._align(text, data, next(batch)) if data else self._align(text, data, []))
        return results

    def token_id(self, text: str) -> int:
        """The id spelled `text` by the tokenizer, else the lowest whose bytes are `text`; KeyError if there is none."""
        if text in self._names:
            return self._names[text]
        try:
            return self.token_bytes.index(text.encode())
        except ValueError:
            raise KeyError(text) from None

    @property
    def control_names(self) -> dict[str, int]:
        """Text and id of every token that is named and has no bytes."""
        return {text: i for text, i in self._names.items() if i < self.size and self.token_bytes[i] is None and text}

    @property
    def start_name(self) -> str:
        """Text of the start token; "auto" where none of its kind has that text."""
        return next((text for text, i in self._names.items() if i == self.start_id and text), "auto")

    def describe(self) -> dict[str, Any]:
        """Provenance: family, counts, duplicate and missing byte strings, longest token in bytes."""
        ordinary = len(self.order)
        return {
            "family": self.family,
            "size": self.size,
            "ordinary": ordinary,
            "control": self.size - ordinary,
            "duplicates": ordinary - len({t for t in self.token_bytes if t}),
            "missing_bytes": self.missing_bytes,
            "longest_token": int(self._lengths.max(initial=0)),
            "start_id": self.start_id,
            "end_ids": self.end_ids.tolist(),
            "fingerprint": self.fingerprint,
        }

    def _align(self, text: str, data: bytes, ids: list[int] | Failure) -> Encoded | Misfit:
        if isinstance(ids, Failure):
            return Misfit(ids)
        first = self._match(data, ids)
        if isinstance(first, Encoded):
            return first
        plain = self._encoder.plain(text)
        if isinstance(plain, Failure):
            return Misfit(plain)
        second = self._match(data, plain) if plain is not None else first
        if isinstance(second, Encoded):
            return second
        if second.reason == "mismatch" and self._encoder.rewrites:
            return Misfit("normalised")
        return second

    def _match(self, data: bytes, ids: list[int]) -> Encoded | Misfit:
        table = self.token_bytes
        try:
            spelled = b"".join([table[i] for i in ids])  # type: ignore[misc]  # None raises, and that is the test
        except TypeError:
            odd = next(i for i in ids if i >= self.size or table[i] is None)
            return Misfit("unk" if odd in self._unknown else "beyond the head" if odd >= self.size else "control token")
        except IndexError:
            return Misfit("beyond the head")
        if spelled == data:
            synthetic = 0
        elif spelled == b" " + data:
            synthetic, data = 1, spelled
        else:
            return self._explain(data, spelled)
        array = np.asarray(ids, dtype=np.int32)
        starts = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(self._lengths[array], out=starts[1:])
        return Encoded(array, starts, data, synthetic)

    def _explain(self, data: bytes, spelled: bytes) -> Misfit:
        if spelled[:1] == b" " and data[:1] != b" ":
            spelled = spelled[1:]
        at = next(
            (i for i, (a, b) in enumerate(zip(data, spelled, strict=False)) if a != b), min(len(data), len(spelled))
        )
        # A byte-level BPE without an unknown token drops what it cannot spell.
        if at < len(data) and data[at] in self.missing_bytes:
            return Misfit("missing-byte")
        return Misfit("mismatch", f"at byte {at}")

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(b"bytecache vocabulary 1\0")
        for array in (np.array([self.size, self.start_id]), self.end_ids, self._lengths):
            digest.update(np.array([array.size], dtype="<i8").tobytes())
            digest.update(array.astype("<i8").tobytes())
        digest.update(b"".join(t for t in self.token_bytes if t))
        return digest.hexdigest()


TEACHER_REMEDIES = (
    "set teacher.start to the text of its start token",
    "set teacher.end to the text of its end token",
)
"""What to do about a start token, and an end token, that cannot be found: of a teacher, and of a student."""
STUDENT_REMEDIES = (
    "name it as bos_token in the student's tokenizer_config.json",
    "name it as eos_token in the student's tokenizer_config.json",
)


def load_vocabulary(
    model_dir_or_id: str | Path,
    *,
    lm_head_rows: int | None = None,
    start: str = "auto",
    end: str = "auto",
    trust_remote_code: bool = False,
    revision: str = "",
    for_student: bool = False,
) -> Vocabulary:
    """The vocabulary of a checkpoint folder, tokenizer file or hub id.

    `lm_head_rows`: rows of the model's output; default config.json's vocab_size, else the tokenizer's length.
    `start`: "auto" (the configuration's BOS, else the tokenizer's, else EOS) or a token's text.
    `for_student`: what is missing is asked of the files, since a student has no settings for it.
    `end`: "auto" (every EOS of configuration, generation configuration and tokenizer) or texts separated by spaces.
    Raises InputError for tokenizers whose tokens do not spell the text, and where start or end cannot be found.
    """
    try:
        files = open_tokenizer(model_dir_or_id, revision=revision, trust_remote_code=trust_remote_code)
    except InputError as error:
        raise InputError(str(error).replace("use a teacher", "use a student") if for_student else str(error)) from error
    table = list(files.table.token_bytes)
    size = lm_head_rows or files.config.get("vocab_size") or len(table)
    room_for([size - 1], files.where)
    remedies = STUDENT_REMEDIES if for_student else TEACHER_REMEDIES
    end_ids = _end_ids(files, end, size, remedies)
    start_id = _start_id(files, start, size, remedies)
    # Ids beyond the head have no probability; rows beyond the tokenizer have no bytes.
    table = table[:size] + [None] * (size - len(table))
    for i in end_ids:
        table[i] = None
    return Vocabulary(
        table,
        start_id=start_id,
        end_ids=end_ids,
        encoder=files.make_encoder(table + [None] * (len(files.table.token_bytes) - size)),
        family=files.table.family,
        unknown=files.table.unknown,
        names=files.table.names,
    )


def _start_id(files: TokenizerFiles, start: str, size: int, remedies: tuple[str, str]) -> int:
    if start != "auto":
        return _checked(_named(files, start, "teacher.start"), files, "teacher.start", size, remedies[0])
    # The model knows best: converted tokenizers often neither add nor name the BOS that training used.
    candidates = [files.config.get("bos_token_id"), files.generation.get("bos_token_id"), files.bos]
    candidates += [files.config.get("eos_token_id"), files.generation.get("eos_token_id"), files.eos]
    for candidate in candidates:
        for i in as_ids(candidate):
            return _checked(i, files, "the start token", size, remedies[0])
    raise InputError(f"{files.where} names neither BOS nor EOS; {remedies[0]}")


def _end_ids(files: TokenizerFiles, end: str, size: int, remedies: tuple[str, str]) -> list[int]:
    if end != "auto":
        # A token may itself be or hold a space.
        whole = _find(files, end) is not None
        end_ids = [_named(files, text, "teacher.end") for text in ([end] if whole else end.split())]
    else:
        end_ids = [
            *as_ids(files.config.get("eos_token_id")),
            *as_ids(files.generation.get("eos_token_id")),
            *as_ids(files.eos),
        ]
    if not end_ids:
        raise InputError(f"{files.where} names no end token; {remedies[1]}")
    return sorted({_checked(i, files, "the end token", size, remedies[1]) for i in end_ids})


def _find(files: TokenizerFiles, text: str) -> int | None:
    if text in files.table.names:
        return files.table.names[text]
    data = text.encode()
    return files.table.token_bytes.index(data) if data and data in files.table.token_bytes else None


def _named(files: TokenizerFiles, text: str, setting: str) -> int:
    token = _find(files, text)
    if token is not None:
        return token
    near = get_close_matches(text, [name for name in files.table.names if name[:1] in "<[|"], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; give the text of one token"
    raise InputError(f"{setting} = {text!r} is no token of {files.where}{hint}")


def _checked(i: int, files: TokenizerFiles, what: str, size: int, remedy: str) -> int:
    if not 0 <= i < size:
        raise InputError(f"{what} of {files.where} has id {i}, but the model has {size} rows; {remedy}")
    return i
