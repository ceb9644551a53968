"""The teacher through vLLM: the production engine.

Requests are plain pre-tokenised prompts with one sampled token; the rows we want ride on the prefill (see
stages.engines.vllm_worker). `LLMEngine.step()` is driven here with a cap on the tokens in flight, so memory stays flat.
Branches are short requests whose prefix is in the prefix cache, added right after their window.

An engine exception is fatal by design: after one, vLLM's next call may never return.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.stages.engines.engine import Branch, Engine, Prompt
from bytecache.stages.engines.paths import PathReducer, RowMasses, concatenate
from bytecache.stages.engines.static import StaticJob, batches, context_tokens, together, tokens_of
from bytecache.stages.engines.vllm_worker import Want, WantState

TOKENS_IN_FLIGHT = 16_384
"""Prompt tokens handed to the scheduler at once."""
_BLOCK = {"cpu": 32, "gpu": 16}
"""Tokens per cache block, the fewest an engine takes: a branch recomputes at most one block of its prefix."""


def _environment(settings: st.Teacher) -> None:
    """Before vLLM is imported. In-process: an engine process of its own survives a kill and keeps its GPU."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # vLLM warns about its platform before it configures its own logger.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def _quiet_llvmlite() -> None:
    """Let vLLM start after numba was imported.

    vLLM 0.32 reads `__dict__` of every attribute of every module; llvmlite's library proxy answers any name with a
    function, and vLLM dies on it. The proxy has no `__dict__`, so it may say so.
    """
    from llvmlite.binding import ffi

    proxy: Any = type(ffi.lib)
    answer = proxy.__getattr__

    def guarded(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return answer(self, name)

    proxy.__getattr__ = guarded


class VllmEngine(Engine):
    """Rows from an in-process `vllm.LLMEngine`. Raises EngineError when the self-test fails."""

    def __init__(self, folder: Path, reducer: PathReducer, settings: st.Teacher):
        _environment(settings)
        _quiet_llvmlite()
        warnings.filterwarnings("ignore", message=".*reduce_op.*", category=FutureWarning)
        try:
            from vllm import EngineArgs, LLMEngine
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                'teacher.backend = "vllm" but vLLM is not installed: install bytecache[cpu] or bytecache[gpu], '
                'or set teacher.backend = "hf"'
            ) from error
        self._serial = 0
        on_cpu = current_platform.is_cpu()
        arguments: dict[str, Any] = {
            "model": str(folder),
            "dtype": settings.dtype,
            "hf_overrides": {"head_dtype": "float32"},
            "max_model_len": settings.context,
            "max_num_batched_tokens": settings.max_batched_tokens,
            "max_num_seqs": min(128, settings.max_batched_tokens),
            "enable_chunked_prefill": True,
            # Reference windows branch even where production does not.
            "enable_prefix_caching": settings.depth > 0 or settings.sample_tokens > 0,
            "block_size": _BLOCK["cpu" if on_cpu else "gpu"],
            "enforce_eager": on_cpu,
            "skip_tokenizer_init": True,
            "async_scheduling": False,
            "seed": 0,
            "tensor_parallel_size": settings.tensor_parallel,
            "trust_remote_code": settings.trust_remote_code,
            "load_format": "safetensors",
            "use_tqdm_on_load": False,
            "worker_extension_cls": "bytecache.stages.engines.vllm_worker.PathExtension",
            "disable_log_stats": True,
        }
        if not on_cpu:
            arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
        try:
            self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except Exception as error:
            raise EngineError(
                f"vLLM could not start with teacher.model = {settings.model!r}: {_reason(error)}; "
                'lower teacher.context or teacher.kv_cache_gib, or try teacher.backend = "hf"'
            ) from error
        self._contexts = context_tokens(reducer.vocabulary)
        if not all(self._engine.collective_rpc("bytecache_install", args=(reducer, len(self._contexts)))):
            raise EngineError(
                "this vLLM's model runner has no hook for path masses; install the version in the lock file"
            )
        self._vocabulary_size = reducer.vocabulary.size
        self._self_test(reducer)

    def _self_test(self, reducer: PathReducer) -> None:
        """The rows must be the engine's own: compare with its prompt logprobs on a short prompt."""
        from vllm import SamplingParams

        ordinary = reducer.vocabulary.order
        tokens = np.append(reducer.vocabulary.start_id, ordinary[:: max(1, len(ordinary) // 7)][:7]).astype(np.int32)
        pieces = [reducer.vocabulary.token_bytes[t] or b"" for t in tokens]
        starts = np.cumsum([0, *map(len, pieces[1:])], dtype=np.int64)
        prompt = Prompt("self-test", tokens, 0, np.frombuffer(b"".join(pieces[1:]), np.uint8), starts)
        (rows,) = self.score([prompt])
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=1)
        self._engine.add_request("self-test-reference", {"prompt_token_ids": tokens.tolist()}, params)
        reference: list[Any] | None = None
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                reference = output.prompt_logprobs
        assert reference is not None
        theirs = np.array([row[int(t)].logprob for row, t in zip(reference[1:], tokens[1:], strict=True)])
        worst = float(np.abs(theirs - rows.next_logp[:-1]).max())
        mass = float(np.abs(_root_mass(rows) + rows.end + rows.control - 1).max())
        if not worst < 1e-2 or not mass < 1e-2 + 256 * reducer.floor:
            raise EngineError(
                f"the engine's self-test failed: log-probabilities differ by {worst:.2g} nats, masses sum off by "
                f"{mass:.2g}; this vLLM version is not supported, install the one in the lock file"
            )

    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        wants = (Want(p.tokens, p.first_row, p.text, p.starts, p.name) for p in prompts)
        return self._run(list(wants), reuse_prefix=False)

    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        wants = []
        for prompt, branches in jobs:
            for branch in branches:
                tokens = np.append(prompt.tokens[: branch.anchor + 1], np.array(branch.chain, np.int32))
                start = np.array([branch.start], np.int64)
                wants.append(Want(tokens, len(tokens) - 1, prompt.text, start, f"{prompt.name}, branch"))
        rows = self._run(wants, reuse_prefix=True)
        for _, branches in jobs:
            yield concatenate([next(rows) for _ in branches])

    def _run(self, wants: list[Want], *, reuse_prefix: bool) -> Iterator[RowMasses]:
        """Keep about TOKENS_IN_FLIGHT tokens in the scheduler; yield rows in the order of `wants`."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True, skip_reading_prefix_cache=not reuse_prefix
        )
        ready: dict[str, RowMasses] = {}
        names = [f"bc{self._serial + i}" for i in range(len(wants))]
        self._serial += len(wants)
        size = {name: len(want.tokens) for name, want in zip(names, wants, strict=True)}
        added, flying, given = 0, 0, 0
        while given < len(wants):
            batch = {}
            while added < len(wants) and (flying == 0 or flying + len(wants[added].tokens) <= TOKENS_IN_FLIGHT):
                batch[names[added]] = wants[added]
                flying += len(wants[added].tokens)
                added += 1
            if batch:
                self._engine.collective_rpc("bytecache_want", args=(batch,))
                for name, want in batch.items():
                    self._add(name, want.tokens, params)
            finished = [o.request_id for o in self._step() if o.finished]
            if finished:
                collected: dict[str, RowMasses] = {}
                for part in self._engine.collective_rpc("bytecache_collect", args=(finished,)):
                    collected.update(part)
                missing = [name for name in finished if name not in collected]
                if missing:
                    raise EngineError(
                        f"vLLM finished {len(missing)} requests without all their rows; rerun the command"
                    )
                ready.update(collected)
                flying -= sum(size[name] for name in finished)
            while given < len(wants) and names[given] in ready:
                yield ready.pop(names[given])
                given += 1

    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        missing = self._engine.collective_rpc("bytecache_static_missing", args=(tokens_of(jobs),))[0]
        for tokens in batches(missing):
            self._ask_states(tokens)
        for some in together(jobs):
            answers = self._engine.collective_rpc("bytecache_static_rows", args=(some,))
            rows = next((rows for rows in answers if rows is not None), None)
            if rows is None:
                raise EngineError("no worker of vLLM holds logits; rerun the command")
            yield from rows

    def load_static(self, file: Path) -> None:
        self._engine.collective_rpc("bytecache_static_file", args=(file, False))

    def save_static(self, file: Path) -> None:
        self._engine.collective_rpc("bytecache_static_file", args=(file, True))

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
                wants[f"bc{self._serial + len(wants)}"] = WantState(token, number, len(context) + 1)
                prompts.append(np.append(context, np.int32(token)))
        self._serial += len(wants)
        self._engine.collective_rpc("bytecache_want_states", args=(wants,))
        for name, prompt in zip(wants, prompts, strict=True):
            self._add(name, prompt, params)
        while self._engine.has_unfinished_requests():
            self._step()

    def _add(self, name: str, tokens: np.ndarray, params: Any) -> None:
        # An id past the vocabulary would kill the engine and hang the next call.
        if int(tokens.max()) >= self._vocabulary_size or int(tokens.min()) < 0:
            raise EngineError(
                f"token id {int(tokens.max())} is outside the teacher's vocabulary of {self._vocabulary_size}"
            )
        self._engine.add_request(name, {"prompt_token_ids": tokens.tolist()}, params)

    def _step(self) -> list[Any]:
        try:
            return self._engine.step()
        except Exception as error:
            if isinstance(error, EngineError):
                raise
            raise EngineError(
                f'vLLM failed while scoring: {_reason(error)}; rerun the same command, or try teacher.backend = "hf"'
            ) from error

    def forget(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise EngineError("vLLM could not drop its prefix cache between units; rerun the same command to continue")

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _root_mass(rows: RowMasses) -> np.ndarray:
    """Sum of each row's depth-0 entries, float64 [R]."""
    first = np.cumsum([0, *rows.n_levels[:-1]])
    begin = np.cumsum([0, *rows.fanout])[first]
    mass = np.cumsum(np.append(0.0, rows.entry_mass.astype(np.float64)))
    return mass[begin + rows.fanout[first]] - mass[begin]


def _reason(error: BaseException) -> str:
    """The start of an error's message; pydantic's says what is wrong in its third line."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:3])
