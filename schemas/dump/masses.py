"""How many bits of a mass a token dump keeps (the dump's own docstring says why), and how they lie on disk.

float32 numbers lie as four planes of bytes, the lowest byte of every number first: what zstd can compress. Parquet's
BYTE_STREAM_SPLIT does the same to a column of numbers. A ragged column would be a list there, and a reader rebuilds its
offsets from a level per number; a blob per row has no levels.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bytecache.schemas.arrays import F32, U8

MASS_BITS = 13
"""Bits of mantissa of a stop's mass."""
SHARE_BITS = 15
"""Bits of mantissa of an entry that has all of its prefix's mass, and of the text's own; one less for each halving of
the share."""
LEAST_BITS = 5
"""Bits of mantissa of the rarest entries."""


def round_masses(mass: np.ndarray, kept: int = MASS_BITS) -> np.ndarray:
    """Round float32 to `kept` bits of mantissa, to nearest; by default the precision a dump keeps of stops."""
    drop = 23 - kept
    bits = mass.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)


@njit(cache=True, nogil=True)
def round_by_share(
    text: np.ndarray, row_start: np.ndarray, n_levels: np.ndarray, fanout: np.ndarray, entry_byte: np.ndarray,
    bits: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The rounded float32 bits of entries; shares are compared by their exponents."""
    out = bits.copy()
    one = np.int64(127)
    level = 0
    e = 0
    for r in range(len(row_start)):
        prefix = one
        for depth in range(n_levels[r]):
            i = row_start[r] + depth
            following = prefix
            if level == len(fanout) or e + fanout[level] > len(bits):  # inconsistent: refused by whoever reads it
                return out
            for _ in range(fanout[level]):
                exponent = np.int64(bits[e] >> np.uint32(23))
                keep = min(SHARE_BITS, max(LEAST_BITS, SHARE_BITS + int(exponent - prefix)))
                if i < len(text) and entry_byte[e] == text[i]:  # all that follows is a part of it
                    following = exponent
                    keep = SHARE_BITS
                drop = np.uint32(23 - keep)
                half = np.uint32(1) << (drop - np.uint32(1))
                out[e] = ((bits[e] + half) >> drop) << drop
                e += 1
            prefix = following
            level += 1
    return out


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
