"""Known ways across tokenizers, on equal terms with the rest: they match the teacher's tokens, not its bytes.

    uld          sum over i of |p_(i) - q_(i)|, both distributions sorted in descending order
                 (Universal Logit Distillation, Boizard et al., arXiv 2402.12030)
    shared_topk  KL(teacher || student) over those of the teacher's top k that some token of the student spells; all
                 other mass of each side is one bucket, as for bytes
    strict_topk  the same with the teacher's sixteen likeliest tokens, where the token that the text has is one and the
                 same for both (strict one-to-one places, top 16: what arXiv 2610.08448 finds the strongest simple way)
    mapped_topk  KL(teacher || student) over the student's tokens that the teacher's top k stand for (`token_map.py`)

They compare at places where a token of the teacher and one of the student begin at the same byte. (ULD's paper pairs
the i-th token with the i-th, which drifts apart over anything longer than an answer.) The dump holds the teacher's top
k: of `uld` the sums beyond rank k are compared instead of the probabilities, a lower bound of the paper's distance and
equal to it where k covers the vocabulary. None has parameters. Not here: DSKD needs the teacher's hidden states, which
no cache of probabilities holds; MinED, whose map of the vocabularies is made by edit distance where `mapped_topk`
counts; and GOLD (products over the tokens of a span, sorted distances for the rest), which the same top k would do for.
Price: a softmax over the vocabulary at the common places, for `uld` a top-k beside it.
"""

import torch
from torch import Tensor
from torch.nn import functional

from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.types import MicroBatch, SlotTargets, TokenTargets
from bytecache.stages.train.objective.loss import LossParts, byte_terms
from bytecache.stages.train.objective.marginal import COUNTED_POSITIONS, MarginalTerm
from bytecache.stages.train.objective.term import ByteTerm, Work, tokens_alone
from bytecache.stages.train.objective.token_map import TokenMap

STRICT = 16
"""Tokens of the teacher that `strict_topk` reads."""


def sorted_distance(logits: Tensor, prob: Tensor, temperature: float = 1.0) -> Tensor:
    """ULD's distance at each place.

    Args:
        logits: float [A, V], the student's. prob: float [A, K], the teacher's largest, descending.
        temperature: of both sides; the teacher's top k is renormalised to its own mass at temperature 1.

    Returns:
        float [A], 0 to 2.
    """
    q = torch.softmax(logits / temperature, dim=-1)
    if temperature != 1:
        heated = prob ** (1 / temperature)
        prob = heated / heated.sum(1, keepdim=True).clamp_min(1e-12) * prob.sum(1, keepdim=True)
    k = min(prob.shape[1], q.shape[1])
    mine = functional.pad(q.topk(k, dim=-1).values, (0, prob.shape[1] - k))
    beyond = (1 - prob.sum(1)).clamp_min(0) - (1 - mine.sum(1)).clamp_min(0)
    return (prob - mine).abs().sum(1) + beyond.abs()


def shared_distance(
    logits: Tensor, ids: Tensor, prob: Tensor, divergence: str = "forward", temperature: float = 1.0
) -> Tensor:
    """Divergence over shared tokens and one bucket at each place.

    Args:
        logits: float [A, V]. ids: int64 [A, K], -1 = not shared, else unique in a row. prob: float [A, K].

    Returns:
        float [A], nats.
    """
    slot, column = torch.nonzero(ids >= 0, as_tuple=True)
    listed = prob[slot, column]
    tail = (1 - torch.zeros_like(prob[:, 0]).index_add_(0, slot, listed)).clamp_min(0)
    return bucket_distance(logits, SlotTargets(slot, ids[slot, column], listed, tail), divergence, temperature)


def bucket_distance(logits: Tensor, targets: SlotTargets, divergence: str, temperature: float) -> Tensor:
    """Divergence over the listed tokens and one bucket; logits float [A, V], targets of A slots; float [A], nats."""
    symbols = logits.shape[1]
    none = targets.slot.new_zeros(len(logits))
    # Where every token of the student is listed, what is left is rounding, and it could go nowhere.
    n_listed = none.index_add(0, targets.slot, torch.ones_like(targets.slot))
    targets = targets._replace(tail=torch.where(n_listed < symbols, targets.tail, 0.0))
    return byte_terms(logits, none, targets, divergence=divergence, temperature=temperature, symbols=symbols)[1]


class TokenTerm(ByteTerm):
    """A baseline that matches the teacher's tokens; it is measured by the bytes of the student's own.

    Args:
        kind: one of `settings.BASELINES`. measure: the term that measures.
    """

    reads = "tokens"

    def __init__(self, kind: str, measure: MarginalTerm) -> None:
        super().__init__()
        self.kind, self.measure, self.slots = kind, measure, measure.slots
        self.map = TokenMap() if kind == "mapped_topk" else None

    def observe(self, reader: ShardReader) -> None:
        """See `MarginalTerm.observe`."""
        self.measure.observe(reader)
        if self.map is not None and reader.dump is not None:
            self.map.observe(reader, COUNTED_POSITIONS)

    def work(self, micro: MicroBatch, reduction: str, *, measure: bool) -> Work | None:
        """The teacher's tokens at common places, or the bytes to measure."""
        return self.measure.work(micro, reduction, measure=True) if measure else micro.teacher

    def of_logits(self, z: Tensor, label: Tensor, work: Work) -> LossParts:
        """Token CE and the sum of distances at the common places."""
        if not isinstance(work, TokenTargets):
            return self.measure.of_logits(z, label, work)
        parts = tokens_alone(z, label)
        if not work.row.numel():
            return parts
        kind, temperature, _ = self.measure.divergence
        if self.kind == "uld":
            return parts._replace(kl=sorted_distance(z[work.row], work.prob.to(z.dtype), temperature).sum())
        row, ids, prob = work.row, work.ids, work.prob
        if self.map is not None:
            targets = self.map.project(ids, prob.to(z.dtype), z.shape[1])
            return parts._replace(kl=bucket_distance(z[row], targets, kind, temperature).sum())
        if self.kind == "strict_topk":
            row, ids, prob = row[work.whole], ids[work.whole, :STRICT], prob[work.whole, :STRICT]
        return parts._replace(kl=shared_distance(z[row], ids, prob.to(z.dtype), kind, temperature).sum())

    def byte_scores(self, logits: Tensor, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `MarginalTerm.byte_scores`."""
        return self.measure.byte_scores(logits, hidden, micro)
