"""Token dump, version 2: what the teacher said, reduced to path masses. One Parquet part per unit of work.

One Parquet row is one *window*: a run of text with every evaluated history of it, self-contained, so that a part
can be converted with nothing but this file. A long document is several windows; the bytes before `score_start`
are context and belong to an earlier window. Inside a window, *rows* are histories: the canonical tokens first,
in order, then branches (histories through a token that is not canonical). All list columns are flat and ragged;
TOKEN_DUMP.md gives the sums that delimit them.

A *reference window* is a second record of a short stretch that ordinary windows of the part score too, evaluated
much deeper. It gives no targets; the converter compares (stages.fidelity.certificate).

Masses are float32 with low bits rounded away, in planes of bytes before zstd: the entries are most of a part and their
low bits are noise. An entry keeps as many bits as its share of its prefix deserves (`round_entries`): divergence grows
with p times the square of a relative error, so the many rare ones need few. `benchmarks/dump_columns.py` measures it.
Entries are a blob per window, which is read in half of the time that a Parquet list takes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.schemas import strict_json
from bytecache.schemas.dump.masses import from_planes, round_by_share, round_masses, to_planes
from bytecache.schemas.dump.window import Window, is_consistent
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.parquet_pages import refuse_blown_up

FORMAT = "bytecache.token-dump"
VERSION = 2
_META = b"bytecache"

_ARROW = {"int32": pa.int32(), "uint16": pa.uint16(), "uint8": pa.uint8(), "float32": pa.float32()}
_LISTS: dict[str, str] = {
    "row_start": "int32", "row_parent": "int32", "row_token": "int32", "row_logp": "float32", "row_depth": "uint8",
    "row_static": "uint8",
    "log_norm": "float32", "end": "float32", "control": "float32", "n_levels": "int32", "fanout": "uint16",
    "entry_byte": "uint8", "entry_mass": "float32", "n_stops": "int32", "stop_depth": "uint16",
    "stop_token": "int32", "stop_mass": "float32", "topk_id": "int32", "topk_logp": "float32",
    "row_sampled": "uint8",
}  # fmt: skip
_BLOBS = ("entry_byte", "entry_mass")
"""Stored as bytes instead of lists: a byte an entry, and the planes of their masses."""
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
            pa.field(
                name,
                pa.binary() if name in _BLOBS else pa.list_(pa.field("element", _ARROW[kind], nullable=False)),
                nullable=False,
            )
            for name, kind in _LISTS.items()
        ),
    ]
)
_GROUP = 1 << 21
"""Entries of a row group: about 10 MB in a reader's memory, whatever the windows' length."""
_SPLIT = [f"{name}.list.element" for name, t in _LISTS.items() if t == "float32" and name not in _BLOBS]


def round_entries(window: "Window") -> np.ndarray:
    """`entry_mass` as a dump keeps it, float32 [E]: wrong by at most 2^-16 of the prefix's mass, or 2^-6 of its own.

    The text's own next byte, the prefix of all that follows, keeps `SHARE_BITS`.
    """
    bits = window.entry_mass.astype(np.float32).view(np.uint32)
    rounded: np.ndarray = round_by_share(
        window.text, window.row_start, window.n_levels, window.fanout, window.entry_byte, bits
    )
    return rounded.view(np.float32)


def part_writer(place: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """Packs columns of a part, all or some, into a path or an Arrow stream."""
    return pq.ParquetWriter(
        place,
        schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=["doc_id", "fanout.list.element"],
        column_encoding={name: "BYTE_STREAM_SPLIT" for name in _SPLIT if name.partition(".")[0] in schema.names},
        write_statistics=False,
    )


class DumpWriter:
    """Writes one part; equal windows give equal bytes. Use `close()`; an unclosed file is not a Parquet file."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, "version": VERSION, **meta}, sort_keys=True)
        self._path = path
        self._schema = SCHEMA.with_metadata({_META: text.encode()})
        self._n_entries = 0
        self._pending: list[Window] = []
        self._writer = part_writer(path, self._schema)

    def append(self, window: Window) -> None:
        """Add a window; masses are rounded here."""
        if not is_consistent(window):  # before anything trusts its offsets
            raise _inconsistent(self._path, window.score_start, window.doc_id)
        self._pending.append(window)
        self._n_entries += len(window.entry_byte)
        if self._n_entries >= _GROUP:
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
        columns["entry_byte"] = pa.array([np.asarray(w.entry_byte, np.uint8).tobytes() for w in self._pending])
        columns["entry_mass"] = pa.array([to_planes(round_entries(w)).tobytes() for w in self._pending])
        for name in _LISTS.keys() - columns.keys():
            values = [np.asarray(getattr(w, name), _LISTS[name]) for w in self._pending]
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
            flat = np.concatenate(values)
            if name == "stop_mass":
                flat = round_masses(flat)
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=SCHEMA.field(name).type)
        arrays = [columns[name] for name in SCHEMA.names]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._pending, self._n_entries = [], 0

    def close(self) -> None:
        """Write what waits, and the end of the file."""
        self._flush()
        self._writer.close()


def open_part(path: Path) -> tuple[pq.ParquetFile, dict[str, Any]]:
    """A part and its metadata. Raises IntegrityError unless it is a whole one of this version."""
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
        meta = strict_json.parse((file.schema_arrow.metadata or {}).get(_META, b"{}"))
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
    if names != SCHEMA.names or file.schema_arrow.types != SCHEMA.types:
        raise IntegrityError(f"{path}: columns {names} are not those of version {VERSION}; dump it again")
    return file, meta


def read_meta(path: Path) -> dict[str, Any]:
    """Format, version and provenance of a part. Raises IntegrityError."""
    file, meta = open_part(path)
    file.close()
    return meta


def read_windows(path: Path, *, top_k: bool = True) -> Iterator[Window]:
    """The windows of a part, a row group in memory at a time; without `top_k` those two columns stay empty.

    Raises IntegrityError, also for inconsistent lengths.
    """
    names = [name for name in SCHEMA.names if top_k or not name.startswith("topk_")]
    absent = [name for name in SCHEMA.names if name not in names]
    file, _ = open_part(path)
    with file:
        for group in range(file.num_row_groups):
            try:
                refuse_blown_up(path, file.metadata, group)
                table = file.read_row_group(group, columns=names, use_threads=False)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise IntegrityError(
                    f"{path}: row group {group} cannot be read ({error}); delete the part and rerun `bytecache teacher`"
                ) from error
            holes = [name for name in names if table.column(name).null_count]
            if holes:
                raise IntegrityError(
                    f"{path}: row group {group} has nulls in {', '.join(holes)}; "
                    "delete the part and rerun `bytecache teacher`"
                )
            try:
                columns = {name: _column(table.column(name)) for name in names}
                columns |= {name: [np.zeros(0, _LISTS[name])] * table.num_rows for name in absent}
            except UnicodeDecodeError as error:
                raise IntegrityError(f"{path}: group {group} has a name that is no UTF-8") from error
            for i in range(table.num_rows):
                window = _window(path, columns, i)
                if not is_consistent(window):
                    raise _inconsistent(path, window.score_start, window.doc_id)
                yield window


def _column(chunks: pa.ChunkedArray) -> tuple[list[int], np.ndarray] | list[Any]:
    """A row group's column: offsets, and values without a copy; or a list where there is one value a row."""
    column = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
    if pa.types.is_binary(column.type):
        _, offsets, data = column.buffers()
        start = np.frombuffer(offsets, np.int32, len(column) + 1, 4 * column.offset)
        has_bytes = data is not None and data.size > 0
        return start.tolist(), np.frombuffer(data, np.uint8) if has_bytes else np.zeros(0, np.uint8)
    if pa.types.is_list(column.type):
        return column.offsets.to_numpy().tolist(), column.values.to_numpy(zero_copy_only=False)
    values: list[Any] = column.to_pylist()
    return values


def _window(path: Path, columns: dict[str, Any], i: int) -> Window:
    """Row i of a row group's columns; columns that were not read are empty."""
    values: dict[str, Any] = {}
    for name, column in columns.items():
        if type(column) is tuple:
            start, flat = column
            values[name] = flat[start[i] : start[i + 1]]
        else:
            values[name] = column[i]
    mass = values["entry_mass"]
    if len(mass) != 4 * len(values["entry_byte"]):
        raise _inconsistent(path, values["score_start"], values["doc_id"])
    values["entry_mass"] = from_planes(mass)
    return Window(**values)


def _inconsistent(path: Path, score_start: int, doc_id: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: the window at byte {score_start} of document {doc_id!r} is inconsistent; "
        "delete the part and rerun `bytecache teacher`"
    )
