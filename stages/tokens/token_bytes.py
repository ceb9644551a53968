"""The exact bytes of every token id, read from a fast tokenizer's own JSON by decoder type.

`decode([id])` is never asked: it drops leading spaces and turns partial UTF-8 into U+FFFD. Two families are exact:

  byte-level      (ByteLevel decoder: GPT-2, Llama-3, Qwen, DeepSeek ...) each character of a piece is one byte of a
                  fixed 256-letter alphabet;
  sentencepiece   (ByteFallback / Metaspace / Replace decoders: Llama-2, Mistral, Gemma ...) `<0xNN>` is a byte,
                  U+2581 a space, everything else its own UTF-8.

Added tokens that are not special are the literal UTF-8 of their content. Special ones, and pieces that stand for
"unknown", "padding" or "unused", carry no bytes. Tokenizers that change the text before they cut it are refused.
Price: 0.1-0.3 s for 150k-262k tokens.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from bytecache.schemas.errors import InputError

Json = dict[str, Any]

UNICODE_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalisers that can be left out of the encoding of a document they would change."""

SPACE_MARK = "\u2581"
"""SentencePiece's letter for a space."""
_LOSSY_NORMALIZERS = frozenset({"BertNormalizer", "Lowercase", "StripAccents", "Strip", "Nmt", "Precompiled"})
_LOSSY_PRE_TOKENIZERS = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"})
_SENTENCEPIECE_DECODERS = frozenset({"ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"})
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Not <s> or </s>: Gemma has them as HTML tags; where they are control they are flagged special or named in the config.
_CONTROL_NAME = re.compile(
    r"<\|?(unk|pad|mask|bos|eos|unused_?\d+|reserved_\w*\d+)\|?>|\[(UNK|PAD|MASK|BOS|EOS|@BOS@|unused\d+|control_\d+)\]"
)


MAX_IDS = 1 << 22
"""Ids of a vocabulary, at most; the largest that are published have 2 ** 18, and each costs its readers 50 bytes."""


def room_for(ids: Iterable[int], where: str) -> int:
    """The size of a table that has all these ids. Raises InputError for one that no vocabulary has."""
    highest, lowest = max(ids, default=-1), min(ids, default=0)
    if lowest < 0 or highest >= MAX_IDS:
        bad = lowest if lowest < 0 else highest
        raise InputError(
            f"tokenizer of {where}: a token has id {bad}, ids are 0..{MAX_IDS - 1}; fetch the tokenizer's files again"
        )
    return highest + 1


def refuse_twins(pieces: Mapping[str, int], where: str, what: str = "tokens") -> None:
    """Raises InputError where two texts have one id: which of them it spells would be chance."""
    seen: dict[int, str] = {}
    for piece, i in pieces.items():
        if i in seen:
            raise InputError(
                f"tokenizer of {where}: {what} {seen[i]!r} and {piece!r} have the same id {i}, which spells one; "
                "fetch the tokenizer's files again, or give one of them an id of its own"
            )
        seen[i] = piece


class TokenTable(NamedTuple):
    """What a tokenizer's own files say about its ids."""

    family: str
    token_bytes: list[bytes | None]
    """Bytes by id; None for control tokens and holes."""
    names: dict[str, int]
    """The tokenizer's own spelling of every token, to its id."""
    unknown: frozenset[int]
    """Ids that replace what the tokenizer cannot spell."""


def parts(node: Json | None, plural: str) -> Iterator[Json]:
    """A normaliser, pre-tokeniser or decoder with its Sequences flattened; `plural` is the Sequence's list key."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for child in node[plural]:
            yield from parts(child, plural)
    else:
        yield node


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


def refuse_lossy(spec: Json, where: str) -> str:
    """The family of a tokenizer.json, "byte-level" or "sentencepiece"; InputError where tokens do not spell text."""

    def refuse(why: str) -> InputError:
        return InputError(
            f"tokenizer of {where}: {why}, so its tokens do not spell the text; "
            "use a teacher with a byte-level or byte-fallback tokenizer"
        )

    model = spec["model"]
    decoders = {part["type"] for part in parts(spec.get("decoder"), "decoders")}
    if model["type"] not in ("BPE", "Unigram"):
        raise refuse(f"its model is {model['type']}, which drops spaces and unknown characters")
    if suffix := model.get("end_of_word_suffix"):
        raise refuse(f"it marks word ends with {suffix!r} instead of keeping spaces")
    if prefix := model.get("continuing_subword_prefix"):
        raise refuse(f"it marks word continuations with {prefix!r} instead of keeping spaces")
    for part in parts(spec.get("normalizer"), "normalizers"):
        if part["type"] in _LOSSY_NORMALIZERS:
            raise refuse(f"its {part['type']} normaliser rewrites the text")
    pre_tokenizers = list(parts(spec.get("pre_tokenizer"), "pretokenizers"))
    for part in pre_tokenizers:
        if part["type"] in _LOSSY_PRE_TOKENIZERS:
            raise refuse(f"its {part['type']} pre-tokeniser drops whitespace")
    if "ByteLevel" in decoders or (not decoders and any(part["type"] == "ByteLevel" for part in pre_tokenizers)):
        return "byte-level"
    if decoders and decoders <= _SENTENCEPIECE_DECODERS:
        return "sentencepiece"
    raise refuse(f"its decoder ({', '.join(sorted(decoders)) or 'none'}) has no known byte form")


def table_from_json(spec: Json, where: str, named_special: frozenset[str] = frozenset()) -> TokenTable:
    """Bytes of every id of a tokenizer.json (as `Tokenizer.to_str()` gives it).

    `where` names the tokenizer in errors; `named_special` are the texts its configuration calls bos, eos, pad ...
    """
    family = refuse_lossy(spec, where)
    model = spec["model"]
    vocab = model["vocab"]
    # Unigram stores [piece, score] rows in id order.
    pieces = vocab if isinstance(vocab, dict) else {row[0]: i for i, row in enumerate(vocab)}
    added = spec["added_tokens"]
    size = room_for([*pieces.values(), *(token["id"] for token in added)], where)
    table: list[bytes | None] = [None] * size
    unknown = set()
    if family == "byte-level":
        alphabet = byte_alphabet()
        for piece, i in pieces.items():
            try:
                table[i] = bytes([alphabet[c] for c in piece]) or None
            except KeyError:
                # Outside the alphabet: no text reaches this entry except as an added token, below.
                table[i] = None
    else:
        spell = _speller(spec, where)
        for piece, i in pieces.items():
            table[i] = None if _CONTROL_NAME.fullmatch(piece) else spell(piece)
        for piece in named_special & pieces.keys():
            table[pieces[piece]] = None
    for token in added:
        content, i = token["content"], token["id"]
        if is_control(token, named_special):
            table[i] = None
        elif family == "byte-level" or pieces.get(content) != i:
            table[i] = content.encode() or None
    if (unk_token := model.get("unk_token")) in pieces:
        unknown.add(pieces[unk_token])
    if model.get("unk_id") is not None:
        unknown.add(model["unk_id"])
    for i in unknown:
        table[i] = None
    names = {**pieces, **{token["content"]: token["id"] for token in added}}
    return TokenTable(family, table, names, frozenset(unknown))


class SentencePieces(NamedTuple):
    """What a SentencePiece model says of itself, as its own library reads it."""

    pieces: list[str]
    """By id."""
    silent: list[int]
    """Control, unknown and unused ids."""
    bytes: list[int]
    """Ids that are one byte, named <0xNN>."""
    bos: int
    eos: int
    unk: int
    """-1 where there is none, as for `bos` and `eos`."""
    normalised: list[str]
    """What its normaliser makes of the texts of `PROBES`."""


PROBES = {
    "a  b": "joins spaces",
    "a b ": "drops spaces at the end of a text",
    "a\n\tb": "rewrites white space",
    "\ufb01\uff21\u00bd": "rewrites characters to a compatibility form",
    "e\u0301": "composes accents",
    "Ab": "changes the case of letters",
}
"""Texts that a normaliser may change, and what one does that changes them."""


def table_from_sentencepiece(model: SentencePieces, where: str) -> TokenTable:
    """Bytes of every id of a SentencePiece model.

    Raises InputError for a model whose normaliser changes text: drops spaces, rewrites characters, or puts the space
    of a word behind it.
    """

    def refuse(why: str) -> InputError:
        return InputError(
            f"tokenizer of {where}: its SentencePiece model {why}, so its tokens do not spell the text; "
            "use a teacher with a byte-level or byte-fallback tokenizer"
        )

    for (text, why), raw in zip(PROBES.items(), model.normalised, strict=True):
        normalised = raw.replace(SPACE_MARK, " ")
        if normalised == text + " ":
            raise refuse("puts the space of a word behind it")
        if normalised not in (text, " " + text):
            raise refuse(why)
    table: list[bytes | None] = [piece.replace(SPACE_MARK, " ").encode() or None for piece in model.pieces]
    for i in model.silent:
        table[i] = None
    for i in model.bytes:
        table[i] = bytes([int(model.pieces[i][3:-1], 16)])
    names: dict[str, int] = {}
    for i, piece in enumerate(model.pieces):
        names.setdefault(piece, i)
    return TokenTable("sentencepiece", table, names, frozenset({model.unk}))


def is_control(token: Json, named_special: frozenset[str]) -> bool:
    """Whether an entry of `added_tokens` stands for something other than its text.

    A single character is text even when flagged: "!" as a padding token is common and still an exclamation mark.
    """
    content = token["content"]
    if len(content) == 1:
        return False
    return bool(token["special"] or content in named_special or _CONTROL_NAME.fullmatch(content))


def _speller(spec: Json, where: str) -> Callable[[str], bytes | None]:
    """The function piece -> bytes of a SentencePiece decoder chain."""
    replacements: list[tuple[str, str]] = []
    has_bytes = bool(spec["model"].get("byte_fallback"))
    for part in parts(spec.get("decoder"), "decoders"):
        if part["type"] == "Metaspace":
            replacements.append((part["replacement"], " "))
        elif part["type"] == "ByteFallback":
            has_bytes = True
        elif part["type"] == "Replace":
            pattern = part["pattern"].get("String")
            if pattern is None:
                raise InputError(
                    f"tokenizer of {where}: its decoder replaces by the regular expression {part['pattern']}; "
                    "only plain strings have a known byte form"
                )
            replacements.append((pattern, part["content"]))

    def spell(piece: str) -> bytes | None:
        if has_bytes and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode() or None

    return spell
