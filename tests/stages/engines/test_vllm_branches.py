"""Passes of branches over blocks: what the model would read from the cache is each branch's own history."""

from types import SimpleNamespace

import numpy as np
import pytest

from bytecache.stages.engines.engine import Branch, Prompt
from bytecache.stages.engines.vllm_branches import WindowBlocks, borrowed_blocks, cut, job_of, make_pass, window_blocks

BLOCK = 4


def world(seed: int):
    """Windows of random lengths in blocks of a cache, branches of each, and the cache: token by slot."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(1, 200)).tolist()
    cache = np.full(200 * BLOCK, -1)
    windows, jobs = [], []
    for _ in range(5):
        tokens = rng.integers(0, 1000, rng.integers(1, 30))
        blocks = np.array([ids.pop() for _ in range(-(-len(tokens) // BLOCK))], np.int32)
        at = np.arange(len(tokens))
        cache[blocks[at // BLOCK] * BLOCK + at % BLOCK] = tokens
        branches = [
            Branch(int(rng.integers(0, len(tokens))), tuple(rng.integers(0, 1000, rng.integers(1, 7)).tolist()), 0)
            for _ in range(rng.integers(1, 40))
        ]
        windows.append((tokens, branches))
        jobs.append(job_of(blocks, branches))
    return windows, jobs, cache, ids


@pytest.mark.parametrize("seed", range(5))
def test_a_pass_reads_every_history(seed):
    windows, jobs, cache, ids = world(seed)
    before, seen = cache.copy(), []
    for parts in cut(jobs, BLOCK, tokens=24, blocks=12):
        count = borrowed_blocks(jobs, parts, BLOCK)
        borrowed = np.array(ids[:count], np.int32)
        step = make_pass(jobs, parts, borrowed, BLOCK)
        assert len(step.tokens) <= 24 and count <= 12
        blocks = cache.reshape(-1, BLOCK)
        blocks[step.copies[:, 1]] = blocks[step.copies[:, 0]]
        cache[step.slots] = step.tokens
        branches = [(part.job, number) for part in parts for number in range(part.lo, part.hi)]
        for sequence, (job, number) in enumerate(branches):
            tokens, branch = windows[job][0], windows[job][1][number]
            history = [*tokens[: branch.anchor + 1].tolist(), *branch.chain]
            at = np.arange(step.seq_lens[sequence])
            read = cache[step.table[sequence][at // BLOCK] * BLOCK + at % BLOCK]
            assert read.tolist() == history
            span = slice(step.query_start[sequence], step.query_start[sequence + 1])
            assert step.positions[span].tolist() == list(range(branch.anchor + 1, len(history)))
        # What is no one's is not written: other windows' blocks, and this window's own.
        touched = np.isin(np.arange(len(cache)) // BLOCK, ids)
        np.testing.assert_array_equal(cache[~touched], before[~touched])
        seen += branches
    assert seen == [(job, number) for job, (_, branches) in enumerate(windows) for number in range(len(branches))]


def test_a_branch_larger_than_a_pass_goes_alone():
    jobs = [job_of(np.array([1, 2], np.int32), [Branch(3, (7,) * 9, 0), Branch(0, (7,), 0)])]
    passes = list(cut(jobs, BLOCK, tokens=2, blocks=1))
    assert [(part.lo, part.hi) for parts in passes for part in parts] == [(0, 1), (1, 2)]


class Scheduler:
    """As much of vLLM's as is touched: a pool that counts references, and requests that give their blocks back."""

    def __init__(self, blocks: int):
        self.blocks = [SimpleNamespace(block_id=number, ref_cnt=0, is_null=number == 0) for number in range(blocks)]
        self.requests: dict[str, list[SimpleNamespace]] = {}
        pool = SimpleNamespace(
            num_gpu_blocks=blocks, get_num_free_blocks=lambda: len(self.free()), get_new_blocks=self.take,
            touch=self.touch, free_blocks=self.give,
        )  # fmt: skip
        coordinator = SimpleNamespace(get_blocks=lambda name: (self.requests[name],))
        self.kv_cache_manager = SimpleNamespace(block_pool=pool, coordinator=coordinator)
        spec = SimpleNamespace(block_size=BLOCK)
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])

    def free(self):
        return [block for block in self.blocks if not block.ref_cnt and not block.is_null]

    def take(self, count: int):
        taken = self.free()[:count]
        assert len(taken) == count
        self.touch(taken)
        return taken

    def touch(self, blocks):
        for block in blocks:
            block.ref_cnt += 1

    def give(self, blocks):
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0

    def run(self, name: str, tokens: int, computed: int | None = None):
        """A request that finishes after `computed` of its tokens."""
        self.requests[f"{name}-x1"] = self.take(-(-tokens // BLOCK))
        computed = tokens if computed is None else computed
        self._free_blocks(SimpleNamespace(request_id=f"{name}-x1", num_computed_tokens=computed))

    def _free_blocks(self, request):
        self.give(self.requests.pop(request.request_id))


def prompt_of(tokens: int) -> Prompt:
    return Prompt("w", np.arange(tokens, dtype=np.int32), 0, np.zeros(0, np.uint8), np.zeros(tokens, np.int64))


def test_blocks_of_finished_windows_are_kept_from_others_until_they_are_let_go():
    scheduler = Scheduler(41)
    blocks = WindowBlocks(scheduler, longest=9)
    first, second, aborted, stranger = (prompt_of(count) for count in (10, 4, 10, 5))
    for name, prompt in (("a", first), ("b", second), ("c", aborted)):
        blocks.expect(name, prompt)
    scheduler.run("a", 10)
    scheduler.run("b", 4)
    scheduler.run("c", 10, computed=6)
    scheduler.run("d", 5)
    assert [blocks.holds(prompt) for prompt in (first, second, aborted, stranger)] == [True, True, False, False]
    assert not blocks.holds(prompt_of(10))
    mine = {*blocks.table(first).tolist(), *blocks.table(second).tolist()}
    assert len(mine) == 3 + 1 and blocks.free == 40 - len(mine)
    borrowed = blocks.borrow(blocks.free)
    assert not mine & {block.block_id for block in borrowed}
    blocks.give_back(borrowed)
    blocks.forget()
    assert blocks.free == 40 and not blocks.holds(first)


def test_a_full_cache_keeps_no_more_windows():
    scheduler = Scheduler(41)
    blocks = WindowBlocks(scheduler, longest=9)
    prompts = [prompt_of(12) for _ in range(20)]
    for number, prompt in enumerate(prompts):
        blocks.expect(str(number), prompt)
        scheduler.run(str(number), 12)
    held = [blocks.holds(prompt) for prompt in prompts]
    assert held == sorted(held, reverse=True) and 5 < sum(held) < 13
    assert blocks.free >= blocks.room - 3 >= 2 * 3


@pytest.mark.parametrize("groups", [[], ["FullAttentionSpec"] * 2, ["MambaSpec"]])
def test_layers_that_share_no_block_table_are_left_to_requests(groups):
    scheduler = Scheduler(9)
    specs = [type(name, (), {"block_size": BLOCK})() for name in groups]
    scheduler.kv_cache_config.kv_cache_groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler)))
    assert window_blocks(engine, 9) is None
    assert window_blocks(SimpleNamespace(engine_core=SimpleNamespace()), 9) is None
