"""Chunk likelihoods: the student's probability of a stretch of text against the teacher's, whatever tokens either has.

Approximate Likelihood Matching (Minixhofer et al., arXiv 2503.20083) from a cache. A chunk is a run of the student's
tokens between two *certain ends*: byte pairs that no token of the vocabulary holds, so that the tokenizer cuts between
them whatever follows (words, mostly). The teacher's log-likelihood of a chunk is the sum over its bytes of the stored
probability of the text's own byte: exact, where the paper sums over the teacher's tokens and asks for chunks whose
boundaries agree. With p and q the likelihoods under teacher and student, at temperature T (the paper's 100),

    loss = T [ p' log(p'/q') + (1 - p') log((1 - p')/(1 - q')) ],     p' = p^(1/T), q' = q^(1/T),

which tends to a Poisson divergence of the log-likelihoods as T grows, hence the factor T. One number a chunk, so the
other ways that the text could have gone teach nothing. `train.divergence` and `train.temperature` are not asked.
Price: a log-softmax at the labels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bytecache.schemas.arrays import SYMBOLS
from bytecache.schemas.errors import ConfigError
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.types import MicroBatch
from bytecache.stages.train.objective.loss import LossParts
from bytecache.stages.train.objective.marginal import MarginalTerm
from bytecache.stages.train.objective.term import ByteTerm, Work, tokens_alone

TEMPERATURE = 100.0
"""The paper's."""
FLOOR = 2.0**-24
"""Least probability of a symbol that the teacher does not list."""


def byte_pairs(vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    """bool [256, 256]: whether some token holds the first byte with the second after it."""
    joins = np.zeros((256, 256), np.bool_)
    for spelled in vocabulary.token_bytes:
        if spelled is not None and len(spelled) > 1:
            data = np.frombuffer(spelled, np.uint8)
            joins[data[:-1], data[1:]] = True
    return joins


class Chunks(NamedTuple):
    """T tokens in C chunks: row, chunk int64 [T]; teacher float32 [C], log-likelihoods of the chunks."""

    row: Tensor
    chunk: Tensor
    teacher: Tensor

    def split(self, rows: int, size: int) -> Sequence[Work]:
        """Never asked for: a chunk's tokens are read together (`ChunkTerm`)."""
        raise NotImplementedError


class ChunkTerm(ByteTerm):
    """Chunk likelihoods as a baseline; measured by the bytes of the student's own tokens.

    Args:
        measure: the term that measures. whole_rows: whether all token logits are at hand at once.

    Raises:
        ConfigError: they are not.
    """

    def __init__(self, vocabulary: Vocabulary, measure: MarginalTerm, *, whole_rows: bool) -> None:
        super().__init__()
        if not whole_rows:
            raise ConfigError("train.head = 'alm' reads the logits of a chunk's tokens together; set train.chunk = 0")
        self.measure, self.slots = measure, measure.slots
        ends = [(t[0], t[-1]) if t else (-1, -1) for t in vocabulary.token_bytes]
        self.register_buffer("ends", torch.tensor(ends), persistent=False)
        self.register_buffer("joins", torch.from_numpy(byte_pairs(vocabulary)), persistent=False)

    def observe(self, reader: ShardReader) -> None:
        """See `MarginalTerm.observe`."""
        self.measure.observe(reader)

    def work(self, micro: MicroBatch, reduction: str, *, measure: bool) -> Work | None:
        """The chunks whose bytes the teacher all knows, or the bytes to measure."""
        if measure:
            return self.measure.work(micro, reduction, measure=True)
        return None if micro.targets is None else self.chunks(micro)

    def chunks(self, micro: MicroBatch) -> Chunks:
        """Chunks of a micro-batch with targets."""
        ids, labels = micro.input_ids.flatten(), micro.labels.flatten()
        nats, known = _token_nats(micro, labels.numel())
        length = self.measure.tables.length_of(labels.clamp_min(0)).clamp_min(1)  # an END token has one symbol
        row = torch.nonzero(labels >= 0)[:, 0]
        before = (row - 1).clamp_min(0)
        follows = (labels[before] == ids[row]) & (row % micro.input_ids.shape[1] > 0)
        if micro.position_ids is not None:
            follows &= micro.position_ids.flatten()[row] > 0
        left, right = self.get_buffer("ends")[labels[before].clamp_min(0), 1], self.get_buffer("ends")[labels[row], 0]
        joined = self.get_buffer("joins")[left.clamp_min(0), right.clamp_min(0)] & (left >= 0) & (right >= 0)
        chunk = torch.cumsum((~(follows & joined)).long(), 0) - 1
        count = int(chunk[-1]) + 1 if chunk.numel() else 0
        whole = torch.ones(count, dtype=torch.bool, device=row.device)
        whole[chunk[known[row] < length[row]]] = False
        teacher = torch.zeros(count, device=row.device).index_add_(0, chunk, nats[row])
        number = torch.cumsum(whole.long(), 0) - 1
        is_whole = whole[chunk]
        return Chunks(row[is_whole], number[chunk[is_whole]], teacher[whole])

    def of_logits(self, z: Tensor, label: Tensor, work: Work) -> LossParts:
        """Token CE and the chunks' divergence."""
        if not isinstance(work, Chunks):
            return self.measure.of_logits(z, label, work)
        parts = tokens_alone(z, label)
        if not work.row.numel():
            return parts
        log_q = -functional.cross_entropy(z[work.row], label[work.row], reduction="none")
        student = torch.zeros_like(work.teacher, dtype=z.dtype).index_add_(0, work.chunk, log_q)
        return parts._replace(kl=chunk_divergence(work.teacher.to(z.dtype), student).sum())

    def byte_scores(self, logits: Tensor, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `MarginalTerm.byte_scores`."""
        return self.measure.byte_scores(logits, hidden, micro)


def chunk_divergence(teacher: Tensor, student: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The loss [C] of log-likelihoods [C] (module docstring)."""
    p, q = (teacher / temperature).clamp_max(-1e-7), (student / temperature).clamp_max(-1e-7)
    rest_p, rest_q = torch.log(-torch.expm1(p)), torch.log(-torch.expm1(q))
    return temperature * (p.exp() * (p - q) + rest_p.exp() * (rest_p - rest_q))


def _token_nats(micro: MicroBatch, rows: int) -> tuple[Tensor, Tensor]:
    """Per row, the teacher's log-probability of its token's bytes, float32 [rows], and how many of them it knows."""
    assert micro.targets is not None
    slot, symbol, prob, tail = micro.targets
    listed = torch.bincount(slot, minlength=tail.numel())
    true = tail / (SYMBOLS - listed).clamp_min(1)
    hit = symbol == micro.slot_symbol[slot]
    true[slot[hit]] = prob[hit]
    nats = torch.zeros(rows, device=true.device).index_add_(0, micro.slot_token, true.clamp_min(FLOOR).log())
    return nats, torch.bincount(micro.slot_token, minlength=rows)
