"""Rows of path masses as engines hand them over: at once, or made when somebody reads them; joined, taken, divided.

An engine's thread makes sums alone. What is listed of them is made by the thread that reads a row's columns first
(`LateRows`); where several jobs share what one reduction lists, the first of their threads makes it (`Once`).
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bytecache.schemas.dump.rows import Rows, columns_of


@dataclass
class RowMasses(Rows):
    """Rows as an engine reduces them."""

    next_logp: np.ndarray
    """float32 [R]; log p(next token | h), nats; NaN where no next token was asked for."""


COLUMNS = tuple(field.name for field in fields(RowMasses))


class LateRows(RowMasses):
    """Rows whose columns are made when the first of them is read, by the thread that reads it."""

    def __init__(self, make: Callable[[], RowMasses]) -> None:
        self._make: Callable[[], RowMasses] | None = make

    def __getattr__(self, name: str) -> Any:
        if name not in COLUMNS or self._make is None:
            raise AttributeError(name)
        rows, self._make = self._make(), None
        self.__dict__ |= {column: getattr(rows, column) for column in COLUMNS}
        return self.__dict__[name]


class Once:
    """Rows that several threads may ask for; the first of them makes them."""

    def __init__(self, make: Callable[[], RowMasses]) -> None:
        self._make: Callable[[], RowMasses] | None = make
        self._lock = threading.Lock()
        self._rows: RowMasses | None = None

    def __call__(self) -> RowMasses:
        """The rows."""
        with self._lock:
            if self._rows is None and self._make is not None:
                self._rows, self._make = self._make(), None
            assert self._rows is not None
            return self._rows


def made(rows: RowMasses) -> RowMasses:
    """The rows with all of their columns there."""
    return RowMasses(**{name: getattr(rows, name) for name in COLUMNS})


def concatenate(parts: Sequence[RowMasses]) -> RowMasses:
    """Rows of several reductions, in order."""
    if len(parts) == 1:
        return parts[0]
    return RowMasses(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS})


def take(rows: RowMasses, index: np.ndarray) -> RowMasses:
    """The rows `index` int [N], in that order; views where they lie one after the other."""
    if len(index) and index[-1] - index[0] + 1 == len(index) and (np.diff(index) == 1).all():
        return _between(rows, int(index[0]), int(index[-1]) + 1)
    return RowMasses(**columns_of(rows, index), next_logp=rows.next_logp[index])


def _between(rows: RowMasses, lo: int, hi: int) -> RowMasses:
    """The rows [lo, hi) as views."""
    if lo == 0 and hi == len(rows.n_levels):
        return rows
    row = slice(lo, hi)
    level = _span(rows.n_levels, row)
    entry, stop = _span(rows.fanout, level), _span(rows.n_stops, row)
    places = dict.fromkeys(COLUMNS, row) | {"fanout": level}
    places |= dict.fromkeys(("entry_byte", "entry_mass"), entry)
    places |= dict.fromkeys(("stop_depth", "stop_token", "stop_mass"), stop)
    return RowMasses(**{name: getattr(rows, name)[place] for name, place in places.items()})


def _span(count: np.ndarray, groups: slice) -> slice:
    """Where the items of some groups lie, of groups of `count` items one after the other."""
    begin = int(count[: groups.start].sum(dtype=np.int64))
    return slice(begin, begin + int(count[groups].sum(dtype=np.int64)))
