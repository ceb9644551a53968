"""What the top k of a token dump costs for every k: its columns cut and packed again as a dump packs them, in memory.

Price: 0.2 s per MB of the columns for half a dozen k.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.schemas.dump.parquet import BLOBS, SCHEMA, TOP_K, open_part, part_writer
from bytecache.schemas.dump.planes import from_planes, to_planes
from bytecache.schemas.errors import IntegrityError


def top_k_sizes(path: Path, wanted: Sequence[int]) -> dict[int, int]:
    """Packed bytes of a part's top-k columns if it held only the first k of every row, for each `wanted` k.

    Raises IntegrityError, also for a part of version 2; k above what the part holds gives what it holds.
    """
    schema = pa.schema([SCHEMA.field(name) for name in TOP_K])
    file, meta = open_part(path)
    sizes = dict.fromkeys(wanted, 0)
    with file:
        if file.schema_arrow.names != SCHEMA.names:
            raise IntegrityError(f"{path}: version {meta['version']} of the format; run `bytecache teacher` again")
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["stop_rows", *TOP_K])
            rows = [1 + int(np.sum(np.frombuffer(marks, np.uint8) & 1)) for marks in _blobs(table, "stop_rows")]
            columns = {
                name: [from_planes(np.frombuffer(blob, np.uint8), BLOBS[name]) for blob in _blobs(table, name)]
                for name in TOP_K
            }
            held = len(columns[TOP_K[0]][0]) // rows[0]
            if any(len(v) != held * n for values in columns.values() for v, n in zip(values, rows, strict=True)):
                raise IntegrityError(
                    f"{path}: windows with different top k; delete the part and rerun `bytecache teacher`"
                )
            for k in sizes:
                sizes[k] += _packed_size(columns, schema, held, min(k, held))
    return sizes


def _blobs(table: pa.Table, name: str) -> list[bytes]:
    return [value or b"" for value in table.column(name).to_pylist()]


def _packed_size(columns: dict[str, list[np.ndarray]], schema: pa.Schema, held: int, k: int) -> int:
    """Bytes of the columns with k of the `held` tokens of a row, as a part packs them."""
    arrays = []
    for name in schema.names:
        cut = [values.reshape(-1, held)[:, :k].reshape(-1) if held else values for values in columns[name]]
        arrays.append(pa.array([to_planes(values).tobytes() for values in cut], pa.binary()))
    sink = pa.BufferOutputStream()
    with part_writer(sink, schema) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    meta = pq.read_metadata(pa.BufferReader(sink.getvalue())).row_group(0)
    return sum(meta.column(at).total_compressed_size for at in range(meta.num_columns))
