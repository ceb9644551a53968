"""Text -> ids, the teacher's own way, with no text ever read as a control token.

Two encodings exist of a text: the canonical one, exactly what the model was trained on, and a plain one for the
documents that the canonical one would change (Unicode normalisation, spaces injected after added tokens, a literal
U+2581, which SentencePiece takes for a space and the plain one spells by bytes). The caller compares bytes and
decides. Price: the tokenizers library's own speed, 2-5 MB/s per core.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.byte_trie import Trie, longest_match_within
from bytecache.stages.tokens.cutters import HfCutter, RankCutter, SentencePieceCutter
from bytecache.stages.tokens.guard import Failure
from bytecache.stages.tokens.token_bytes import PROBES, SPACE_MARK, UNICODE_FORMS, Json, parts

STEPS = 512
"""Looks at the trie for each byte of a text, at most."""


class Encoder(Protocol):
    """What a vocabulary needs of a tokenizer. Texts are non-empty and free of lone surrogates."""

    rewrites: bool
    """True where a normaliser outside our control may change the text."""

    def canonical(self, texts: Sequence[str]) -> Sequence[list[int] | Failure]:
        """The model's own tokens, without start or end tokens; or why a text has none."""
        ...

    def plain(self, text: str) -> list[int] | Failure | None:
        """Tokens with every step that can change the text left out; None where there is no such encoding."""
        ...


class HfEncoder:
    """A `tokenizers` pipeline with its control tokens sealed: text that looks like one is cut like any text."""

    def __init__(self, spec: Json, control: frozenset[int], where: str = "") -> None:
        """`spec` is a parsed tokenizer.json, `where` its place; `control` are the ids that text must never reach."""
        normalizers = list(parts(spec.get("normalizer"), "normalizers"))
        self.rewrites = any(
            part["type"] not in UNICODE_FORMS | {"Prepend", "ByteLevel"} and not _is_space(part) for part in normalizers
        )
        # Dropout would draw other tokens on every run; padding and truncation would change documents.
        self._spec = spec | {"padding": None, "truncation": None}
        if spec["model"].get("dropout") is not None:
            self._spec["model"] = spec["model"] | {"dropout": None}
        # The library seals what is flagged special; end tokens and unused pieces are not always flagged.
        self._spec["added_tokens"] = [
            token | {"special": True} if token["id"] in control else token | {"special": False}
            for token in spec["added_tokens"]
        ]
        self._what = f"the tokenizer of {where}" if where else "the tokenizer"
        self._cutter = HfCutter(self._spec, self._what)
        plain = _without_rewrites(self._spec)
        # Nothing to leave out: a second encoding would only repeat the first.
        self._plain_spec = plain if plain != self._spec else None
        self._plain: HfCutter | None = None
        self._mark = _spelled_mark(spec)
        self._prepends = any(part["type"] == "Prepend" for part in normalizers)
        self._prefixes = any(
            (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
            or (part["type"] == "ByteLevel" and part.get("add_prefix_space"))
            for part in parts(spec.get("pre_tokenizer"), "pretokenizers")
        )

    def canonical(self, texts: Sequence[str]) -> list[list[int] | Failure]:
        return self._cutter.cut(texts)

    def plain(self, text: str) -> list[int] | Failure | None:
        marked = bool(self._mark) and SPACE_MARK in text
        if self._plain_spec is None and not marked:
            return None
        if self._plain is None:
            self._plain = HfCutter(self._plain_spec or self._spec, self._what)
        # The one space the model expects at the start is kept; only those injected elsewhere are not.
        if self._prepends or (self._prefixes and not text.startswith(" ")):
            text = " " + text
        ids: list[int] = []
        for number, piece in enumerate(self._plain.cut(text.split(SPACE_MARK) if marked else [text])):
            if isinstance(piece, Failure):
                return piece
            ids += (self._mark if number else []) + piece
        return ids


class RankEncoder:
    """tiktoken over a rank file: `offset` is added to every rank (Tekken puts its control tokens first)."""

    rewrites = False

    def __init__(self, ranks: dict[bytes, int], pattern: str, offset: int = 0) -> None:
        if importlib.util.find_spec("tiktoken") is None:
            raise InputError("a tokenizer of ranks needs the package tiktoken; pip install tiktoken")
        self._cutter = RankCutter(ranks, pattern, "the tokenizer of ranks")
        self._offset = offset

    def canonical(self, texts: Sequence[str]) -> list[list[int] | Failure]:
        batches = self._cutter.cut(texts)
        if not self._offset:
            return batches
        return [ids if isinstance(ids, Failure) else [i + self._offset for i in ids] for ids in batches]

    def plain(self, text: str) -> list[int] | None:
        return None


class SentencePieceEncoder:
    """A SentencePiece model cut by Google's own library; what transformers makes of such a file cuts otherwise.

    Control symbols are never matched in text by that library. `plain` leaves out the space that the model puts in front
    of a text, and spells U+2581, which stands for a space, by its bytes.
    """

    rewrites = False

    def __init__(self, model: bytes, where: str) -> None:
        """`model`: a serialised ModelProto, of `where`. Raises InputError where it is none."""
        self._model, self._what = model, f"the SentencePiece model of {where}"
        self._cutter = SentencePieceCutter(model, self._what)
        self.pieces = self._cutter.pieces(list(PROBES))
        self._without_prefix: SentencePieceCutter | None = None
        names = {self.pieces.pieces[i]: i for i in self.pieces.bytes}
        mark = [names.get(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark: list[int] = [i for i in mark if i is not None] if None not in mark else []

    def canonical(self, texts: Sequence[str]) -> list[list[int] | Failure]:
        return self._cutter.cut(texts)

    def plain(self, text: str) -> list[int] | Failure | None:
        if SPACE_MARK not in text or not self._mark:
            return None
        if self._without_prefix is None:
            self._without_prefix = SentencePieceCutter(self._model, self._what, prefix=False)
        ids: list[int] = []
        for number, piece in enumerate(self._without_prefix.cut(text.split(SPACE_MARK))):
            if isinstance(piece, Failure):
                return piece
            ids += (self._mark if number else []) + piece
        return ids


class GreedyEncoder:
    """Longest match over the byte trie (RWKV), in at most `STEPS` looks at the trie a byte.

    The published vocabulary needs as many as its longest token has bytes, 128; one with tokens of a million bytes that
    almost match could look at the whole text from every byte of it.
    """

    rewrites = False

    def __init__(self, trie: Trie, order: NDArray[np.int32]) -> None:
        self._trie, self._order = trie, order

    def canonical(self, texts: Sequence[str]) -> list[list[int] | Failure]:
        ids_of: list[list[int] | Failure] = []
        for text in texts:
            data = np.frombuffer(text.encode(), dtype=np.uint8)
            ids = longest_match_within(STEPS * len(data), self._trie, self._order, data)
            ids_of.append(Failure("tokenizer: too slow") if ids is None else ids.tolist())
        return ids_of

    def plain(self, text: str) -> list[int] | None:
        return None


def _spelled_mark(spec: Json) -> list[int]:
    """Ids of the three byte pieces of U+2581, which such a tokenizer reads as a space; empty where it has none."""
    model = spec["model"]
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {row[0]: i for i, row in enumerate(model["vocab"])}
    names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
    return [vocab[name] for name in names] if model.get("byte_fallback") and all(n in vocab for n in names) else []


def _is_space(part: Json) -> bool:
    """SentencePiece's own Replace(" " -> U+2581), which the table undoes."""
    return (part["type"], part["pattern"], part["content"]) == ("Replace", {"String": " "}, SPACE_MARK)


def _without_rewrites(spec: Json) -> Json:
    """`spec` without Unicode normalisation, injected spaces and added tokens that swallow their neighbours' spaces."""

    def normalizer(part: Json) -> Json | None:
        return None if part["type"] in UNICODE_FORMS | {"Prepend"} else part

    def pre_tokenizer(part: Json) -> Json | None:
        if part["type"] == "Metaspace":
            return part | {"prepend_scheme": "never"}
        if part["type"] == "ByteLevel":
            return part | {"add_prefix_space": False}
        return part

    return spec | {
        "normalizer": _rebuild(spec.get("normalizer"), "normalizers", normalizer),
        "pre_tokenizer": _rebuild(spec.get("pre_tokenizer"), "pretokenizers", pre_tokenizer),
        "added_tokens": [token | {"lstrip": False, "rstrip": False} for token in spec["added_tokens"]],
    }


def _rebuild(node: Json | None, plural: str, edit: Callable[[Json], Json | None]) -> Json | None:
    old = list(parts(node, plural))
    new = [changed for part in old if (changed := edit(part)) is not None]
    if new == old:
        return node
    return {"type": "Sequence", plural: new} if new else None
