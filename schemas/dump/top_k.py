"""What the top k of a token dump costs for every k: its columns cut and packed again as a dump packs them, in memory.

Price: 0.2 s per MB of the columns for half a dozen k.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.schemas.dump.parquet import SCHEMA, open_part, part_writer
from bytecache.schemas.errors import IntegrityError


def top_k_sizes(path: Path, wanted: Sequence[int]) -> dict[int, int]:
    """Packed bytes of a part's top-k columns if it held only the first k of every row, for each `wanted` k.

    Raises IntegrityError; k above what the part holds gives what it holds.
    """
    names = ["row_start", "topk_id", "topk_logp"]
    schema = pa.schema([SCHEMA.field(name) for name in names[1:]])
    file, _ = open_part(path)
    found = dict.fromkeys(wanted, 0)
    with file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=names)
            rows, *columns = (table.column(name).combine_chunks() for name in names)
            counts = np.diff(rows.offsets.to_numpy())
            flat = [column.values.to_numpy() for column in columns]
            held = len(flat[0]) // max(int(counts.sum()), 1)
            if any(len(values) != held * counts.sum() for values in flat):
                raise IntegrityError(
                    f"{path}: windows with different top k; delete the part and rerun `bytecache teacher`"
                )
            for k in found:
                offsets = pa.array(np.cumsum([0, *(counts * min(k, held))], dtype=np.int32))
                cut = [
                    np.ascontiguousarray(values.reshape(-1, held)[:, :k]).ravel() if held else values for values in flat
                ]
                arrays = [
                    pa.ListArray.from_arrays(offsets, pa.array(values), type=field.type)
                    for values, field in zip(cut, schema, strict=True)
                ]
                sink = pa.BufferOutputStream()
                with part_writer(sink, schema) as writer:
                    writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
                meta = pq.read_metadata(pa.BufferReader(sink.getvalue())).row_group(0)
                found[k] += sum(meta.column(at).total_compressed_size for at in range(meta.num_columns))
    return found
