"""A slice as a Parquet file, committed under a name that holds its content.

Equal documents make an equal file, wherever in the corpus they lie, and a half-written plan of other settings can never
lend a slice to this one. Price: a third of planning is zstd, at level 1; level 3 would be 7 % smaller and take 2.2
times as long.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.pipeline.plan.index import Split
from bytecache.pipeline.plan.slices import Entry
from bytecache.pipeline.stores import Store, disk_errors
from bytecache.pipeline.units.runner import commit_file
from bytecache.schemas.files import arrow_path
from bytecache.stages.corpus.conversations import KIND_KEY
from bytecache.stages.corpus.reader import Document

SLICE_SCHEMA = pa.schema([("doc_id", pa.string()), ("text", pa.string()), ("context", pa.string())])


@dataclass(frozen=True, order=True)
class Slice:
    """A slice that was written; slices come in the order of their last documents, `place`."""

    place: tuple[int, int]
    split: Split
    key: str
    sha256: str
    n_docs: int
    n_bytes: int
    n_renamed: int


def write_slice(store: Store, split: Split, entries: Sequence[Entry], kind: str) -> Slice:
    """Commit the slice of one unit. Raises StorageError."""
    ids = unique([entry.doc_id for entry in entries])
    content = hashlib.sha256(kind.encode() + b"\0")
    for doc_id, entry in zip(ids, entries, strict=True):
        content.update(identity_bytes(doc_id, entry.digest))
    key = f"plan/slices/{split}-{content.hexdigest()[:24]}.parquet"
    # The texts are UTF-8 already; a slice is shorter than the 2 GiB that an array holds.
    texts = pa.array([entry.text for entry in entries], pa.binary()).view(pa.string())
    columns = [pa.array(ids), texts, pa.array([entry.context for entry in entries])]
    table = pa.Table.from_arrays(columns, schema=SLICE_SCHEMA.with_metadata({KIND_KEY: kind}))
    temporary = store.temp_path(key)
    try:
        with disk_errors(f"writing {temporary}"):
            pq.write_table(
                table, arrow_path(temporary), compression="zstd", compression_level=1, use_dictionary=False,
                row_group_size=1024,
            )  # fmt: skip
        sha256 = commit_file(store, key, temporary).sha256
    finally:
        temporary.unlink(missing_ok=True)
    n_renamed = sum(doc_id != entry.doc_id for doc_id, entry in zip(ids, entries, strict=True))
    n_bytes = sum(len(entry.text) for entry in entries)
    return Slice(entries[-1].place, split, key, sha256, len(ids), n_bytes, n_renamed)


def digest_of(document: Document, raw: bytes) -> bytes:
    """sha256 over the length-prefixed text and, where there is one, context."""
    digest = hashlib.sha256(len(raw).to_bytes(8, "little"))
    digest.update(raw)
    digest.update(document.context.encode("utf-8"))
    return digest.digest()


def identity_bytes(doc_id: str, digest: bytes) -> bytes:
    """What identifies a document: its length-prefixed id, and the digest of its text and context."""
    raw = doc_id.encode("utf-8")
    return len(raw).to_bytes(8, "little") + raw + digest


def unique(ids: Sequence[str]) -> list[str]:
    """The ids with `#2`, `#3`, ... behind those that came before, past names that others have."""
    taken, counts = set(ids), Counter[str]()
    names = []
    for name in ids:
        counts[name] += 1
        fresh = name
        while counts[name] > 1 and fresh in taken:
            fresh = f"{name}#{counts[name]}"
            counts[name] += fresh in taken
        taken.add(fresh)
        names.append(fresh)
    return names
