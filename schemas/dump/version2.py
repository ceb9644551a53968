"""Version 2 of a token dump, which releases before 2026-11-29 wrote: read, never written.

Every member of a window is a column, lists of numbers but for the entries, whose bytes and masses (float32 in planes)
are blobs. Stops keep 13 bits of mantissa, an entry 15 less one for every halving of its share of its prefix, 5 at
least; `log_norm` (log of the sum of exp(logits)) and the top k are those of every row.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from bytecache.schemas.dump.planes import from_planes
from bytecache.schemas.dump.window import Window

_ARROW = {"int32": pa.int32(), "uint16": pa.uint16(), "uint8": pa.uint8(), "float32": pa.float32()}
LISTS: dict[str, str] = {
    "row_start": "int32", "row_parent": "int32", "row_token": "int32", "row_logp": "float32", "row_depth": "uint8",
    "row_static": "uint8",
    "log_norm": "float32", "end": "float32", "control": "float32", "n_levels": "int32", "fanout": "uint16",
    "entry_byte": "uint8", "entry_mass": "float32", "n_stops": "int32", "stop_depth": "uint16",
    "stop_token": "int32", "stop_mass": "float32", "topk_id": "int32", "topk_logp": "float32",
    "row_sampled": "uint8",
}  # fmt: skip
BLOBS = ("entry_byte", "entry_mass")
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
                pa.binary() if name in BLOBS else pa.list_(pa.field("element", _ARROW[kind], nullable=False)),
                nullable=False,
            )
            for name, kind in LISTS.items()
        ),
    ]
)
TOP_K = ("topk_id", "topk_logp")


def window_of(values: dict[str, Any]) -> Window:
    """The window of one row of a part; columns that were not read are empty. Raises ValueError."""
    if len(values["entry_mass"]) != 4 * len(values["entry_byte"]):
        raise ValueError("its entries have no mass each")
    absent = {name: np.zeros(0, kind) for name, kind in LISTS.items() if name not in values}
    return Window(**(values | absent | {"entry_mass": from_planes(values["entry_mass"], "float32")}))
