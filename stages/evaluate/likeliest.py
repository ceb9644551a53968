"""What a student's most likely byte is worth: how often it is the teacher's, and how much its confidence is."""

import numpy as np
import torch

from bytecache.stages.train.batches.types import MicroBatch


class Agreement:
    """How often the likeliest symbol of the student is that of the teacher, where the student's tokens begin."""

    def __init__(self) -> None:
        self.places = self.equal = 0

    def add(self, scores: torch.Tensor, micro: MicroBatch) -> None:
        """scores float [S or more, symbols], the slots' first; slots of number 0, where tokens begin, lead those."""
        n = micro.slot_counts[0]
        assert micro.targets is not None
        first = micro.targets.slot < n
        best = micro.targets.prob.new_zeros(n).scatter_reduce_(
            0, micro.targets.slot[first], micro.targets.prob[first], "amax"
        )
        # Where less is listed than is not, the teacher's likeliest is not known.
        known = best > micro.targets.tail[:n]
        mine = scores[:n].argmax(dim=1)
        agree = first.clone()
        agree[first] = (micro.targets.symbol[first] == mine[micro.targets.slot[first]]) & (
            micro.targets.prob[first] == best[micro.targets.slot[first]]
        )
        self.places += int(known.sum())
        self.equal += int(known[micro.targets.slot[agree]].sum())

    @property
    def share(self) -> float | None:
        """Of the places where the teacher's likeliest symbol is known; None without any."""
        return self.equal / self.places if self.places else None


class Calibration:
    """Expected calibration error of byte predictions, fifteen equal bins of confidence."""

    BINS = 15

    def __init__(self) -> None:
        self.sums = np.zeros((3, self.BINS))

    def add(self, scores: torch.Tensor, true: torch.Tensor) -> None:
        """scores float [S, symbols], log-probabilities up to a constant; true int64 [S]."""
        if not true.numel():
            return
        confidence, guess = torch.softmax(scores.double(), dim=-1).max(dim=-1)
        where = np.minimum((confidence.numpy() * self.BINS).astype(np.int64), self.BINS - 1)
        right = (guess == true).double().numpy()
        for row, weight in zip(self.sums, (None, confidence.numpy(), right), strict=True):
            row += np.bincount(where, weights=weight, minlength=self.BINS)

    @property
    def error(self) -> float:
        """Mean |accuracy - confidence|."""
        n, confidence, right = self.sums
        return float(np.abs(confidence - right).sum() / max(n.sum(), 1))
