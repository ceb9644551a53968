"""The objective of a run: which terms a micro-batch is scored by, their weights, and the parameters they own.

    loss = lambda_token CE_token + lambda_byte CE_byte + lambda_kl D(teacher, student)

`train.py` knows only this class: it forwards the student, hands over logits, hidden states and the micro-batch, and
gets sums in nats (`LossParts`); `total` weighs and divides them by the step's counts, `terms` names them for the log.
Sums of micro-batches and of ranks add up, so `total` is exact for any split of a step. The token cross-entropy is
computed here, or by the one `ByteTerm` that `train.head` names in the same pass over the logits:

    marginal                  the student's token distribution as bytes                 (`marginal.py`)
    parallel, autoregressive  a byte head that reads the hidden state                   (`heads.py`)
    alm                       likelihoods of chunks of bytes                            (`chunks.py`)
    uld, shared_topk, ...     baselines that match tokens in the place of bytes         (`baselines.py`)

With `chunk`, positions pass the lm_head in pieces that the backward pass computes again: memory for logits falls from
[positions, V] to [chunk, V] for one more product with the lm_head.
Parameters appear in checkpoints as `term.*` and are dropped at export.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytecache.schemas import settings as st
from bytecache.schemas.settings import BASELINES
from bytecache.stages.student.student import Student
from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.types import MicroBatch, Step
from bytecache.stages.train.objective.baselines import TokenTerm
from bytecache.stages.train.objective.chunks import ChunkTerm
from bytecache.stages.train.objective.heads import HeadTerm
from bytecache.stages.train.objective.loss import Divergence, LossParts
from bytecache.stages.train.objective.marginal import MarginalTerm
from bytecache.stages.train.objective.term import ByteTerm, Work, tokens_alone

Logits = Tensor | Callable[[Tensor], Tensor]
"""Token logits, or how to make them from the lm_head's input."""


def _same(z: Tensor) -> Tensor:
    return z


def make_term(settings: st.Train, student: Student, seed: int) -> ByteTerm:
    """The term that `train.head` names."""
    divergence = Divergence(settings.divergence, settings.temperature, settings.max_tail)
    if settings.head in ("parallel", "autoregressive"):
        return HeadTerm(settings.head, student.hidden_size, settings.head_width, seed, divergence)
    rows = int(student.model.get_output_embeddings().weight.shape[0])
    term = MarginalTerm(student.vocabulary, rows, divergence)
    if settings.head == "alm":
        return ChunkTerm(student.vocabulary, term, whole_rows=settings.chunk == 0)
    return TokenTerm(settings.head, term) if settings.head in BASELINES else term


class Objective(nn.Module):
    """Built once per run from its settings and student.

    Args:
        settings: the `[train]` section.
        student: gives the width of the hidden state and the vocabulary; or the term itself, made already.
        seed: of the term's parameters, independent of the global generator.
        lambda_kl: replaces `settings.lambda_kl`; 0 is the control, whose token loss then has weight 1.
    """

    def __init__(
        self, settings: st.Train, student: Student | ByteTerm, seed: int, *, lambda_kl: float | None = None
    ) -> None:
        super().__init__()
        self.lambda_kl = settings.lambda_kl if lambda_kl is None else lambda_kl
        self.kl_share = 1.0
        """Of `lambda_kl`, at the current step (`run.kl_share`)."""
        self.lambda_token = settings.lambda_token if self.lambda_kl else 1.0
        self.lambda_byte = settings.lambda_byte
        self.chunk, self.reduction = settings.chunk, settings.byte_reduction
        self.term = student if isinstance(student, ByteTerm) else make_term(settings, student, seed)

    @property
    def needs_targets(self) -> bool:
        """Whether micro-batches must carry the teacher's entries."""
        return self.lambda_kl > 0 and self.term.reads == "bytes"

    def observe(self, reader: ShardReader) -> None:
        """Learn from training text what the term needs before step 0."""
        self.term.observe(reader)

    def prepare(self, step: Step) -> Step:
        """The same step with what needs no student made ahead, for a thread beside the one that trains; CPU only."""
        if not self.needs_targets:
            return step
        micros = [replace(micro, prepared=self.term.prepare(micro, self.reduction)) for micro in step.micro]
        return replace(step, micro=micros)

    def forward(self, logits: Logits, hidden: Tensor | None, micro: MicroBatch, *, measure: bool = False) -> LossParts:
        """Sums of one micro-batch.

        Args:
            logits: float [R, T, V], or the function from hidden [P, hidden] to logits [P, V], which is then called
                on `chunk` positions at a time and again in the backward pass.
            hidden: float [R, T, hidden], the lm_head's input; None where logits are at hand and the term reads nothing
                else. micro: on the same device.
            measure: compute the byte terms although their weights are 0 (evaluation).
        """
        states = None if hidden is None else hidden.flatten(0, 1)
        to_logits = logits if not isinstance(logits, Tensor) else _same
        rows = logits.flatten(0, 1) if isinstance(logits, Tensor) else states
        assert rows is not None
        wanted = (measure or bool(self.lambda_byte or self.lambda_kl)) and micro.slot_token.numel() > 0
        work = of_hidden = None
        if wanted:
            work = self.term.work(micro, "sum" if measure else self.reduction, measure=measure)
            of_hidden = None if states is None else self.term.of_hidden(states, micro)
        of_logits = self._in_pieces(rows, to_logits, micro.labels.flatten(), work)
        return of_logits if of_hidden is None else of_logits.plus(of_hidden)

    def _in_pieces(
        self, rows: Tensor, to_logits: Callable[[Tensor], Tensor], labels: Tensor, work: Work | None
    ) -> LossParts:
        """What reads token logits, over pieces of `chunk` positions so that few [positions, V] arrays live."""

        def piece(part: Tensor, label: Tensor, asked: Work | None) -> LossParts:
            z = to_logits(part)
            z = z if z.dtype.itemsize >= 8 else z.float()
            return tokens_alone(z, label) if asked is None else self.term.of_logits(z, label, asked)

        size = self.chunk or len(rows)
        if size >= len(rows):
            return piece(rows, labels, work)
        asked = work.split(len(rows), size) if work is not None else [None] * -(-len(rows) // size)
        spans = [slice(first, first + size) for first in range(0, len(rows), size)]
        parts: list[LossParts] = [
            checkpoint(piece, rows[span], labels[span], one, use_reentrant=False)
            for span, one in zip(spans, asked, strict=True)
        ]
        return reduce(LossParts.plus, parts)

    def byte_scores(self, logits: Tensor, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `ByteTerm.byte_scores`. For measuring; all token logits are held at once."""
        return self.term.byte_scores(logits, hidden, micro)

    def total(self, parts: LossParts, n_tokens: int, n_byte_tokens: int) -> Tensor:
        """The scalar to differentiate: this micro-batch's share of a step with these counts (over all ranks)."""
        lambda_byte = self.lambda_byte if self.term.own_bytes else 0.0
        return parts.total(n_tokens, n_byte_tokens, self.lambda_token, lambda_byte, self.lambda_kl * self.kl_share)

    def terms(self, sums: LossParts, n_tokens: int, n_byte_tokens: int) -> dict[str, float]:
        """A step's terms for the log, nats per token, from its summed parts; `loss` is their weighted sum."""
        per_byte_token = max(n_byte_tokens, 1)
        return {
            "loss": float(self.total(sums, n_tokens, n_byte_tokens)),
            "token_nll": float(sums.token) / max(n_tokens, 1),
            "byte_ce": float(sums.byte) / per_byte_token,
            "byte_kl": float(sums.kl) / per_byte_token,
            "byte_open": float(sums.open) / per_byte_token,
        }

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to a parameter of this module; biases and norms are exempt."""
        return not name.endswith("bias")

    def flops(self, tokens: int, slots: int) -> int:
        """Matrix FLOPs, forward and backward, of the byte terms of `tokens` positions and `slots` bytes."""
        return self.term.flops(tokens, slots)

    @property
    def n_parameters(self) -> int:
        """Trained parameters of the objective, all of which are dropped at export."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
