"""JSON from strangers: one meaning or a refusal, in time that its length bounds.

Python's parser keeps the last of two equal keys, reads NaN and Infinity, and takes a number of any length; other
readers do otherwise, so a file could say one thing to a checker and another to a user. Deep nesting ends as a
ValueError, not as a crash.
"""

import json
import math
from typing import Any

LARGEST = 1 << 63
"""Integers of this size and more are refused: no count, no other language's parser holds them."""


def parse(data: bytes) -> Any:
    """The value of a JSON document in UTF-8.

    Raises ValueError, saying why: not UTF-8, not JSON, a repeated key, NaN or Infinity, a number beyond 64 bits or
    beyond a float64, nested too deep.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=distinct, parse_constant=_constant, parse_int=_integer,
            parse_float=_float,
        )  # fmt: skip
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def loads(data: str | bytes) -> Any:
    """`json.loads` for files of other programs, with their repeated keys and NaN; nested too deep is a ValueError too.

    Raises ValueError (UnicodeDecodeError is one).
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def most_values(data: bytes) -> int:
    """How many values a JSON document can have at most inside the outermost: what it costs, known before it is parsed.

    Each of them follows a comma or the bracket of its list or object; such characters in texts count as well.
    """
    return sum(map(data.count, (b",", b"[", b"{")))


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its pairs, as `object_pairs_hook`. Raises ValueError for a repeated key."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name[:80]!r} appears twice")
            seen.add(name)
    return out


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else LARGEST
    if not -LARGEST <= value < LARGEST:
        raise ValueError(f"the number {digits[:20]}{'...' * (len(digits) > 20)} is beyond 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is beyond a float64")
    return value
