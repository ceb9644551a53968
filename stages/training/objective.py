"""The objective of a run: which terms a micro-batch is scored by, their weights, and the parameters they own.

`train.py` knows only this class: it forwards the student, hands over logits, hidden states and the micro-batch, and
gets sums in nats (`LossParts`); `total` weighs and divides them by the step's counts, `terms` names them for the log.
Sums of micro-batches and of ranks add up, so `total` is exact for any split of a step. Parameters appear in
checkpoints as `head.*` and are dropped at export.
"""

from torch import Tensor, nn

from schemas.settings import Train as TrainSettings
from stages.training.byte_head import ByteHead
from stages.training.loss import LossParts, loss_parts
from stages.training.stream import MicroBatch
from stages.training.student import Student


class Objective(nn.Module):
    """Built once per run from its settings and student.

    Args:
        settings: the `[train]` section.
        student: gives the width of the hidden state.
        seed: of the head's parameters, independent of the global generator.
        lambda_kl: replaces `settings.lambda_kl`; 0 is the control.
    """

    def __init__(self, settings: TrainSettings, student: Student, seed: int, *, lambda_kl: float | None = None) -> None:
        super().__init__()
        self.lambda_byte = settings.lambda_byte
        self.lambda_kl = settings.lambda_kl if lambda_kl is None else lambda_kl
        self.head = ByteHead(student.hidden_size, seed)

    @property
    def needs_targets(self) -> bool:
        """Whether micro-batches must carry the teacher's entries."""
        return self.lambda_kl > 0

    def forward(self, logits: Tensor, hidden: Tensor, micro: MicroBatch, *, measure: bool = False) -> LossParts:
        """Sums of one micro-batch.

        Args:
            logits: float [R, T, V]. hidden: float [R, T, hidden], the lm_head's input. micro: on the same device.
            measure: compute the byte terms although their weights are 0 (evaluation).
        """
        used = measure or bool(self.lambda_byte or self.lambda_kl)
        return loss_parts(
            logits, micro.labels, hidden, self.head if used else None,
            micro.slot_token, micro.slot_counts, micro.slot_symbol, micro.slot_weight, micro.targets,
        )  # fmt: skip

    def total(self, parts: LossParts, n_tokens: int, n_byte_tokens: int) -> Tensor:
        """The scalar to differentiate: this micro-batch's share of a step with these counts (over all ranks)."""
        return parts.total(n_tokens, n_byte_tokens, self.lambda_byte, self.lambda_kl)

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

    @property
    def n_parameters(self) -> int:
        """Parameters of the objective, all of which are dropped at export."""
        return sum(p.numel() for p in self.parameters())
