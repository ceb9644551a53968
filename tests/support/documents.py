"""The documents of the repository, taken apart: links, headings, blocks of code, commands, words in backticks."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.places import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "schemas").glob("*.md")])
"""Everything in the repository that a person reads at length."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.M)


@dataclass(frozen=True)
class Document:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """Without fenced blocks of code."""
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        """Fenced blocks of one language."""
        return [body for kind, body in _FENCE.findall(self.text) if kind == language]

    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return ["".join(groups) for groups in _LINK.findall(self.prose)]

    def anchors(self) -> set[str]:
        """What `#...` may name: headings, as forges spell them."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}

    def inline(self) -> list[str]:
        """Words in backticks, tables included."""
        return [" ".join(words.split()) for words in re.findall(r"(?<!`)`([^`]+)`(?!`)", self.prose)]

    def shell_lines(self) -> Iterator[str]:
        """Lines of indented and `sh` blocks, continued ones joined."""
        indented = re.findall(r"^(?: {4}|\t)(\S.*)$", self.prose.replace("\\\n", " "), re.M)
        fenced = [line for block in self.blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
        for line in [*indented, *fenced]:
            yield line.removeprefix("$ ").strip()

    def commands(self) -> Iterator[list[str]]:
        """Arguments of every `bytecache` command in its blocks."""
        for line in self.shell_lines():
            for part in re.split(r" (?:&&|\|\|?|;) ", line):
                words = _words(part)
                if words[:1] in (["bytecache"], ["python"], ["torchrun"]) and "bytecache" in words:
                    yield words[1 + words.index("bytecache") :]


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    redirected = [at for at, word in enumerate(words) if re.fullmatch(r"\d?>+.*|<", word)]
    return words[: redirected[0]] if redirected else words


def documents() -> list[Document]:
    """All of them."""
    return [Document(path) for path in DOCUMENTS]
