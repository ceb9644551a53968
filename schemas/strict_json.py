"""JSON from strangers: one meaning or a refusal.

Python's parser keeps the last of two equal keys and reads NaN and Infinity; other readers do otherwise, so a file
could say one thing to a checker and another to a user. Deep nesting ends as a ValueError, not as a crash.
"""

import json
from typing import Any


def parse(data: bytes) -> Any:
    """The value of a JSON document in UTF-8.

    Raises ValueError, saying why: not UTF-8, not JSON, a repeated key, NaN or Infinity, nested too deep.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:80]!r} appears twice")
    return out


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
