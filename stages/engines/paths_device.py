"""Path masses where the logits are: the vocabulary is read once, and the host never waits inside a step.

Columns are taken in *byte order*: the ordinary tokens sorted by their bytes, then the END tokens, then the rest. So all
that is asked of a row is a run of columns: a trie node's tokens, one stopping token, END, control. Then

    blocks   of every tile of 4,096 columns the maximum; of every block of 128 the maximum and the sum of exponentials
    ranges   each run's whole blocks by their sums, its two edges by column
    top k    of the k blocks with the greatest maxima alone: no other block can hold one of the k

in float32, sums of at most 128 terms at a time, each relative to its tile's maximum; against float64 the masses differ
by about 1e-6 of themselves. The ranges go over, and the masses come back, through pinned memory without waiting;
whoever wants them waits, a step later. Triton where there is a GPU, the same in torch's own operations elsewhere.

The logits are gathered in byte order as they are read. Permuting the head's rows once instead would make the reads
straight, and cost a second copy of a head that is tied to the input embedding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from bytecache.stages.engines.blocks import BLOCK, TILE, BlockedRows, Blocks


class Sums(NamedTuple):
    """What the rows of a plan ask of L rows of logits, on the host: C children, S stops, K of top-k, R rows."""

    child: np.ndarray
    """float [C]; share of its row."""
    stop: np.ndarray
    """float [S]; share of its row."""
    end: np.ndarray
    """float [L]"""
    control: np.ndarray
    """float [L]"""
    log_norm: np.ndarray
    """float64 [L]; nats; not finite where the logits were not."""
    topk_id: np.ndarray
    """int64 [L, K]"""
    topk_logit: np.ndarray
    """float32 [L, K]"""
    next_logit: np.ndarray
    """float32 [R]; of the next tokens asked for."""


class Tables(NamedTuple):
    """The vocabulary's columns on the device, and where END and control lie among them."""

    columns: torch.Tensor
    """int32 [W]; the column of the logits at each place of the byte order."""
    end_ranges: np.ndarray
    """int32 [k, 2]"""
    control_range: tuple[int, int]


def make_tables(order: np.ndarray, end_ids: np.ndarray, width: int, device: torch.device) -> Tables:
    """`order`: ordinary tokens sorted by bytes; `width`: columns of the logits, those past the vocabulary included."""
    place = np.full(width, -1, np.int64)
    place[order] = np.arange(len(order))
    apart = end_ids[place[end_ids] < 0]
    rest = place < 0
    rest[apart] = False
    columns = np.concatenate([order, apart, np.flatnonzero(rest)]).astype(np.int32)
    ends = [(len(order), len(order) + len(apart))] if len(apart) else []
    ends += [(p, p + 1) for p in place[end_ids].tolist() if p >= 0]  # an END token that has bytes
    return Tables(
        torch.from_numpy(columns).to(device),
        np.array(ends, np.int32).reshape(-1, 2),
        (len(order) + len(apart), width),
    )


def sum_on_device(
    logits: torch.Tensor, tables: Tables, ranges: np.ndarray, children: int, row: np.ndarray, next_token: np.ndarray,
    top_k: int,
) -> Callable[[], Sums]:  # fmt: skip
    """Begin the sums of `ranges` int32 [3, C + S] (row, first place, one past the last) of `logits` float [L, W].

    `row`, `next_token` int64 [R]: single logits that are wanted beside. What is returned waits for the device.
    """
    logits = logits.to(torch.float32)
    apart = _apart(tables, len(logits))
    asked = np.concatenate([ranges, apart], axis=1)
    blocks, range_masses = _kernels(logits)
    read: Blocks = blocks(logits, tables.columns)
    peak = read.tile_peak.amax(dim=1)
    per_tile = read.sum.view(len(logits), -1, TILE // BLOCK).sum(dim=-1, dtype=torch.float64)
    total = (per_tile * torch.exp(read.tile_peak - peak[:, None])).sum(dim=-1)
    rows = BlockedRows(logits, tables.columns, read, peak, total.float())
    mass = range_masses(rows, _to_device(asked, logits.device), whole_blocks(asked))
    topk_id, topk_logit = _top_k(logits, tables.columns, read.peak, top_k)
    wanted = _to_device(np.stack([row, next_token]), logits.device)
    wait = _to_host([mass, peak.double() + total.log(), topk_id, topk_logit, logits[wanted[0], wanted[1]]])
    ends, n_ranges = len(tables.end_ranges), ranges.shape[1]

    def sums() -> Sums:
        masses, *rest = wait()
        of_row = masses[n_ranges:].reshape(-1, ends + 1)
        return Sums(masses[:children], masses[children:n_ranges], of_row[:, :ends].sum(axis=1), of_row[:, ends], *rest)

    return sums


def _apart(tables: Tables, rows: int) -> np.ndarray:
    """The ranges of END and control tokens of every row of logits, int32 [3, rows * (ends + 1)]."""
    bounds = np.concatenate([tables.end_ranges, np.array([tables.control_range], np.int32)])
    row = np.repeat(np.arange(rows, dtype=np.int32), len(bounds))
    return np.concatenate([row[None], np.tile(bounds.T, rows)])


def whole_blocks(ranges: np.ndarray) -> int:
    """Blocks that lie wholly in the ranges."""
    return int(np.maximum(ranges[2] // BLOCK - -(-ranges[1] // BLOCK), 0).sum(dtype=np.int64))


def _kernels(logits: torch.Tensor) -> tuple[Any, Any]:
    if logits.is_cuda:
        from bytecache.stages.engines import path_kernels

        return path_kernels.launch_blocks, path_kernels.launch_ranges
    return torch_blocks, torch_ranges


def torch_blocks(logits: torch.Tensor, columns: torch.Tensor) -> Blocks:
    """`path_kernels.launch_blocks` in torch's operations."""
    rows, tiles = len(logits), -(-len(columns) // TILE)
    ordered = torch.full((rows, tiles * TILE), -torch.inf, device=logits.device)
    ordered[:, : len(columns)] = logits[:, columns]
    blocks = ordered.view(rows, tiles, TILE // BLOCK, BLOCK)
    block_peak = blocks.amax(dim=-1)
    tile_peak = block_peak.amax(dim=-1)
    shift = torch.where(tile_peak == -torch.inf, 0.0, tile_peak)
    block_sum = torch.exp(blocks - shift[:, :, None, None]).sum(dim=-1)
    return Blocks(tile_peak, block_peak.view(rows, -1), block_sum.view(rows, -1))


def torch_ranges(rows: BlockedRows, ranges: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """`path_kernels.launch_ranges` in torch's operations; `n_blocks`: `whole_blocks` of the ranges."""
    logits, columns = rows.logits, rows.columns
    row, begin, end = ranges.long()
    first, last = (begin + BLOCK - 1) // BLOCK, end // BLOCK
    whole = last > first
    head_end = torch.where(whole, first * BLOCK, end)
    tail_begin = torch.where(whole, last * BLOCK, end)
    share = torch.exp(rows.blocks.tile_peak - rows.peak[:, None])
    weight = share.repeat_interleave(TILE // BLOCK, dim=1) * rows.blocks.sum
    count = torch.where(whole, last - first, 0)
    shift = row * weight.shape[1] + first - (count.cumsum(0) - count)
    block = torch.arange(n_blocks, device=logits.device) + shift.repeat_interleave(count, output_size=n_blocks)
    mass = torch.segment_reduce(weight.view(-1)[block].double(), "sum", lengths=count, unsafe=True)
    step = torch.arange(BLOCK, device=logits.device)
    for low, high in ((begin, head_end), (tail_begin, end)):
        # A short range without a whole block spans at most two of them.
        for shift in (0, BLOCK):
            place = low[:, None] + shift + step
            inside = place < high[:, None]
            value = logits[row[:, None], columns[place.clamp(max=len(columns) - 1)].long()] - rows.peak[row][:, None]
            mass = mass + torch.where(inside, torch.exp(value), 0.0).sum(dim=1, dtype=torch.float64)
    return (mass / rows.total[row]).float()


def _top_k(
    logits: torch.Tensor, columns: torch.Tensor, block_peak: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and logits [R, k] of the k greatest, from the k blocks of the greatest maxima."""
    blocks = torch.topk(block_peak, min(k, block_peak.shape[1]), dim=1).indices
    place = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    column = columns[place.clamp(max=len(columns) - 1)].long()
    value = torch.where(place < len(columns), logits.gather(1, column), -torch.inf)
    best = torch.topk(value, k, dim=1)
    return column.gather(1, best.indices), best.values


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _to_host(parts: list[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
    """Send tensors to pinned memory; what is returned waits until they are there."""
    on_gpu = parts[0].is_cuda
    copies = [torch.empty(part.shape, dtype=part.dtype, pin_memory=on_gpu) for part in parts]
    for copy, part in zip(copies, parts, strict=True):
        copy.copy_(part, non_blocking=True)
    event: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
    if event:
        event.record()

    def wait() -> list[np.ndarray]:
        if event:
            event.synchronize()
        return [copy.numpy() for copy in copies]

    return wait


@njit(cache=True)
def count_ranges(
    level_offset: np.ndarray, node: np.ndarray, first_child: np.ndarray, n_equal: np.ndarray
) -> tuple[int, int]:
    """Children and stopping tokens of all levels of some rows."""
    children = stops = 0
    for level in range(level_offset[0], level_offset[-1]):
        v = node[level]
        children += first_child[v + 1] - first_child[v]
        stops += n_equal[v]
    return children, stops


@njit(cache=True)
def write_ranges(
    level_offset: np.ndarray, node: np.ndarray, row: np.ndarray, first_child: np.ndarray, lo: np.ndarray,
    hi: np.ndarray, n_equal: np.ndarray, children: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Row, first place and end of every child of every level, then of every stopping token, into int32 [3, C + S].

    Both come in the order of levels.
    """
    child, stop = 0, children
    for r in range(len(row)):
        for level in range(level_offset[r], level_offset[r + 1]):
            v = node[level]
            for c in range(first_child[v], first_child[v + 1]):
                out[0, child], out[1, child], out[2, child] = row[r], lo[c], hi[c]
                child += 1
            for place in range(lo[v], lo[v] + n_equal[v]):
                out[0, stop], out[1, stop], out[2, stop] = row[r], place, place + 1
                stop += 1


def columns_read(ranges: np.ndarray, width: int, rows: int) -> float:
    """Columns that the two kernels read of each row, counted in rows: blocks and their sums, edges, tables.

    `ranges` int32 [3, C]; `width` columns of the logits.
    """
    begin, end = ranges[1].astype(np.int64), ranges[2].astype(np.int64)
    first, last = -(-begin // BLOCK), end // BLOCK
    whole = last > first
    edges = np.where(whole, first * BLOCK - begin + end - last * BLOCK, end - begin).sum()
    sums = np.where(whole, last - first, 0).sum()
    return float((rows * width + edges + 2 * sums) / (rows * width))
