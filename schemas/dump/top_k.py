"""What the top k of a token dump costs for every k: its columns cut and packed again as a dump packs them, in memory.

Price: 0.2 s per MB of the columns for half a dozen k.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.schemas.arrays import F32, I32
from bytecache.schemas.dump.likely import TopK, pack_lists, unpack_top_k
from bytecache.schemas.dump.packed import CANONICAL
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
            try:
                lists = [_lists(window) for window in table.to_pylist()]
            except ValueError as error:
                raise IntegrityError(f"{path}: {error}; delete the part and rerun `bytecache teacher`") from error
            if len({ids.shape[1] for ids, _ in lists}) > 1:
                raise IntegrityError(
                    f"{path}: windows with different top k; delete the part and rerun `bytecache teacher`"
                )
            for k in sizes:
                sizes[k] += _packed_size(lists, schema, k)
    return sizes


def _lists(window: dict[str, bytes]) -> tuple[I32, F32]:
    """Ids and log-probabilities of a window's canonical rows, [C, k]. Raises ValueError where they are not such."""
    blobs = {name: from_planes(np.frombuffer(blob, np.uint8), BLOBS[name]) for name, blob in window.items()}
    rows = np.zeros(1 + int(np.sum(blobs["stop_rows"] & CANONICAL)), np.uint8)
    ids, logp = unpack_top_k(rows, TopK(*(blobs[name] for name in TOP_K)))
    return ids.reshape(len(rows), -1), logp.reshape(len(rows), -1)


def _packed_size(lists: list[tuple[I32, F32]], schema: pa.Schema, k: int) -> int:
    """Bytes of the columns with the first k tokens of every row, as a part packs them."""
    cut = [pack_lists(ids[:, :k], logp[:, :k])._asdict() for ids, logp in lists]
    arrays = [
        pa.array([to_planes(columns[name].astype(BLOBS[name])).tobytes() for columns in cut], pa.binary())
        for name in schema.names
    ]
    sink = pa.BufferOutputStream()
    with part_writer(sink, schema) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    meta = pq.read_metadata(pa.BufferReader(sink.getvalue())).row_group(0)
    return sum(meta.column(at).total_compressed_size for at in range(meta.num_columns))
