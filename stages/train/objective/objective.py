"""The objective of a run: which terms a micro-batch is scored by, their weights, and the parameters they own.

    loss = lambda_token CE_token + lambda_byte CE_byte + lambda_kl D_byte(teacher, student)

`train.py` knows only this class: it forwards the student, hands over logits, hidden states and the micro-batch, and
gets sums in nats (`LossParts`); `total` weighs and divides them by the step's counts, `terms` names them for the log.
Sums of micro-batches and of ranks add up, so `total` is exact for any split of a step. D_byte is a KL (or another
divergence) per byte, of a byte head that reads the hidden state (`heads.py`), or of the student's own token
distribution seen as bytes (`marginal.py`); the baselines of `baselines.py` match tokens in its place. Positions whose
tail exceeds `max_tail` give no D_byte.
With `chunk`, positions pass the lm_head in pieces that the backward pass computes again: memory for logits falls from
[positions, V] to [chunk, V] for one more product with the lm_head.
Parameters appear in checkpoints as `head.*` or `marginal.*` and are dropped at export.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bytecache.schemas.arrays import SYMBOLS
from bytecache.schemas.settings import BASELINES
from bytecache.schemas.settings import Train as TrainSettings
from bytecache.stages.student.student import Student
from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.types import IGNORE, MicroBatch, SlotTargets, Step, TokenTargets
from bytecache.stages.train.objective.baselines import shared_distance, sorted_distance
from bytecache.stages.train.objective.heads import make_head
from bytecache.stages.train.objective.loss import LossParts, byte_terms, diverge
from bytecache.stages.train.objective.marginal import Choices, Marginal
from bytecache.stages.train.objective.node_sums import compiled, node_log_probs, node_logits

COUNTED_POSITIONS = 4_000_000
"""Training text, in positions, that the `marginal` objective counts the tokenizer's cuts on."""


Logits = Tensor | Callable[[Tensor], Tensor]
"""Token logits, or how to make them from the lm_head's input."""


def _same(z: Tensor) -> Tensor:
    return z


class Objective(nn.Module):
    """Built once per run from its settings and student.

    Args:
        settings: the `[train]` section.
        student: gives the width of the hidden state and, for `marginal`, the vocabulary.
        seed: of the head's parameters, independent of the global generator.
        lambda_kl: replaces `settings.lambda_kl`; 0 is the control, whose token loss then has weight 1.
    """

    def __init__(self, settings: TrainSettings, student: Student, seed: int, *, lambda_kl: float | None = None) -> None:
        super().__init__()
        self.lambda_kl = settings.lambda_kl if lambda_kl is None else lambda_kl
        self.kl_share = 1.0
        """Of `lambda_kl`, at the current step (`run.kl_share`)."""
        self.lambda_token = settings.lambda_token if self.lambda_kl else 1.0
        self.lambda_byte = settings.lambda_byte
        self.divergence, self.temperature = settings.divergence, settings.temperature
        self.chunk = settings.chunk
        self.max_tail, self.reduction = settings.max_tail, settings.byte_reduction
        # A baseline is trained on tokens and measured, as a student without a head is, by the bytes of its own.
        self.baseline = settings.head if settings.head in BASELINES else ""
        if settings.head == "marginal" or self.baseline:
            rows = int(student.model.get_output_embeddings().weight.shape[0])
            self.marginal: Marginal | None = Marginal(student.vocabulary, rows)
            self.head = None
        else:
            self.marginal = None
            self.head = make_head(settings.head, student.hidden_size, settings.head_width, seed)

    @property
    def needs_targets(self) -> bool:
        """Whether micro-batches must carry the teacher's entries."""
        return self.lambda_kl > 0 and not self.baseline

    def observe(self, reader: ShardReader) -> None:
        """Learn from training text what the objective needs before step 0: how the student's tokenizer cuts.

        Reads the first shards, at most `COUNTED_POSITIONS`; the same data set gives the same counts. A no-op for heads.
        """
        if self.marginal is None:
            return
        seen = 0
        for number, positions in enumerate(reader.positions):
            if seen and seen + positions > COUNTED_POSITIONS:
                break
            source = reader[number]
            real = source.ids != reader.end_id
            self.marginal.segmentation.add(
                self.marginal.tables, np.asarray(source.shard.text), source.start[real], source.end[real],
                np.asarray(source.shard.doc_start, np.int64)[1:][source.row[real]] - 1,
            )  # fmt: skip
            seen += positions
        self.marginal.segmentation.settle()

    def prepare(self, step: Step) -> Step:
        """The same step with what needs no student made ahead, for a thread beside the one that trains; CPU only.

        Where FSDP holds the tokenizer's cuts in shards, only `forward` sees them whole.
        """
        if self.marginal is None or not self.needs_targets or isinstance(self.marginal.segmentation.on, DTensor):
            return step
        made = [replace(m, prepared=self.marginal.choices(m, self.reduction)) for m in step.micro]
        return replace(step, micro=made)

    def forward(self, logits: Logits, hidden: Tensor, micro: MicroBatch, *, measure: bool = False) -> LossParts:
        """Sums of one micro-batch.

        Args:
            logits: float [R, T, V], or the function from hidden [P, hidden] to logits [P, V], which is then called
                on `chunk` positions at a time and again in the backward pass.
            hidden: float [R, T, hidden], the lm_head's input. micro: on the same device.
            measure: compute the byte terms although their weights are 0 (evaluation).
        """
        rows = hidden.flatten(0, 1) if callable(logits) else logits.flatten(0, 1)
        to_logits = logits if callable(logits) else _same
        labels = micro.labels.flatten()
        if self.baseline and not measure:
            return self._chunked(rows, to_logits, labels, micro.teacher if self.lambda_kl else None)
        wanted = (measure or bool(self.lambda_byte or self.lambda_kl)) and micro.slot_token.numel() > 0
        if self.marginal is not None and wanted and (measure or micro.targets is not None):
            ready: Choices | None = None if measure else micro.prepared
            choices = ready or self.marginal.choices(micro, "sum" if measure else self.reduction)
            return self._chunked(rows, to_logits, labels, choices)
        token = self._chunked(rows, to_logits, labels, None).token
        zero = token.new_zeros(())
        if self.head is None or not wanted:
            return LossParts(token, zero, zero)  # without targets the byte CE of `marginal` is the token CE
        scores = self.head(hidden.flatten(0, 1), micro.slot_token, micro.slot_counts, micro.slot_symbol)
        targets = micro.targets
        unlisted = targets.tail if targets is not None else None
        return LossParts(token, *self._byte_sums(scores, micro.slot_symbol, micro.slot_weight, targets, unlisted))

    def _byte_sums(
        self, scores: Tensor, true: Tensor, weight: Tensor, targets: SlotTargets | None, unlisted: Tensor | None,
        symbols: int | Tensor = SYMBOLS,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Weighted sums of byte CE and divergence over slots; `symbols`: see `byte_terms`."""
        if targets is None or unlisted is None:
            ce = functional.cross_entropy(scores.float(), true, reduction="none")
            return (ce * weight).sum(), scores.new_zeros((), dtype=torch.float32)
        ce, apart = byte_terms(
            scores, true, targets, divergence=self.divergence, temperature=self.temperature, symbols=symbols
        )
        return (ce * weight).sum(), (apart * self._kept(weight, unlisted)).sum()

    def _token_distance(self, z: Tensor, own: TokenTargets) -> Tensor:
        """Sum of a baseline's distances over the common places; z float [P, V]."""
        at, prob = z[own.row], own.prob.to(z.dtype)
        if self.baseline == "uld":
            return sorted_distance(at, prob, self.temperature).sum()
        return shared_distance(at, own.ids, prob, self.divergence, self.temperature).sum()

    def _kept(self, weight: Tensor, unlisted: Tensor | None) -> Tensor:
        """Weights of the divergence: 0 where the teacher left more than `max_tail` unlisted."""
        return weight if self.max_tail >= 1 or unlisted is None else weight * (unlisted <= self.max_tail)

    def _chunked(
        self,
        rows: Tensor,
        to_logits: Callable[[Tensor], Tensor],
        labels: Tensor,
        choices: Choices | TokenTargets | None,
    ) -> LossParts:
        """Terms that read token logits, over pieces of `chunk` positions so that few [positions, V] arrays live."""

        def piece(part: Tensor, label: Tensor, own: Choices | TokenTargets | None) -> LossParts:
            z = to_logits(part)
            z = z if z.dtype == torch.float64 else z.float()
            if isinstance(own, Choices) and own.targets is not None and own.row.numel():
                assert self.marginal is not None
                if self.temperature == 1 and compiled(z.device):
                    asked = (own.row, own.node, own.true, own.targets.slot, own.targets.symbol)
                    token, right, listed, log_u = node_log_probs(z, label, *asked, self.marginal.tables)
                    apart = diverge(listed, log_u, own.targets, self.divergence)
                    kl = (apart * self._kept(own.weight, own.unlisted)).sum()
                    return LossParts(token, -(right * own.weight).sum(), kl)
            token = functional.cross_entropy(z, label, ignore_index=IGNORE, reduction="sum")
            zero = token.new_zeros(())
            if own is None or own.row.numel() == 0:
                return LossParts(token, zero, zero)
            if isinstance(own, TokenTargets):
                return LossParts(token, zero, self._token_distance(z, own))
            assert self.marginal is not None
            scores = node_logits(z, own.row, own.node, self.marginal.tables)
            offered = self.marginal.tables.offered(own.node)
            return LossParts(token, *self._byte_sums(scores, own.true, own.weight, own.targets, own.unlisted, offered))

        size = self.chunk or len(rows)
        if size >= len(rows):
            return piece(rows, labels, choices)
        owned = choices.split(len(rows), size) if choices is not None else None
        sums: LossParts | None = None
        for number, first in enumerate(range(0, len(rows), size)):
            span = slice(first, first + size)
            own = owned[number] if owned is not None else None
            parts: LossParts = checkpoint(piece, rows[span], labels[span], own, use_reentrant=False)
            sums = parts if sums is None else LossParts(*(a + b for a, b in zip(sums, parts, strict=True)))
        assert sums is not None
        return sums

    def byte_scores(self, logits: Tensor, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Unnormalised log-probabilities of every byte choice of a micro-batch, [S, symbols], and the true ones [S].

        Args:
            logits: float [R, T, V]. hidden: float [R, T, hidden]. For measuring; all token logits are held at once.
        """
        if self.marginal is None:
            assert self.head is not None
            scores = self.head(hidden.flatten(0, 1), micro.slot_token, micro.slot_counts, micro.slot_symbol)
            return scores, micro.slot_symbol
        own = self.marginal.choices(micro, "sum")
        return node_logits(logits.flatten(0, 1).float(), own.row, own.node, self.marginal.tables), own.true

    def total(self, parts: LossParts, n_tokens: int, n_byte_tokens: int) -> Tensor:
        """The scalar to differentiate: this micro-batch's share of a step with these counts (over all ranks)."""
        lambda_byte = 0.0 if self.marginal is not None else self.lambda_byte
        return parts.total(n_tokens, n_byte_tokens, self.lambda_token, lambda_byte, self.lambda_kl * self.kl_share)

    def terms(self, sums: LossParts, n_tokens: int, n_byte_tokens: int) -> dict[str, float]:
        """A step's terms for the log, nats per token, from its summed parts; `loss` is their weighted sum."""
        per_byte_token = max(n_byte_tokens, 1)
        return {
            "loss": float(self.total(sums, n_tokens, n_byte_tokens)),
            "token_nll": float(sums.token) / max(n_tokens, 1),
            "byte_ce": float(sums.byte) / per_byte_token,
            "byte_kl": float(sums.kl) / per_byte_token,
        }

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to a parameter of this module; biases and norms are exempt."""
        return not name.endswith("bias")

    def flops(self, tokens: int, slots: int) -> int:
        """Matrix FLOPs, forward and backward, of the byte terms of `tokens` positions and `slots` bytes."""
        return 0 if self.head is None else self.head.flops(tokens, slots)

    @property
    def n_parameters(self) -> int:
        """Trained parameters of the objective, all of which are dropped at export."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
