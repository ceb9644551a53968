"""What is wrong with a dataset folder: every hash recomputed, every file accounted for.

Price: one read of every byte (about 1 GB/s per core); `deep` adds the decoding of each shard (40-75 MB text/s/core).
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bytecache.schemas import strict_json
from bytecache.schemas.dataset import card
from bytecache.schemas.dataset.editions import edition_folder, edition_of, older_editions
from bytecache.schemas.dataset.index import DATASET, MAX_JSON, SUFFIX, Dataset, ShardEntry, read_dataset
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.files import file_sha256, read_member, refuse_stray
from bytecache.schemas.shard.codes import TAIL
from bytecache.schemas.shard.reader import ByteShard, read_shard

_COUNTED = ("n_documents", "n_bytes", "n_positions", "n_supervised", "n_entries")
_TAILS = ("tail_mean", "tail_max")


class Problem(NamedTuple):
    """One fault of one file."""

    file: str
    kind: str
    """index | older (index of an edition) | missing | truncated | altered | inconsistent | duplicated | foreign
    | unreadable"""
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
    older, problems = check_editions(dataset)
    by_hash: dict[str, str] = {}
    for entry in (*dataset.entries, *older):
        if entry.sha256 in by_hash:
            problems.append(Problem(entry.file, "duplicated", f"same content as {by_hash[entry.sha256]}"))
        by_hash.setdefault(entry.sha256, entry.file)
        fault = check_shard(dataset.path(entry), entry, deep=deep)
        problems += [fault] if fault else []
    known = {entry.file for entry in (*dataset.entries, *older)}
    sizes = {entry.size for entry in (*dataset.entries, *older)}
    for path in sorted(dataset.folder.iterdir()):
        if path.name.endswith(SUFFIX) and path.name not in known:
            # A file of another size is no copy, however long it would take to hash.
            copied = path.is_file() and path.stat().st_size in sizes
            twin = by_hash.get(file_sha256(path)) if copied else None
            kind, detail = ("duplicated", f"same content as {twin}") if twin else ("foreign", "no entry lists it")
            problems.append(Problem(path.name, kind, detail))
    return problems + _check_card(dataset.folder)


def check_editions(dataset: Dataset) -> tuple[list[ShardEntry], list[Problem]]:
    """Shards that only older editions list, and what is wrong with the indices of those and with their chain.

    Reads indices alone, no shard.
    """
    entries, problems = dict[str, ShardEntry](), list[Problem]()
    before: Dataset | None = None
    for name, folder in older_editions(dataset.folder):
        try:
            older = read_dataset(folder)
        except (IntegrityError, StorageError) as error:
            problems.append(Problem(f"{name}/{DATASET}", "older", str(error)))
            before = None  # what follows it cannot be compared with it
            continue
        fault = edition_fault(older, before) or (
            f"is edition {edition_of(older.info)}" if name != edition_folder(edition_of(older.info)) else ""
        )
        problems += [Problem(f"{name}/{DATASET}", "older", fault)] if fault else []
        entries.update((entry.file, entry) for entry in older.entries)
        before = older
    fault = edition_fault(dataset, before)
    problems += [Problem(DATASET, "index", fault)] if fault else []
    newest = {entry.file for entry in dataset.entries}
    return [entry for file, entry in entries.items() if file not in newest], problems


def edition_fault(dataset: Dataset, before: Dataset | None) -> str:
    """Why an index cannot follow the edition before it, in words; "" where it can, and where there is none before."""
    if before is None:
        return ""
    if edition_of(dataset.info) == edition_of(before.info) and dataset.content_sha256 == before.content_sha256:
        return ""  # kept already, by a conversion that was ended before it wrote the next
    info = dataset.info
    number, parent = edition_of(info), (info.get("edition") or {}).get("parent", "")
    if number <= edition_of(before.info):
        return f"is edition {number}, and edition {edition_of(before.info)} is an older one beside it"
    if parent != before.content_sha256:
        return (
            f"names {parent[:12] or 'nothing'} as its parent, and edition {edition_of(before.info)}, before it, is "
            f"{before.content_sha256[:12]}"
        )
    return ""


def _check_card(folder: Path) -> list[Problem]:
    try:
        raw = read_member(folder / card.FILE, card.LONGEST)
    except FileNotFoundError:
        return [Problem(card.FILE, "missing", "the data set has no card for those who download it")]
    except OSError as error:
        return [Problem(card.FILE, "unreadable", error.strerror or str(error))]
    # Whoever writes more than that has a card of his own.
    fault = card.fault(raw, _rendered(folder)) if len(raw) <= card.LONGEST else ""
    return [Problem(card.FILE, "altered", fault)] if fault else []


def _rendered(folder: Path) -> bytes:
    """The card that the index makes; nothing where it makes none."""
    try:
        return card.render(strict_json.parse(read_member(folder / DATASET, MAX_JSON)))
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return b""


def check_shard(path: Path, entry: ShardEntry, *, deep: bool = False) -> Problem | None:
    """What is wrong with one listed shard."""
    try:
        refuse_stray(path)
        size = path.stat().st_size
        sha256 = file_sha256(path) if size == entry.size else ""
    except FileNotFoundError:
        return Problem(entry.file, "missing", f"the manifest lists {entry.size} bytes")
    except OSError as error:
        return Problem(entry.file, "unreadable", error.strerror or str(error))
    if size < entry.size:
        return Problem(entry.file, "truncated", f"{size} bytes, the manifest says {entry.size}")
    if size > entry.size:
        return Problem(entry.file, "altered", f"{size} bytes, the manifest says {entry.size}")
    if sha256 != entry.sha256:
        return Problem(entry.file, "altered", f"sha256 is {sha256}, the manifest says {entry.sha256}")
    return _deep(path, entry) if deep else None


def _deep(path: Path, entry: ShardEntry) -> Problem | None:
    try:
        shard = read_shard(path)
    except (IntegrityError, StorageError) as error:
        return Problem(entry.file, "inconsistent", str(error))
    wrong = contradictions(shard, entry) or _false_tails(shard)
    return Problem(entry.file, "inconsistent", "; ".join(wrong)) if wrong else None


def contradictions(shard: ByteShard, entry: ShardEntry) -> list[str]:
    """Where a manifest's entry says other things of a shard than the shard does; a list of words, empty if nowhere.

    The counts are those of the columns (`read_shard` compares the shard's own statistics with them), the tails those
    that the shard states. Price: one sum over the mask.
    """
    stated: dict[str, Any] = {**shard.statistics, "n_supervised": int(shard.mask.sum(dtype=np.int64))}
    return [
        f"{name} is {stated.get(name)}, the manifest says {getattr(entry, name)}"
        for name in (*_COUNTED, *_TAILS)
        if stated.get(name) != getattr(entry, name)
    ]


def _false_tails(shard: ByteShard) -> list[str]:
    """Where a shard's statistics of its unlisted mass are not those of its columns (rounding to six digits aside)."""
    codes = np.bincount(shard.codes["tail"][shard.mask == 1], minlength=256)
    used = np.flatnonzero(codes)
    mass = math.fsum(float(TAIL[code]) * int(codes[code]) for code in used)
    measured = {
        "tail_mean": mass / max(1, int(codes.sum())),
        "tail_max": float(TAIL[used].max()) if len(used) else 0.0,
    }
    return [
        f"{name} is {shard.statistics.get(name)} in its statistics, {value:.6g} in its columns"
        for name, value in measured.items()
        if not math.isclose(float(shard.statistics.get(name, math.nan)), value, rel_tol=1e-5, abs_tol=1e-12)
    ]
