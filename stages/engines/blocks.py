"""Rows of logits as blocks of columns in byte order, what `paths_device` and its two kernels share."""

from typing import NamedTuple

import torch

BLOCK = 128
"""Columns that are summed together."""
TILE = 4096
"""Columns that share a maximum; those that one program of `path_kernels.sum_blocks` reads."""


class Blocks(NamedTuple):
    """Maxima and sums of some rows of logits; R rows, T tiles, B = T * TILE / BLOCK blocks."""

    tile_peak: torch.Tensor
    """float32 [R, T]"""
    peak: torch.Tensor
    """float32 [R, B]"""
    sum: torch.Tensor
    """float32 [R, B]; of exp(logit - its tile's maximum)."""


class BlockedRows(NamedTuple):
    """Rows of logits whose blocks are known: all that the mass of a range of columns is made of."""

    logits: torch.Tensor
    """float32 [R, >= W]"""
    columns: torch.Tensor
    """int32 [W]; the column of the logits at each place of the byte order."""
    blocks: Blocks
    peak: torch.Tensor
    """float32 [R]; maximum of the row."""
    total: torch.Tensor
    """float32 [R]; sum of exp(logit - peak)."""
