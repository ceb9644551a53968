"""Token dump, version 1: what the teacher said, reduced to path masses. One Parquet part per unit of work.

One Parquet row is one *window*: a run of text with every evaluated history of it, self-contained, so that a part
can be converted with nothing but this file. A long document is several windows; the bytes before `score_start`
are context and belong to an earlier window. Inside a window, *rows* are histories: the canonical tokens first,
in order, then branches (histories through a token that is not canonical). All list columns are flat and ragged;
SPEC.md gives the sums that delimit them.

A *reference window* is a second record of a short stretch that ordinary windows of the part score too, evaluated
much deeper. It gives no targets; the converter compares (stages.fidelity).

Masses are float32 with low bits rounded away, byte-stream-split before zstd: the entries are most of a part and their
low bits are noise. An entry keeps as many bits as its share of its prefix deserves (`round_entries`): divergence grows
with p times the square of a relative error, so the many rare ones need few. `benchmarks/dump_columns.py` measures it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from schemas.errors import IntegrityError

FORMAT = "bytecache.token-dump"
VERSION = 1
MASS_BITS = 13
"""Bits of mantissa of a stop's mass."""
SHARE_BITS = 15
"""Bits of mantissa of an entry that has all of its prefix's mass, and of the text's own; one less for each halving of
the share."""
LEAST_BITS = 5
"""Bits of mantissa of the rarest entries."""
_META = b"bytecache"


@dataclass
class Window:
    """A run of text and its R evaluated rows; L levels, E entries, S stops (see stages.engines.paths for the terms)."""

    doc_id: str
    doc_index: int
    """Index of the document within the unit."""
    text: np.ndarray
    """uint8 [n]; the window's bytes, context included."""
    score_start: int
    """First position of `text` whose targets this window gives; the bytes before it are context."""
    is_last: bool
    """Whether the document ends with this window, so that its END target is given too."""
    row_start: np.ndarray
    """int32 [R]; byte position in `text` where the row's history ends."""
    row_parent: np.ndarray
    """int32 [R]; row whose history this one extends by one token; -1 for the first."""
    row_token: np.ndarray
    """int32 [R]; last token of the history; the start or last context token for the first row."""
    row_logp: np.ndarray
    """float32 [R]; log p(row_token | parent), nats; 0 for the first row."""
    row_depth: np.ndarray
    """uint8 [R]; 0 on the canonical tokens, else how many tokens ago the history left them."""
    row_static: np.ndarray
    """uint8 [R]; 1 where the row is p(. | row_token) in short contexts of its own instead of p(. | history)."""
    log_norm: np.ndarray
    """float32 [R]; log of the sum of exp(logits), nats."""
    end: np.ndarray
    """float32 [R]; mass of END."""
    control: np.ndarray
    """float32 [R]; mass of ids without bytes that are not END."""
    n_levels: np.ndarray
    """int32 [R]"""
    fanout: np.ndarray
    """uint16 [L]"""
    entry_byte: np.ndarray
    """uint8 [E]"""
    entry_mass: np.ndarray
    """float32 [E]"""
    n_stops: np.ndarray
    """int32 [R]"""
    stop_depth: np.ndarray
    """uint16 [S]"""
    stop_token: np.ndarray
    """int32 [S]"""
    stop_mass: np.ndarray
    """float32 [S]"""
    topk_id: np.ndarray
    """int32 [R * K]"""
    topk_logp: np.ndarray
    """float32 [R * K]; nats"""
    reference: bool = False
    """Whether this is a reference window: no targets; its rows but the static ones are the tau -> 0 reference."""
    doc_position: int = -1
    """Position in the document of a reference window's first target; -1 in the others."""
    row_sampled: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """uint8 [R] in a reference window, 1 = the row belongs to the production capture too; empty elsewhere."""
    context: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """uint8; bytes that stand before the document in a shard, unsupervised; on its first window only."""

    @property
    def canonical_nll(self) -> float:
        """Negative log-likelihood of the scored canonical tokens, nats (END not included)."""
        on_path = (self.row_depth == 0) & (self.row_start > self.score_start)
        return float(-self.row_logp[on_path].astype(np.float64).sum())


_ARROW = {"int32": pa.int32(), "uint16": pa.uint16(), "uint8": pa.uint8(), "float32": pa.float32()}
_LISTS: dict[str, str] = {
    "row_start": "int32", "row_parent": "int32", "row_token": "int32", "row_logp": "float32", "row_depth": "uint8",
    "row_static": "uint8",
    "log_norm": "float32", "end": "float32", "control": "float32", "n_levels": "int32", "fanout": "uint16",
    "entry_byte": "uint8", "entry_mass": "float32", "n_stops": "int32", "stop_depth": "uint16",
    "stop_token": "int32", "stop_mass": "float32", "topk_id": "int32", "topk_logp": "float32",
    "row_sampled": "uint8",
}  # fmt: skip
SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("doc_index", pa.int32(), nullable=False),
        pa.field("text", pa.binary(), nullable=False),
        pa.field("context", pa.binary(), nullable=False),
        pa.field("score_start", pa.int32(), nullable=False),
        pa.field("is_last", pa.bool_(), nullable=False),
        pa.field("reference", pa.bool_(), nullable=False),
        pa.field("doc_position", pa.int32(), nullable=False),
        *(
            pa.field(n, pa.list_(pa.field("element", _ARROW[t], nullable=False)), nullable=False)
            for n, t in _LISTS.items()
        ),
    ]
)
_SPLIT = [f"{name}.list.element" for name, t in _LISTS.items() if t == "float32"]


def round_masses(mass: np.ndarray, kept: int = MASS_BITS) -> np.ndarray:
    """Round float32 to `kept` bits of mantissa, to nearest; by default the precision a dump keeps of stops."""
    drop = 23 - kept
    bits = mass.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)


def round_entries(window: "Window") -> np.ndarray:
    """`entry_mass` as a dump keeps it, float32 [E]: wrong by at most 2^-16 of the prefix's mass, or 2^-6 of its own.

    The text's own next byte, the prefix of all that follows, keeps `SHARE_BITS`.
    """
    bits = window.entry_mass.astype(np.float32).view(np.uint32)
    return _round_by_share(window.text, window.row_start, window.n_levels, window.fanout, window.entry_byte, bits).view(
        np.float32
    )


@njit(cache=True, nogil=True)
def _round_by_share(
    text: np.ndarray, row_start: np.ndarray, n_levels: np.ndarray, fanout: np.ndarray, entry_byte: np.ndarray,
    bits: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The rounded float32 bits of entries; shares are compared by their exponents."""
    out = bits.copy()
    one = np.int64(127)
    level = 0
    e = 0
    for r in range(len(row_start)):
        prefix = one
        for depth in range(n_levels[r]):
            i = row_start[r] + depth
            following = prefix
            if level == len(fanout) or e + fanout[level] > len(bits):  # inconsistent: refused by whoever reads it
                return out
            for _ in range(fanout[level]):
                exponent = np.int64(bits[e] >> np.uint32(23))
                keep = min(SHARE_BITS, max(LEAST_BITS, SHARE_BITS + int(exponent - prefix)))
                if i < len(text) and entry_byte[e] == text[i]:  # all that follows is a part of it
                    following = exponent
                    keep = SHARE_BITS
                drop = np.uint32(23 - keep)
                half = np.uint32(1) << (drop - np.uint32(1))
                out[e] = ((bits[e] + half) >> drop) << drop
                e += 1
            prefix = following
            level += 1
    return out


class DumpWriter:
    """Writes one part; equal windows give equal bytes. Use `close()`; an unclosed file is not a Parquet file."""

    def __init__(self, path: Path, meta: dict[str, Any], *, windows_per_group: int = 32):
        text = json.dumps({"format": FORMAT, "version": VERSION, **meta}, sort_keys=True)
        self._path = path
        self._schema = SCHEMA.with_metadata({_META: text.encode()})
        self._group = windows_per_group
        self._pending: list[Window] = []
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=["doc_id", "fanout.list.element"],
            column_encoding=dict.fromkeys(_SPLIT, "BYTE_STREAM_SPLIT"),
            write_statistics=False,
        )

    def append(self, window: Window) -> None:
        """Add a window; masses are rounded here."""
        _check(self._path, window)  # before anything trusts its offsets
        self._pending.append(window)
        if len(self._pending) >= self._group:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        columns: dict[str, pa.Array] = {
            "doc_id": pa.array([w.doc_id for w in self._pending], pa.string()),
            "doc_index": pa.array([w.doc_index for w in self._pending], pa.int32()),
            "text": pa.array([w.text.tobytes() for w in self._pending], pa.binary()),
            "context": pa.array([w.context.tobytes() for w in self._pending], pa.binary()),
            "score_start": pa.array([w.score_start for w in self._pending], pa.int32()),
            "is_last": pa.array([w.is_last for w in self._pending], pa.bool_()),
            "reference": pa.array([w.reference for w in self._pending], pa.bool_()),
            "doc_position": pa.array([w.doc_position for w in self._pending], pa.int32()),
        }
        for name, kind in _LISTS.items():
            values = [
                round_entries(w) if name == "entry_mass" else np.asarray(getattr(w, name), kind) for w in self._pending
            ]
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
            flat = np.concatenate(values)
            if name == "stop_mass":
                flat = round_masses(flat)
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=SCHEMA.field(name).type)
        arrays = [columns[name] for name in SCHEMA.names]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._pending = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


def _open(path: Path) -> tuple[pq.ParquetFile, dict[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: the dump part is missing; rerun `bytecache teacher`") from error
    except (pa.ArrowException, OSError, ValueError) as error:  # a name that is no UTF-8 is a ValueError
        raise IntegrityError(
            f"{path}: not a whole Parquet file ({error}); delete it and rerun `bytecache teacher`"
        ) from error
    try:
        meta = json.loads((file.schema_arrow.metadata or {}).get(_META, b"{}"))
    except ValueError:
        meta = {}
    if not isinstance(meta, dict):
        meta = {}
    if meta.get("format") != FORMAT:
        raise IntegrityError(f"{path}: not a bytecache token dump (format {meta.get('format')!r}, expected {FORMAT!r})")
    if meta.get("version") != VERSION:
        raise IntegrityError(
            f"{path}: token dump version {meta.get('version')}, this software reads {VERSION}; "
            "convert it with the release that wrote it or rerun `bytecache teacher`"
        )
    if names != SCHEMA.names:
        raise IntegrityError(f"{path}: columns {names} are not those of version {VERSION}; dump it again")
    return file, meta


def read_meta(path: Path) -> dict[str, Any]:
    """Format, version and provenance of a part. Raises IntegrityError."""
    file, meta = _open(path)
    file.close()
    return meta


def read_windows(path: Path, *, top_k: bool = True) -> Iterator[Window]:
    """The windows of a part, a row group in memory at a time; without `top_k` those two columns stay empty.

    Raises IntegrityError, also for inconsistent lengths.
    """
    names = [name for name in SCHEMA.names if top_k or not name.startswith("topk_")]
    file, _ = _open(path)
    with file:
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group, columns=names, use_threads=False)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise IntegrityError(
                    f"{path}: row group {group} cannot be read ({error}); delete the part and rerun `bytecache teacher`"
                ) from error
            columns = {name: table.column(name).combine_chunks() for name in names}
            for i in range(table.num_rows):
                try:
                    window = _window(columns, i)
                except UnicodeDecodeError as error:
                    raise IntegrityError(f"{path}: row {i} of group {group} has a name that is no UTF-8") from error
                _check(path, window)
                yield window


def _window(columns: dict[str, Any], i: int) -> Window:
    """Row i of a row group's columns; columns that were not read are empty."""
    values: dict[str, Any] = {}
    for member in fields(Window):
        column = columns.get(member.name)
        if column is None:
            values[member.name] = np.zeros(0, _LISTS[member.name])
        elif member.name in _LISTS:
            a, b = column.offsets[i].as_py(), column.offsets[i + 1].as_py()
            values[member.name] = column.values.slice(a, b - a).to_numpy(zero_copy_only=False)
        elif member.name in ("text", "context"):
            values[member.name] = np.frombuffer(column[i].as_py(), np.uint8)
        else:
            values[member.name] = column[i].as_py()
    return Window(**values)


def _sampled_rows_stand_alone(w: Window) -> bool:
    """The production capture is a window of its own: the canonical rows and whole chains of branches."""
    kept = w.row_sampled == 1
    closed = kept[w.row_parent[1:][kept[1:]]].all()
    return bool((w.row_sampled <= 1).all() and kept[0] and kept[w.row_depth == 0].all() and closed)


def _check(path: Path, w: Window) -> None:
    rows, n = len(w.row_start), len(w.text)

    def ok() -> bool:
        per_row = (
            "row_parent",
            "row_token",
            "row_logp",
            "row_depth",
            "row_static",
            "log_norm",
            "end",
            "control",
            "n_levels",
            "n_stops",
        )
        return (
            rows > 0
            and all(len(getattr(w, name)) == rows for name in per_row)
            and 0 <= w.score_start <= n
            and bool((w.row_start >= 0).all() and (w.row_start <= n).all())
            and bool((w.row_parent[1:] >= 0).all() and (w.row_parent < np.arange(rows)).all())
            and bool((w.n_levels >= 1).all() and (w.n_levels <= n - w.row_start + 1).all() and (w.n_stops >= 0).all())
            and len(w.fanout) == int(w.n_levels.sum())
            and bool((w.fanout >= 0).all())
            and len(w.entry_byte) == len(w.entry_mass) == int(w.fanout.sum())
            and len(w.stop_depth) == len(w.stop_token) == len(w.stop_mass) == int(w.n_stops.sum())
            and bool((w.stop_depth >= 1).all())
            and len(w.topk_id) == len(w.topk_logp)
            and bool((w.stop_depth < np.repeat(w.n_levels, w.n_stops)).all())
            and len(w.row_sampled) == (rows if w.reference else 0)
            and (w.doc_position >= 0) == w.reference
            and (not w.reference or _sampled_rows_stand_alone(w))
        )

    if not ok():
        raise IntegrityError(
            f"{path}: the window at byte {w.score_start} of document {w.doc_id!r} is inconsistent; "
            "delete the part and rerun `bytecache teacher`"
        )
