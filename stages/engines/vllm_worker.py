"""Inside vLLM's worker: reduce the logits of chosen rows beside the model, so that no vocabulary row travels.

vLLM mixes `PathExtension` into its worker (`worker_extension_cls`, a public argument). `install` wraps one method of
the model runner that every step calls with the final hidden states of all scheduled tokens; the wrapper computes
logits for the wanted rows with the model's own head (soft-capping and scaling included), a chunk at a time, and
keeps only their path masses. Price: no prompt logits tensor at all, one head product per wanted row.

The wrapped method is private to vLLM's V1 runner; the engine pins that runner and self-tests at start.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bytecache.stages.engines.paths import PathReducer, RowMasses, concatenate, plan_paths
from bytecache.stages.engines.static import LOGIT_ROWS, StaticJob, StaticStates, linear_logits

HOOK = "_get_prompt_logprobs_dict"


class Want(NamedTuple):
    """Rows wanted of a request: histories tokens[: j + 1], first_row <= j < len(tokens)."""

    tokens: np.ndarray
    first_row: int
    text: np.ndarray
    starts: np.ndarray
    label: str


class WantState(NamedTuple):
    """The last hidden state wanted of a request: the static state of `token` after context number `context`."""

    token: int
    context: int
    length: int
    """Tokens of the prompt."""


class _Progress:
    def __init__(self, want: Want, reducer: PathReducer):
        self.want = want
        self.plan = plan_paths(reducer.vocabulary, want.text, want.starts)
        self.following = np.append(want.tokens[want.first_row + 1 :], -1).astype(np.int64)
        self.next_row = want.first_row
        self.parts: list[RowMasses] = []


class PathExtension:
    """Methods that `collective_rpc` calls; `self` is the worker."""

    model_runner: Any

    def bytecache_install(self, reducer: PathReducer, contexts: int) -> bool:
        """Wrap the runner; True when this runner has the hook. `contexts`: of static rows."""
        runner = self.model_runner
        original = getattr(runner, HOOK, None)
        if original is None or not hasattr(runner, "query_start_loc"):
            return False
        self._reducer = reducer
        self._wanted: dict[str, _Progress] = {}
        self._wanted_states: dict[str, WantState] = {}
        config = runner.model_config.hf_text_config
        self._static = StaticStates(reducer, contexts, linear=linear_logits(config))

        def hooked(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
            self._capture(hidden_states, num_scheduled_tokens)
            return original(hidden_states, num_scheduled_tokens)

        setattr(runner, HOOK, hooked)
        return True

    def bytecache_want(self, wants: dict[str, Want]) -> None:
        """Announce requests before they are added to the engine."""
        for name, want in wants.items():
            self._wanted[name] = _Progress(want, self._reducer)

    def bytecache_collect(self, names: list[str]) -> dict[str, RowMasses]:
        """Rows of finished requests; empty on ranks that hold no logits."""
        out = {}
        for name in names:
            progress = self._wanted.pop(name)
            if progress.next_row == len(progress.want.tokens):
                out[name] = concatenate(progress.parts)
        return out

    def bytecache_static_missing(self, tokens: np.ndarray) -> list[int]:
        """Tokens whose static states must be asked for."""
        return self._static.missing(tokens)

    def bytecache_want_states(self, wants: dict[str, WantState]) -> None:
        """Announce requests for static states before they are added to the engine."""
        self._wanted_states.update(wants)

    @torch.inference_mode()
    def bytecache_static_rows(self, jobs: list[StaticJob]) -> list[RowMasses] | None:
        """Static rows of some windows; None on ranks that hold no logits."""
        return self._static.rows(jobs, self.model_runner.model.compute_logits)

    def bytecache_static_file(self, file: Path, save: bool) -> None:
        """Keep the static states, or take them from an earlier run."""
        if not save:
            self._static.load(file)
        elif getattr(self, "rank", 0) == 0:
            self._static.save(file)

    @torch.inference_mode()
    def _capture(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> None:
        runner = self.model_runner
        for request_id, scheduled in num_scheduled_tokens.items():
            # vLLM appends a random suffix to the request id that it was given.
            name = request_id.rsplit("-", 1)[0]
            if name in self._wanted_states:
                self._capture_state(hidden_states, request_id, scheduled, name)
                continue
            progress = self._wanted.get(name)
            if progress is None:
                continue
            begin = runner.requests[request_id].num_computed_tokens
            stop = min(begin + scheduled, len(progress.want.tokens))
            # A preempted request starts over; rows it gave already are the same again.
            lo = max(begin, progress.next_row)
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]) - begin
            for a in range(lo, stop, LOGIT_ROWS):
                if a != progress.next_row:
                    break  # rows missing from a cached prefix: collect() will not return the request
                b = min(a + LOGIT_ROWS, stop)
                logits = runner.model.compute_logits(hidden_states[offset + a : offset + b])
                if logits is None:
                    continue
                first = progress.want.first_row
                plan = progress.plan._replace(level_offset=progress.plan.level_offset[a - first : b - first + 1])
                progress.parts.append(
                    self._reducer.reduce(
                        logits, plan, progress.following[a - first : b - first], where=progress.want.label
                    )
                )
                progress.next_row = b

    def _capture_state(self, hidden_states: torch.Tensor, request_id: str, scheduled: int, name: str) -> None:
        runner = self.model_runner
        want = self._wanted_states[name]
        begin = runner.requests[request_id].num_computed_tokens
        if begin < want.length <= begin + scheduled:
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]) - begin
            self._static.put(want.token, want.context, hidden_states[offset + want.length - 1])
            del self._wanted_states[name]
