"""Passes of branches over blocks: what the model would read from the cache is each branch's own history."""

import numpy as np
import pytest

from bytecache.stages.engines.engine import Branch
from bytecache.stages.engines.vllm_branches import borrowed_blocks, cut, job_of, make_pass

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
