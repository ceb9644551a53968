"""Numbers as planes of bytes, the lowest byte of every number first: what zstd can compress.

Parquet's BYTE_STREAM_SPLIT does the same to a column of numbers. A ragged column would be a list there, and a reader
rebuilds its offsets from a level per number; a blob per row has no levels.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bytecache.schemas.arrays import U8


def to_planes(values: NDArray[Any]) -> U8:
    """uint8 [width n] of n numbers of one or more bytes each."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    planes: U8 = little.view(np.uint8).reshape(len(values), little.itemsize).T.ravel()
    return planes


def from_planes(planes: U8, dtype: str) -> NDArray[Any]:
    """The numbers, [n] of `dtype`, of uint8 [width n]. Raises ValueError for a length that is no multiple of it."""
    width = np.dtype(dtype).itemsize
    if len(planes) % width:
        raise ValueError(f"{len(planes)} bytes are not {width} planes of one length")
    out = np.empty(len(planes) // width, dtype)
    if width == 1:
        out.view(np.uint8)[:] = planes
    elif width == 2:
        _join_two(planes, out.view(np.uint16))
    else:
        _join_four(planes, out.view(np.uint32))
    return out


@njit(cache=True, nogil=True)
def _join_two(planes: U8, out: NDArray[np.uint16]) -> None:
    n = np.uint64(out.shape[0])
    for k in range(n):
        out[k] = np.uint16(planes[k]) | np.uint16(planes[n + k]) << np.uint16(8)


@njit(cache=True, nogil=True)
def _join_four(planes: U8, out: NDArray[np.uint32]) -> None:
    n = np.uint64(out.shape[0])
    for k in range(n):
        low = np.uint32(planes[k]) | np.uint32(planes[n + k]) << np.uint32(8)
        high = np.uint32(planes[n + n + k]) | np.uint32(planes[n + n + n + k]) << np.uint32(8)
        out[k] = low | high << np.uint32(16)
