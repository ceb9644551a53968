"""What version 3 of a dump holds of a window: nothing that follows from something else, everything else in codes.

Rows are marks on stops. A stop that a row goes on from says of what kind that row is; where the row starts, which token
it ends with, its parent and its depth follow, because rows are numbered breadth first: the canonical ones, then row
after row, stop after stop, the branch and the static row of each. Levels that hold too little of the text's probability
at the end of a row are cut off. Shares of a level are coded as `schemas.dump.shares` says, under the weights that the
lattice gave the window; without weights every level counts as if it held all. `packing` writes, `unpacking` reads.
"""

from typing import NamedTuple

from bytecache.schemas.arrays import F64, I32, U8, U16

CANONICAL, BRANCH, STATIC = 1, 2, 4
"""Bits of a stop's mark: the kinds of row that go on from it."""
NEW_TOKEN = 8
"""Another bit: its token is listed, and is that of its spelling from here on."""


class Weights(NamedTuple):
    """What a window's parts hold of P(text so far), by the lattice; 0 where nothing is read from them."""

    level: F64
    """float64 [L]; the cell of each level"""
    stop: F64
    """float64 [S]; each stop, where it ends"""


class Packed(NamedTuple):
    """The ragged columns of a window; R rows, L levels, E entries, S stops, X rare shares, T tokens."""

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
    level_top: U16
    """uint16 [L]; the entry whose share is implied, 1 more than its place in the level's sequence; 0 for none"""
    entry_gap: U8
    """uint8 [E]; how many places of the level's sequence lie between an entry's and the one before it"""
    entry_code: U16
    """uint16 [E]"""
    stop_code: U16
    """uint16 [S]"""
    stop_rows: U8
    """uint8 [S]; bits"""
    token: I32
    """int32 [T]; tokens of the stops that are marked `NEW_TOKEN`, in order"""
    rare: U16
    """uint16 [X]"""
