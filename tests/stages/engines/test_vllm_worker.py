"""The worker's half without vLLM: stand-ins for both of its runners, on a CPU and on a pretend GPU."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bytecache.schemas.errors import EngineError
from bytecache.stages.engines.engine import Branch, Prompt
from bytecache.stages.engines.paths import PathReducer, plan_paths
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.engines.static import StaticJob
from bytecache.stages.engines.vllm import VllmEngine
from bytecache.stages.engines.vllm_branches import WindowBlocks
from bytecache.stages.engines.vllm_worker import PathExtension, Request, Want, WantState
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.cache_blocks import Scheduler, prompt_of
from tests.support.pretend_device import DEVICE, PretendDevice

WIDTH = 8
TEXT = np.frombuffer(b"the cache is a promise kept in advance", np.uint8)
RUNNERS = ["v1", "v2"]
OPERATIONS_PER_BRANCH = 14
"""Calls of functions on the engine's thread for one more branch."""
OPERATIONS_PER_ROW = 2
"""The same for one more row of a window."""


@pytest.fixture(scope="module")
def reducer(tiny_checkpoint):
    return PathReducer(load_vocabulary(tiny_checkpoint("bytelevel")), top_k=2, floor=1e-4)


class Runner:
    """As much of a model runner of vLLM as is touched; `calls` counts products with the head."""

    def __init__(self, kind: str, head: torch.Tensor, device: torch.device):
        self.device, self.calls, self.head = device, 0, head
        self.model = SimpleNamespace(compute_logits=self._logits)
        config = SimpleNamespace(to_dict=dict)
        self.model_config = SimpleNamespace(hf_text_config=config)
        self.requests: dict[str, Any] = {}
        self.query_start_loc = SimpleNamespace(np=np.zeros(64, np.int32))
        self.input_batch = SimpleNamespace(req_id_to_index={})
        if kind == "v1":
            self._get_prompt_logprobs_dict = lambda hidden, scheduled: {"kept": len(scheduled)}
        else:
            self.prompt_logprobs_worker = SimpleNamespace(
                compute_prompt_logprobs=lambda logits_fn, hidden, batch, *rest: {"kept": len(batch.req_ids)}
            )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return hidden @ self.head

    def step(self, hidden: torch.Tensor, scheduled: list[tuple[str, int, int]]) -> Any:
        """One step of requests (id, first token, tokens), whose hidden states lie one after the other."""
        ids, begins, counts = zip(*scheduled, strict=True)
        ends = np.cumsum([0, *counts])
        if hasattr(self, "prompt_logprobs_worker"):
            batch = SimpleNamespace(
                req_ids=list(ids), num_computed_prefill_tokens_np=np.array(begins),
                num_scheduled_tokens=np.array(counts), query_start_loc_np=ends,
            )  # fmt: skip
            return self.prompt_logprobs_worker.compute_prompt_logprobs(self._logits, hidden, batch, None, None, None)
        self.requests = {
            name: SimpleNamespace(num_computed_tokens=begin) for name, begin in zip(ids, begins, strict=True)
        }
        self.input_batch.req_id_to_index = {name: index for index, name in enumerate(ids)}
        self.query_start_loc.np[: len(ends)] = ends
        return self._get_prompt_logprobs_dict(hidden, dict(zip(ids, counts, strict=True)))


def extension(
    runner: Runner, reducer: PathReducer, logit_rows: int = 512, rank: int = 0, process: int = 0
) -> PathExtension:
    worker = PathExtension()
    worker.model_runner, worker.rank = runner, rank  # type: ignore[attr-defined]
    assert worker.bytecache_install(reducer, 1, logit_rows, process) in RUNNERS
    return worker


def states(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def head_of(reducer: PathReducer) -> torch.Tensor:
    return torch.randn(WIDTH, reducer.vocabulary.size, generator=torch.Generator().manual_seed(0)) * 3


def want_of(name: str, starts: list[int], requests: dict[str, Request]) -> Want:
    following = np.full(len(starts), -1, np.int64)
    return Want(name, TEXT, np.array(starts, np.int64), following, requests)


def expected(reducer: PathReducer, hidden: torch.Tensor, starts: list[int]) -> RowMasses:
    plan = plan_paths(reducer.vocabulary, TEXT, np.array(starts, np.int64))
    return reducer.reduce(hidden @ head_of(reducer), plan, np.full(len(starts), -1, np.int64), where="x")


def close(rows: RowMasses, others: RowMasses) -> None:
    for name, values in vars(rows).items():
        np.testing.assert_allclose(values, getattr(others, name), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("logit_rows", [512, 3])
def test_a_window_in_two_steps_and_branches_beside_it(reducer, kind, logit_rows):
    """Rows come out by want, whatever shared a step; requests of others are left alone, and their answer given on."""
    runner = Runner(kind, head_of(reducer), torch.device("cpu"))
    worker = extension(runner, reducer, logit_rows)
    window, branch, more = states(1, 10), states(2, 4), states(3, 2)
    worker.bytecache_want({
        "w": want_of("window", list(range(7)), {"a": Request(3, 10)}),
        "b": want_of("branches", [5, 9], {"b1": Request(3, 4), "b2": Request(1, 2)}),
    })  # fmt: skip
    first = torch.cat([window[:6], states(9, 3)])
    assert runner.step(first, [("a-x1", 0, 6), ("stranger-x2", 0, 3)]) == {"kept": 2}
    second = torch.cat([branch[2:4], window[6:], more])
    runner.step(second, [("b1-x", 2, 2), ("a-x1", 6, 4), ("b2-x", 0, 2)])
    rows = worker.bytecache_collect(["w", "b"])
    assert rows is not None
    close(rows["w"], expected(reducer, window[3:], list(range(7))))
    close(rows["b"], expected(reducer, torch.stack([branch[3], more[1]]), [5, 9]))
    assert runner.calls == (2 if logit_rows == 512 else 1 + 2)
    assert not worker._chunks and not worker._asked


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_request_that_was_preempted_starts_over_and_gives_its_rows_once(reducer, kind):
    runner = Runner(kind, head_of(reducer), torch.device("cpu"))
    worker = extension(runner, reducer)
    window = states(1, 6)
    worker.bytecache_want({"w": want_of("window", list(range(6)), {"a": Request(0, 6)})})
    runner.step(window[:4], [("a-x", 0, 4)])
    runner.step(window[:2], [("a-x", 0, 2)])
    runner.step(window[2:], [("a-x", 2, 4)])
    rows = worker.bytecache_collect(["w"])
    assert rows is not None
    close(rows["w"], expected(reducer, window, list(range(6))))


def test_rows_missing_from_a_cached_prefix_are_not_made_up(reducer):
    runner = Runner("v1", head_of(reducer), torch.device("cpu"))
    worker = extension(runner, reducer)
    worker.bytecache_want({"w": want_of("window", list(range(6)), {"a": Request(0, 6)})})
    runner.step(states(1, 4), [("a-x", 2, 4)])
    assert worker.bytecache_collect(["w"]) == {}


def test_only_the_first_rank_reduces_and_answers(reducer):
    """The others take part in the head's product, which may gather its parts."""
    runner = Runner("v1", head_of(reducer), torch.device("cpu"))
    worker = extension(runner, reducer, rank=1)
    worker.bytecache_want({"w": want_of("window", [0, 1], {"a": Request(0, 2)})})
    runner.step(states(1, 2), [("a-x", 0, 2)])
    assert runner.calls == 1 and not worker._chunks
    assert worker.bytecache_collect(["w"]) is None


def test_a_nan_names_the_text_that_it_was_in(reducer):
    runner = Runner("v1", head_of(reducer), torch.device("cpu"))
    worker = extension(runner, reducer)
    worker.bytecache_want({
        "w": want_of("document 'good'", [0, 1], {"a": Request(0, 2)}),
        "v": want_of("document 'bad'", [3], {"b": Request(0, 1)}),
    })  # fmt: skip
    hidden = states(1, 3)
    hidden[2] = torch.nan
    with pytest.raises(EngineError, match=r"NaN or Inf logits \(document 'bad'"):
        runner.step(hidden, [("a-x", 0, 2), ("b-x", 0, 1)])


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_step_on_a_device_waits_for_nothing_and_costs_the_same_for_many(reducer, kind):
    """Synchronisations 0; as many launches for one window and sixty branches as for a window alone."""
    launches = []
    for n_branches in (0, 60):
        with PretendDevice() as gpu:
            runner = Runner(kind, gpu.put(head_of(reducer)), DEVICE)
            worker = extension(runner, reducer)
            warm = want_of("warm", [0, 1], {"w": Request(0, 2)})
            worker.bytecache_want({"warm": warm})
            runner.step(gpu.put(states(4, 2)), [("w-x", 0, 2)])  # the vocabulary's tables go over once
            worker.bytecache_collect(["warm"])
            branches = {f"b{i}": Request(1, 2) for i in range(n_branches)}
            worker.bytecache_want({"w": want_of("window", list(range(8)), {"a": Request(0, 8)})})
            if branches:
                worker.bytecache_want({"b": want_of("branches", [i % 30 for i in range(n_branches)], branches)})
            hidden = states(5, 8 + 2 * n_branches)
            there = gpu.put(hidden)
            gpu.forget()
            runner.step(there, [("a-x", 0, 8), *((f"{name}-x", 0, 2) for name in branches)])
            assert not gpu.synchronisations
            launches.append(sum(gpu.kernels.values()))
        rows = worker.bytecache_collect(["w"])
        assert rows is not None
        close(rows["w"], expected(reducer, hidden[:8], list(range(8))))
    assert launches[1] <= launches[0] + 2  # the gather of hidden states


@pytest.mark.parametrize("kind", RUNNERS)
def test_static_states_are_taken_from_a_step_and_multiplied_on_the_device(reducer, kind):
    with PretendDevice() as gpu:
        runner = Runner(kind, gpu.put(head_of(reducer)), DEVICE)
        worker = extension(runner, reducer)
        assert worker.bytecache_static_missing(np.array([40, 41], np.int32)) == [40, 41]
        worker.bytecache_want_states({"s": WantState(40, 0, 2), "t": WantState(41, 0, 2)})
        hidden = states(6, 4)
        there = gpu.put(hidden)
        gpu.forget()
        runner.step(there, [("s-x", 0, 2), ("t-x", 0, 2)])
        assert not gpu.synchronisations
        assert worker.bytecache_static_missing(np.array([40, 41], np.int32)) == []
        job = StaticJob("d", TEXT, np.array([41, 40], np.int32), np.array([4, 8]))
        rows = worker.bytecache_static_rows([job])
    assert rows is not None
    close(
        replace(rows[0], topk_id=np.zeros(0), topk_logp=np.zeros(0)),
        replace(expected(reducer, hidden[[3, 1]], [4, 8]), topk_id=np.zeros(0), topk_logp=np.zeros(0)),
    )


class Operations:
    """Counts the calls of functions, Python's and compiled ones, that this thread makes: host work without a clock."""

    def __enter__(self) -> "Operations":
        self.count = 0
        sys.setprofile(self._note)
        return self

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        self.count += event in ("call", "c_call")

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def engine_over(worker: PathExtension, blocks: WindowBlocks) -> VllmEngine:
    """The engine's half for branches, with `worker` in its own process."""
    engine = VllmEngine.__new__(VllmEngine)
    engine._blocks, engine._pass_tokens = blocks, 1 << 20
    engine.branches = engine.branch_tokens = engine._prefix_tokens = 0
    engine._engine = SimpleNamespace(collective_rpc=lambda method, args: [getattr(worker, method)(*args)])
    return engine


def held_windows(count: int, tokens: int, blocks: int) -> tuple[WindowBlocks, list[Prompt]]:
    """Windows of the same text in blocks of a cache."""
    scheduler = Scheduler(blocks)
    windows = WindowBlocks(scheduler, longest=64)
    prompts = [prompt_of(tokens)._replace(text=TEXT) for _ in range(count)]
    windows.expect({str(number): prompt for number, prompt in enumerate(prompts)}, 1)
    for number in range(count):
        scheduler.run(str(number), tokens)
    return windows, prompts


def jobs_of(prompts: list[Prompt], each: int, depth: int) -> list[tuple[Prompt, list[Branch]]]:
    return [(prompt, [Branch(i % 8, (i, *range(depth - 1)), i % len(TEXT)) for i in range(each)]) for prompt in prompts]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_branch_is_a_few_operations_on_the_engines_thread(reducer, monkeypatch, depth):
    """Everything from a list of branches to rows that threads list; deep ones go on from those before them."""
    monkeypatch.setattr("bytecache.stages.engines.vllm_worker.run_pass", lambda _, step: states(1, len(step.wanted)))
    counts = []
    for each in (64, 64, 320):  # the first compiles loops
        worker = extension(Runner("v1", head_of(reducer), torch.device("cpu")), reducer, process=os.getpid())
        blocks, prompts = held_windows(4, 10, 20_000)
        engine = engine_over(worker, blocks)
        for shorter in range(1, depth):
            list(engine._over_blocks(jobs_of(prompts, each, shorter)))
        jobs = jobs_of(prompts, each, depth)
        tokens = engine.branch_tokens
        with Operations() as operations:
            rows = list(engine._over_blocks(jobs))
        assert engine.branch_tokens - tokens == 4 * each == sum(len(one.log_norm) for one in rows)
        counts.append(operations.count)
    assert 0 < (counts[2] - counts[1]) / (4 * (320 - 64)) < OPERATIONS_PER_BRANCH


def test_chains_that_grow_for_long_keep_their_tails_in_a_small_cache(reducer, monkeypatch):
    """Tails that were gone on from are let go after their call; a chain that is asked for costs its last token."""
    monkeypatch.setattr("bytecache.stages.engines.vllm_worker.run_pass", lambda _, step: states(1, len(step.wanted)))
    worker = extension(Runner("v1", head_of(reducer), torch.device("cpu")), reducer)
    blocks, prompts = held_windows(2, 10, 160)
    engine = engine_over(worker, blocks)
    engine.longest = 1 << 10
    held = blocks.free
    for length in range(1, 120):
        jobs = [(prompt, [Branch(i, (i, *range(length - 1)), 0) for i in (2, 5)]) for prompt in prompts]
        before = engine.branch_tokens
        rows = [row for row, _ in zip(engine.score_branches(jobs), jobs, strict=True)]
        assert engine.branch_tokens - before == 4 == sum(len(one.log_norm) for one in rows)
        wanted = 4 * -(-(length + 6) // 4)
        assert held - blocks.free <= wanted + 4  # nothing of what they extend is held but the blocks that they share
    blocks.release(prompts)
    assert blocks.free == 159


def test_a_row_of_a_window_is_hardly_an_operation_on_the_engines_thread(reducer):
    counts = []
    for rows in (64, 64, 640):  # the first compiles loops
        runner = Runner("v1", head_of(reducer), torch.device("cpu"))
        worker = extension(runner, reducer, process=os.getpid())
        hidden = states(2, rows)
        with Operations() as operations:
            worker.bytecache_want({"w": want_of("window", [i % 30 for i in range(rows)], {"a": Request(0, rows)})})
            runner.step(hidden, [("a-x", 0, rows)])
            late = worker.bytecache_collect(["w"])
        assert late is not None and len(late["w"].log_norm) == rows
        counts.append(operations.count)
    assert 0 < (counts[2] - counts[1]) / (640 - 64) < OPERATIONS_PER_ROW


def test_a_pass_of_branches_on_a_device_waits_for_nothing_and_costs_the_same_for_many(reducer, monkeypatch):
    launches = []
    for each in (8, 120):
        with PretendDevice() as gpu:
            monkeypatch.setattr(
                "bytecache.stages.engines.vllm_worker.run_pass",
                lambda _, step, gpu=gpu: gpu.put(states(1, len(step.wanted))),
            )
            worker = extension(Runner("v1", gpu.put(head_of(reducer)), DEVICE), reducer)
            blocks, prompts = held_windows(2, 10, 4000)
            engine = engine_over(worker, blocks)
            list(engine._over_blocks(jobs_of(prompts, 2, 1)))  # the vocabulary's tables go over once
            jobs = jobs_of(prompts, each, 2)
            gpu.forget()
            rows = list(engine._over_blocks(jobs))
            assert not gpu.synchronisations
            launches.append(sum(gpu.kernels.values()))
        hidden = states(1, 2 * each)
        starts = [branch.start for branch in jobs[0][1]]
        close(rows[0], expected(reducer, hidden[:each], starts))
    assert launches[0] == launches[1]
