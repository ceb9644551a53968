"""What the teacher stage asks of an engine: rows of path masses for histories, in order."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bytecache.schemas.errors import ConfigError
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.engines.static import StaticJob

GROUP_TOKENS = 16_384
"""Tokens of windows evaluated together, then their branches; an engine that holds twice as many takes two groups."""


class Prompt(NamedTuple):
    """A run of tokens to evaluate: rows for the histories tokens[: j + 1], j >= first_row."""

    name: str
    """For messages: document and window."""
    tokens: np.ndarray
    """int32 [T]; the start token first."""
    first_row: int
    text: np.ndarray
    """uint8 [n]; the text whose paths are wanted."""
    starts: np.ndarray
    """int64 [T - first_row]; byte of `text` where each captured history ends."""


class Branch(NamedTuple):
    """A history off the canonical path: tokens[: anchor + 1] of a prompt, then `chain`."""

    anchor: int
    chain: tuple[int, ...]
    start: int
    """Byte of the prompt's text where the history ends."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the history."""
        return self.anchor + 1 + len(self.chain)


def refuse_long_branches(name: str, branches: Sequence[Branch], longest: int) -> None:
    """Raises ConfigError for a branch of more than `longest` tokens; `name` of its window."""
    most = max((branch.n_tokens for branch in branches), default=0)
    if most > longest:
        raise ConfigError(
            f"{name}: a branch of {most} tokens exceeds the {longest} that the teacher holds; "
            "lower teacher.depth, or teacher.context"
        )


class Engine(ABC):
    """Evaluates histories and reduces their logits beside the model. All calls keep order."""

    longest = 1 << 30
    """Tokens of the longest history that it evaluates; who asks leaves out what is longer."""

    in_flight = 1
    """Calls of `score` whose prompts may be branched from in turns; with one, each call forgets those before."""

    pass_room = 0
    """Branches up to which a pass costs about as much as one with fewer, since all weights are read for it."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        """Rows of each prompt from its `first_row` on."""

    @abstractmethod
    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        """One row per branch, grouped by job; every prompt has been scored before, and not released.

        A branch costs least after the one that it extends, of this call or one before.
        """

    @abstractmethod
    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        """Static rows (stages.engines.static), grouped by job."""

    @abstractmethod
    def load_static(self, folder: Path) -> None:
        """Take the static states of earlier runs of the same teacher."""

    @abstractmethod
    def save_static(self, folder: Path) -> None:
        """Keep new static states for later runs of the same teacher, if they are worth a file."""

    def foresees(self, prompt: Prompt) -> bool:
        """Whether branches of this one may be asked for that nobody needs yet, which fill a pass up."""
        return False

    def release(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 - most engines remember nothing
        """There will be no more branches of these."""

    def forget(self) -> None:  # noqa: B027 - most engines remember nothing
        """Drop what was cached: the bytes of a unit must not depend on the units before it."""

    def close(self) -> None:  # noqa: B027 - most engines have nothing to release
        """Release the model."""
