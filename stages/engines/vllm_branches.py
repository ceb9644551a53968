"""Branches over the cache blocks of their windows, without a request each.

A branch is its window's tokens up to an anchor, and a chain of its own. As a request it costs the scheduler about a
millisecond, and what the prefix cache cannot share: on average half a block of tokens. Here the blocks of a window stay
where they are after its request has finished (`WindowBlocks`), and a *pass* runs many branches of many windows at once,
each a sequence of its chain's tokens alone:

    block table     the window's whole blocks up to the anchor, then blocks borrowed for the pass
    first borrowed  a copy of the block that holds the anchor, so that the chain can be written behind it
    slots           of the chain's tokens, in the borrowed blocks

What they borrowed is kept while there is room, and a branch that extends another computes its last token alone
(stages.engines.vllm_tails). Branches of one call that extend one another are one sequence, with a row for each.

All of a pass is computed here at once, in arrays; stages.engines.vllm_pass runs it in the workers. Blocks are taken
from, and given back to, vLLM's own pool, whose counts of references keep requests away from them. Windows for which
there is no room are not kept; their branches go as requests.

Models whose layers cache different blocks (recurrent ones) have no such table; `window_blocks` returns None for them.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from bytecache.stages.engines.engine import Branch, Prompt
from bytecache.stages.engines.vllm_tails import Resumed, Tails

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
    wanted: np.ndarray
    """int64 [R]; of the N tokens, those that branches end with, in the branches' order."""


class Part(NamedTuple):
    """Sequences of a pass that belong together: [lo, hi) of job number `job`."""

    job: int
    lo: int
    hi: int


class Job(NamedTuple):
    """Branches of one window in arrays, as B sequences: such that extend one another are one."""

    blocks: np.ndarray
    """int32; of the window."""
    rows: np.ndarray
    """int64 [B]; branches of each: its last tokens are theirs."""
    own: np.ndarray
    """int64 [B]; number of the first block in each history that is no block of the window."""
    cached: np.ndarray
    """int64 [B]; tokens of each history that are in the cache."""
    length: np.ndarray
    """int64 [B]; those that are not."""
    chain: np.ndarray
    """int32; the tokens that are not, one branch after the other."""
    in_place: np.ndarray
    """bool [B]; they are written behind the cached ones, in the same block."""
    borrowed: np.ndarray
    """int64 [B]; blocks that each takes for them."""
    tail_count: np.ndarray
    """int64 [B]; blocks of the tail that each goes on from."""
    tail: np.ndarray
    """int32; those blocks, one branch after the other."""


class WindowBlocks:
    """Cache blocks of finished windows, and blocks to borrow, of vLLM's pool."""

    def __init__(self, scheduler: Any, longest: int) -> None:
        """`longest`: tokens of the longest history, for which requests must find room."""
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self.block_size = int(scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self.room = max(int(self._pool.num_gpu_blocks) // ROOM, 2 * -(-longest // self.block_size))
        self.tails = Tails(self._pool, self.block_size, self.room // 2)
        self._expected: dict[str, Prompt] = {}
        self._windows: dict[int, tuple[Prompt, list[Any]]] = {}
        self._calls: list[set[int]] = []  # windows of each call of `score` that are not released
        release = scheduler._free_blocks  # of requests that have finished; preempted ones go another way

        def keep_and_release(request: Any) -> None:
            self._keep(request)
            release(request)

        scheduler._free_blocks = keep_and_release

    def expect(self, prompts: dict[str, Prompt], in_flight: int) -> None:
        """Keep the blocks of requests, by name, when they have finished.

        Of calls before, windows of the last `in_flight` - 1 stay that have some that are not released.
        """
        while len(self._calls) >= in_flight:
            self._release(self._calls.pop(0))
        self._calls.append({id(prompt) for prompt in prompts.values()})
        self._expected |= prompts

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
        """Blocks of nobody, which become those of tails; `room // 2` at least can be had."""
        blocks: list[Any] = self._pool.get_new_blocks(count)
        return blocks

    @property
    def windows_tokens(self) -> int:
        """Tokens of windows that there is room for."""
        return (int(self._pool.num_gpu_blocks) - self.room) * self.block_size

    @property
    def free(self) -> int:
        """Blocks that can be borrowed now."""
        return int(self._pool.get_num_free_blocks())

    def forget(self) -> None:
        """Let the windows go, and the tails of their branches."""
        self.tails.settle()
        self._release(set(self._windows))
        self._calls, self._expected = [], {}

    def release(self, prompts: Sequence[Prompt]) -> None:
        """Let the windows of these prompts go, and the tails of their branches."""
        released = {id(prompt) for prompt in prompts}
        self._release(released)
        self._calls = [left for call in self._calls if (left := call - released)]

    def _release(self, windows: set[int]) -> None:
        self.tails.forget(windows)
        for window in [number for number in self._windows if number in windows]:
            _, blocks = self._windows.pop(window)
            self._pool.free_blocks(reversed(blocks))


def window_blocks(engine: Any, longest: int) -> WindowBlocks | None:
    """Those of a `vllm.LLMEngine`, or None: its scheduler is elsewhere, or its layers do not share one block table."""
    scheduler = getattr(getattr(engine.engine_core, "engine_core", None), "scheduler", None)
    groups: Sequence[Any] = getattr(getattr(scheduler, "kv_cache_config", None), "kv_cache_groups", ())
    named = all(hasattr(scheduler, name) for name in ("kv_cache_manager", "_free_blocks"))
    # Recurrent states have no block for each run of tokens.
    if len(groups) != 1 or not named or "Mamba" in type(groups[0].kv_cache_spec).__name__:
        return None
    return WindowBlocks(scheduler, longest)


def sequences(branches: Sequence[Branch]) -> list[Sequence[Branch]]:
    """Runs of branches of which each is its predecessor and a token."""
    anchor = np.array([branch.anchor for branch in branches], np.int64)
    length = _lengths(branches)
    begins = np.ones(len(branches) + 1, bool)
    for number in (np.flatnonzero((np.diff(anchor) == 0) & (np.diff(length) == 1)) + 1).tolist():
        begins[number] = branches[number].chain[:-1] != branches[number - 1].chain
    first = np.flatnonzero(begins).tolist()
    return [branches[a:b] for a, b in pairwise(first)]


def _lengths(branches: Sequence[Branch]) -> np.ndarray:
    """Tokens of their chains, int64."""
    return np.fromiter(map(len, map(attrgetter("chain"), branches)), np.int64, len(branches))


def job_of(blocks: np.ndarray, runs: Sequence[Sequence[Branch]], resumed: Sequence[Resumed], block_size: int) -> Job:
    """Branches of a window whose block ids are `blocks`, as `sequences`, and how much of each is in the cache."""
    longest = [run[-1] for run in runs]
    anchor = np.array([branch.anchor for branch in longest], np.int64)
    known = np.array([one.known for one in resumed], np.int64)
    length = _lengths(longest) - known
    in_place = np.array([one.in_place for one in resumed], bool)
    cached = anchor + 1 + known
    chains = [branch.chain[one.known :] for branch, one in zip(longest, resumed, strict=True)]
    tails = [one.tail.blocks if one.tail else [] for one in resumed]
    return Job(
        blocks,
        np.fromiter(map(len, runs), np.int64, len(runs)),
        (anchor + 1) // block_size,
        cached,
        length,
        np.array([token for chain in chains for token in chain], np.int32),
        in_place,
        (cached + length - 1) // block_size - cached // block_size + 1 - in_place,
        np.array([len(tail) for tail in tails], np.int64),
        np.array([block.block_id for tail in tails for block in tail], np.int32),
    )


def cut(jobs: Sequence[Job], tokens: int, blocks: int) -> Iterator[list[Part]]:
    """Passes of at most `tokens` tokens and `blocks` borrowed blocks, one sequence at least; jobs in order."""
    parts: list[Part] = []
    token_room, block_room = tokens, blocks
    for number, job in enumerate(jobs):
        lo, count = 0, len(job.length)
        token_end = np.cumsum(job.length)
        block_end = np.cumsum(job.borrowed)
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


def borrowed_blocks(jobs: Sequence[Job], parts: list[Part]) -> int:
    """Blocks that a pass borrows."""
    return sum(int(jobs[p.job].borrowed[p.lo : p.hi].sum()) for p in parts)


def make_pass(jobs: Sequence[Job], parts: list[Part], borrowed: np.ndarray, block_size: int) -> BranchPass:
    """The arrays of one pass; `borrowed` int32: ids of as many blocks as `borrowed_blocks` says."""
    own, cached, length, in_place, mine = (
        np.concatenate([getattr(jobs[p.job], name)[p.lo : p.hi] for p in parts])
        for name in ("own", "cached", "length", "in_place", "borrowed")
    )
    count = len(cached)
    table = _known_blocks(jobs, parts, own, int(((cached + length - 1) // block_size).max()) + 1)
    first = cached // block_size
    begin = np.cumsum(mine) - mine
    copied = np.flatnonzero((cached % block_size > 0) & ~in_place)
    copies = np.stack([table[copied, first[copied]], borrowed[begin[copied]]], axis=1).astype(np.int64)
    first_mine = first + in_place
    table[np.arange(table.shape[1]) >= (first_mine + mine)[:, None]] = 0
    table[np.repeat(np.arange(count), mine), np.repeat(first_mine - begin, mine) + np.arange(len(borrowed))] = borrowed
    query_start = np.append(0, np.cumsum(length))
    sequence = np.repeat(np.arange(count), length)
    positions = cached[sequence] + np.arange(len(sequence)) - query_start[sequence]
    slots = table[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size
    chains = [_rows_of(jobs[p.job].chain, jobs[p.job].length, p) for p in parts]
    rows = np.concatenate([jobs[p.job].rows[p.lo : p.hi] for p in parts])
    end = np.cumsum(rows)
    wanted = np.repeat(query_start[1:] - end, rows) + np.arange(end[-1])
    return BranchPass(
        np.concatenate(chains), positions, query_start.astype(np.int32), (cached + length).astype(np.int32), table,
        slots, copies, wanted,
    )  # fmt: skip


def _known_blocks(jobs: Sequence[Job], parts: list[Part], own: np.ndarray, width: int) -> np.ndarray:
    """Blocks of each history before anything is borrowed, int32 [S, width]: its window's, then its tail's."""
    table = np.zeros((len(own), width), np.int32)
    row = 0
    for p in parts:
        job = jobs[p.job]
        wide = min(len(job.blocks), width)
        table[row : row + p.hi - p.lo, :wide] = job.blocks[:wide]
        row += p.hi - p.lo
    count = np.concatenate([jobs[p.job].tail_count[p.lo : p.hi] for p in parts])
    tails = np.concatenate([_rows_of(jobs[p.job].tail, jobs[p.job].tail_count, p) for p in parts])
    begin = np.cumsum(count) - count
    table[np.repeat(np.arange(len(own)), count), np.repeat(own - begin, count) + np.arange(len(tails))] = tails
    return table


def _rows_of(values: np.ndarray, count: np.ndarray, part: Part) -> np.ndarray:
    """Those of rows [lo, hi) of values that lie one row after the other."""
    ends = np.cumsum(count)
    return values[ends[part.lo] - count[part.lo] : ends[part.hi - 1]]
