"""What lies where in a window: which rows end at a byte, which continues a stop, and who would stand in for it.

Made from a window's columns alone, so that whoever reads a dump finds the same. Price: linear in rows and stops.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.dump.window import Window
from bytecache.stages.lattice.heirs import heirs


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
    heir: np.ndarray
    """int32 [S]; row that an orphan joins, or -1 (stages/lattice/heirs.py)"""
    agreement: np.ndarray
    """int32 [S]; in how many of its last tokens another evaluated history that ends there agrees, or -1"""
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


def tables(w: Window) -> Tables:
    """What lies where in a window."""
    by_start, at, canonical, child, level_offset, entry_offset, stop_offset = _places(
        len(w.text), w.row_start, w.row_depth, w.row_parent, w.row_token, w.n_levels, w.fanout, w.n_stops, w.stop_token
    )
    heir, agreement = heirs(
        w.row_start, w.row_parent, w.row_token, w.row_logp, w.row_static, by_start, at, stop_offset, w.stop_depth,
        w.stop_token, child,
    )  # fmt: skip
    return Tables(by_start, at, canonical, child, heir, agreement, level_offset, entry_offset, stop_offset)


@njit(cache=True, nogil=True)
def _places(
    n: int, row_start: np.ndarray, row_depth: np.ndarray, row_parent: np.ndarray, row_token: np.ndarray,
    n_levels: np.ndarray, fanout: np.ndarray, n_stops: np.ndarray, stop_token: np.ndarray,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The members of `Tables` but for heirs."""
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
