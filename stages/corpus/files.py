"""Which files a corpus is of: one file, a folder of them in a fixed order, what the hub streams, or none."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.files import kind_of, local_path
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus import hub
from bytecache.stages.corpus.containers import COMPRESSED, TABLES
from bytecache.stages.corpus.saved import saved_files

BUILTIN = "builtin:pydoc-topics"
SUFFIXES = (".jsonl", *(f".jsonl{ending}" for ending in COMPRESSED), *TABLES, ".txt")


class File(NamedTuple):
    """A file of the corpus, by the `name` that ids are made of; or of it the lines that begin in [begin, end)."""

    path: str
    name: str
    begin: int = 0
    end: int | None = None


def corpus_files(corpus: Corpus) -> tuple[list[File], list[str]]:
    """The files of a corpus in order, none for a built-in one, and the names of the others that its folder holds.

    Hidden ones, whose names begin with a full stop, are in neither.

    Raises InputError where there is no such source, nothing in it that can be read, or a name that is not UTF-8;
    ConfigError for a built-in corpus that does not exist or is not of `corpus.kind`.
    """
    source = corpus.source
    if source.startswith("builtin:"):
        if source != BUILTIN:
            raise ConfigError(f"corpus.source = {source!r}: the only built-in corpus is {BUILTIN}")
        if corpus.kind != "text":
            raise ConfigError(f"corpus.kind = {corpus.kind!r}: {BUILTIN} is plain text; name another source")
        return [], []
    if source.startswith(hub.PREFIX):
        split = hub.pinned(source)
        return [File(split.url, split.name)], []
    root = local_path(source)
    if not root.exists():
        raise InputError(
            f"corpus.source = {source!r} does not exist; name a file, a folder, {hub.PREFIX}OWNER/NAME or {BUILTIN}"
        )
    ignored: list[str] = []
    if root.is_dir() and (saved := saved_files(root)) is not None:
        known = saved
    elif root.is_dir():
        files = sorted(_walk(root), key=lambda pair: pair[1].encode("utf-8", "surrogateescape"))
        known = [pair for pair in files if _is_text(pair[1])]
        ignored = [name for _, name in files if not _is_text(name)]
        if not known:
            raise InputError(
                f"folder {source} holds none of {', '.join(SUFFIXES)} ({len(files)} other files); "
                "convert the text to one of them"
            )
    else:
        known = [(root, root.name)]
    for path, name in known:
        # A pipe can be read once, a plan reads its corpus twice; a device may never end.
        if path.exists() and not path.is_file():
            raise InputError(f"{str(path)!r} is {kind_of(path.stat().st_mode)}, not a regular file; name a file")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"file name {name!r} is not UTF-8; rename it") from None
    return [File(str(path), name) for path, name in known], ignored


def source_name(source: str) -> str:
    """What a corpus is called for strangers: its place and commit on the hub, or the last part of a path."""
    return hub.pinned(source).url if source.startswith(hub.PREFIX) else Path(source).name


def ending_of(name: str) -> str:
    """Which of `SUFFIXES` a file of a corpus has; "the hub" for what is streamed from there."""
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "the hub")


def _is_text(name: str) -> bool:
    """Whether a file of a folder is part of the corpus; cache-*.arrow are copies that `datasets` leaves beside it."""
    return name.endswith(SUFFIXES) and not (name.endswith(".arrow") and Path(name).name.startswith("cache-"))


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    for place, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        for file in files:
            if not file.startswith("."):
                path = Path(place) / file
                yield path, path.relative_to(root).as_posix()
