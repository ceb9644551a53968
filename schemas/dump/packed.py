"""What version 3 of a dump holds of a window: nothing that follows from something else, everything else in codes.

Rows are marks on stops. A stop that a row goes on from says of what kind that row is; where the row starts, which token
it ends with, its parent and its depth follow, because rows are numbered breadth first: the canonical ones, then row
after row, stop after stop, the branch and the static row of each. Levels that hold too little of the text's probability
at the end of a row are cut off. Shares of a level are coded as `schemas.dump.shares` says, under the weights that the
lattice gave the window; without weights every level counts as if it held all. `packing` writes, `unpacking` reads.
"""

from typing import NamedTuple

import numpy as np

from bytecache.schemas.arrays import F32, F64, I32, U8, U16
from bytecache.schemas.dump.window import Window

CANONICAL, BRANCH, STATIC = 1, 2, 4
"""Bits of a stop's mark: the kinds of row that go on from it."""
TOP_K_STEPS = 16
"""Codes of a log-probability per nat."""


class Weights(NamedTuple):
    """What a window's parts hold of P(text so far), by the lattice; 0 where nothing is read from them."""

    level: F64
    """float64 [L]; the cell of each level"""
    stop: F64
    """float64 [S]; each stop, where it ends"""


class Packed(NamedTuple):
    """The ragged columns of a window; R rows, L levels, E entries, S stops, X rare shares."""

    row_scale: U8
    """uint8 [R]"""
    row_levels: U16
    """uint16 [R]"""
    row_end: U16
    """uint16 [R]; codes"""
    row_control: U16
    """uint16 [R]; codes; nothing is implied by them"""
    level_entries: U16
    """uint16 [L]"""
    level_stops: U8
    """uint8 [L]"""
    level_rest: U16
    """uint16 [L]; codes of what is unlisted, where a share is implied"""
    entry_gap: U8
    """uint8 [E]; how many bytes lie between an entry's and the one before it in its level"""
    entry_code: U16
    """uint16 [E]"""
    stop_token: I32
    """int32 [S]"""
    stop_code: U16
    """uint16 [S]"""
    stop_rows: U8
    """uint8 [S]; bits"""
    rare: U16
    """uint16 [X]"""


def pack_top_k(window: Window) -> tuple[I32, U16]:
    """Ids, int32 [rows k], and codes, uint16 [rows k], of the canonical rows' top k, row after row.

    A code is how much less likely a token is than the one before it, modulo 2^16 should it be more.
    """
    k = len(window.topk_id) // len(window.row_start)
    canonical = np.flatnonzero(window.row_depth == 0)
    ids: I32 = window.topk_id.reshape(-1, k)[canonical].reshape(-1) if k else window.topk_id.astype(np.int32)
    if not k:
        return ids, np.zeros(0, np.uint16)
    logp = window.topk_logp.reshape(-1, k)[canonical].astype(np.float64)
    codes = np.rint(np.clip(-logp * TOP_K_STEPS, 0.0, 65535.0)).astype(np.int64)
    return ids, np.diff(codes, axis=1, prepend=0).astype(np.uint16).reshape(-1)


def unpack_top_k(row_depth: U8, ids: I32, codes: U16) -> tuple[I32, F32]:
    """Ids and log-probabilities of every row, int32 and float32 [R k]; zeros in all but canonical rows."""
    canonical = np.flatnonzero(row_depth == 0)
    k = len(ids) // len(canonical)
    if len(ids) != k * len(canonical) or len(codes) != len(ids):
        raise ValueError("its top k has not as many tokens in every row")
    all_ids, logp = np.zeros((len(row_depth), k), np.int32), np.zeros((len(row_depth), k), np.float32)
    all_ids[canonical] = ids.reshape(-1, k) if k else 0
    total = np.cumsum(codes.reshape(-1, max(k, 1)), axis=1, dtype=np.uint16) if k else logp[canonical]
    logp[canonical] = total / np.float32(-TOP_K_STEPS)
    return all_ids.reshape(-1), logp.reshape(-1)
