"""The index of a dataset folder: `manifest.parquet` (one row per shard) and `dataset.json`, written last.

A folder is a dataset once its `dataset.json` names the hash of its `manifest.parquet`, which names the hash of
every shard. Both are written to a temporary name, flushed and renamed, so a kill leaves the old index or the new
one, or (between the two renames) a pair whose hashes disagree, which is refused with the remedy. The index holds
no time and no path, so equal shards and info give an equal index.

Price: `read_dataset` reads two small files; `verify_dataset` hashes every shard (about 1 GB/s per core).
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from schemas.byte_shard import read_shard
from schemas.errors import InputError, IntegrityError, StorageError

FORMAT = "bytecache.dataset"
VERSION = 1
MANIFEST, DATASET, SUFFIX = "manifest.parquet", "dataset.json", ".zarr.zip"
MAX_JSON, MAX_MANIFEST = 1 << 24, 1 << 28
"""Bytes of the two index files that a reader is willing to load."""

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
Mass = Annotated[float, Field(ge=0.0, le=1.0)]


class ShardEntry(BaseModel):
    """One shard as the manifest lists it; a plain file name, so that no entry can point outside the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.zarr\.zip$")]
    split: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    sha256: Hash
    size: Count
    n_documents: Count
    n_bytes: Count
    n_positions: Count
    n_entries: Count
    tail_mean: Mass
    tail_max: Mass
    key: Annotated[str, StringConstraints(min_length=1, max_length=200)]


_COUNTS = ("size", "n_documents", "n_bytes", "n_positions", "n_entries")
_ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
_SCHEMA = pa.schema(
    [
        pa.field(name, _ARROW["int" if name in _COUNTS else "float" if name.startswith("tail") else "str"], False)
        for name in ShardEntry.model_fields
    ]
)
_IDENTITY = ("teacher", "tokenizer", "corpus", "settings", "software", "creation")
_FREE_TEXT = ("license", "attribution")


@dataclass(frozen=True)
class Dataset:
    """A dataset's index, checked against itself (the shards' bytes are checked by `verify_dataset`)."""

    folder: Path
    entries: tuple[ShardEntry, ...]
    """sorted by split, then file"""
    info: dict[str, Any]
    """teacher, tokenizer, corpus, settings, software, creation: objects; license, attribution: text; and more"""
    manifest_hash: str
    """sha256 over the entries' values: the identity that data order depends on, whatever wrote the Parquet file"""
    fidelity: dict[str, Any] | None = None
    """how far the stored targets are from a reference of the same teacher (SPEC.md); None: not measured"""

    def split(self, name: str) -> list[ShardEntry]:
        return [entry for entry in self.entries if entry.split == name]

    def path(self, entry: ShardEntry) -> Path:
        return self.folder / entry.file


class Problem(NamedTuple):
    file: str
    kind: str
    """index | missing | truncated | altered | inconsistent | duplicated | foreign | unreadable"""
    detail: str


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_shard(path: str | os.PathLike[str], split: str, key: str, statistics: dict[str, Any]) -> ShardEntry:
    """Entry of a finished shard: hashes the file; `statistics` as `ShardBuilder.write` returned them."""
    names = (*_COUNTS, "tail_mean", "tail_max")
    numbers = {name: statistics[name] for name in names}
    return ShardEntry(file=Path(path).name, split=split, key=key, sha256=file_sha256(path), **numbers)


def _content_hash(entries: Sequence[ShardEntry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps(entry.model_dump(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _in_order(entries: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: (entry.split, entry.file)))


def _totals(entries: Sequence[ShardEntry]) -> dict[str, dict[str, Any]]:
    """Per split: number of shards, summed counts, mean tail per position, largest tail."""
    out: dict[str, dict[str, Any]] = {}
    for split in sorted({entry.split for entry in entries}):
        mine = [entry for entry in entries if entry.split == split]
        totals: dict[str, Any] = {"n_shards": len(mine)}
        totals |= {name: sum(getattr(entry, name) for entry in mine) for name in _COUNTS}
        mass = math.fsum(entry.tail_mean * entry.n_positions for entry in mine)
        totals["tail_mean"] = float(f"{mass / max(1, totals['n_positions']):.6g}")
        totals["tail_max"] = max(entry.tail_max for entry in mine)
        out[split] = totals
    return out


def _replace(path: Path, data: bytes) -> None:
    """Atomically give `path` this content: temporary name in the same folder, flush, rename, flush the folder."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error}; free space or fix permissions, then rerun") from error


def _checked_info(info: dict[str, Any]) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(info, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:
        raise InputError(f"dataset info is not plain JSON: {error}; use text, numbers, lists and objects") from error
    out: dict[str, Any] = {name: {} for name in _IDENTITY} | dict.fromkeys(_FREE_TEXT, "") | plain
    for names, kind in ((_IDENTITY, dict), (_FREE_TEXT, str)):
        for name in names:
            if not isinstance(out[name], kind):
                raise InputError(f"dataset info {name!r} is a {type(out[name]).__name__}, must be a {kind.__name__}")
    return out


def write_dataset(
    folder: str | os.PathLike[str],
    entries: Iterable[ShardEntry],
    info: dict[str, Any],
    fidelity: dict[str, Any] | None = None,
) -> Dataset:
    """Publish a folder of finished shards: write `manifest.parquet`, then `dataset.json`.

    `info`: any JSON object; `teacher`, `tokenizer`, `corpus`, `settings`, `software`, `creation` (no time of day,
    or equal runs differ) must be objects, `license` and `attribution` text; what is absent is written as empty.
    `fidelity`: the certificate of `stages.fidelity`, plain JSON; None where nothing was measured.
    Raises InputError for entries that repeat a file or content or whose file is absent or of another size;
    StorageError when the disk refuses.
    """
    folder = Path(folder)
    listed = _in_order(entries)
    for what in ("file", "sha256"):
        seen: dict[str, str] = {}
        for entry in listed:
            value = getattr(entry, what)
            if value in seen:
                raise InputError(
                    f"{entry.file}: {what} {value} is already listed ({seen[value]}); list each shard once"
                )
            seen[value] = entry.file
    for entry in listed:
        path = folder / entry.file
        if not path.is_file() or path.stat().st_size != entry.size:
            raise InputError(f"{path}: missing, or not of {entry.size} bytes; commit every shard before the index")
    sink = pa.BufferOutputStream()
    rows = [entry.model_dump() for entry in listed]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd", store_schema=False)
    manifest = sink.getvalue().to_pybytes()
    content_hash = _content_hash(listed)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "manifest": {"file": MANIFEST, "sha256": hashlib.sha256(manifest).hexdigest(), "content_sha256": content_hash},
        "splits": _totals(listed),
        "info": _checked_info(info),
        "fidelity": fidelity,
    }
    _replace(folder / MANIFEST, manifest)
    _replace(folder / DATASET, json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return Dataset(folder, listed, document["info"], content_hash, fidelity)  # type: ignore[arg-type]


def _load(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise IntegrityError(f"{path}: {size} bytes, at most {limit} are read; this is not an index of this format")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{path}: missing; the dataset was never finished: rerun the stage that makes it"
        ) from error
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error}; check the path and permissions") from error


def read_dataset(folder: str | os.PathLike[str]) -> Dataset:
    """Read and check a dataset's index; the shards themselves are not opened.

    Raises IntegrityError, naming file and reason: no `dataset.json`, another format or version, a manifest whose
    hash, columns, values, names or totals do not match; StorageError when a file cannot be read.
    """
    folder = Path(folder)
    path = folder / DATASET
    try:
        document = json.loads(_load(path, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: is not JSON ({error}); fetch or make the index again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise IntegrityError(f"{path}: is not a {FORMAT!r} index; point at the folder that holds the shards")
    if document.get("version") != VERSION:
        version = str(document.get("version"))[:40]
        raise IntegrityError(f"{path}: version {version}, this reader knows {VERSION}; use the matching release")
    manifest, info = document.get("manifest"), document.get("info")
    if not isinstance(manifest, dict) or not isinstance(info, dict) or manifest.get("file") != MANIFEST:
        raise IntegrityError(f"{path}: `info` must be an object and `manifest.file` {MANIFEST!r}; make the index again")
    fidelity = document.get("fidelity", "absent")
    if fidelity is not None and not isinstance(fidelity, dict):
        raise IntegrityError(f"{path}: `fidelity` must be an object or null; fetch or make the index again")
    table_path = folder / MANIFEST
    data = _load(table_path, MAX_MANIFEST)
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.get("sha256"):
        raise IntegrityError(
            f"{table_path}: sha256 is {found}, {DATASET} says {str(manifest.get('sha256'))[:80]}; fetch both again, "
            "or rerun the stage that makes them"
        )
    try:
        table = pq.read_table(pa.BufferReader(data))
        if table.schema.names != _SCHEMA.names or table.schema.types != _SCHEMA.types:
            raise IntegrityError(f"{table_path}: columns {table.schema.names} are not those of version {VERSION}")
        entries = tuple(ShardEntry(**row) for row in table.to_pylist())
    except ValidationError as error:
        first = error.errors()[0]
        value = repr(first.get("input"))[:120]
        raise IntegrityError(
            f"{table_path}: {first['loc'][0]} {value} refused: {first['msg']}; do not use it"
        ) from error
    except pa.ArrowException as error:
        raise IntegrityError(f"{table_path}: is not Parquet ({error}); fetch or make the index again") from error
    if len({entry.file for entry in entries}) != len(entries) or entries != _in_order(entries):
        raise IntegrityError(f"{table_path}: shards must be sorted and listed once; make the index again")
    content_hash = _content_hash(entries)
    if manifest.get("content_sha256") != content_hash or document.get("splits") != _totals(entries):
        raise IntegrityError(f"{path}: content hash or totals do not match {MANIFEST}; make the index again")
    return Dataset(folder, entries, info, content_hash, fidelity)


def verify_dataset(folder: str | os.PathLike[str], *, deep: bool = False) -> list[Problem]:
    """Everything that is wrong with a dataset folder, by file name; an empty list means every byte is as published.

    Recomputes each shard's sha256; reports shards that are missing, truncated, altered, duplicated (listed twice
    by content, or present under a second name) or foreign (`*.zarr.zip` that no entry lists). `deep` also opens
    each shard and compares its structure and counts with the manifest. Never raises for a broken dataset.
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
        path = dataset.path(entry)
        try:
            size = path.stat().st_size
            found = file_sha256(path) if size == entry.size else ""
        except FileNotFoundError:
            problems.append(Problem(entry.file, "missing", f"the manifest lists {entry.size} bytes"))
            continue
        except OSError as error:
            problems.append(Problem(entry.file, "unreadable", str(error)))
            continue
        if size < entry.size:
            problems.append(Problem(entry.file, "truncated", f"{size} bytes, the manifest says {entry.size}"))
        elif size > entry.size or found != entry.sha256:
            detail = f"{size} bytes, the manifest says {entry.size}" if size > entry.size else f"sha256 is {found}"
            problems.append(Problem(entry.file, "altered", f"{detail}, the manifest says {entry.sha256}"))
        elif deep:
            problems += _deep(path, entry)
    known = {entry.file for entry in dataset.entries}
    for path in sorted(dataset.folder.iterdir()):
        if path.name.endswith(SUFFIX) and path.name not in known:
            twin = by_hash.get(file_sha256(path)) if path.is_file() else None
            kind, detail = ("duplicated", f"same content as {twin}") if twin else ("foreign", "no entry lists it")
            problems.append(Problem(path.name, kind, detail))
    return problems


def _deep(path: Path, entry: ShardEntry) -> list[Problem]:
    try:
        statistics = read_shard(path).statistics
    except (IntegrityError, StorageError) as error:
        return [Problem(entry.file, "inconsistent", str(error))]
    wrong = [
        f"{name} is {statistics.get(name)}, the manifest says {getattr(entry, name)}"
        for name in (*_COUNTS[1:], "tail_mean", "tail_max")
        if statistics.get(name) != getattr(entry, name)
    ]
    return [Problem(entry.file, "inconsistent", "; ".join(wrong))] if wrong else []
