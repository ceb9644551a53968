"""Two terms of one objective: the student's bytes beside a baseline that matches the teacher's tokens; for studies.

The byte term takes the teacher at the text's own bytes alone. What else the teacher would have said at a place, beyond
the first byte, only its tokens say: `JointTerm` adds their divergence, from the same pass over the logits, to that of
the bytes. It needs micro-batches that carry both kinds of targets.
"""

from typing import NamedTuple

from torch import Tensor

from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.types import MicroBatch
from bytecache.stages.train.objective.baselines import TokenTerm
from bytecache.stages.train.objective.loss import LossParts
from bytecache.stages.train.objective.marginal import MarginalTerm
from bytecache.stages.train.objective.term import ByteTerm, Work


class JointWork(NamedTuple):
    """What both terms ask of the same positions; tokens: None where no token of both begins at one byte."""

    of_bytes: Work
    of_tokens: Work | None

    def split(self, rows: int, size: int) -> list["JointWork"]:
        """The work of rows [0, size), [size, 2 size), ..., each with its own row numbers."""
        of_bytes = self.of_bytes.split(rows, size)
        of_tokens = self.of_tokens.split(rows, size) if self.of_tokens is not None else [None] * len(of_bytes)
        return [JointWork(*both) for both in zip(of_bytes, of_tokens, strict=True)]


class JointTerm(ByteTerm):
    """The sum of the byte term's parts and `weight` times the divergence of the teacher's tokens.

    Args:
        of_bytes: also measures. kind: one of `settings.BASELINES`. weight: of the tokens beside the bytes.
    """

    def __init__(self, of_bytes: MarginalTerm, kind: str, weight: float) -> None:
        super().__init__()
        self.of_bytes, self.of_tokens, self.weight = of_bytes, TokenTerm(kind, of_bytes), weight
        self.slots = of_bytes.slots

    def observe(self, reader: ShardReader) -> None:
        """See `MarginalTerm.observe`."""
        self.of_bytes.observe(reader)

    def prepare(self, micro: MicroBatch, reduction: str) -> Work | None:
        """The choices of the bytes."""
        return self.of_bytes.prepare(micro, reduction)

    def work(self, micro: MicroBatch, reduction: str, *, measure: bool) -> Work | None:
        """Both terms' work; the bytes' alone to measure."""
        of_bytes = self.of_bytes.work(micro, reduction, measure=measure)
        return of_bytes if measure or of_bytes is None else JointWork(of_bytes, micro.teacher)

    def of_logits(self, z: Tensor, label: Tensor, work: Work) -> LossParts:
        """The byte term's parts, the tokens' divergence added to its own."""
        if not isinstance(work, JointWork):
            return self.of_bytes.of_logits(z, label, work)
        parts = self.of_bytes.of_logits(z, label, work.of_bytes)
        if work.of_tokens is None:
            return parts
        return parts._replace(kl=parts.kl + self.weight * self.of_tokens.of_logits(z, label, work.of_tokens).kl)
