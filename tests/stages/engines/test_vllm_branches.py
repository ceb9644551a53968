"""Passes of branches over blocks: what the model would read from the cache is each branch's own history."""

from types import SimpleNamespace

import numpy as np
import pytest

from bytecache.stages.engines.engine import Branch
from bytecache.stages.engines.vllm_branches import (
    WindowBlocks,
    borrowed_blocks,
    cut,
    job_of,
    make_pass,
    sequences,
    window_blocks,
)
from bytecache.stages.engines.vllm_tails import FRESH
from tests.support.cache_blocks import BLOCK, Scheduler, prompt_of


def plain(branches):
    """None of them goes on from another."""
    return [[branch] for branch in branches], [FRESH] * len(branches)


class World:
    """Windows of random lengths in blocks of a cache, held; and the cache: token by slot."""

    def __init__(self, seed: int, blocks: int = 400):
        self.rng = np.random.default_rng(seed)
        self.scheduler = Scheduler(blocks)
        self.blocks = WindowBlocks(self.scheduler, longest=40)
        self.cache = np.full(blocks * BLOCK, -1)
        self.prompts = [prompt_of(int(self.rng.integers(2, 30))) for _ in range(5)]
        self.blocks.expect({str(number): prompt for number, prompt in enumerate(self.prompts)}, 1)
        for number, prompt in enumerate(self.prompts):
            tokens = prompt.tokens[:] = self.rng.integers(0, 1000, len(prompt.tokens))
            self.scheduler.run(str(number), len(tokens))
            at = np.arange(len(tokens))
            self.cache[self.blocks.table(prompt)[at // BLOCK] * BLOCK + at % BLOCK] = tokens

    def run(self, jobs, tokens: int, room: int) -> list[int]:
        """Passes over the blocks as the engine makes them; every history must be read; tokens of each pass."""
        runs = [sequences(branches) for _, branches in jobs]
        assert [[branch for run in some for branch in run] for some in runs] == [branches for _, branches in jobs]
        resumed = [self.blocks.tails.resume(prompt, some) for (prompt, _), some in zip(jobs, runs, strict=True)]
        arrays = [
            job_of(self.blocks.table(prompt), some, ones, BLOCK)
            for (prompt, _), some, ones in zip(jobs, runs, resumed, strict=True)
        ]
        seen, computed = [], []
        for parts in cut(arrays, tokens, room):
            borrowed = self.blocks.borrow(borrowed_blocks(arrays, parts))
            step = make_pass(arrays, parts, np.array([block.block_id for block in borrowed], np.int32), BLOCK)
            assert len(step.seq_lens) == 1 or (len(step.tokens) <= tokens and len(borrowed) <= room)
            before = self.cache.copy()
            blocks = self.cache.reshape(-1, BLOCK)
            blocks[step.copies[:, 1]] = blocks[step.copies[:, 0]]
            self.cache[step.slots] = step.tokens
            asked = [(part.job, run) for part in parts for run in runs[part.job][part.lo : part.hi]]
            self.check(step, [(jobs[job][0], run) for job, run in asked])
            self.check_untouched(before, borrowed, step)
            rest = iter(borrowed)
            for part in parts:
                these = slice(part.lo, part.hi)
                counts = arrays[part.job].borrowed[these].tolist()
                self.blocks.tails.keep(jobs[part.job][0], runs[part.job][these], resumed[part.job][these], counts, rest)
            assert next(rest, None) is None
            self.blocks.tails.trim()
            assert self.blocks.free >= self.blocks.room // 2
            seen += [(job, branch) for job, run in asked for branch in run]
            computed.append(len(step.tokens))
        self.blocks.tails.settle()
        assert seen == [(job, branch) for job, (_, branches) in enumerate(jobs) for branch in branches]
        return computed

    def check(self, step, asked):
        wanted = iter(step.wanted.tolist())
        for sequence, (prompt, run) in enumerate(asked):
            history = [*prompt.tokens[: run[-1].anchor + 1].tolist(), *run[-1].chain]
            at = np.arange(step.seq_lens[sequence])
            read = self.cache[step.table[sequence][at // BLOCK] * BLOCK + at % BLOCK]
            assert read.tolist() == history
            new = slice(step.query_start[sequence], step.query_start[sequence + 1])
            assert step.positions[new].tolist() == list(range(len(history)))[-(new.stop - new.start) :]
            assert step.tokens[new].tolist() == history[-(new.stop - new.start) :]
            for branch in run:
                row = next(wanted)
                assert new.start <= row < new.stop and step.positions[row] == branch.n_tokens - 1
        assert next(wanted, None) is None

    def check_untouched(self, before, borrowed, step):
        """Windows' own blocks are not written, nor anything but borrowed blocks and the ends of tails."""
        written = np.flatnonzero(self.cache != before)
        mine = {block.block_id for block in borrowed}
        outside = [slot for slot in written.tolist() if slot // BLOCK not in mine]
        assert set(outside) <= set(step.slots.tolist())
        windows = np.concatenate([self.blocks.table(prompt) for prompt in self.prompts])
        assert not np.isin(written // BLOCK, windows).any()


@pytest.mark.parametrize("seed", range(5))
def test_a_pass_reads_every_history(seed):
    world = World(seed)
    jobs = []
    for prompt in world.prompts:
        branches = [
            Branch(
                int(world.rng.integers(0, len(prompt.tokens))),
                tuple(world.rng.integers(0, 1000, world.rng.integers(1, 7)).tolist()),
                0,
            )
            for _ in range(world.rng.integers(1, 40))
        ]
        jobs.append((prompt, branches))
    world.run(jobs, tokens=24, room=12)


@pytest.mark.parametrize("seed", range(5))
def test_a_longer_branch_costs_its_last_token_whatever_else_leaves_from_the_shorter_one(seed):
    world = World(seed)
    grown: list[tuple[int, Branch]] = [
        (number, Branch(int(world.rng.integers(0, len(prompt.tokens))), (int(world.rng.integers(0, 1000)),), 0))
        for number, prompt in enumerate(world.prompts)
        for _ in range(3)
    ]
    for _ in range(9):
        jobs = []
        for number, prompt in enumerate(world.prompts):
            jobs.append((prompt, [branch for at, branch in grown if at == number]))
        computed = world.run([job for job in jobs if job[1]], tokens=24, room=12)
        assert sum(computed) == len(grown)
        children = [
            (number, branch._replace(chain=(*branch.chain, int(token))))
            for number, branch in grown
            for token in world.rng.integers(0, 1000, world.rng.choice([0, 1, 1, 1, 2]))
        ]
        grown = list(dict.fromkeys(children))
    world.blocks.forget()
    assert world.blocks.free == len(world.scheduler.blocks) - 1


@pytest.mark.parametrize("seed", range(8))
def test_branches_that_extend_one_another_are_one_sequence_and_any_of_them_can_be_extended(seed):
    """Chains of random lengths in one call; then others that leave them anywhere, each for what is new of it."""
    world = World(seed)
    grown = [
        (number, Branch(int(world.rng.integers(0, len(prompt.tokens))), (int(world.rng.integers(0, 1000)),), 0))
        for number, prompt in enumerate(world.prompts)
        for _ in range(3)
    ]
    for _ in range(4):
        runs = []
        for number, branch in grown:
            more = world.rng.integers(0, 1000, world.rng.integers(0, 9)).tolist()
            chains = [(*branch.chain, *more[:count]) for count in range(len(more) + 1)]
            runs.append([(number, branch._replace(chain=chain)) for chain in chains])
        asked = [one for run in runs for one in run]
        jobs = [(prompt, [b for at, b in asked if at == number]) for number, prompt in enumerate(world.prompts)]
        computed = world.run([job for job in jobs if job[1]], tokens=24, room=12)
        assert sum(computed) == len(asked)
        ends = [run[world.rng.integers(0, len(run))] for run in runs for _ in range(2)]
        left = world.rng.choice(len(ends), min(len(ends), 20), replace=False)
        grown = list(dict.fromkeys((ends[i][0], ends[i][1]._replace(chain=(*ends[i][1].chain, 1001))) for i in left))
    world.blocks.forget()
    assert world.blocks.free == len(world.scheduler.blocks) - 1


def test_the_oldest_tails_make_room_and_what_extends_them_is_computed_again():
    world = World(3, blocks=61)
    prompt = world.prompts[0]
    chains = [(token,) for token in range(40)]
    computed = []
    for _ in range(3):
        computed.append(sum(world.run([(prompt, [Branch(0, chain, 0) for chain in chains])], tokens=100, room=8)))
        chains = [(*chain, 7) for chain in chains]
    assert computed[0] == 40 and 40 < computed[1] <= 80 and computed[2] > 40
    world.blocks.forget()
    assert world.blocks.free == 60


def test_a_branch_that_is_asked_for_twice_keeps_one_tail():
    world = World(1)
    prompt = world.prompts[0]
    for chain in ((5,), (5, 6), (5, 6)):
        world.run([(prompt, [Branch(1, chain, 0)] * 2)], tokens=9, room=9)
    world.blocks.forget()
    assert world.blocks.free == len(world.scheduler.blocks) - 1


def test_a_branch_larger_than_a_pass_goes_alone():
    branches = [Branch(3, (7,) * 9, 0), Branch(0, (7,), 0)]
    jobs = [job_of(np.array([1, 2], np.int32), *plain(branches), BLOCK)]
    passes = list(cut(jobs, tokens=2, blocks=1))
    assert [(part.lo, part.hi) for parts in passes for part in parts] == [(0, 1), (1, 2)]


def test_blocks_of_finished_windows_are_kept_from_others_until_they_are_let_go():
    scheduler = Scheduler(41)
    blocks = WindowBlocks(scheduler, longest=9)
    first, second, aborted, stranger = (prompt_of(count) for count in (10, 4, 10, 5))
    blocks.expect({"a": first, "b": second, "c": aborted}, 1)
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
    scheduler.give(borrowed)
    blocks.forget()
    assert blocks.free == 40 and not blocks.holds(first)


def test_windows_of_two_calls_are_kept_until_they_are_released_or_a_third_comes():
    scheduler = Scheduler(41)
    blocks = WindowBlocks(scheduler, longest=9)
    prompts = [prompt_of(6) for _ in range(6)]
    for call in range(3):
        blocks.expect({str(number): prompts[number] for number in (2 * call, 2 * call + 1)}, 2)
        for number in (2 * call, 2 * call + 1):
            scheduler.run(str(number), 6)
        if call == 1:
            blocks.release(prompts[2:3])
    assert [blocks.holds(prompt) for prompt in prompts] == [False, False, False, True, True, True]
    blocks.release(prompts[3:4])
    blocks.expect({"more": prompts[0]}, 2)
    scheduler.run("more", 6)
    assert [blocks.holds(prompt) for prompt in prompts] == [True, False, False, False, True, True]
    blocks.forget()
    assert blocks.free == 40


def test_a_full_cache_keeps_no_more_windows():
    scheduler = Scheduler(41)
    blocks = WindowBlocks(scheduler, longest=9)
    prompts = [prompt_of(12) for _ in range(20)]
    blocks.expect({str(number): prompt for number, prompt in enumerate(prompts)}, 1)
    for number in range(len(prompts)):
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
