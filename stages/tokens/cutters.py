"""Texts cut into ids by a stranger's tokenizer: here where nothing in it can run away, else in a child (`guard`).

What can run away is a regular expression: on some texts its time grows beyond all bounds, or the library gives up and
ends the process; and a normaliser that replaces one letter by a million. The expressions that the published encodings
use are known to be linear (`TAME`); a tokenizer with no others and no such steps (`is_tame`) cuts in this process, at
the library's own speed. Every other one runs in the child, and so does
a text of more than `LONG` characters, which takes a hundred bytes of memory a character. SentencePiece always cuts in
the child: how long a text takes is up to the pieces of the model.
"""

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.guard import TO_OPEN, Failure, Guard, UnopenedError, groups, is_panic, tokens_of
from bytecache.stages.tokens.token_bytes import Json, SentencePieces, parts

LONG = 1 << 22
_CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _published() -> Iterator[str]:
    """The expressions of GPT-2 and its many heirs: each alternative that can fail late is followed by one that eats."""
    for digits in (r"\p{N}", r"\p{N}{1,3}", r"\p{N}{1}", r"\d", r"\d{1,3}", r"\p{N}+"):
        yield digits
        for end in ("", r"\s+$|"):
            yield f"{_CUTS}|{_WORD}|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|{end}{_SPACES}"
        for contraction in ("", f"{_CUTS}?"):
            words = (
                rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contraction}|"
                rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contraction}"
            )
            for tail in (r"[\r\n/]*", r"[\r\n]*"):
                yield f"{words}|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+{tail}|{_SPACES}"
    yield r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    yield r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    yield "[一-龥\u3040-ゟ゠-ヿ]+"
    marks = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    yield (marks + "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+")
    yield r"\s+"
    yield " {2,}"


TAME = frozenset(_published())


MOST_PARTS = 64
"""Steps of a normaliser or pre-tokeniser that a tame tokenizer has, at most."""
MOST_GROWTH = 8.0
"""Characters that a tame normaliser makes of one, at most."""
MOST_BLOWN = 1000.0
LONGEST_PIECE = 512
"""Characters of a Unigram piece: from every position of a text the library looks for pieces of all lengths."""


def is_tame(spec: Json) -> bool:
    """Whether what a tokenizer.json does to a text is known to end, in memory that the text's length bounds.

    Every regular expression is one of the published ones; there are few steps, none of which blows text up; and no
    piece of a Unigram model is so long that looking for it takes for ever.
    """
    steps = [*parts(spec.get("normalizer"), "normalizers"), *parts(spec.get("pre_tokenizer"), "pretokenizers")]
    if len(steps) > MOST_PARTS or math.prod(map(_growth, steps)) > MOST_GROWTH:
        return False
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list) and any(len(row[0]) > LONGEST_PIECE for row in vocab):
        return False
    patterns = (step["pattern"] for step in steps if isinstance(step.get("pattern"), dict))
    return all(str(pattern["Regex"]) in TAME for pattern in patterns if "Regex" in pattern)


def blows_up(spec: Json) -> bool:
    """Whether a normaliser makes more than `MOST_BLOWN` characters of one: no text could be learned through it."""
    try:
        return math.prod(map(_growth, parts(spec.get("normalizer"), "normalizers"))) > MOST_BLOWN
    except (KeyError, TypeError, AttributeError, ValueError):
        return False  # no tokenizer at all, which its library says better


def _growth(step: Json) -> float:
    """How many characters a step may make of one."""
    if step["type"] == "Prepend":
        return 1.0 if len(step["prepend"]) <= LONGEST_PIECE else math.inf
    if step["type"] != "Replace":
        return 1.0
    pattern = step["pattern"].get("String", "")
    return max(1.0, len(step["content"]) / len(pattern)) if pattern else 1.0 + len(step["content"])


class HfCutter:
    """A `tokenizers` pipeline. `seal`: text that looks like a control token is cut like any text."""

    def __init__(self, spec: Json, what: str, *, seal: bool = True) -> None:
        self._spec, self._what, self._seal = spec, what, seal
        self._here: Tokenizer | None = None
        self._guard: Guard | None = None
        if is_tame(spec):
            self._here = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
            self._here.encode_special_tokens = seal

    def cut(self, texts: Sequence[str]) -> list[list[int] | Failure]:
        """The ids of every text, or why it has none."""
        if self._here is None:
            return tokens_of(self._child(), texts)
        ids: list[list[int] | Failure] = []
        for group in groups(texts):
            ids += self._cut_here(self._here, group)
        return ids

    def _cut_here(self, tokenizer: Tokenizer, group: list[str]) -> list[list[int] | Failure]:
        if max(map(len, group)) <= LONG:
            try:
                batch = tokenizer.encode_batch_fast(group, add_special_tokens=False)
                return [encoding.ids for encoding in batch]
            except BaseException as error:
                if not is_panic(error):
                    raise
        return tokens_of(self._child(), group)

    def _child(self) -> Guard:
        if self._guard is None:
            text = json.dumps(self._spec, ensure_ascii=False)
            self._guard = Guard(self._what, {"kind": "tokenizer", "spec": text, "seal": self._seal})
        return self._guard


class RankCutter:
    """tiktoken over ranks."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, what: str) -> None:
        self._here: Any = None
        self._guard: Guard | None = None
        if pattern in TAME:
            import tiktoken

            self._here = tiktoken.Encoding("teacher", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        else:
            listed = [[data.hex(), rank] for data, rank in ranks.items()]
            self._guard = Guard(what, {"kind": "ranks", "ranks": listed, "pattern": pattern})

    def cut(self, texts: Sequence[str]) -> list[list[int] | Failure]:
        """The ranks of every text, or why it has none."""
        if self._guard is not None:
            return tokens_of(self._guard, texts)
        ids: list[list[int] | Failure] = list(self._here.encode_ordinary_batch(list(texts), num_threads=1))
        return ids


class SentencePieceCutter:
    """A SentencePiece model. `prefix` off: no space is put in front of a text, whatever the model says."""

    def __init__(self, model: bytes, what: str, *, prefix: bool = True) -> None:
        """Raises InputError where the package is missing."""
        if importlib.util.find_spec("sentencepiece") is None:
            raise InputError("a SentencePiece model needs the package sentencepiece; pip install sentencepiece")
        self._guard = Guard(what, {"kind": "sentencepiece", "model": model.hex(), "prefix": prefix})

    def cut(self, texts: Sequence[str]) -> list[list[int] | Failure]:
        """The ids of every text, or why it has none."""
        return tokens_of(self._guard, texts)

    def pieces(self, probes: Sequence[str]) -> SentencePieces:
        """What the model says of its ids, and what its normaliser makes of `probes`. Raises InputError."""
        try:
            answer = self._guard.call({"pieces": list(probes)}, TO_OPEN)
        except UnopenedError as error:
            raise InputError(f"no SentencePiece model ({error.reason})") from error
        if isinstance(answer, Failure):
            raise InputError(f"no SentencePiece model whose pieces can be read ({answer})")
        return SentencePieces(*answer[0])
