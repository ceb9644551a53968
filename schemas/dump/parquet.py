"""Token dump, version 3: what the teacher said, reduced to path masses. One Parquet part per unit of work.

One Parquet row is one *window*: a run of text with every evaluated history of it, self-contained, so that a part
can be converted with nothing but this file. A long document is several windows; the bytes before `score_start`
are context and belong to an earlier window. Inside a window, *rows* are histories: the canonical tokens first,
in order, then branches (histories through a token that is not canonical). TOKEN_DUMP.md is the format.

A *reference window* is a second record of a short stretch that ordinary windows of the part score too, evaluated
much deeper. It gives no targets; the converter compares (stages.fidelity.certificate). Its codes are so fine that what
they round is nothing beside what it measures.

What is stored of a window, and how: schemas.dump.packed. Every column is a blob per window, numbers of several bytes in
planes, zstd over all: a blob is read in half of the time that a Parquet list takes. Version 2 is read as well.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.schemas import strict_json
from bytecache.schemas.dump import version2
from bytecache.schemas.dump.likely import TopK, pack_top_k
from bytecache.schemas.dump.packed import Packed, Weights
from bytecache.schemas.dump.packing import in_order, pack
from bytecache.schemas.dump.planes import from_planes, to_planes
from bytecache.schemas.dump.shares import REFERENCE_STEP, step_of
from bytecache.schemas.dump.unpacking import window_of
from bytecache.schemas.dump.window import Window, is_consistent
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.files import arrow_path
from bytecache.schemas.parquet_pages import refuse_blown_up
from bytecache.schemas.whole import is_whole

FORMAT = "bytecache.token-dump"
VERSION = 3
_META = b"bytecache"

BLOBS: dict[str, str] = {
    "row_scale": "uint8", "row_levels": "uint16", "row_end": "uint16", "row_control": "uint16",
    "level_entries": "uint16", "level_stops": "uint8", "level_rest": "uint16", "level_top": "uint16",
    "entry_gap": "uint8", "entry_code": "uint16",
    "stop_code": "uint16", "stop_rows": "uint8", "token": "int32", "rare": "uint16",
    "topk_rank": "uint16", "topk_token": "int32", "topk_code": "uint16", "row_sampled": "uint8",
}  # fmt: skip
"""Ragged columns, and the type of their items."""
TOP_K = TopK._fields
_WINDOW: dict[str, pa.DataType] = {
    "doc_id": pa.string(), "doc_index": pa.int32(), "text": pa.binary(), "context": pa.binary(),
    "score_start": pa.int32(), "is_last": pa.bool_(), "reference": pa.bool_(), "doc_position": pa.int32(),
}  # fmt: skip
"""Members of a window that are columns as they are."""
SCHEMA = pa.schema(
    pa.field(name, kind, nullable=False)
    for name, kind in {
        **_WINDOW,
        "first_token": pa.int32(),
        "step": pa.int32(),
        **dict.fromkeys(BLOBS, pa.binary()),
    }.items()
)
_GROUP = 1 << 23
"""Bytes of blobs of a row group, before zstd: what a reader holds, whatever the windows' length."""
LEVEL = 16
"""Of zstd: a twentieth smaller than at 9, for 11 s per MB of text in place of 2; unpacking costs the same."""


def part_writer(place: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """Packs columns of a part, all or some, into a path or an Arrow stream."""
    sink = arrow_path(place) if isinstance(place, str | os.PathLike) else place
    return pq.ParquetWriter(
        sink, schema, compression="zstd", compression_level=LEVEL, use_dictionary=False, write_statistics=False
    )


class DumpWriter:
    """Writes one part; equal windows give equal bytes. Use `close()`; an unclosed file is not a Parquet file.

    `divergence`: nats per byte of text that coding may add to the targets.
    """

    def __init__(self, place: Any, meta: dict[str, Any], divergence: float = 0.0) -> None:
        text = json.dumps({"format": FORMAT, "version": VERSION, **meta}, sort_keys=True)
        self._place = place
        self._schema = SCHEMA.with_metadata({_META: text.encode()})
        self._step = step_of(divergence)
        self._pending: list[dict[str, Any]] = []
        self._size = 0
        self._writer = part_writer(place, self._schema)
        # zstd needs no interpreter: a teacher goes on meanwhile, a group ahead at most.
        self._packing = ThreadPoolExecutor(1)
        self._packed: Future[None] | None = None

    def append(self, window: Window, weights: Weights | None = None) -> None:
        """Add a window; it is coded here, by what its parts weigh in the text, or as if each were all of it."""
        window, packed, step = _coded(window, weights, self._step, self._place)
        columns = _columns_of(window, packed, step)
        self._pending.append(columns)
        self._size += sum(len(columns[name]) for name in BLOBS)
        if self._size >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        arrays = [pa.array([row[field.name] for row in self._pending], field.type) for field in SCHEMA]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._await()
        self._packed = self._packing.submit(self._writer.write_table, table)
        self._pending, self._size = [], 0

    def _await(self) -> None:
        if self._packed is not None:
            self._packed.result()

    def close(self) -> None:
        """Write what waits, and the end of the file."""
        self._flush()
        self._await()
        self._packing.shutdown()
        self._writer.close()


def as_stored(window: Window, weights: Weights | None, divergence: float) -> Window:
    """The window as a reader of a part would find it, without its top k. Raises IntegrityError."""
    window, packed, step = _coded(window, weights, step_of(divergence), "the window")
    plain = {name: getattr(window, name) for name in (*_WINDOW, "row_sampled")}
    return window_of(plain, int(window.row_token[0]), packed, step, None)


def _coded(window: Window, weights: Weights | None, step: int, place: Any) -> tuple[Window, Packed, int]:
    """A window with its rows in order, its columns, and the step that they have. Raises IntegrityError."""
    if not is_consistent(window):  # before anything trusts its offsets
        raise _inconsistent(place, window.score_start, window.doc_id)
    step = REFERENCE_STEP if window.reference else step
    try:
        ordered, weights, marks = in_order(window, weights)
        return ordered, pack(ordered, weights, marks, step), step
    except ValueError as error:
        raise _inconsistent(place, window.score_start, window.doc_id, str(error)) from error


def _columns_of(window: Window, packed: Packed, step: int) -> dict[str, Any]:
    """A window's row of the part."""
    blobs: dict[str, np.ndarray] = packed._asdict()
    blobs |= pack_top_k(window)._asdict()
    blobs["row_sampled"] = window.row_sampled
    plain = {name: getattr(window, name) for name in _WINDOW}
    plain |= {name: plain[name].tobytes() for name in ("text", "context")}
    bytes_of = {name: to_planes(blobs[name].astype(kind)).tobytes() for name, kind in BLOBS.items()}
    return plain | bytes_of | {"first_token": int(window.row_token[0]), "step": step}


def open_part(path: Path) -> tuple[pq.ParquetFile, dict[str, Any]]:
    """A part and its metadata. Raises IntegrityError unless it is a whole one of a version that is read."""
    try:
        file = pq.ParquetFile(arrow_path(path))
        schema = file.schema_arrow
        names = schema.names
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: the dump part is missing; rerun `bytecache teacher`") from error
    except (pa.ArrowException, OSError, ValueError) as error:  # a name that is no UTF-8 is a ValueError
        raise IntegrityError(
            f"{path}: not a whole Parquet file ({error}); delete it and rerun `bytecache teacher`"
        ) from error
    try:
        meta = strict_json.parse((schema.metadata or {}).get(_META, b"{}"))
    except ValueError:
        meta = {}
    if not isinstance(meta, dict):
        meta = {}
    if meta.get("format") != FORMAT:
        raise IntegrityError(f"{path}: not a bytecache token dump (format {meta.get('format')!r}, expected {FORMAT!r})")
    version = meta.get("version")
    known = {VERSION: SCHEMA, 2: version2.SCHEMA}.get(version) if is_whole(version) else None
    if known is None:
        raise IntegrityError(
            f"{path}: token dump version {version}, this software reads 2 and {VERSION}; "
            "convert it with the release that wrote it or rerun `bytecache teacher`"
        )
    if names != known.names or schema.types != known.types:
        raise IntegrityError(f"{path}: columns {names} are not those of version {version}; dump it again")
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
    file, meta = open_part(path)
    build = version2.window_of if meta["version"] == 2 else _window_of
    left_out = () if top_k else version2.TOP_K if meta["version"] == 2 else TOP_K
    with file:
        names = [name for name in file.schema_arrow.names if name not in left_out]
        for group in range(file.num_row_groups):
            columns = _read_group(path, file, group, names)
            for i in range(file.metadata.row_group(group).num_rows):
                values = {name: _item(column, i) for name, column in columns.items()}
                try:
                    window = build(values)
                except ValueError as error:
                    raise _inconsistent(path, values["score_start"], values["doc_id"], str(error)) from error
                if not is_consistent(window):
                    raise _inconsistent(path, window.score_start, window.doc_id)
                yield window


def _read_group(path: Path, file: pq.ParquetFile, group: int, names: list[str]) -> dict[str, Any]:
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
            f"{path}: row group {group} has nulls in {', '.join(holes)}; delete the part and rerun `bytecache teacher`"
        )
    try:
        return {name: _column(table.column(name)) for name in names}
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: group {group} has a name that is no UTF-8") from error


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


def _item(column: Any, i: int) -> Any:
    if type(column) is tuple:
        start, flat = column
        return flat[start[i] : start[i + 1]]
    return column[i]


def _window_of(values: dict[str, Any]) -> Window:
    """The window of one row of a part; a top k that was not read is empty. Raises ValueError."""
    blobs = {name: from_planes(values[name], kind) for name, kind in BLOBS.items() if name in values}
    top_k = TopK(*(blobs[name] for name in TOP_K)) if TOP_K[0] in blobs else None
    packed = Packed(*(blobs[name] for name in Packed._fields))
    plain = {name: values[name] for name in _WINDOW} | {"row_sampled": blobs["row_sampled"]}
    return window_of(plain, values["first_token"], packed, values["step"], top_k)


def _inconsistent(path: Any, score_start: int, doc_id: str, why: str = "") -> IntegrityError:
    return IntegrityError(
        f"{path}: the window at byte {score_start} of document {doc_id!r} is inconsistent{why and f' ({why})'}; "
        "delete the part and rerun `bytecache teacher`"
    )
