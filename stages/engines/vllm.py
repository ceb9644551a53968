"""The teacher through vLLM: the production engine.

Requests are plain pre-tokenised prompts with one sampled token; the rows we want ride on the prefill (see
stages.engines.vllm_worker). `LLMEngine.step()` is driven here with a cap on the tokens in flight, so memory stays flat.
Branches run over the cache blocks of their windows in passes of their own (stages.engines.vllm_branches), about a token
each. Where a model or a cache that is full does not let them, they are short requests whose prefix is in the prefix
cache; what the cache does not hold of them is counted, and a model whose cache holds nothing of them is refused.

An engine exception is fatal by design: after one, vLLM's next call may never return.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.errors import BytecacheError, EngineError
from bytecache.stages.engines.engine import GROUP_TOKENS, Branch, Engine, Prompt, refuse_long_branches
from bytecache.stages.engines.paths import PathReducer
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.engines.static import StaticJob, batches, context_tokens, together, tokens_of
from bytecache.stages.engines.vllm_branches import (
    WindowBlocks,
    borrowed_blocks,
    cut,
    job_of,
    make_pass,
    sequences,
    window_blocks,
)
from bytecache.stages.engines.vllm_start import CPU_BLOCK, logit_rows, reason, start_engine
from bytecache.stages.engines.vllm_worker import LEAVE_S, Request, Want, WantState
from bytecache.stages.models.device import batched_tokens

TOKENS_IN_FLIGHT = 16_384
"""Tokens that the scheduler has still to compute at most, cached prefixes aside."""
PASS_ROOM = {"cpu": 48, "gpu": 256}
"""Branches up to which a pass is bound by reading the weights rather than by them."""
TRIAL_BRANCHES = 64
"""Branches after which the engine is judged by what it computed for them."""
COSTLY_BRANCH = 64
"""Tokens computed for a branch above which a line says so."""
_LOG = logging.getLogger("bytecache.vllm")


class Ask(NamedTuple):
    """A want and the prompts of its requests, in order."""

    want: Want
    prompts: list[np.ndarray]
    cached: int = 0
    """Tokens of each prompt that the prefix cache is expected to hold, the last block aside."""


class VllmEngine(Engine):
    """Rows from an in-process `vllm.LLMEngine`. Raises EngineError when the self-test fails."""

    def __init__(self, folder: Path, reducer: PathReducer, settings: st.Teacher, *, longest: int) -> None:
        self._serial = 0
        self._model, self.longest = settings.model, longest
        self.branches = self.branch_tokens = self._prefix_tokens = 0
        self._blocks: WindowBlocks | None = None
        self._said = False
        self._engine, on_cpu = start_engine(folder, settings, longest)
        self._contexts = context_tokens(reducer.vocabulary)
        self._size = reducer.vocabulary.size
        rows = logit_rows(reducer, on_cpu=on_cpu)
        kinds = self._call("installing its hook", "bytecache_install", reducer, len(self._contexts), rows, os.getpid())
        if not all(kinds):
            raise EngineError(
                "this vLLM's model runner has no hook for path masses; install the version in the lock file"
            )
        self._self_test(reducer)
        self._pass_tokens = batched_tokens(settings, on_cpu=on_cpu)
        self.pass_room = PASS_ROOM["cpu" if on_cpu else "gpu"]
        if settings.depth or settings.sample_tokens:
            self._blocks = window_blocks(self._engine, longest)
            why = "its layers share no block table"
            if self._blocks and (why := self._branches_differ(reducer, self._blocks.block_size)):
                self._blocks.forget()
                self._blocks = None
            if self._blocks and self._blocks.windows_tokens >= 2 * GROUP_TOKENS:
                self.in_flight = 2
            if not self._blocks:
                _LOG.warning("branches of this teacher go as requests, which costs more (%s)", why)

    def _self_test(self, reducer: PathReducer) -> None:
        """The rows must be the engine's own: compare with its prompt logprobs on a short prompt."""
        from vllm import SamplingParams

        prompt = _trial_prompt(reducer, 8)
        tokens = prompt.tokens
        (rows,) = self.score([prompt])
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=1)
        self._add("self-test-reference", tokens, params, "self-test")
        reference: list[Any] | None = None
        while self._engine.has_unfinished_requests():
            for output in self._step():
                reference = output.prompt_logprobs
        if reference is None:
            raise EngineError("vLLM returned no prompt logprobs in the self-test; install the version in the lock file")
        theirs = np.array([row[int(t)].logprob for row, t in zip(reference[1:], tokens[1:], strict=True)])
        worst = float(np.abs(theirs - rows.next_logp[:-1]).max())
        mass = float(np.abs(_root_mass(rows) + rows.end + rows.control - 1).max())
        if not worst < 1e-2 or not mass < 1e-2 + 256 * reducer.floor:
            raise EngineError(
                f"the engine's self-test failed: log-probabilities differ by {worst:.2g} nats, masses sum off by "
                f"{mass:.2g}; this vLLM version is not supported, install the one in the lock file"
            )

    def _branches_differ(self, reducer: PathReducer, block_size: int) -> str:
        """Why branches over blocks do not give the rows of the same histories in their window; empty if they do."""
        prompt = _trial_prompt(reducer, min(block_size + block_size // 2, self.longest - 1))
        ends = range(len(prompt.tokens) - 2)
        two = [tuple(prompt.tokens[j + 1 : j + 3].tolist()) for j in ends]
        shorter = [Branch(j, tokens[:1], int(prompt.starts[j + 1])) for j, tokens in zip(ends, two, strict=True)]
        branches = [Branch(j, tokens, int(prompt.starts[j + 2])) for j, tokens in zip(ends, two, strict=True)]
        # Another history leaves each shorter one: from half of them first, so that both ways to go on are tried.
        forks = [branch._replace(chain=branch.chain[:1] * 2, start=len(prompt.text)) for branch in branches]
        half = len(branches) // 2
        if not branches:
            return f"its histories are of {self.longest} tokens at most"
        try:
            (rows,) = self.score([prompt])
            if self._blocks and not self._blocks.holds(prompt):
                return "the cache has no room to keep windows in"
            list(self.score_branches([(prompt, shorter)]))
            asked = [*branches[:half], *forks, *branches[half:]]
            (again,) = self.score_branches([(prompt, asked)])
            (in_runs,) = self.score_branches([(prompt, [*chain.from_iterable(zip(shorter, branches, strict=True))])])
        except EngineError as error:
            return str(error)
        log_norm = np.delete(again.log_norm, np.s_[half : half + len(forks)])
        both = np.stack([rows.log_norm[1:-1], rows.log_norm[2:]], axis=1).reshape(-1)
        worst = float(max(np.abs(rows.log_norm[2:] - log_norm).max(), np.abs(both - in_runs.log_norm).max()))
        # Half precision rounds a batch of another shape otherwise; another history is another matter.
        return "" if worst < 0.1 else f"rows differ by {worst:.2g} nats"

    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        asks = [self._ask(prompt) for prompt in prompts]
        if self._blocks:
            named = (name for ask in asks for name in ask.want.requests)
            self._blocks.expect(dict(zip(named, prompts, strict=True)), self.in_flight)
        return self._run(asks, reuse_prefix=False)

    def _ask(self, prompt: Prompt) -> Ask:
        following = np.append(prompt.tokens[prompt.first_row + 1 :], -1).astype(np.int64)
        requests = {self._name(): Request(prompt.first_row, len(prompt.tokens))}
        return Ask(Want(prompt.name, prompt.text, prompt.starts, following, requests), [prompt.tokens])

    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        for prompt, branches in jobs:
            refuse_long_branches(prompt.name, branches, self.longest)
        held = [self._blocks is not None and self._blocks.holds(prompt) for prompt, _ in jobs]
        over_blocks = self._over_blocks([job for job, here in zip(jobs, held, strict=True) if here])
        if not all(held):  # requests in flight would hold blocks that a pass counts on
            over_blocks = iter(list(over_blocks))
        asks = [self._ask_branches(*job) for job, here in zip(jobs, held, strict=True) if not here]
        as_requests = self._run(asks, reuse_prefix=True)
        for here in held:
            yield next(over_blocks if here else as_requests)

    def _over_blocks(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        """Branches of windows whose blocks are held, in passes; the rows of each job, in order."""
        blocks = self._blocks
        if blocks is None or not jobs:
            return
        runs = [sequences(branches) for _, branches in jobs]
        resumed = [blocks.tails.resume(prompt, some) for (prompt, _), some in zip(jobs, runs, strict=True)]
        arrays = [
            job_of(blocks.table(prompt), some, ones, blocks.block_size)
            for (prompt, _), some, ones in zip(jobs, runs, resumed, strict=True)
        ]
        ends = [np.append(0, np.cumsum(job.rows)) for job in arrays]
        yet = announced = 0
        for parts in cut(arrays, self._pass_tokens, blocks.room // 2):
            more = range(announced, parts[-1].job + 1)
            wants = {f"branches {number}": _want_of_branches(*jobs[number]) for number in more}
            self._call("announcing branches", "bytecache_want", wants)
            announced = parts[-1].job + 1
            borrowed = blocks.borrow(borrowed_blocks(arrays, parts))
            ids = np.array([block.block_id for block in borrowed], np.int32)
            step = make_pass(arrays, parts, ids, blocks.block_size)
            named = [(f"branches {part.job}", *ends[part.job][[part.lo, part.hi]].tolist()) for part in parts]
            self._call("scoring branches", "bytecache_branches", step, named)
            rest = iter(borrowed)
            for part in parts:
                these = slice(part.lo, part.hi)
                counts = arrays[part.job].borrowed[these].tolist()
                blocks.tails.keep(jobs[part.job][0], runs[part.job][these], resumed[part.job][these], counts, rest)
            blocks.tails.trim()
            self.branches += len(step.wanted)
            self.branch_tokens += len(step.tokens)
            self._prefix_tokens += int(step.seq_lens.sum())
            last = parts[-1]
            whole = last.job + (last.hi == len(arrays[last.job].length))
            if whole == len(jobs):
                blocks.tails.settle()  # who takes the last rows may never come back to this generator
            yield from self._collect({f"branches {n}": f"{jobs[n][0].name}, branches" for n in range(yet, whole)})
            yet = whole

    def _ask_branches(self, prompt: Prompt, branches: Sequence[Branch]) -> Ask:
        prompts = [np.append(prompt.tokens[: b.anchor + 1], np.array(b.chain, np.int32)) for b in branches]
        requests = {self._name(): Request(len(tokens) - 1, len(tokens)) for tokens in prompts}
        return Ask(_want_of_branches(prompt, branches)._replace(requests=requests), prompts)

    def _name(self) -> str:
        self._serial += 1
        return f"bc{self._serial}"

    def _run(self, asks: list[Ask], *, reuse_prefix: bool) -> Iterator[RowMasses]:
        """Keep about TOKENS_IN_FLIGHT tokens in the scheduler; yield the rows of each ask, in order."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True, skip_reading_prefix_cache=not reuse_prefix
        )
        to_come = [
            (number, name, prompt)
            for number, ask in enumerate(asks)
            for name, prompt in zip(ask.want.requests, ask.prompts, strict=True)
        ]
        owner = {name: number for number, name, _ in to_come}
        cost = {name: self._expected(prompt, reuse_prefix=reuse_prefix) for _, name, prompt in to_come}
        unfinished = [len(ask.prompts) for ask in asks]
        announced = added = flying = 0
        for number in range(len(asks)):
            while unfinished[number]:
                while added < len(to_come) and (not flying or flying + cost[to_come[added][1]] <= TOKENS_IN_FLIGHT):
                    ask, name, prompt = to_come[added]
                    if ask >= announced:
                        wants = {str(ask): asks[ask].want}
                        self._call("announcing a window", "bytecache_want", wants)
                        announced = ask + 1
                    self._add(name, prompt, params, asks[ask].want.label)
                    flying += cost[name]
                    added += 1
                for output in self._step():
                    if output.finished:
                        name = output.request_id
                        unfinished[owner[name]] -= 1
                        flying -= cost[name]
                        if reuse_prefix:
                            self._count(output)
            if reuse_prefix:
                self._judge()
            yield from self._collect({str(number): asks[number].want.label})

    def _expected(self, prompt: np.ndarray, *, reuse_prefix: bool) -> int:
        """Tokens of a prompt that are to be computed."""
        return min(len(prompt), CPU_BLOCK) if reuse_prefix else len(prompt)

    def _collect(self, labels: dict[str, str]) -> Iterator[RowMasses]:
        """The rows of wants, named by what messages call them."""
        if not labels:
            return
        answers = self._call("collecting rows", "bytecache_collect", list(labels))
        answer: dict[str, RowMasses] = next((answer for answer in answers if answer is not None), {})
        for name, label in labels.items():
            if name not in answer:
                raise EngineError(f"vLLM finished {label} without all of its rows; rerun the command")
            yield answer[name]

    def _count(self, output: Any) -> None:
        """Add what a branch cost."""
        self.branches += 1
        self._prefix_tokens += len(output.prompt_token_ids)
        self.branch_tokens += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)

    def _judge(self) -> None:
        """Say what branches cost, once; refuse a model that computes all of them anew."""
        if self.branches < TRIAL_BRANCHES:
            return
        each, whole = self.branch_tokens / self.branches, self._prefix_tokens / self.branches
        if each > 0.9 * whole and whole > 2 * CPU_BLOCK:
            raise EngineError(
                f"teacher.model = {self._model!r}: vLLM computes {each:.0f} of a branch's {whole:.0f} tokens again, "
                "because this architecture's cache cannot be entered in the middle; set teacher.depth = 0 and "
                "teacher.sample_tokens = 0 (static rows stand in for branches), or a teacher.context that makes each "
                "branch cheap"
            )
        if each > COSTLY_BRANCH and not self._said:
            self._said = True
            _LOG.warning("vLLM computes %.0f tokens for each branch; a smaller teacher.context costs less", each)

    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        for some in together(jobs):
            missing = self._call("looking up static states", "bytecache_static_missing", tokens_of(some))[0]
            for tokens in batches(missing):
                self._ask_states(tokens)
            answers = self._call("making static rows", "bytecache_static_rows", some)
            rows = next((rows for rows in answers if rows is not None), None)
            if rows is None:
                raise EngineError("no worker of vLLM holds logits; rerun the command")
            yield from rows

    def load_static(self, folder: Path) -> None:
        self._call("loading static states", "bytecache_load_static", folder)

    def save_static(self, folder: Path) -> None:
        self._call("saving static states", "bytecache_save_static", folder)

    def _ask_states(self, tokens: Sequence[int]) -> None:
        """One batch of prompts (context, token), alone in the engine."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True, skip_reading_prefix_cache=True
        )
        wants: dict[str, WantState] = {}
        prompts = []
        for number, context in enumerate(self._contexts):
            for token in tokens:
                wants[self._name()] = WantState(token, number, len(context) + 1)
                prompts.append(np.append(context, np.int32(token)))
        self._call("announcing static states", "bytecache_want_states", wants)
        for name, prompt in zip(wants, prompts, strict=True):
            self._add(name, prompt, params, "static states")
        while self._engine.has_unfinished_requests():
            self._step()

    def _add(self, name: str, tokens: np.ndarray, params: Any, label: str) -> None:
        # An id past the vocabulary would kill the engine and hang the next call.
        if int(tokens.max()) >= self._size or int(tokens.min()) < 0:
            raise EngineError(f"token id {int(tokens.max())} is outside the teacher's vocabulary of {self._size}")
        self._guard(
            f"taking {len(tokens)} tokens of {label}",
            lambda: self._engine.add_request(name, {"prompt_token_ids": tokens.tolist()}, params),
        )

    def _step(self) -> list[Any]:
        outputs: list[Any] = self._guard("scoring", self._engine.step)
        return outputs

    def _call(self, doing: str, method: str, *args: Any) -> list[Any]:
        """Answers of all workers to one of our methods (stages.engines.vllm_worker)."""
        answers: list[Any] = self._guard(doing, lambda: self._engine.collective_rpc(method, args=args))
        return answers

    def _guard(self, doing: str, call: Callable[[], Any]) -> Any:
        """Every call of vLLM goes through here: what it raises becomes a refusal that names what was done."""
        try:
            return call()
        except BytecacheError:
            raise
        except Exception as error:
            raise EngineError(
                f"vLLM failed while {doing} ({type(error).__name__}: {reason(error)}); rerun the same command to go on"
            ) from error

    def foresees(self, prompt: Prompt) -> bool:
        return self._blocks is not None and self._blocks.holds(prompt)

    def release(self, prompts: Sequence[Prompt]) -> None:
        if self._blocks:
            self._blocks.release(prompts)

    def forget(self) -> None:
        if self._blocks:
            self._blocks.forget()
        if not self._guard("dropping its prefix cache", self._engine.reset_prefix_cache):
            raise EngineError("vLLM could not drop its prefix cache between units; rerun the same command to continue")

    def close(self) -> None:
        with contextlib.suppress(Exception):  # an engine that failed may not answer
            self._engine.collective_rpc("bytecache_leave", timeout=LEAVE_S)
        self._engine.engine_core.shutdown()


def _trial_prompt(reducer: PathReducer, count: int) -> Prompt:
    """The start token and tokens from all over the vocabulary, `count` in all."""
    ordinary = reducer.vocabulary.order
    some = np.resize(ordinary[:: max(1, len(ordinary) // (count - 1))], count - 1)
    tokens = np.append(reducer.vocabulary.start_id, some).astype(np.int32)
    pieces = [reducer.vocabulary.token_bytes[t] or b"" for t in tokens[1:]]
    starts = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return Prompt("self-test", tokens, 0, np.frombuffer(b"".join(pieces), np.uint8), starts)


def _want_of_branches(prompt: Prompt, branches: Sequence[Branch]) -> Want:
    """Rows of branches, for which no request is named."""
    starts = np.array([branch.start for branch in branches], np.int64)
    none = np.full(len(branches), -1, np.int64)
    return Want(f"{prompt.name}, branches", prompt.text, starts, none, {})


def _root_mass(rows: RowMasses) -> np.ndarray:
    """Sum of each row's depth-0 entries, float64 [R]."""
    first = np.cumsum([0, *rows.n_levels[:-1]])
    begin = np.cumsum([0, *rows.fanout])[first]
    mass = np.cumsum(np.append(0.0, rows.entry_mass.astype(np.float64)))
    root_mass: np.ndarray = mass[begin + rows.fanout[first]] - mass[begin]
    return root_mass
