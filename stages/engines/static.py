"""Static rows: what a teacher says after a token whatever came before, for histories not worth a call of their own.

When the text could have been cut after a token u where neither the canonical tokens nor an evaluated branch break,
the lattice needs p(. | history, u). A static row answers with the geometric mean over a few short contexts,

    log p(. | u) = mean over contexts c of log p(. | start, c, u)      (then normalised by the reducer)
                                                                 = logits of the mean state, where logits are linear

wrong about what the text is about, right about what a token with these bytes is followed by. Its path masses are
taken along the text like those of any row, so it predicts as far as its tokens reach. Kept on the host is the hidden
state of (start, c, u), its mean over contexts (each of them if the logits are soft-capped), for the life of a teacher
and for its later runs; a row then costs one product with the output embedding (one per context if soft-capped), shared
by all its uses in `TOGETHER` histories of any windows, and no pass through the model.

Two contexts, a line break and " in", were chosen by measuring (SmolLM2-135M, KL in nats per byte of a canonical pass
on two English texts): no context 0.053, 0.029; line break 0.044, 0.024; " in" 0.039, 0.019; both 0.034 on the first.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bytecache.schemas.errors import StorageError
from bytecache.schemas.files import make_folder, scratch_folder
from bytecache.stages.engines.paths import PathReducer, join_plans, plan_paths, take_plan
from bytecache.stages.engines.rows import LateRows, Once, RowMasses, concatenate, take
from bytecache.stages.tokens.vocab import Misfit, Vocabulary

CONTEXTS = ("\n", " in")
BATCH = 64
"""Prompts evaluated together, always as many: a state must not depend on what else was asked for."""
LOGIT_ROWS = 128
"""Rows of logits in memory at once: 128 x vocabulary x 4 bytes."""
TOGETHER = 4096
"""Histories of several windows whose rows are made together: bounds memory, and the time to a stop."""
HELD_BYTES = 1 << 30
"""Bytes of states in the host's memory at most (of each process, where a teacher is spread over several)."""
MAX_SAVED = 1 << 31
"""Bytes of states in a teacher's folder of the cache at most."""
SAVE_AT_ONCE = 512
"""New tokens that are worth a file of their own, however many are known."""
_LOG = logging.getLogger("bytecache.static")


class StaticJob(NamedTuple):
    """Static rows wanted along one text."""

    name: str
    """For messages: document and window."""
    text: np.ndarray
    """uint8 [n]"""
    token: np.ndarray
    """int32 [D]; the last token of each history."""
    start: np.ndarray
    """int64 [D]; byte of `text` where each history ends."""


def context_tokens(vocabulary: Vocabulary) -> list[np.ndarray]:
    """Start token and context, int32, for every context that the tokenizer can write; at least the start token."""
    encoded = vocabulary.encode_batch(list(CONTEXTS))
    start = np.array([vocabulary.start_id], np.int32)
    contexts = [np.append(start, e.ids).astype(np.int32) for e in encoded if not isinstance(e, Misfit)]
    return contexts or [start]


class _Block(NamedTuple):
    """States that came together, on the host; the unit of what is dropped and saved."""

    tokens: list[int]
    states: torch.Tensor
    """[tokens, per token, width]"""


class StaticStates:
    """Hidden states by token, on the host whatever the model's device; at most `limit` bytes, the oldest go first.

    Where logits are linear in the state, only the mean over contexts is kept. `dropped` counts tokens that had to go;
    they are simply asked for again.
    """

    def __init__(
        self, reducer: PathReducer, contexts: int, *, linear: bool, device: torch.device, limit: int = HELD_BYTES
    ) -> None:
        self.reducer, self.contexts, self.linear = reducer, contexts, linear
        self.device, self.limit = device, limit
        self.held_bytes = self.dropped = 0
        self._arriving: dict[int, list[torch.Tensor | None]] = {}
        self._blocks: dict[int, _Block] = {}
        self._place: dict[int, tuple[int, int]] = {}
        self._serial = 0
        self._unsaved: list[int] = []

    def missing(self, tokens: np.ndarray) -> list[int]:
        """Tokens without states, ascending. The states of the others stay until the next call."""
        self._settle()
        asked = np.unique(tokens).tolist()
        self._make_room({self._place[t][0] for t in asked if t in self._place})
        return [t for t in asked if t not in self._place]

    def put(self, token: int, context: int, state: torch.Tensor) -> None:
        """Take the state [width] of one token after one context; it stays on its device until all have come."""
        if token not in self._place:
            self._arriving.setdefault(token, [None] * self.contexts)[context] = state.detach().clone()

    def _settle(self) -> None:
        """Bring the states that are whole to the host, in one copy."""
        whole = {t: s for t, s in self._arriving.items() if None not in s}
        if not whole:
            return
        states = torch.stack([torch.stack([s for s in of_token if s is not None]) for of_token in whole.values()])
        if self.linear:
            states = states.float().mean(dim=1, keepdim=True).to(states.dtype)
        self._unsaved.append(self._add(list(whole), states.cpu()))
        for token in whole:
            del self._arriving[token]

    def _add(self, tokens: list[int], states: torch.Tensor) -> int:
        number = self._serial
        self._serial += 1
        self._blocks[number] = _Block(tokens, states)
        self._place |= {token: (number, row) for row, token in enumerate(tokens)}
        self.held_bytes += states.nbytes
        return number

    def _make_room(self, needed: set[int]) -> None:
        """Drop the oldest blocks that are not needed now, until the rest fits."""
        for number in [n for n in self._blocks if n not in needed]:
            if self.held_bytes <= self.limit:
                return
            block = self._blocks.pop(number)
            self.held_bytes -= block.states.nbytes
            self.dropped += len(block.tokens)
            self._unsaved = [n for n in self._unsaved if n != number]
            for token in block.tokens:
                del self._place[token]

    def rows(
        self,
        jobs: Sequence[StaticJob],
        logits_of: Callable[[torch.Tensor], torch.Tensor | None],
        *,
        answer: bool = True,
    ) -> list[RowMasses] | None:
        """The rows of each job; None where there are no logits, or no `answer` is wanted but the product with others.

        A token's logits are computed once for all jobs.
        """
        self._settle()
        token = tokens_of(jobs)
        plan = join_plans([plan_paths(self.reducer.vocabulary, job.text, job.start) for job in jobs])
        order = np.argsort(token, kind="stable")
        first = np.flatnonzero(np.diff(token[order], prepend=-1))
        ends = np.append(first, len(token))
        parts = []
        for a in range(0, len(first), LOGIT_ROWS):
            b = min(a + LOGIT_ROWS, len(first))
            logits = self._logits(token[order[first[a:b]]], logits_of)
            if logits is None or not answer:
                continue
            # Many histories share a row of logits.
            which = np.repeat(np.arange(b - a), np.diff(ends[a : b + 1]))
            rows = order[ends[a] : ends[b]]
            none = np.full(len(rows), -1, np.int64)
            where = f"{jobs[0].name} and {len(jobs) - 1} more, static rows"
            parts.append(self.reducer.begin(logits, take_plan(plan, rows), none, where=where, row=which))
        if not parts:
            return None
        masses = Once(lambda: _without_top(concatenate([part() for part in parts])))
        place = np.split(np.argsort(order), np.cumsum([len(job.token) for job in jobs])[:-1])
        return [LateRows(partial(_taken, masses, index)) for index in place]

    def _logits(
        self, tokens: np.ndarray, logits_of: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Mean over contexts of the logits of tokens, [tokens, vocabulary], up to a constant per token."""
        places = [self._place[int(t)] for t in tokens]
        states = torch.stack([self._blocks[number].states[row] for number, row in places]).to(self.device)
        total: torch.Tensor | None = None
        for state in states.unbind(dim=1):
            logits = logits_of(state.contiguous())
            if logits is None:
                return None
            total = logits.float() if total is None else total + logits.float()
        return total if total is None or states.shape[1] == 1 else total / states.shape[1]

    def load(self, folder: Path) -> None:
        """Take the states of earlier runs, as many as there is room for; damaged files are passed over with a line."""
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    tokens, states = opened.get_tensor("token"), opened.get_tensor("state")
                    stated = (opened.metadata() or {}).get("sha256")
            except (OSError, SafetensorError):
                tokens = states = stated = None
            if (
                stated is None
                or stated != _digest(tokens, states)
                or states.shape[:2] != (len(tokens), self._per_token)
            ):
                _LOG.warning("%s: damaged static states, not used; they are computed again", file)
                continue
            fresh = [row for row, token in enumerate(tokens.tolist()) if token not in self._place]
            if fresh and self.held_bytes + len(fresh) * states[0].nbytes <= self.limit:
                self._add(tokens[fresh].tolist(), states[fresh].clone())

    def save(self, folder: Path) -> None:
        """Write the states that are new into a file of their own, beside those of other runs, once they are worth it.

        Files are few: each holds an eighth of what was known, or SAVE_AT_ONCE tokens.
        """
        self._settle()
        blocks = [self._blocks[number] for number in self._unsaved]
        fresh = sum(len(block.tokens) for block in blocks)
        if not fresh or fresh < min(SAVE_AT_ONCE, len(self._place) // 8):
            return
        self._unsaved = []
        try:
            self._write(folder, blocks)
        except (OSError, StorageError, SafetensorError) as error:  # they cost time the next time, and nothing else
            _LOG.warning("%s: static states are not kept for later runs: %s", folder, " ".join(str(error).split()))

    def _write(self, folder: Path, blocks: Sequence[_Block]) -> None:
        states = torch.cat([block.states for block in blocks])
        make_folder(folder)
        if sum(file.stat().st_size for file in folder.glob("*.safetensors")) + states.nbytes > MAX_SAVED:
            _LOG.warning("%s holds %d bytes of static states already; no more are kept there", folder, MAX_SAVED)
            return
        tokens = torch.tensor([token for block in blocks for token in block.tokens], dtype=torch.int64)
        digest = _digest(tokens, states)
        with scratch_folder(folder) as scratch:
            part = scratch / f"{digest[:32]}.safetensors"
            save_file({"token": tokens, "state": states}, part, {"sha256": digest})
            part.replace(folder / part.name)

    @property
    def _per_token(self) -> int:
        return 1 if self.linear else self.contexts


def _taken(masses: Once, index: np.ndarray) -> RowMasses:
    return take(masses(), index)


def _without_top(rows: RowMasses) -> RowMasses:
    """A token list "whatever came before" is nobody's business; zeros cost nothing in the dump."""
    return replace(rows, topk_id=np.zeros_like(rows.topk_id), topk_logp=np.zeros_like(rows.topk_logp))


def _digest(tokens: torch.Tensor, states: torch.Tensor) -> str:
    raw = tokens.numpy().tobytes() + states.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def tokens_of(jobs: Sequence[StaticJob]) -> np.ndarray:
    """int32; the tokens that the jobs of a group need, asked for together because batches are filled up."""
    return np.concatenate([job.token for job in jobs] or [np.zeros(0, np.int32)])


def together(jobs: Sequence[StaticJob]) -> Iterator[list[StaticJob]]:
    """Runs of jobs of at most TOGETHER histories, one job at least."""
    run: list[StaticJob] = []
    for job in jobs:
        if run and sum(len(j.token) for j in run) + len(job.token) > TOGETHER:
            yield run
            run = []
        run.append(job)
    if run:
        yield run


def linear_logits(config: Any) -> bool:
    """Whether a model's logits are a linear function of what its output embedding is given; `config` of its text."""
    caps = [name for name in config.to_dict() if "softcap" in name and not name.startswith("attn")]
    return not any(getattr(config, name) for name in caps)


def batches(tokens: Sequence[int]) -> list[list[int]]:
    """Runs of BATCH tokens, the last one filled up by repeating its last token."""
    out = [list(tokens[a : a + BATCH]) for a in range(0, len(tokens), BATCH)]
    return [run + run[-1:] * (BATCH - len(run)) for run in out]
