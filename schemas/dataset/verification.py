"""What is wrong with a dataset folder: every hash recomputed, every file accounted for.

Price: one read of every byte (about 1 GB/s per core); `deep` adds the decoding of each shard.
"""

import os
from pathlib import Path
from typing import NamedTuple

from bytecache.schemas.dataset import card
from bytecache.schemas.dataset.index import DATASET, SUFFIX, ShardEntry, read_dataset
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.files import file_sha256, read_regular
from bytecache.schemas.shard.reader import read_shard

_COMPARED = ("n_documents", "n_bytes", "n_positions", "n_supervised", "n_entries", "tail_mean", "tail_max")


class Problem(NamedTuple):
    """One fault of one file."""

    file: str
    kind: str
    """index | missing | truncated | altered | inconsistent | duplicated | foreign | unreadable"""
    detail: str


def verify_dataset(folder: str | os.PathLike[str], *, deep: bool = False) -> list[Problem]:
    """Everything that is wrong with a dataset folder, by file name; an empty list means every byte is as published.

    Recomputes each shard's sha256; reports shards that are missing, truncated, altered, duplicated (listed twice
    by content, or present under a second name) or foreign (`*.zarr.zip` that no entry lists), and a card that is not
    as it was made (one that people took over is theirs). `deep` also opens each shard and compares its structure and
    counts with the manifest. Never raises for a broken dataset.
    """
    try:
        dataset = read_dataset(folder)
    except (IntegrityError, StorageError) as error:
        return [Problem(DATASET, "index", str(error))]
    problems: list[Problem] = []
    by_hash: dict[str, str] = {}
    for entry in dataset.entries:
        if entry.sha256 in by_hash:
            problems.append(Problem(entry.file, "duplicated", f"same content as {by_hash[entry.sha256]}"))
        by_hash.setdefault(entry.sha256, entry.file)
        fault = check_shard(dataset.path(entry), entry, deep=deep)
        problems += [fault] if fault else []
    known = {entry.file for entry in dataset.entries}
    sizes = {entry.size for entry in dataset.entries}
    for path in sorted(dataset.folder.iterdir()):
        if path.name.endswith(SUFFIX) and path.name not in known:
            # A file of another size is no copy, however long it would take to hash.
            copied = path.is_file() and path.stat().st_size in sizes
            twin = by_hash.get(file_sha256(path)) if copied else None
            kind, detail = ("duplicated", f"same content as {twin}") if twin else ("foreign", "no entry lists it")
            problems.append(Problem(path.name, kind, detail))
    return problems + _check_card(dataset.folder / card.FILE)


def _check_card(path: Path) -> list[Problem]:
    try:
        raw = read_regular(path, card.LONGEST)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [Problem(card.FILE, "unreadable", error.strerror or str(error))]
    # Whoever writes more than that has a card of his own.
    fault = card.fault(raw) if len(raw) <= card.LONGEST else ""
    return [Problem(card.FILE, "altered", fault)] if fault else []


def check_shard(path: Path, entry: ShardEntry, *, deep: bool = False) -> Problem | None:
    """What is wrong with one listed shard."""
    try:
        size = path.stat().st_size
        found = file_sha256(path) if size == entry.size else ""
    except FileNotFoundError:
        return Problem(entry.file, "missing", f"the manifest lists {entry.size} bytes")
    except OSError as error:
        return Problem(entry.file, "unreadable", str(error))
    if size < entry.size:
        return Problem(entry.file, "truncated", f"{size} bytes, the manifest says {entry.size}")
    if size > entry.size:
        return Problem(entry.file, "altered", f"{size} bytes, the manifest says {entry.size}")
    if found != entry.sha256:
        return Problem(entry.file, "altered", f"sha256 is {found}, the manifest says {entry.sha256}")
    return _deep(path, entry) if deep else None


def _deep(path: Path, entry: ShardEntry) -> Problem | None:
    try:
        statistics = read_shard(path).statistics
    except (IntegrityError, StorageError) as error:
        return Problem(entry.file, "inconsistent", str(error))
    wrong = [
        f"{name} is {statistics.get(name)}, the manifest says {getattr(entry, name)}"
        for name in _COMPARED
        if statistics.get(name) != getattr(entry, name)
    ]
    return Problem(entry.file, "inconsistent", "; ".join(wrong)) if wrong else None
