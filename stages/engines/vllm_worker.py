"""Inside vLLM's worker: reduce the logits of chosen rows beside the model, so that no vocabulary row travels.

vLLM mixes `PathExtension` into its worker (`worker_extension_cls`, a public argument). `install` wraps one method of
the model runner that every step calls with the final hidden states of all scheduled tokens. What a step then does:

    find the wanted rows of all requests of the step
    for every chunk of them:  logits by the model's own head (soft-capping and scaling included), path masses of those

so the head is read once per `logit_rows` rows, whoever asked for them; a branch no longer reads it alone. There is no
prompt logits tensor at all. On a device nothing waits inside the step: masses are on their way while the next step runs
(stages.engines.paths_device). With tensor parallelism every rank takes part in the head's product, the first reduces.

The wrapped method is private to vLLM: `_get_prompt_logprobs_dict` of the V1 runner, or `compute_prompt_logprobs` of the
V2 runner's `prompt_logprobs_worker`. The engine says which runner it starts, and self-tests.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bytecache.stages.engines.paths import PathReducer, join_plans, plan_between, plan_paths
from bytecache.stages.engines.rows import LateRows, Once, RowMasses, concatenate, made, take
from bytecache.stages.engines.static import StaticJob, StaticStates, linear_logits
from bytecache.stages.engines.vllm_branches import BranchPass
from bytecache.stages.engines.vllm_pass import run_pass

V1_HOOK = "_get_prompt_logprobs_dict"
V2_HOOK = "compute_prompt_logprobs"
LEAVE_S = 0.5
"""Seconds from `bytecache_leave` to the end: the executor takes it for its own doing by then."""
_PR_SET_PDEATHSIG = 1


def _is_vllm_process() -> bool:
    return multiprocessing.current_process().name.startswith("VllmWorker")


def tie_to_parent() -> None:
    """In a worker process of vLLM: leave signals to the parent, and die with it at once.

    A signal to the whole process group (Slurm's SIGTERM, Ctrl-C) would end the workers in the middle of a step and look
    like a failure of the unit; the parent decides what becomes of it. vLLM's own watch over the parent begins when the
    model is loaded and ends a worker after its step; the kernel's is immediate.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not _is_vllm_process():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it went before the kernel was told
        os._exit(1)


# vLLM imports this module in each worker before it loads the model: the earliest place that is ours.
tie_to_parent()


class Request(NamedTuple):
    """A prompt of a want: rows for its histories tokens[: j + 1], first <= j < stop, the prompt's length."""

    first: int
    stop: int


class Want(NamedTuple):
    """Rows wanted along one text, by any number of requests."""

    label: str
    """For messages: document and window."""
    text: np.ndarray
    """uint8 [n]"""
    starts: np.ndarray
    """int64 [R]; byte of `text` where each row's history ends, the requests' rows one after the other."""
    following: np.ndarray
    """int64 [R]; the next token of each row, -1 for none."""
    requests: dict[str, Request]
    """By name, in the order of their rows."""


class WantState(NamedTuple):
    """The last hidden state wanted of a request: the static state of `token` after context number `context`."""

    token: int
    context: int
    length: int
    """Tokens of the prompt."""


class Scheduled(NamedTuple):
    """A request's part of a step."""

    name: str
    """Ours; vLLM appends a random suffix to the request id that it was given."""
    begin: int
    """First token of the prompt that the step computes."""
    tokens: int
    offset: int
    """Row of `hidden_states` that belongs to `begin`."""


class _Wanted:
    """A want in progress: where in the chunks its rows are."""

    def __init__(self, want: Want, reducer: PathReducer) -> None:
        self.label = want.label
        self.plan = plan_paths(reducer.vocabulary, want.text, want.starts)
        self.following = want.following
        self.chunk = np.full(len(want.starts), -1, np.int64)
        self.place = np.zeros(len(want.starts), np.int64)


class _Asked:
    """One request of a want: which of its rows comes next."""

    def __init__(self, wanted: _Wanted, request: Request, first_row: int) -> None:
        self.wanted, self.stop, self.next = wanted, request.stop, request.first
        self.shift = first_row - request.first


class _Piece(NamedTuple):
    """Rows [lo, hi) of a want, and the hidden states that they belong to."""

    wanted: _Wanted
    lo: int
    hi: int
    hidden: int


class PathExtension:
    """Methods that `collective_rpc` calls; `self` is the worker."""

    model_runner: Any

    def bytecache_install(self, reducer: PathReducer, contexts: int, logit_rows: int, process: int = 0) -> str:
        """Wrap the runner; returns which kind it is, empty if unknown.

        `contexts`: of static rows. `process`: the one that collects; in the same, its threads list what rows hold.
        """
        runner = self.model_runner
        self._late = process == os.getpid()
        self._reducer, self._logit_rows = reducer, logit_rows
        self._answers = getattr(self, "rank", 0) == 0
        self._asked: dict[str, _Asked] = {}
        self._wanted: dict[str, _Wanted] = {}
        self._wanted_states: dict[str, WantState] = {}
        self._chunks: dict[int, Once] = {}
        self._uncollected: dict[int, int] = {}
        self._serial = 0
        config = runner.model_config.hf_text_config
        self._static = StaticStates(reducer, contexts, linear=linear_logits(config), device=runner.device)
        if hasattr(getattr(runner, "prompt_logprobs_worker", None), V2_HOOK):
            self._wrap_v2()
            return "v2"
        if hasattr(runner, V1_HOOK) and hasattr(runner, "query_start_loc"):
            self._wrap_v1()
            return "v1"
        return ""

    def _wrap_v1(self) -> None:
        runner = self.model_runner
        original = getattr(runner, V1_HOOK)

        def hooked(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
            if self._asked or self._wanted_states:
                self._capture(hidden_states, list(scheduled_v1(runner, num_scheduled_tokens)))
            return original(hidden_states, num_scheduled_tokens)

        setattr(runner, V1_HOOK, hooked)

    def _wrap_v2(self) -> None:
        prompts = self.model_runner.prompt_logprobs_worker
        original = getattr(prompts, V2_HOOK)

        def hooked(logits_fn: Any, hidden_states: torch.Tensor, input_batch: Any, *rest: Any) -> Any:
            if self._asked or self._wanted_states:
                self._capture(hidden_states, list(scheduled_v2(input_batch)))
            return original(logits_fn, hidden_states, input_batch, *rest)

        setattr(prompts, V2_HOOK, hooked)

    def bytecache_want(self, wants: dict[str, Want]) -> None:
        """Announce wants before their requests are added to the engine."""
        for name, want in wants.items():
            wanted = self._wanted[name] = _Wanted(want, self._reducer)
            row = 0
            for request_name, request in want.requests.items():
                self._asked[request_name] = _Asked(wanted, request, row)
                row += request.stop - request.first

    @torch.inference_mode()
    def bytecache_branches(self, step: BranchPass, parts: list[tuple[str, int, int]]) -> None:
        """Run a pass of branches: rows [lo, hi) of wants announced before, one after the other."""
        hidden_states = run_pass(self.model_runner, step)
        pieces = []
        at = 0
        for name, lo, hi in parts:
            pieces.append(_Piece(self._wanted[name], lo, hi, at - lo))
            at += hi - lo
        for some in chunks(pieces, self._logit_rows):
            self._reduce(hidden_states, some)

    def bytecache_collect(self, names: list[str]) -> dict[str, RowMasses] | None:
        """Rows of wants whose requests have finished, without those that lack one; None on ranks that do not answer."""
        collected = {}
        for name in names:
            wanted = self._wanted.pop(name)
            if self._answers and (wanted.chunk >= 0).all():
                collected[name] = self._rows_of(wanted)
        return collected if self._answers else None

    def _rows_of(self, wanted: _Wanted) -> RowMasses:
        """The rows of a want from the chunks that hold them; a chunk goes with its last row."""
        cuts = np.flatnonzero(np.diff(wanted.chunk)) + 1
        parts = []
        for a, b in zip([0, *cuts], [*cuts, len(wanted.chunk)], strict=True):
            number = int(wanted.chunk[a])
            parts.append((self._chunks[number], wanted.place[a:b]))
            self._uncollected[number] -= b - a
            if not self._uncollected[number]:
                del self._chunks[number], self._uncollected[number]

        def gathered() -> RowMasses:
            return concatenate([take(chunk(), place) for chunk, place in parts])

        return LateRows(gathered) if self._late else gathered()

    def bytecache_static_missing(self, tokens: np.ndarray) -> list[int]:
        """Tokens whose static states must be asked for."""
        return self._static.missing(tokens)

    def bytecache_want_states(self, wants: dict[str, WantState]) -> None:
        """Announce requests for static states before they are added to the engine."""
        self._wanted_states.update(wants)

    @torch.no_grad()
    def bytecache_static_rows(self, jobs: list[StaticJob]) -> list[RowMasses] | None:
        """Static rows of some windows; None on ranks that do not answer."""
        rows = self._static.rows(jobs, self._logits, answer=self._answers)
        return rows if rows is None or self._late else [made(one) for one in rows]

    def bytecache_load_static(self, folder: Path) -> None:
        """Take the static states of earlier runs."""
        self._static.load(folder)

    def bytecache_save_static(self, folder: Path) -> None:
        """Keep the new static states for later runs."""
        if self._answers:
            self._static.save(folder)

    def bytecache_leave(self) -> None:
        """End this process soon: it holds nothing that is not saved, and vLLM would wait for it for seconds."""
        if _is_vllm_process():
            threading.Timer(LEAVE_S, os._exit, args=(0,)).start()

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.model_runner.model.compute_logits(hidden_states)
        return logits

    @torch.no_grad()
    def _capture(self, hidden_states: torch.Tensor, scheduled: list[Scheduled]) -> None:
        pieces = []
        for request in scheduled:
            if request.name in self._wanted_states:
                self._capture_state(hidden_states, request)
            elif asked := self._asked.get(request.name):
                stop = min(request.begin + request.tokens, asked.stop)
                # A preempted request starts over; rows it gave already are the same again. Rows that are missing from a
                # cached prefix are never given, and collect() does not return the want.
                lo = max(request.begin, asked.next)
                if lo == asked.next and lo < stop:
                    shift = asked.shift
                    pieces.append(
                        _Piece(asked.wanted, lo + shift, stop + shift, request.offset - request.begin - shift)
                    )
                    asked.next = stop
                if asked.next == asked.stop:
                    del self._asked[request.name]
        for some in chunks(pieces, self._logit_rows):
            self._reduce(hidden_states, some)

    def _reduce(self, hidden_states: torch.Tensor, pieces: list[_Piece]) -> None:
        """One chunk of a step's rows, of all who want some."""
        if len(pieces) == 1:
            (piece,) = pieces
            wanted_states = hidden_states[piece.hidden + piece.lo : piece.hidden + piece.hi]
        else:
            index = np.concatenate([np.arange(p.hidden + p.lo, p.hidden + p.hi) for p in pieces])
            wanted_states = hidden_states[torch.from_numpy(index).to(hidden_states.device, non_blocking=True)]
        logits = self._logits(wanted_states)
        if logits is None or not self._answers:
            return
        plan = join_plans([plan_between(p.wanted.plan, p.lo, p.hi) for p in pieces])
        following = np.concatenate([p.wanted.following[p.lo : p.hi] for p in pieces])
        ends = np.cumsum([p.hi - p.lo for p in pieces])

        def where(row: int) -> str:
            piece = pieces[int(np.searchsorted(ends, row, side="right"))]
            return piece.wanted.label

        number = self._serial
        self._serial += 1
        self._chunks[number] = Once(self._reducer.begin(logits, plan, following, where=where))
        self._uncollected[number] = int(ends[-1])
        for piece, end in zip(pieces, ends.tolist(), strict=True):
            piece.wanted.chunk[piece.lo : piece.hi] = number
            piece.wanted.place[piece.lo : piece.hi] = np.arange(end - (piece.hi - piece.lo), end)

    def _capture_state(self, hidden_states: torch.Tensor, request: Scheduled) -> None:
        want = self._wanted_states[request.name]
        last = want.length - 1 - request.begin
        if 0 <= last < request.tokens:
            self._static.put(want.token, want.context, hidden_states[request.offset + last])
            del self._wanted_states[request.name]


def chunks(pieces: list[_Piece], rows: int) -> Iterator[list[_Piece]]:
    """Runs of pieces of `rows` rows, the last one shorter; pieces are cut where a run ends."""
    run: list[_Piece] = []
    room = rows
    for piece in pieces:
        lo = piece.lo
        while lo < piece.hi:
            hi = min(piece.hi, lo + room)
            run.append(piece._replace(lo=lo, hi=hi))
            room -= hi - lo
            lo = hi
            if not room:
                yield run
                run, room = [], rows
    if run:
        yield run


def _ours(request_id: str) -> str:
    return request_id.rsplit("-", 1)[0]


def scheduled_v1(runner: Any, num_scheduled_tokens: dict[str, int]) -> Iterator[Scheduled]:
    """What vLLM's V1 runner computed in a step."""
    offsets, index = runner.query_start_loc.np, runner.input_batch.req_id_to_index
    for request_id, count in num_scheduled_tokens.items():
        begin = runner.requests[request_id].num_computed_tokens
        yield Scheduled(_ours(request_id), begin, count, int(offsets[index[request_id]]))


def scheduled_v2(input_batch: Any) -> Iterator[Scheduled]:
    """What vLLM's V2 runner computed in a step."""
    begins = input_batch.num_computed_prefill_tokens_np.tolist()
    counts = input_batch.num_scheduled_tokens.tolist()
    offsets = input_batch.query_start_loc_np.tolist()
    for request_id, begin, count, offset in zip(input_batch.req_ids, begins, counts, offsets, strict=False):
        yield Scheduled(_ours(request_id), begin, count, offset)
