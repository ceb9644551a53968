"""The writer of version 2 of a token dump, to compare with: float32 masses in planes, low bits rounded away, zstd 3.

Stops keep 13 bits of mantissa, an entry 15 less one for every halving of its share of its prefix, 5 at least; the
text's own next byte keeps 15.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from bytecache.schemas.dump.parquet import FORMAT
from bytecache.schemas.dump.planes import to_planes
from bytecache.schemas.dump.version2 import BLOBS, LISTS, SCHEMA
from bytecache.schemas.dump.window import Window

_MASS_BITS, _SHARE_BITS, _LEAST_BITS = 13, 15, 5
_SPLIT = [f"{name}.list.element" for name, kind in LISTS.items() if kind == "float32" and name not in BLOBS]


def round_masses(mass: np.ndarray, bits: int = _MASS_BITS) -> np.ndarray:
    """float32 rounded to `bits` bits of mantissa."""
    drop = 23 - bits
    whole = mass.astype(np.float32).view(np.uint32)
    return ((whole + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)


@njit(cache=True)
def _round_by_share(
    text: np.ndarray, row_start: np.ndarray, n_levels: np.ndarray, fanout: np.ndarray, entry_byte: np.ndarray,
    bits: np.ndarray,
) -> np.ndarray:  # fmt: skip
    out = bits.copy()
    level = e = 0
    for r in range(len(row_start)):
        prefix = np.int64(127)
        for depth in range(n_levels[r]):
            i = row_start[r] + depth
            following = prefix
            for _ in range(fanout[level]):
                exponent = np.int64(bits[e] >> np.uint32(23))
                keep = min(_SHARE_BITS, max(_LEAST_BITS, _SHARE_BITS + int(exponent - prefix)))
                if i < len(text) and entry_byte[e] == text[i]:
                    following, keep = exponent, _SHARE_BITS
                drop = np.uint32(23 - keep)
                half = np.uint32(1) << (drop - np.uint32(1))
                out[e] = ((bits[e] + half) >> drop) << drop
                e += 1
            prefix = following
            level += 1
    return out


def _column(name: str, windows: Sequence[Window]) -> pa.Array:
    if name == "entry_byte":
        return pa.array([w.entry_byte.astype(np.uint8).tobytes() for w in windows])
    if name == "entry_mass":
        rounded = [
            _round_by_share(
                w.text, w.row_start, w.n_levels, w.fanout, w.entry_byte, w.entry_mass.astype(np.float32).view(np.uint32)
            )
            for w in windows
        ]
        return pa.array([to_planes(bits).tobytes() for bits in rounded])
    values = [np.asarray(getattr(w, name), LISTS[name]) for w in windows]
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.concatenate(values)
    flat = round_masses(flat) if name == "stop_mass" else flat
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=SCHEMA.field(name).type)


def write_version_2(path: Path, windows: Sequence[Window], meta: dict[str, Any]) -> None:
    """Write windows as one part of version 2, in one row group."""
    text = json.dumps({"format": FORMAT, "version": 2, **meta}, sort_keys=True)
    schema = SCHEMA.with_metadata({b"bytecache": text.encode()})
    columns: dict[str, pa.Array] = {name: _column(name, windows) for name in LISTS}
    for name in SCHEMA.names:
        if name not in columns:
            values = [getattr(w, name) for w in windows]
            plain = [v.tobytes() if isinstance(v, np.ndarray) else v for v in values]
            columns[name] = pa.array(plain, SCHEMA.field(name).type)
    with pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=3, use_dictionary=["doc_id", "fanout.list.element"],
        column_encoding=dict.fromkeys(_SPLIT, "BYTE_STREAM_SPLIT"), write_statistics=False,
    ) as writer:  # fmt: skip
        writer.write_table(pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=schema))
