"""What any teacher could give at equal steps: a student with its teacher's own tokenizer, taught by all its logits.

An offline cache loses something on the way from one tokenizer to another. To tell what is lost from what is not there
to be won, `forget` makes a student whose tokenizer is its teacher's: a share of its tokens gets the mean embedding of
the pieces that spell it, which is what a new tokenizer's tokens get. Between the two every distribution over tokens can
be compared as it is, and `LogitTerm` does: no bytes, no cache, no list, the teacher run in every step. What that gains
on cross-entropy is a ceiling for every objective that teaches distributions, at these steps of this text.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bytecache.stages.student.student import Student
from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.types import IGNORE, MicroBatch
from bytecache.stages.train.objective.loss import LossParts
from bytecache.stages.train.objective.term import ByteTerm, Work, tokens_alone


def pieces(spelled: bytes, kept: dict[bytes, int]) -> list[int]:
    """Ids of the longest kept tokens that spell it, from the left; single bytes must be kept."""
    ids, at = [], 0
    while at < len(spelled):
        size = next(size for size in range(len(spelled) - at, 0, -1) if spelled[at : at + size] in kept)
        ids.append(kept[spelled[at : at + size]])
        at += size
    return ids


@torch.no_grad()
def forget(opened: Student, share: float, seed: int) -> int:
    """Give a share of the tokens of two bytes or more the mean embedding of their pieces; returns how many.

    Both ends of the model are changed, where they are apart.
    """
    spelled = {i: bytes(b) for i, b in enumerate(opened.vocabulary.token_bytes) if b}
    draws = np.random.default_rng(seed).random(len(opened.vocabulary.token_bytes))
    lost = [i for i, b in spelled.items() if len(b) > 1 and draws[i] < share]
    kept = {b: i for i, b in spelled.items() if len(b) == 1 or draws[i] >= share}
    ends = (opened.model.get_input_embeddings(), opened.model.get_output_embeddings())
    for weight in {id(end.weight): end.weight for end in ends}.values():
        old = weight.clone()
        for token in lost:
            weight[token] = old[pieces(spelled[token], kept)].mean(0)
    return len(lost)


@dataclass(frozen=True)
class LogitWork:
    """The teacher's log-probabilities, float32 [P, V], of the positions; not to be split."""

    log_p: Tensor

    def split(self, rows: int, size: int) -> list["LogitWork"]:
        """The work of rows [0, size), [size, 2 size), ..."""
        return [LogitWork(self.log_p[first : first + size]) for first in range(0, rows, size)]


class LogitTerm(ByteTerm):
    """KL(teacher || student) over the whole vocabulary at every predicted token, the teacher run beside.

    Args:
        teacher: of the same tokenizer. measure: the term that measures.
    """

    reads = "tokens"

    def __init__(self, teacher: Student, measure: ByteTerm) -> None:
        super().__init__()
        # Not a module of this one: its weights are no parameters of the objective.
        self.teacher, self.measure = (teacher,), measure

    def observe(self, reader: ShardReader) -> None:
        """See `MarginalTerm.observe`."""
        self.measure.observe(reader)

    def work(self, micro: MicroBatch, reduction: str, *, measure: bool) -> Work | None:
        """The teacher's distributions, or the bytes to measure."""
        if measure:
            return self.measure.work(micro, reduction, measure=True)
        with torch.no_grad():
            logits = self.teacher[0].forward(micro.input_ids, micro.position_ids)[0]
        return LogitWork(functional.log_softmax(logits.flatten(0, 1).float(), dim=-1))

    def of_logits(self, z: Tensor, label: Tensor, work: Work) -> LossParts:
        """Token CE and the divergence of the predicted tokens."""
        if not isinstance(work, LogitWork):
            return self.measure.of_logits(z, label, work)
        predicted = label != IGNORE
        log_q = functional.log_softmax(z[predicted], dim=-1)
        apart = functional.kl_div(log_q, work.log_p[predicted], log_target=True, reduction="sum")
        return tokens_alone(z, label)._replace(kl=apart)
