"""The stored columns, and what a writer chose to columns (`expansion` is the way back).

Two small numbers share a byte, and what is too large for its half is in a column apart: zstd's entropy stage codes
single bytes. A byte that holds value and gap is coded with their joint statistics, never costs a whole bit for a
certain half, and has too many values for useless short matches. Measured on English prose: 17 % fewer bytes for value
and gap than in two columns at zstd level 3, 5 % fewer at level 19.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytecache.schemas.arrays import F64, U8

FORMAT = "bytecache.byte-targets"
VERSION = 1
COLUMNS = {
    "text": "uint8",
    "mask": "uint8",
    "head": "uint8",
    "tail_low": "uint8",
    "count_over": "uint8",
    "top": "uint8",
    "entry": "uint8",
    "gap_over": "uint8",
    "prior_parent": "int64",
    "prior_byte": "uint8",
    "prior_code": "uint8",
    "doc_start": "int64",
    "doc_id": "uint8",
    "doc_id_start": "int64",
}
STEPS = (1, 2, 4, 8, 16, 32, 64)
"""What a `value_step` may be."""
COUNT_OVER = 7
"""Counts of this and more: this in `head`, the rest in `count_over`."""
TAIL_IS_ALL = 255
"""Value of the `tail` column that says: nothing is listed, all mass is unlisted."""
MAX_COUNT = 127
VALUE: F64 = (np.arange(256) / 256.0) ** 2
"""float64 [256]: probability of a listed symbol's code."""
TAIL: F64 = np.append(((np.arange(255) / 256.0) ** 2) ** 2, 1.0)
"""float64 [256]: mass of a `tail` code; 255 = 1."""


class Codes(NamedTuple):
    """What a shard says about its rows, one number a byte."""

    head: U8
    """uint8 [N]: 2 * count of listed symbols + (the implied symbol is not the true one)"""
    tail: U8
    """uint8 [N]: code of the unlisted mass"""
    top: U8
    """uint8 [M]: for the rows whose implied symbol is not the true one: its rank among all others"""
    gap: U8
    """uint8 [E]: ranks passed over since the listed symbol before"""
    value: U8
    """uint8 [E]: code of the probability"""


def pack_columns(codes: Codes, step: int) -> dict[str, U8]:
    """The stored columns of these codes; `step`, a power of two, divides every value."""
    head, tail, top, gap, value = codes
    count = head >> 1
    widest = np.uint8(step - 1)
    return {
        "head": tail & 240 | np.minimum(count, COUNT_OVER) << 1 | head & 1,
        "tail_low": tail & 15,
        "count_over": count[count >= COUNT_OVER] - np.uint8(COUNT_OVER),
        "top": top,
        "entry": value | np.minimum(gap, widest),
        "gap_over": gap[gap >= widest] - widest,
    }


def check_bounds(columns: dict[str, NDArray[Any]], step: int) -> None:
    """Raises ValueError, the column's name first, for numbers that `pack_columns` does not make."""
    for name, most in (("tail_low", 15), ("count_over", MAX_COUNT - COUNT_OVER), ("gap_over", 256 - step)):
        highest = columns[name].max(initial=0)
        if highest > most:
            raise ValueError(f"{name} holds {highest}, at most {most}")
