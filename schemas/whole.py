"""Whole numbers as files state them: `true`, `1.0` and "1" are none, whatever Python's comparison says.

`True == 1 == 1.0` in Python, and `isinstance(True, int)`; in a file they are three values, of which other readers take
one. What compares a file's value with a number of ours asks `same`; what needs a count asks `is_whole`, or is a field
of the types here.
"""

import json
from typing import Annotated, Any, TypeGuard

from pydantic import Field

Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
Number = Annotated[float, Field(strict=True)]
"""A whole number may stand for one with a fraction; a truth value may not."""


def is_whole(value: Any, least: int | None = None) -> TypeGuard[int]:
    """Whether a value is a whole number, and no less than `least`."""
    return type(value) is int and (least is None or value >= least)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, NaN and infinity included."""
    return type(value) in (int, float)


def same(value: Any, wanted: Any) -> bool:
    """Whether two values are the same JSON, down to every number's kind."""
    if type(value) is not type(wanted):
        return False
    if isinstance(wanted, dict | list):
        return json.dumps(value, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    return bool(value == wanted)
