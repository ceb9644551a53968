"""What lies where in a window: its rows by their first byte, and the row that goes on where a token stops."""

from typing import NamedTuple

import numpy as np
from numba import njit


class Masses(NamedTuple):
    """The members of a window that the sum reads, by their names there (schemas/dump/window.py)."""

    text: np.ndarray
    start: np.ndarray
    static: np.ndarray
    end: np.ndarray
    control: np.ndarray
    entry_byte: np.ndarray
    entry_mass: np.ndarray
    stop_depth: np.ndarray
    stop_mass: np.ndarray


class Tables(NamedTuple):
    """What lies where in a window of n bytes and R rows."""

    by_start: np.ndarray
    """int32 [R]; rows by their first byte, of equals in their order"""
    at: np.ndarray
    """int64 [n + 3]; those that start at byte i are by_start[at[i] : at[i + 1]]"""
    canonical: np.ndarray
    """int32 [n + 2]; the canonical row that starts at each byte, or -1"""
    child: np.ndarray
    """int32 [S]; row that continues each stop, or -1"""
    level_offset: np.ndarray
    """int64 [R + 1]; where a row's levels begin"""
    entry_offset: np.ndarray
    """int64 [L + 1]; where a level's entries begin"""
    stop_offset: np.ndarray
    """int64 [R + 1]; where a row's stops begin"""


@njit(cache=True, nogil=True)
def _offsets(counts: np.ndarray) -> np.ndarray:
    out = np.zeros(len(counts) + 1, np.int64)
    for k in range(len(counts)):
        out[k + 1] = out[k] + counts[k]
    return out


@njit(cache=True, nogil=True)
def tables(
    n: int, row_start: np.ndarray, row_depth: np.ndarray, row_parent: np.ndarray, row_token: np.ndarray,
    n_levels: np.ndarray, fanout: np.ndarray, n_stops: np.ndarray, stop_token: np.ndarray,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The members of `Tables`."""
    rows = len(row_start)
    starting = np.zeros(n + 2, np.int64)
    canonical = np.full(n + 2, -1, np.int32)
    for r in range(rows):
        starting[row_start[r]] += 1
        if row_depth[r] == 0:
            canonical[row_start[r]] = r
    at = _offsets(starting)
    place = at.copy()
    by_start = np.empty(rows, np.int32)
    for r in range(rows):
        by_start[place[row_start[r]]] = r
        place[row_start[r]] += 1
    stop_offset = _offsets(n_stops)
    child = np.full(len(stop_token), -1, np.int32)
    for r in range(1, rows):
        p = row_parent[r]
        for s in range(stop_offset[p], stop_offset[p + 1]):
            if stop_token[s] == row_token[r]:
                child[s] = r
                break
    return by_start, at, canonical, child, _offsets(n_levels), _offsets(fanout), stop_offset
