"""The index of a dataset folder: `manifest.parquet` (one row per shard) and `dataset.json`, written last.

A chain of hashes: `dataset.json` names its own hash and that of `manifest.parquet`, which names the hash of every
shard; each file has one spelling, so a flipped bit anywhere breaks the chain. Both are written to a temporary name,
flushed and renamed: a kill leaves the old index or the new one, or (between the two renames) a pair whose hashes
disagree, which is refused with the remedy. The index holds no time and no path: equal shards and info, equal index.
Beside it lies README.md, a card made from the index for people and hubs (`schemas.dataset.card`).

Price: reading an index parses two small files; hashing all shards is `schemas.dataset.verification`'s work.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from bytecache.schemas import strict_json
from bytecache.schemas.arrays import SYMBOLS
from bytecache.schemas.dataset import card
from bytecache.schemas.dataset.info import MAX_DEPTH, checked_info, completed, depth, misshapen
from bytecache.schemas.errors import InputError, IntegrityError, StorageError
from bytecache.schemas.files import NotAFileError, file_sha256, read_member, replace_file
from bytecache.schemas.messages import one_line
from bytecache.schemas.parquet_pages import pages_of
from bytecache.schemas.shard.limits import excess
from bytecache.schemas.whole import Count, same

FORMAT = "bytecache.dataset"
VERSION = 1
MANIFEST, DATASET, SUFFIX = "manifest.parquet", "dataset.json", ".zarr.zip"
MAX_JSON, MAX_MANIFEST = 1 << 24, 1 << 28
"""Bytes of the two index files that a reader is willing to load."""
MAX_SHARDS, ROW_BYTES, TABLE_BYTES = 1 << 20, 32, 2048
"""Rows of a manifest, at most; the bytes of file that each takes at least (its own sha256 does not compress below 32);
and the bytes that each may decompress to."""

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Mass = Annotated[float, Field(ge=0.0, le=1.0, strict=True)]


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
    n_supervised: Count
    n_entries: Count
    tail_mean: Mass
    tail_max: Mass
    key: Annotated[str, StringConstraints(min_length=1, max_length=200)]


_COUNTS = ("size", "n_documents", "n_bytes", "n_positions", "n_supervised", "n_entries")
_ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
_SCHEMA = pa.schema(
    [
        pa.field(name, _ARROW["int" if name in _COUNTS else "float" if name.startswith("tail") else "str"], False)
        for name in ShardEntry.model_fields
    ]
)


@dataclass(frozen=True)
class Dataset:
    """A dataset's index, checked against itself (the shards' bytes are checked by `verify_dataset`)."""

    folder: Path
    entries: tuple[ShardEntry, ...]
    """sorted by split, then file"""
    info: dict[str, Any]
    """teacher, tokenizer, corpus, settings, software, creation: objects; name, license, corpus_license,
    teacher_license, attribution: text; edition: see `schemas.dataset.editions`; and more"""
    content_sha256: str
    """sha256 over the entries' values: the identity that data order depends on, whatever wrote the Parquet file"""
    fidelity: dict[str, Any] | None = None
    """how far the stored targets are from a reference of the same teacher (SPEC.md); None: not measured"""

    def split(self, name: str) -> list[ShardEntry]:
        """Entries of one split, in order."""
        return [entry for entry in self.entries if entry.split == name]

    @property
    def where(self) -> str:
        """The folder or URL, for messages."""
        return str(self.folder)

    def path(self, entry: ShardEntry) -> Path:
        """Where the shard lies, or would."""
        return self.folder / entry.file

    @contextmanager
    def held(self, entry: ShardEntry) -> Iterator[Path]:
        """The shard as a local file that stays while the block runs (its bytes are not checked here)."""
        yield self.path(entry)


def describe_shard(path: str | os.PathLike[str], split: str, key: str, statistics: dict[str, Any]) -> ShardEntry:
    """Entry of a finished shard: hashes the file; `statistics` as `ShardBuilder.write` returned them."""
    names = (*_COUNTS, "tail_mean", "tail_max")
    numbers = {name: statistics[name] for name in names}
    return ShardEntry(file=Path(path).name, split=split, key=key, sha256=file_sha256(path), **numbers)


def _content_sha256(entries: Sequence[ShardEntry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps(entry.model_dump(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _in_order(entries: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: (entry.split, entry.file)))


def _totals(entries: Sequence[ShardEntry]) -> dict[str, dict[str, Any]]:
    """Per split: number of shards, summed counts, mean tail per supervised position, largest tail."""
    out: dict[str, dict[str, Any]] = {}
    for split in sorted({entry.split for entry in entries}):
        mine = [entry for entry in entries if entry.split == split]
        totals: dict[str, Any] = {"n_shards": len(mine)}
        totals |= {name: sum(getattr(entry, name) for entry in mine) for name in _COUNTS}
        mass = math.fsum(entry.tail_mean * entry.n_supervised for entry in mine)
        totals["tail_mean"] = float(f"{mass / max(1, totals['n_supervised']):.6g}")
        totals["tail_max"] = max(entry.tail_max for entry in mine)
        out[split] = totals
    return out


def seal(document: dict[str, Any]) -> bytes:
    """The one spelling of an index document: sorted keys, its own sha256 (over the spelling without it) included."""

    def spell(value: dict[str, Any]) -> bytes:
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    bare = {key: value for key, value in document.items() if key != "sha256"}
    return spell({**bare, "sha256": hashlib.sha256(spell(bare)).hexdigest()})


def index_documents(
    entries: Iterable[ShardEntry], info: dict[str, Any], fidelity: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """Name and bytes of `manifest.parquet`, the card `README.md` and `dataset.json`; publish them in that order.

    `info`: any JSON object; `teacher`, `tokenizer`, `corpus`, `settings`, `software`, `creation` (no time of day,
    or equal runs differ) must be objects; `name`, `license`, `corpus_license`, `teacher_license` and
    `attribution` text; what is absent is written as empty. `fidelity`: the certificate of `stages.fidelity`,
    plain JSON; None where nothing was measured. Raises InputError for entries that repeat a file or content.
    """
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
    sink = pa.BufferOutputStream()
    rows = [entry.model_dump() for entry in listed]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd", store_schema=False)
    manifest = sink.getvalue().to_pybytes()
    hashes = {"sha256": hashlib.sha256(manifest).hexdigest(), "content_sha256": _content_sha256(listed)}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "manifest": {"file": MANIFEST, **hashes},
        "splits": _totals(listed),
        "info": checked_info(info),
        "fidelity": fidelity,
    }
    sealed = seal(document)
    # The card lists what it finds in the order it finds it: give it the one order of the file.
    return {MANIFEST: manifest, card.FILE: card.render(json.loads(sealed)), DATASET: sealed}


def write_dataset(
    folder: str | os.PathLike[str],
    entries: Iterable[ShardEntry],
    info: dict[str, Any],
    fidelity: dict[str, Any] | None = None,
) -> Dataset:
    """Publish a local folder of finished shards (see `index_documents`). A README.md that somebody wrote is kept.

    Raises InputError for entries that repeat a file or content or whose file is absent or of another size;
    StorageError when the disk refuses.
    """
    folder = Path(folder)
    listed = _in_order(entries)
    documents = index_documents(listed, info, fidelity)
    for entry in listed:
        path = folder / entry.file
        if not path.is_file() or path.stat().st_size != entry.size:
            raise InputError(f"{path}: missing, or not of {entry.size} bytes; commit every shard before the index")
    for name, raw in documents.items():
        if name != card.FILE or card.is_ours(folder / name):
            replace_file(folder / name, raw)
    return Dataset(folder, listed, checked_info(info), _content_sha256(listed), fidelity)


def _load(path: Path, limit: int) -> bytes:
    try:
        data = read_member(path, limit)
        if len(data) > limit:
            size = path.stat().st_size
            raise IntegrityError(f"{path}: {size} bytes, at most {limit} are read; this is not an index of this format")
        return data
    except NotAFileError as error:
        raise IntegrityError(f"{path} {error.strerror}; fetch or make the index again") from error
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{path}: missing; the dataset was never finished: rerun the stage that makes it"
        ) from error
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error}; check the path and permissions") from error


def read_dataset(folder: str | os.PathLike[str]) -> Dataset:
    """Read and check a dataset's index; the shards themselves are not opened.

    Raises IntegrityError, naming file and reason: no `dataset.json`, another format or version, an index whose
    hashes, columns, values, names or totals do not match; StorageError when a file cannot be read.
    """
    folder = Path(folder)
    document = _load(folder / DATASET, MAX_JSON)
    return parse_index(folder, str(folder), document, lambda: _load(folder / MANIFEST, MAX_MANIFEST))


def parse_index(folder: Path, where: str, document_bytes: bytes, load_manifest: Callable[[], bytes]) -> Dataset:
    """A dataset from the bytes of its two index files; `where` names their folder or URL in messages.

    `load_manifest` is called once `dataset.json` is known to be whole. Raises IntegrityError as `read_dataset`.
    """
    path, table_path = f"{where}/{DATASET}", f"{where}/{MANIFEST}"
    try:
        document = strict_json.parse(document_bytes)
    except ValueError as error:
        begin = one_line(document_bytes[:60].decode("utf-8", "replace"), 40)
        raise IntegrityError(
            f"{path}: is not JSON ({error}; it begins with {begin!r}); fetch or make the index again"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise IntegrityError(f"{path}: is not a {FORMAT!r} index; point at the folder that holds the shards")
    if not same(document.get("version"), VERSION):
        version = str(document.get("version"))[:40]
        raise IntegrityError(f"{path}: version {version}, this reader knows {VERSION}; use the matching release")
    try:
        whole = seal(document) == document_bytes
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: cannot be hashed ({error}); fetch or make the index again") from error
    if not whole:
        raise IntegrityError(
            f"{path}: does not match the sha256 that it states for itself; it was damaged or edited: fetch it again, "
            "or rerun `bytecache convert`"
        )
    manifest, info = document.get("manifest"), document.get("info")
    if not isinstance(manifest, dict) or not isinstance(info, dict) or manifest.get("file") != MANIFEST:
        raise IntegrityError(f"{path}: `info` must be an object and `manifest.file` {MANIFEST!r}; make the index again")
    fidelity = document.get("fidelity", "absent")
    if fidelity is not None and not isinstance(fidelity, dict):
        raise IntegrityError(f"{path}: `fidelity` must be an object or null; fetch or make the index again")
    data = load_manifest()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != manifest.get("sha256"):
        raise IntegrityError(
            f"{table_path}: sha256 is {sha256}, {DATASET} says {str(manifest.get('sha256'))[:80]}; fetch both again, "
            "or rerun the stage that makes them"
        )
    entries = _parse_manifest(table_path, data)
    distinct = min(len({entry.file for entry in entries}), len({entry.sha256 for entry in entries}))
    if distinct != len(entries) or entries != _in_order(entries):
        raise IntegrityError(f"{table_path}: shards must be sorted and listed once; make the index again")
    content_sha256 = _content_sha256(entries)
    if manifest.get("content_sha256") != content_sha256 or not same(document.get("splits"), _totals(entries)):
        raise IntegrityError(f"{path}: content hash or totals do not match {MANIFEST}; make the index again")
    info = completed(info)
    why = misshapen(info) or ("fidelity, beside it, is nested too deep" if depth(fidelity) > MAX_DEPTH else "")
    if why:
        raise IntegrityError(f"{path}: info: {why}; fetch or make the index again")
    return Dataset(folder, entries, info, content_sha256, fidelity)


def _checked(path: str, entry: ShardEntry) -> ShardEntry:
    """An entry whose counts agree with each other and with the size of its file. Raises IntegrityError."""
    why = excess(entry.size, entry.n_positions, entry.n_documents)
    if not why and entry.n_bytes + entry.n_documents != entry.n_positions:
        why = f"{entry.n_bytes} bytes and {entry.n_documents} documents are not {entry.n_positions} positions"
    if not why and (entry.n_supervised > entry.n_positions or entry.n_entries > SYMBOLS * entry.n_positions):
        why = f"{entry.n_supervised} supervised and {entry.n_entries} entries of {entry.n_positions} positions"
    if why:
        raise IntegrityError(f"{path}: {entry.file}: {why}; do not use it")
    return entry


def _parse_manifest(path: str, data: bytes) -> tuple[ShardEntry, ...]:
    """The rows of a manifest; what it would decompress to is bounded before anything is decompressed."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            meta = file.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            # The footer's sizes are only said; what is taken for a page is what its own header says.
            pages = [page for i in range(meta.num_row_groups) for page in pages_of(io.BytesIO(data), meta, i)]
            size = max(size, sum(page.size for page in pages))
            values = max((page.values for page in pages), default=0)
            most = min(MAX_SHARDS, len(data) // ROW_BYTES)
            most_bytes = (1 + meta.num_rows) * TABLE_BYTES
            if not (values <= meta.num_rows <= most and 0 <= size <= most_bytes and meta.num_row_groups <= 1 + most):
                raise IntegrityError(
                    f"{path}: {max(values, meta.num_rows)} rows of {size} bytes in a file of {len(data)}, at most "
                    f"{most} rows and {most_bytes} bytes are read; do not use it"
                )
            if file.schema_arrow.names != _SCHEMA.names or file.schema_arrow.types != _SCHEMA.types:
                raise IntegrityError(f"{path}: columns {file.schema_arrow.names} are not those of version {VERSION}")
            batches = file.iter_batches(batch_size=1024)
            return tuple(_checked(path, ShardEntry(**row)) for batch in batches for row in batch.to_pylist())
    except ValidationError as error:
        first = error.errors()[0]
        value = repr(first.get("input"))[:120]
        raise IntegrityError(f"{path}: {first['loc'][0]} {value} refused: {first['msg']}; do not use it") from error
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise IntegrityError(f"{path}: is not Parquet ({error}); fetch or make the index again") from error
