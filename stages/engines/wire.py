r"""Arrays over HTTP between a fleet and the server of its teacher: a line of JSON, then the arrays' bytes, no code.

    {"header": {...}, "arrays": [[name, dtype, shape], ...]}\n  and the arrays in C order, one behind the other

Numbers alone may travel (`KINDS`), so nothing that comes in can be more than numbers; what does not add up is refused.
"""

import json
import math
from typing import Any

import numpy as np

from bytecache.schemas import strict_json
from bytecache.schemas.whole import is_whole
from bytecache.stages.engines.rows import COLUMNS, RowMasses

KINDS = frozenset({"uint8", "uint16", "int32", "int64", "float32"})
LONGEST_HEADER = 1 << 16
MAX_BYTES = 1 << 30
MOST_DIMENSIONS = 2


def pack(header: dict[str, Any], **arrays: np.ndarray) -> bytes:
    """Header (JSON) and arrays of `KINDS` as bytes."""
    told = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    line = json.dumps({"header": header, "arrays": told}).encode()
    return b"".join([line, b"\n", *(np.ascontiguousarray(array).tobytes() for array in arrays.values())])


def unpack(raw: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `pack` was given. Raises ValueError for anything else."""
    end = raw.find(b"\n", 0, LONGEST_HEADER)
    told = strict_json.loads(raw[:end]) if end > 0 else None
    if (
        not isinstance(told, dict)
        or not isinstance(told.get("header"), dict)
        or not isinstance(told.get("arrays"), list)
    ):
        raise ValueError("no header")
    arrays, at = {}, end + 1
    for each in told["arrays"]:
        if not isinstance(each, list) or len(each) != 3:
            raise ValueError(f"an array that is {str(each)[:80]}")
        name, kind, shape = each
        is_shape = isinstance(shape, list) and all(is_whole(n, 0) for n in shape)
        if not isinstance(kind, str) or kind not in KINDS or not is_shape or len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"array {str(name)[:80]!r} of {str(kind)[:80]} {str(shape)[:80]}")
        count = math.prod(shape)
        size = count * np.dtype(kind).itemsize
        if size > len(raw) - at:
            raise ValueError(f"array {str(name)[:80]!r} breaks off")
        arrays[str(name)] = np.frombuffer(raw, kind, count, at).reshape(shape).copy()
        at += size
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes too many")
    return told["header"], arrays


def pack_rows(jobs: list[RowMasses]) -> bytes:
    """Rows of several jobs."""
    fields = {f"{number} {name}": getattr(rows, name) for number, rows in enumerate(jobs) for name in COLUMNS}
    return pack({"jobs": len(jobs)}, **fields)


_COUNTS = {"n_levels": "int32", "fanout": "uint16", "n_stops": "int32"}
_BYTES = {"entry_byte": "uint8", "stop_depth": "uint16", "stop_token": "int32", "topk_id": "int32"}
_KINDS = dict.fromkeys(COLUMNS, "float32") | _COUNTS | _BYTES
"""What each column is; compiled loops take them as they come."""


def unpack_rows(raw: bytes) -> list[RowMasses]:
    """What `pack_rows` was given. Raises ValueError for anything else, and for columns that do not go together."""
    header, arrays = unpack(raw)
    jobs = header.get("jobs")
    if not is_whole(jobs, 0) or jobs * len(COLUMNS) > len(arrays):
        raise ValueError("rows without all of their columns")
    try:
        row_masses = [RowMasses(**{name: arrays[f"{n} {name}"] for name in COLUMNS}) for n in range(jobs)]
    except KeyError:
        raise ValueError("rows without all of their columns") from None
    for rows in row_masses:
        _refuse_unsound(rows)
    return row_masses


def _refuse_unsound(rows: RowMasses) -> None:
    """Raise ValueError unless every column is of its kind and as long as the counts say."""
    for name, kind in _KINDS.items():
        array = getattr(rows, name)
        if array.dtype.name != kind or array.ndim != 1 + (name.startswith("topk") and array.ndim == 2):
            raise ValueError(f"{name} is {array.dtype.name} of {array.ndim} dimensions")
    count = len(rows.log_norm)
    lengths = dict.fromkeys(("end", "control", "n_levels", "n_stops", "next_logp"), count)
    for name in ("n_levels", "n_stops"):
        if (getattr(rows, name) < 0).any():
            raise ValueError(f"{name} below 0")
    lengths["fanout"] = int(rows.n_levels.sum(dtype=np.int64))
    lengths |= dict.fromkeys(("entry_byte", "entry_mass"), int(rows.fanout.sum(dtype=np.int64)))
    stops = int(rows.n_stops.sum(dtype=np.int64))
    lengths |= dict.fromkeys(("stop_depth", "stop_token", "stop_mass"), stops)
    for name, length in lengths.items():
        if len(getattr(rows, name)) != length:
            raise ValueError(f"{len(getattr(rows, name))} of {name}, {length} are said")
    top = rows.topk_id.shape
    if top != rows.topk_logp.shape or (rows.topk_id.size and (count == 0 or rows.topk_id.size % count)):
        raise ValueError(f"topk of {top} for {count} rows")
