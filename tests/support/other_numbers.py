"""Every whole number of a JSON document, replaced by what Python takes for the same."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from bytecache.schemas.errors import IntegrityError

Where = tuple[str | int, ...]


def numbers(document: Any, at: Where = ()) -> Iterator[tuple[Where, int]]:
    """Where whole numbers stand in a document, and which."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for name, value in items:
        if type(value) is int:
            yield (*at, name), value
        yield from numbers(value, (*at, name))


def others(value: int) -> list[Any]:
    """What Python takes for the same number, or converts to it."""
    return [float(value), str(value), *([bool(value)] if value in (0, 1) else [])]


def changed(document: Any, at: Where, value: Any) -> Any:
    """A copy with one value replaced."""
    document = copy.deepcopy(document)
    inner = document
    for name in at[:-1]:
        inner = inner[name]
    inner[at[-1]] = value
    return document


def cases(document: Any, free: tuple[str, ...] = ()) -> Iterator[tuple[Where, Any, Any]]:
    """(where, what is put there, the document) of every number that is not below one of `free`, which are anybody's."""
    for at, value in numbers(document):
        for other in others(value) if not {*at} & {*free} else ():
            yield at, other, changed(document, at, other)


def is_refused(read: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a reader refuses."""
    try:
        read(*arguments)
    except (IntegrityError, ValidationError):
        return True
    return False
