"""Text without records: lines of a file in UTF-8, runs of paragraphs, and Python's manual, which is built in."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from bytecache.schemas.errors import InputError
from bytecache.stages.corpus.files import BUILTIN

MAX_LINE = 1 << 30
"""Bytes of a line of a text file."""
PARAGRAPH_BYTES = 4096


def decode(raw: bytes, path: Path, line: int, offset: int) -> str:
    """UTF-8 that begins at this line and byte of a file. Raises InputError, which says where it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}, line {line} (byte {offset + error.start}): byte 0x{raw[error.start]:02x} is not UTF-8 "
            f"({error.reason}); re-encode the file as UTF-8"
        ) from None


def lines_of(stream: BinaryIO, path: Path) -> Iterator[str]:
    """The lines of a text file, their ends included. Raises InputError."""
    offset = 0
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
        text = decode(line, path, number, offset)
        yield text.removeprefix("\ufeff") if number == 1 else text
        offset += len(line)


def paragraph_runs(lines: Iterable[str], longest: int) -> Iterator[tuple[int, str]]:
    """(first line, text): a run ends after a blank line once it has PARAGRAPH_BYTES; joined, they are the lines.

    Without a blank line a run ends where it has more than `longest` bytes.
    """
    pieces: list[str] = []
    size, first = 0, 1
    for number, line in enumerate(lines, 1):
        pieces.append(line)
        size += len(line.encode())
        if (size >= PARAGRAPH_BYTES and not line.strip()) or size > longest:
            yield first, "".join(pieces)
            pieces, size, first = [], 0, number + 1
    if pieces:
        yield first, "".join(pieces)


def pydoc_topics(longest: int) -> Iterator[tuple[str, str, str]]:
    """Runs of paragraphs of Python's documentation, in the order of a hash of their names: any prefix is fair.

    `longest`: as in `paragraph_runs`. Yields place, name and text.
    """
    from pydoc_data.topics import topics

    pieces = {
        f"{topic}:{first}": piece
        for topic, text in topics.items()
        for first, piece in paragraph_runs(text.splitlines(keepends=True), longest)
    }
    for name in sorted(pieces, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest()):
        yield f"{BUILTIN} {name}", name, pieces[name]
