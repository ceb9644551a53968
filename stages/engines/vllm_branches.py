"""Branches over the cache blocks of their windows, without a request each.

A branch is its window's tokens up to an anchor, and a chain of its own. As a request it costs the scheduler about a
millisecond, and what the prefix cache cannot share: on average half a block of tokens. Here the blocks of a window stay
where they are after its request has finished (`WindowBlocks`), and a *pass* runs many branches of many windows at once,
each a sequence of its chain's tokens alone:

    block table     the window's whole blocks up to the anchor, then blocks borrowed for the pass
    first borrowed  a copy of the block that holds the anchor, so that the chain can be written behind it
    slots           of the chain's tokens, in the borrowed blocks

All of a pass is computed here at once, in arrays; stages.engines.vllm_pass runs it in the workers. Blocks are taken
from, and given back to, vLLM's own pool, whose counts of references keep requests away from them. Windows for which
there is no room are not kept; their branches go as requests.

Models whose layers cache different blocks (recurrent ones) have no such table; `window_blocks` returns None for them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bytecache.stages.engines.engine import Branch, Prompt

ROOM = 4
"""One part in so many of the cache stays free of windows, for requests and borrowed blocks."""


class BranchPass(NamedTuple):
    """One batch of S sequences, N tokens, for the model: everything but the weights and the cache."""

    tokens: np.ndarray
    """int32 [N]"""
    positions: np.ndarray
    """int64 [N]"""
    query_start: np.ndarray
    """int32 [S + 1]; where each sequence's tokens begin."""
    seq_lens: np.ndarray
    """int32 [S]; tokens of each history, cached ones included."""
    table: np.ndarray
    """int32 [S, W]; blocks of each history, 0 past its end."""
    slots: np.ndarray
    """int64 [N]; where each token's keys and values go."""
    copies: np.ndarray
    """int64 [C, 2]; blocks to copy before, from and to."""


class Part(NamedTuple):
    """Sequences of a pass that belong together: rows [lo, hi) of job number `job`."""

    job: int
    lo: int
    hi: int


class _Job(NamedTuple):
    """Branches of one window in arrays; B of them."""

    blocks: np.ndarray
    """int32; of the window."""
    anchor: np.ndarray
    """int64 [B]"""
    length: np.ndarray
    """int64 [B]; tokens of each chain."""
    chain: np.ndarray
    """int32; the chains, one after the other."""


class WindowBlocks:
    """Cache blocks of finished windows, and blocks to borrow, of vLLM's pool."""

    def __init__(self, scheduler: Any, longest: int) -> None:
        """`longest`: tokens of the longest history, for which requests must find room."""
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self.block_size = int(scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self.room = max(int(self._pool.num_gpu_blocks) // ROOM, 2 * -(-longest // self.block_size))
        self._expected: dict[str, Prompt] = {}
        self._windows: dict[int, tuple[Prompt, list[Any]]] = {}
        release = scheduler._free_blocks  # of requests that have finished; preempted ones go another way

        def keep_and_release(request: Any) -> None:
            self._keep(request)
            release(request)

        scheduler._free_blocks = keep_and_release

    def expect(self, name: str, prompt: Prompt) -> None:
        """Keep the blocks of request `name`, which computes `prompt`, when it has finished."""
        self._expected[name] = prompt

    def _keep(self, request: Any) -> None:
        prompt = self._expected.pop(request.request_id.rsplit("-", 1)[0], None)
        if prompt is None or request.num_computed_tokens < len(prompt.tokens) or self.free < self.room:
            return
        (blocks,) = self._manager.coordinator.get_blocks(request.request_id)
        if len(blocks) * self.block_size >= len(prompt.tokens) and not any(block.is_null for block in blocks):
            self._pool.touch(blocks)
            self._windows[id(prompt)] = prompt, list(blocks)

    def holds(self, prompt: Prompt) -> bool:
        """Whether the blocks of this very prompt are here."""
        return id(prompt) in self._windows and self._windows[id(prompt)][0] is prompt

    def table(self, prompt: Prompt) -> np.ndarray:
        """Block ids of a prompt that is held, int32."""
        return np.array([block.block_id for block in self._windows[id(prompt)][1]], np.int32)

    def borrow(self, count: int) -> list[Any]:
        """Blocks of nobody; `give_back` returns them."""
        blocks: list[Any] = self._pool.get_new_blocks(count)
        return blocks

    def give_back(self, blocks: list[Any]) -> None:
        """Return borrowed blocks."""
        self._pool.free_blocks(blocks)

    @property
    def free(self) -> int:
        """Blocks that can be borrowed now."""
        return int(self._pool.get_num_free_blocks())

    def forget(self) -> None:
        """Let the windows go."""
        for _, blocks in self._windows.values():
            self._pool.free_blocks(reversed(blocks))
        self._windows = {}
        self._expected = {}


def window_blocks(engine: Any, longest: int) -> WindowBlocks | None:
    """Those of a `vllm.LLMEngine`, or None: its scheduler is elsewhere, or its layers do not share one block table."""
    scheduler = getattr(getattr(engine.engine_core, "engine_core", None), "scheduler", None)
    groups: Sequence[Any] = getattr(getattr(scheduler, "kv_cache_config", None), "kv_cache_groups", ())
    named = all(hasattr(scheduler, name) for name in ("kv_cache_manager", "_free_blocks"))
    # Recurrent states have no block for each run of tokens.
    if len(groups) != 1 or not named or "Mamba" in type(groups[0].kv_cache_spec).__name__:
        return None
    return WindowBlocks(scheduler, longest)


def job_of(blocks: np.ndarray, branches: Sequence[Branch]) -> _Job:
    """Branches of a window whose block ids are `blocks`."""
    return _Job(
        blocks,
        np.array([branch.anchor for branch in branches], np.int64),
        np.array([len(branch.chain) for branch in branches], np.int64),
        np.array([token for branch in branches for token in branch.chain], np.int32),
    )


def cut(jobs: Sequence[_Job], block_size: int, tokens: int, blocks: int) -> Iterator[list[Part]]:
    """Passes of at most `tokens` tokens and `blocks` borrowed blocks, one sequence at least; jobs in order."""
    parts: list[Part] = []
    token_room, block_room = tokens, blocks
    for number, job in enumerate(jobs):
        lo, count = 0, len(job.anchor)
        token_end = np.cumsum(job.length)
        block_end = np.cumsum(_borrowed(job.anchor, job.length, block_size))
        while lo < count:
            token_at, block_at = (int(token_end[lo - 1]), int(block_end[lo - 1])) if lo else (0, 0)
            hi = int(
                min(
                    np.searchsorted(token_end, token_at + token_room, side="right"),
                    np.searchsorted(block_end, block_at + block_room, side="right"),
                )
            )
            if hi == lo and not parts:
                hi = lo + 1
            if hi > lo:
                parts.append(Part(number, lo, hi))
                token_room -= int(token_end[hi - 1]) - token_at
                block_room -= int(block_end[hi - 1]) - block_at
                lo = hi
            if lo < count:
                yield parts
                parts, token_room, block_room = [], tokens, blocks
    if parts:
        yield parts


def borrowed_blocks(jobs: Sequence[_Job], parts: list[Part], block_size: int) -> int:
    """Blocks that a pass borrows."""
    return sum(
        int(_borrowed(jobs[p.job].anchor[p.lo : p.hi], jobs[p.job].length[p.lo : p.hi], block_size).sum())
        for p in parts
    )


def _borrowed(anchor: np.ndarray, length: np.ndarray, block_size: int) -> np.ndarray:
    """Blocks from the one that the first token of a chain is in to that of its last, int64."""
    blocks: np.ndarray = (anchor + length) // block_size - (anchor + 1) // block_size + 1
    return blocks


def make_pass(jobs: Sequence[_Job], parts: list[Part], borrowed: np.ndarray, block_size: int) -> BranchPass:
    """The arrays of one pass; `borrowed` int32: ids of as many blocks as `borrowed_blocks` says."""
    anchor = np.concatenate([jobs[p.job].anchor[p.lo : p.hi] for p in parts])
    length = np.concatenate([jobs[p.job].length[p.lo : p.hi] for p in parts])
    count = len(anchor)
    table = np.zeros((count, int(((anchor + length) // block_size).max()) + 1), np.int32)
    chains = []
    row = 0
    for p in parts:
        job = jobs[p.job]
        width = min(len(job.blocks), table.shape[1])
        table[row : row + p.hi - p.lo, :width] = job.blocks[:width]
        row += p.hi - p.lo
        ends = np.cumsum(job.length)
        chains.append(job.chain[ends[p.lo] - job.length[p.lo] : ends[p.hi - 1]])
    first = (anchor + 1) // block_size
    mine = _borrowed(anchor, length, block_size)
    begin = np.cumsum(mine) - mine
    copied = np.flatnonzero((anchor + 1) % block_size)
    copies = np.stack([table[copied, first[copied]], borrowed[begin[copied]]], axis=1).astype(np.int64)
    table[np.arange(table.shape[1]) >= (first + mine)[:, None]] = 0
    table[np.repeat(np.arange(count), mine), np.repeat(first - begin, mine) + np.arange(len(borrowed))] = borrowed
    query_start = np.append(0, np.cumsum(length))
    sequence = np.repeat(np.arange(count), length)
    positions = anchor[sequence] + 1 + np.arange(len(sequence)) - query_start[sequence]
    slots = table[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return BranchPass(
        np.concatenate(chains), positions, query_start.astype(np.int32), (anchor + 1 + length).astype(np.int32), table,
        slots, copies,
    )  # fmt: skip
