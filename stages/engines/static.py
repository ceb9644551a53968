"""Static rows: what a teacher says after a token whatever came before, for histories not worth a call of their own.

When the text could have been cut after a token u where neither the canonical tokens nor an evaluated branch break,
the lattice needs p(. | history, u). A static row answers with the geometric mean over a few short contexts,

    log p(. | u) = mean over contexts c of log p(. | start, c, u)      (then normalised by the reducer)
                                                                 = logits of the mean state, where logits are linear

wrong about what the text is about, right about what a token with these bytes is followed by. Its path masses are
taken along the text like those of any row, so it predicts as far as its tokens reach. Kept is the hidden state of
(start, c, u), 4 bytes x width x contexts per token seen, for the life of a teacher; a row then costs one product with
the output embedding (one per context if the logits are soft-capped), shared by all its uses in `TOGETHER` histories
of any windows, and no pass through the model.

Two contexts, a line break and " in", were chosen by measuring (SmolLM2-135M, KL in nats per byte of a canonical pass
on two English texts): no context 0.053, 0.029; line break 0.044, 0.024; " in" 0.039, 0.019; both 0.034 on the first.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bytecache.schemas.files import scratch_folder
from bytecache.stages.engines.paths import PathReducer, RowMasses, concatenate, join_plans, plan_paths, take, take_plan
from bytecache.stages.tokens.vocab import Misfit, Vocabulary

CONTEXTS = ("\n", " in")
BATCH = 64
"""Prompts evaluated together, always as many: a state must not depend on what else was asked for."""
LOGIT_ROWS = 128
"""Rows of logits in memory at once: 128 x vocabulary x 4 bytes."""
TOGETHER = 4096
"""Histories of several windows whose rows are made together: bounds memory, and the time to a stop."""
MAX_SAVED = 1 << 31
"""Bytes of states written to the cache at most."""


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
    found = [np.append(start, e.ids).astype(np.int32) for e in encoded if not isinstance(e, Misfit)]
    return found or [start]


class StaticStates:
    """Hidden states by token, kept beside the model's output embedding."""

    def __init__(self, reducer: PathReducer, contexts: int, *, linear: bool):
        self.reducer, self.contexts, self.linear = reducer, contexts, linear
        self._state: dict[int, list[torch.Tensor | None]] = {}
        self._saved = 0

    def missing(self, tokens: np.ndarray) -> list[int]:
        """Tokens without states, ascending."""
        return [t for t in np.unique(tokens).tolist() if t not in self._state or None in self._state[t]]

    def put(self, token: int, context: int, state: torch.Tensor) -> None:
        """Keep the state [width] of one token after one context."""
        self._state.setdefault(token, [None] * self.contexts)[context] = state.detach().clone()

    def rows(
        self, jobs: Sequence[StaticJob], logits_of: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> list[RowMasses] | None:
        """The rows of each job; None on ranks that hold no logits. A token's logits are computed once for all jobs."""
        token = tokens_of(jobs)
        plan = join_plans([plan_paths(self.reducer.vocabulary, job.text, job.start) for job in jobs])
        order = np.argsort(token, kind="stable")
        first = np.flatnonzero(np.diff(token[order], prepend=-1))
        ends = np.append(first, len(token))
        parts = []
        for a in range(0, len(first), LOGIT_ROWS):
            b = min(a + LOGIT_ROWS, len(first))
            logits = self._logits(token[order[first[a:b]]], logits_of)
            if logits is None:
                return None
            which = torch.from_numpy(np.repeat(np.arange(b - a), np.diff(ends[a : b + 1]))).to(logits.device)
            rows = order[ends[a] : ends[b]]
            # Gathered a few at a time: many histories share a row of logits.
            for c in range(0, len(rows), self.reducer.chunk):
                some = rows[c : c + self.reducer.chunk]
                wanted = logits[which[c : c + self.reducer.chunk]]
                none = np.full(len(some), -1, np.int64)
                where = f"{jobs[0].name} and {len(jobs) - 1} more, static rows"
                parts.append(self.reducer.reduce(wanted, take_plan(plan, some), none, where=where))
        found = concatenate(parts)
        # A token list "whatever came before" is nobody's business; zeros cost nothing in the dump.
        found = found._replace(topk_id=np.zeros_like(found.topk_id), topk_logp=np.zeros_like(found.topk_logp))
        place = np.split(np.argsort(order), np.cumsum([len(job.token) for job in jobs])[:-1])
        return [take(found, index) for index in place]

    def _logits(
        self, tokens: np.ndarray, logits_of: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Mean over contexts of the logits of tokens, [tokens, vocabulary], up to a constant per token."""
        total: torch.Tensor | None = None
        states = [
            torch.stack([s for s in states if s is not None])
            for states in zip(*(self._state[int(t)] for t in tokens), strict=True)
        ]
        if self.linear:
            states = [torch.stack(states).float().mean(dim=0).to(states[0].dtype)]
        for state in states:
            logits = logits_of(state)
            if logits is None:
                return None
            total = logits.float() if total is None else total + logits.float()
        return None if total is None else total / len(states)

    def load(self, file: Path) -> None:
        """Take the states of an earlier run; a file that is missing or damaged is simply not used."""
        try:
            with safe_open(file, "pt") as opened:
                tokens, states = opened.get_tensor("token"), opened.get_tensor("state")
                stated = (opened.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return
        if stated == _digest(tokens, states) and states.shape[:2] == (len(tokens), self.contexts):
            self._state = {int(t): list(s) for t, s in zip(tokens, states, strict=True)}
            self._saved = len(self._state)

    def save(self, file: Path) -> None:
        """Write the states beside `file` and rename; nothing to do if none are new."""
        whole = {t: s for t, s in sorted(self._state.items()) if None not in s}
        if len(whole) <= self._saved or not whole:
            return
        states = torch.stack([torch.stack([v for v in s if v is not None]) for s in whole.values()]).cpu()
        if states.numel() * states.element_size() > MAX_SAVED:
            return
        tokens = torch.tensor(list(whole), dtype=torch.int64)
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(file.parent) as scratch:
            save_file({"token": tokens, "state": states}, scratch / file.name, {"sha256": _digest(tokens, states)})
            (scratch / file.name).replace(file)
        self._saved = len(whole)


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
