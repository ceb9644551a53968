"""The objective of our trainer as a loss for any loop: token cross-entropy and the divergence from the teacher's bytes.

It reads token logits alone, so any causal language model whose tokenizer has exact bytes will do, in plain PyTorch, in
accelerate, or as `compute_loss_func` of `transformers.Trainer`, under gradient accumulation as well.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Train
from bytecache.stages.loop.rows import ByteLabels, StudentRows
from bytecache.stages.train.objective.loss import Divergence, LossParts
from bytecache.stages.train.objective.marginal import MarginalTerm


class ByteLoss(nn.Module):
    """Loss of a batch of `collate_rows`.

    loss = lambda_token CE / n + lambda_kl D(teacher, student) / m, n the supervised tokens and m those of them with a
    supervised byte, of this batch, or of all batches of an optimiser step where the trainer says how many those are.

    Args:
        rows: the training rows; cuts of the student's tokenizer are counted on their text before the first step.
        lambda_token, lambda_kl, divergence, temperature, max_tail: as in `[train]`; by default as there.

    Raises:
        ConfigError: a weight below 0, an unknown divergence.
    """

    def __init__(
        self, rows: StudentRows, *, lambda_token: float | None = None, lambda_kl: float | None = None,
        divergence: str | None = None, temperature: float | None = None, max_tail: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        usual = Train()
        self.lambda_token = usual.lambda_token if lambda_token is None else lambda_token
        self.lambda_kl = usual.lambda_kl if lambda_kl is None else lambda_kl
        if self.lambda_token < 0 or self.lambda_kl < 0:
            raise ConfigError(f"lambda_token = {lambda_token}, lambda_kl = {lambda_kl}: weights are 0 or more")
        kind = divergence or usual.divergence
        if kind not in ("forward", "reverse", "js"):
            raise ConfigError(f"divergence = {kind!r}: forward, reverse or js")
        self.n_rows = rows.vocabulary.size
        self.term = MarginalTerm(
            rows.vocabulary, self.n_rows,
            Divergence(
                kind,
                usual.temperature if temperature is None else temperature,
                usual.max_tail if max_tail is None else max_tail,
            ),
        )  # fmt: skip
        self.term.observe(rows.reader)

    def forward(self, outputs: Any, labels: ByteLabels, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The scalar to differentiate.

        Args:
            outputs: a model's output with `logits`, or the logits float [R, T, V]. labels: those of the batch.
            num_items_in_batch: supervised tokens of the whole optimiser step; by default those of this batch.
        """
        parts = self.parts(outputs, labels)
        n_tokens, n_byte_tokens = (max(int(count), 1) for count in labels["counts"][:2])
        share = float(num_items_in_batch) / n_tokens if num_items_in_batch is not None else 1.0
        return parts.total(n_tokens, n_byte_tokens, self.lambda_token, 0.0, self.lambda_kl) / share

    def parts(self, outputs: Any, labels: ByteLabels) -> LossParts:
        """Sums of the batch in nats: of the tokens' cross-entropy, and of the divergence."""
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
        if logits.shape[-1] != self.n_rows:
            raise ConfigError(
                f"logits have {logits.shape[-1]} columns, StudentRows was made for {self.n_rows}: pass rows="
                f"{logits.shape[-1]} there"
            )
        if next(self.term.buffers()).device != logits.device:
            self.to(logits.device)
        micro = labels.to(logits.device).micro_batch()
        work = self.term.work(micro, "sum", measure=False)
        scores = logits.flatten(0, 1)
        scores = scores if scores.dtype is torch.float64 else scores.float()
        assert work is not None
        return self.term.of_logits(scores, micro.labels.flatten(), work)
