"""The one term that meets the teacher: what `Objective` asks of it.

`Objective` adds a token cross-entropy and one `ByteTerm`. A term reads the student where it likes: token logits, piece
by piece (`of_logits`), or the hidden state before the lm_head (`of_hidden`). It gets the teacher from the micro-batch
and says which of the teacher's targets those must carry. Sums over pieces, micro-batches and ranks add up.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.types import IGNORE, SLOTS, MicroBatch
from bytecache.stages.train.objective.loss import LossParts


class Work(Protocol):
    """What a term asks of token logits, by position."""

    def split(self, rows: int, size: int) -> Sequence["Work"]:
        """The work of rows [0, size), [size, 2 size), ..., each with its own row numbers."""
        ...


class ByteTerm(nn.Module):
    """A term that asks nothing and costs nothing; others override what they need."""

    reads: Literal["bytes", "tokens"] = "bytes"
    """The teacher's targets that micro-batches carry for it: of bytes, or its own tokens from the dump."""
    own_bytes: bool = False
    """Whether it predicts bytes by itself, so that their CE (`lambda_byte`) is another term than the tokens'."""
    slots: int = SLOTS
    """Bytes of a token that it reads."""

    def observe(self, reader: ShardReader) -> None:
        """Learn from training text what is needed before step 0."""

    def prepare(self, micro: MicroBatch, reduction: str) -> Work | None:
        """What of `work` needs no student, made ahead in a thread; None: nothing."""
        return None

    def work(self, micro: MicroBatch, reduction: str, *, measure: bool) -> Work | None:
        """What is asked of the token logits of a micro-batch; None: nothing but the tokens' CE."""
        return None

    def of_logits(self, z: Tensor, label: Tensor, work: Work) -> LossParts:
        """All parts of some positions, the tokens' CE among them; z float [P, V], label int64 [P]."""
        raise NotImplementedError

    def of_hidden(self, hidden: Tensor, micro: MicroBatch) -> LossParts | None:
        """Parts that read the lm_head's input, float [P, hidden]; None: none."""
        return None

    def byte_scores(self, logits: Tensor, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities up to a constant of every byte choice, float [S, symbols], and the true ones int64 [S].

        Args:
            logits: float [R, T, V]. hidden: float [R, T, hidden].
        """
        raise NotImplementedError

    def flops(self, tokens: int, slots: int) -> int:
        """Matrix FLOPs, forward and backward, of `tokens` positions and `slots` bytes."""
        return 0


def token_nll(z: Tensor, label: Tensor) -> Tensor:
    """Sum of the tokens' NLL; z float [P, V], label int64 [P] or IGNORE."""
    return functional.cross_entropy(z, label, ignore_index=IGNORE, reduction="sum")


def tokens_alone(z: Tensor, label: Tensor) -> LossParts:
    """The parts of positions that no term asks anything of."""
    token = token_nll(z, label)
    nothing = torch.zeros_like(token)
    return LossParts(token, nothing, nothing, nothing)
