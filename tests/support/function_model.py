"""A teacher whose distributions are a function of the history: any tokenizer, no weights, equal in every batch."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bytecache.schemas import settings as st
from bytecache.stages.engines.engine import Branch, Engine, Prompt
from bytecache.stages.engines.paths import PathReducer, plan_paths
from bytecache.stages.engines.rows import RowMasses, concatenate
from bytecache.stages.engines.static import StaticJob, context_tokens
from bytecache.stages.teacher.teacher import Teacher
from bytecache.stages.tokens.vocab import Vocabulary


class FunctionEngine(Engine):
    """Logits are normal numbers times `spread`, drawn with a hash of the history as seed."""

    def __init__(self, vocabulary: Vocabulary, *, floor: float, spread: float):
        self.vocabulary, self.spread = vocabulary, spread
        self.reducer = PathReducer(vocabulary, top_k=2, floor=floor)

    def logits(self, history: Sequence[int]) -> np.ndarray:
        """float32 [size]"""
        digest = hashlib.sha256(np.asarray(history, np.int32).tobytes()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        return (draw.standard_normal(self.vocabulary.size) * self.spread).astype(np.float32)

    def next_token(self, history: tuple[int, ...]) -> np.ndarray:
        """p(. | history), float64 [size]."""
        logits = self.logits(history).astype(np.float64)
        p = np.exp(logits - logits.max())
        return p / p.sum()

    def _row(self, logits: np.ndarray, text: np.ndarray, start: int, following: int = -1) -> RowMasses:
        plan = plan_paths(self.vocabulary, text, np.array([start], np.int64))
        return self.reducer.reduce(torch.from_numpy(logits[None]), plan, np.array([following]), where="test")

    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        for prompt in prompts:
            tokens = prompt.tokens.tolist()
            ends = range(prompt.first_row, len(tokens))
            following = [*tokens[1:], -1]
            yield concatenate(
                [
                    self._row(self.logits(tokens[: j + 1]), prompt.text, int(start), following[j])
                    for j, start in zip(ends, prompt.starts, strict=True)
                ]
            )

    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        for prompt, branches in jobs:
            histories = [(*prompt.tokens[: b.anchor + 1].tolist(), *b.chain) for b in branches]
            yield concatenate(
                [self._row(self.logits(h), prompt.text, b.start) for h, b in zip(histories, branches, strict=True)]
            )

    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        for job in jobs:
            rows = []
            for token, start in zip(job.token.tolist(), job.start.tolist(), strict=True):
                contexts = context_tokens(self.vocabulary)
                logs = [np.log(self.next_token((*context.tolist(), token))) for context in contexts]
                rows.append(self._row(np.mean(logs, axis=0).astype(np.float32), job.text, start))
            yield concatenate(rows)

    def load_static(self, file: Path) -> None:
        pass

    def save_static(self, file: Path) -> None:
        pass


def function_teacher(vocabulary: Vocabulary, *, floor: float = 0.0, spread: float = 4.0, **effort: float) -> Teacher:
    """A teacher of tau = 0.01, depth 2, without static rows, unless `effort` says otherwise."""
    chosen = {"tau": 0.01, "depth": 2, "static": 0.0, **effort}
    settings = st.Teacher(model="function", backend="hf", context=512, overlap=32, top_k=2, floor=floor, **chosen)
    engine = FunctionEngine(vocabulary, floor=floor, spread=spread)
    identity = {"model": "function", "vocabulary": vocabulary.fingerprint, "settings": chosen}
    return Teacher(engine, vocabulary, settings, identity)
