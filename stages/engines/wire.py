r"""Arrays over HTTP between a fleet and the server of its teacher: a line of JSON, then the arrays' bytes, no code.

    {"header": {...}, "arrays": [[name, dtype, shape], ...]}\n  and the arrays in C order, one behind the other

Numbers alone may travel (`KINDS`), so nothing that comes in can be more than numbers; what does not add up is refused.
"""

import json
import math
from typing import Any

import numpy as np

from bytecache.stages.engines.paths import COLUMNS, RowMasses

KINDS = frozenset({"uint8", "uint16", "int32", "int64", "float32"})
LONGEST_HEADER = 1 << 16
MAX_BYTES = 1 << 30


def pack(header: dict[str, Any], **arrays: np.ndarray) -> bytes:
    """Header (JSON) and arrays of `KINDS` as bytes."""
    told = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    line = json.dumps({"header": header, "arrays": told}).encode()
    return b"".join([line, b"\n", *(np.ascontiguousarray(array).tobytes() for array in arrays.values())])


def unpack(raw: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `pack` was given. Raises ValueError for anything else."""
    end = raw.find(b"\n", 0, LONGEST_HEADER)
    told = json.loads(raw[:end]) if end > 0 else None
    if (
        not isinstance(told, dict)
        or not isinstance(told.get("header"), dict)
        or not isinstance(told.get("arrays"), list)
    ):
        raise ValueError("no header")
    arrays, at = {}, end + 1
    for name, kind, shape in told["arrays"]:
        if kind not in KINDS or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"array {name!r} of {kind} {shape}")
        count = math.prod(shape)
        size = count * np.dtype(kind).itemsize
        if size > len(raw) - at:
            raise ValueError(f"array {name!r} breaks off")
        arrays[str(name)] = np.frombuffer(raw, kind, count, at).reshape(shape).copy()
        at += size
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes too many")
    return told["header"], arrays


def pack_rows(jobs: list[RowMasses]) -> bytes:
    """Rows of several jobs."""
    fields = {f"{number} {name}": getattr(rows, name) for number, rows in enumerate(jobs) for name in COLUMNS}
    return pack({"jobs": len(jobs)}, **fields)


def unpack_rows(raw: bytes) -> list[RowMasses]:
    """What `pack_rows` was given. Raises ValueError for anything else."""
    header, arrays = unpack(raw)
    try:
        return [RowMasses(**{name: arrays[f"{n} {name}"] for name in COLUMNS}) for n in range(header["jobs"])]
    except (KeyError, TypeError):
        raise ValueError("rows without all of their columns") from None
