"""The two kernels of path masses on a GPU, in Triton; `stages.engines.paths_device` says what they are for.

They run on a CPU too, under Triton's interpreter (TRITON_INTERPRET=1), which is how their arithmetic is tested.
"""

import torch
import triton
import triton.language as tl

from bytecache.stages.engines.blocks import BLOCK, TILE, BlockedRows, Blocks


@triton.jit
def sum_blocks(  # type: ignore[no-untyped-def]
    logits, stride, columns, width, tile_peak, block_peak, block_sum, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile of one row: its maximum, and of every block the maximum and the sum of exp(logit - tile's maximum)."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    place = tile * TILE + tl.arange(0, TILE)
    inside = place < width
    column = tl.load(columns + place, mask=inside, other=0)
    x = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    blocks = tl.reshape(x, (TILE // BLOCK, BLOCK))
    peaks = tl.max(blocks, 1)
    peak = tl.max(peaks, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    out = row * tiles * (TILE // BLOCK) + tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    tl.store(tile_peak + row * tiles + tile, peak)
    tl.store(block_peak + out, peaks)
    tl.store(block_sum + out, tl.sum(tl.exp(blocks - shift), 1))


@triton.jit
def sum_ranges(  # type: ignore[no-untyped-def]
    logits, stride, columns, tile_peak, block_sum, row_peak, row_total, ranges, masses, tiles,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One range of columns of one row as a share of the row: whole blocks by their sums, the two edges by column."""
    number, count = tl.program_id(0), tl.num_programs(0)
    row = tl.load(ranges + number).to(tl.int64)
    begin, end = tl.load(ranges + count + number), tl.load(ranges + 2 * count + number)
    peak, total = tl.load(row_peak + row), tl.load(row_total + row)
    first, last = (begin + BLOCK - 1) // BLOCK, end // BLOCK
    whole = last > first
    head_end = tl.where(whole, first * BLOCK, end)
    tail_begin = tl.where(whole, last * BLOCK, end)
    # The edges are shorter than a block each, or one short range.
    mass = _columns(logits + row * stride, columns, begin, head_end, peak, BLOCK)
    mass += _columns(logits + row * stride, columns, tail_begin, end, peak, BLOCK)
    if whole:
        for i in range(first, last, BLOCK):
            block = i + tl.arange(0, BLOCK)
            inside = block < last
            sums = tl.load(block_sum + row * tiles * (TILE // BLOCK) + block, mask=inside, other=0.0)
            peaks = tl.load(tile_peak + row * tiles + block // (TILE // BLOCK), mask=inside, other=float("-inf"))
            mass += tl.sum(tl.where(inside, sums * tl.exp(peaks - peak), 0.0), 0)
    tl.store(masses + number, mass / total)


@triton.jit
def _columns(logits, columns, begin, end, peak, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of exp(logit - peak) of the columns [begin, end)."""
    mass = 0.0
    for i in range(begin, end, BLOCK):
        place = i + tl.arange(0, BLOCK)
        inside = place < end
        column = tl.load(columns + place, mask=inside, other=0)
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        mass += tl.sum(tl.where(inside, tl.exp(x - peak), 0.0), 0)
    return mass


def launch_blocks(logits: torch.Tensor, columns: torch.Tensor) -> Blocks:
    """The blocks of `logits` [R, >= W] in the order of `columns` int32 [W]."""
    rows, tiles = len(logits), -(-len(columns) // TILE)
    tile_peak = torch.empty((rows, tiles), dtype=torch.float32, device=logits.device)
    block_peak = torch.empty((rows, tiles * (TILE // BLOCK)), dtype=torch.float32, device=logits.device)
    block_sum = torch.empty_like(block_peak)
    sum_blocks[(rows, tiles)](
        logits, logits.stride(0), columns, len(columns), tile_peak, block_peak, block_sum, tiles, TILE=TILE, BLOCK=BLOCK
    )
    return Blocks(tile_peak, block_peak, block_sum)


def launch_ranges(rows: BlockedRows, ranges: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """Masses float32 [C] of `ranges` int32 [3, C]: row, first column, one past the last, in the order of `columns`.

    `n_blocks` is of use to the form in torch's operations alone.
    """
    masses = torch.empty(ranges.shape[1], dtype=torch.float32, device=rows.logits.device)
    tile_peak = rows.blocks.tile_peak
    sum_ranges[(ranges.shape[1],)](
        rows.logits, rows.logits.stride(0), rows.columns, tile_peak, rows.blocks.sum, rows.peak, rows.total,
        ranges.contiguous(), masses, tile_peak.shape[1], TILE=TILE, BLOCK=BLOCK,
    )  # fmt: skip
    return masses
