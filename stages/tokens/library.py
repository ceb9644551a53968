"""What transformers makes of a folder's tokenizer: asked of a child with a clock and a memory cap, unless it is tame.

Which class opens a folder is up to names in its files, and what that class does with them has no end of its own: it
may convert other files, normalise every token, or give up in a library. A folder whose tokenizer.json is tame
(`cutters.is_tame`) and that holds no other vocabulary is opened in this process, in a tenth of a second; every other
one in a child (`guard`), which costs three.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tokenizers

from bytecache.schemas import strict_json
from bytecache.schemas.files import read_regular
from bytecache.stages.tokens.cutters import is_tame
from bytecache.stages.tokens.guard import MIB, Failure, Guard, Limits, UnopenedError, is_panic
from bytecache.stages.tokens.template_files import refuse_unusable

MAX_FILE = 1 << 28
"""Bytes of a tokenizer's file, at most."""
OPENING = Limits(120.0, 4096 * MIB)
"""What the child may take to open a folder and cut a few short texts."""
_OTHERS = ("vocab.*", "merges.txt", "*.model", "*.model.v*", "*.tiktoken", "tekken*.json", "added_tokens.json", "*.py")
"""Other files that some classes make a tokenizer of."""


class Facts(NamedTuple):
    """What transformers says of a folder. `spec`: its tokenizer.json, None where the class has no fast form."""

    class_name: str
    names: dict[str, Any]
    """special tokens by the names that templates know them by"""
    template: str | None
    """the chat template that is taken; None where there is none"""
    templates: str
    """all that there are, as text: their identity"""
    spec: str | None
    choices: tuple[str, ...] = ()
    """names of the chat templates, where there are several and none is taken"""


class Opened(Protocol):
    """A folder as transformers opens it: `auto` by AutoTokenizer, else as its tokenizer.json stands."""

    def facts(self) -> Facts:
        """What there is to know of what AutoTokenizer opens."""
        ...

    def ids(self, texts: Sequence[str], *, auto: bool, special: bool = False) -> list[list[int]]:
        """The tokens of texts; `special`: with those that the class adds."""
        ...

    def differences(self, texts: Sequence[str], *, auto: bool) -> str:
        """How it cuts and joins texts otherwise than the folder's tokenizer.json; "" if it does not."""
        ...


@contextmanager
def opened(folder: Path, what: str) -> Iterator[Opened]:
    """A folder, for the length of a block.

    Raises InputError where its chat templates cannot be used, UnopenedError, then or at the first question, saying why.
    """
    refuse_unusable(folder, what)
    if is_contained(folder):
        yield Here(folder, what)
        return
    guard = Guard(what, {"kind": "library", "folder": str(folder.resolve())})
    try:
        yield _There(guard, what)
    finally:
        guard.close()


def is_contained(folder: Path) -> bool:
    """Whether opening a folder's tokenizer is work that its size bounds."""
    if any(any(folder.glob(pattern)) for pattern in _OTHERS):
        return False
    try:
        raw = read_regular(folder / "tokenizer.json", MAX_FILE)
        return len(raw) <= MAX_FILE and is_tame(strict_json.loads(raw))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class Here:
    """In this process, which may be the child's. Raises UnopenedError where transformers gives up."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self._kept: dict[bool, Any] = {}

    def _open(self, auto: bool) -> Any:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if auto not in self._kept:
            try:
                if auto:
                    self._kept[auto] = AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False)
                else:
                    self._kept[auto] = PreTrainedTokenizerFast.from_pretrained(str(self.folder))
            except BaseException as error:  # whatever its classes raise; a panic of a Rust library is no Exception
                if not isinstance(error, Exception) and not is_panic(error):
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise UnopenedError(self.what, reason) from error
        return self._kept[auto]

    def facts(self) -> Facts:
        """See `Opened`."""
        tokenizer = self._open(True)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        names = json.loads(json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True))
        templates = tokenizer.chat_template
        template, choices = templates, list[str]()
        if isinstance(templates, dict):
            template, choices = templates.get("default"), sorted(map(str, templates))
        spec = backend.to_str() if backend else None
        shown = str(template) if template else None
        return Facts(type(tokenizer).__name__, names, shown, str(templates), spec, () if shown else tuple(choices))

    def ids(self, texts: Sequence[str], *, auto: bool, special: bool = False) -> list[list[int]]:
        """See `Opened`."""
        tokenizer = self._open(auto)
        return [list(tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]

    def differences(self, texts: Sequence[str], *, auto: bool) -> str:
        """See `Opened`."""
        return differences(self._open(auto), self.folder / "tokenizer.json", texts)


class _There:
    """In a child."""

    def __init__(self, guard: Guard, what: str) -> None:
        self._guard, self._what = guard, what

    def _ask(self, work: str, **arguments: Any) -> Any:
        answer = self._guard.call({"work": work, **arguments}, OPENING)
        if isinstance(answer, Failure):
            raise UnopenedError(self._what, answer)
        return answer[0]

    def facts(self) -> Facts:
        """See `Opened`."""
        return Facts(*self._ask("facts"))

    def ids(self, texts: Sequence[str], *, auto: bool, special: bool = False) -> list[list[int]]:
        """See `Opened`."""
        ids: list[list[int]] = self._ask("ids", texts=list(texts), auto=auto, special=special)
        return ids

    def differences(self, texts: Sequence[str], *, auto: bool) -> str:
        """See `Opened`."""
        return str(self._ask("differences", texts=list(texts), auto=auto))


def differences(tokenizer: Any, file: Path, texts: Sequence[str]) -> str:
    """How a tokenizer of transformers cuts and joins texts otherwise than a tokenizer.json; "" if it does not."""
    original = tokenizers.Tokenizer.from_file(str(file))
    original.no_truncation()
    original.no_padding()
    wrong = []
    for text in texts:
        ids = original.encode(text, add_special_tokens=False).ids
        joined = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            wrong.append(f"cuts {text[:24]!r} otherwise")
        elif joined != original.decode(ids, skip_special_tokens=False):
            wrong.append(f"joins the tokens of {text[:24]!r} otherwise")
    return f"{wrong[0]}, and {len(wrong) - 1} more of {len(texts)}" if wrong else ""
