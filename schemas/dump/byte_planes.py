"""float32 numbers as four planes of bytes, the lowest byte of every number first: what zstd can compress.

Parquet's BYTE_STREAM_SPLIT does the same to a column of numbers. A ragged column would be a list there, and a reader
rebuilds its offsets from a level per number; a blob per row has no levels.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bytecache.schemas.arrays import F32, U8


@njit(cache=True, nogil=True)
def _split(bits: NDArray[np.uint32], planes: U8) -> None:
    n = np.uint64(bits.shape[0])
    for k in range(n):
        planes[k] = bits[k] & np.uint32(255)
        planes[n + k] = bits[k] >> np.uint32(8) & np.uint32(255)
        planes[n + n + k] = bits[k] >> np.uint32(16) & np.uint32(255)
        planes[n + n + n + k] = bits[k] >> np.uint32(24)


@njit(cache=True, nogil=True)
def _join(planes: U8, bits: NDArray[np.uint32]) -> None:
    n = np.uint64(bits.shape[0])
    for k in range(n):
        low = np.uint32(planes[k]) | np.uint32(planes[n + k]) << np.uint32(8)
        high = np.uint32(planes[n + n + k]) | np.uint32(planes[n + n + n + k]) << np.uint32(8)
        bits[k] = low | high << np.uint32(16)


def to_planes(values: F32) -> U8:
    """uint8 [4 n] of float32 [n]."""
    out = np.empty(4 * len(values), np.uint8)
    _split(np.ascontiguousarray(values, np.float32).view(np.uint32), out)
    return out


def from_planes(planes: U8) -> F32:
    """float32 [n] of uint8 [4 n]. Raises ValueError for a length that is no multiple of 4."""
    if len(planes) % 4:
        raise ValueError(f"{len(planes)} bytes are not four planes of one length")
    out = np.empty(len(planes) // 4, np.float32)
    _join(planes, out.view(np.uint32))
    return out
