"""The objective of our trainer as a loss for any loop: token cross-entropy and the divergence from the teacher's bytes.

It is the trainer's own `Objective` with its usual term, so there is one path of code. It reads token logits alone, so
any causal language model whose tokenizer has exact bytes will do: in plain PyTorch, in accelerate, as
`compute_loss_func` of `transformers.Trainer`, or by `ByteLossMixin` in that trainer and in TRL's. Under gradient
accumulation the sum over an optimiser step is exact where the step's counts are passed (`step_counts`).

With `chunk`, no more than `chunk` positions' logits exist at once: `of_model` asks the model for the lm_head's input
and passes it through the lm_head in pieces, which the backward pass makes again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Train
from bytecache.stages.loop.batches import TOGETHER, ByteLabels
from bytecache.stages.loop.rows import MixedRows, StudentRows
from bytecache.stages.student.logits import bare, check_head_input, head_input, logits_of
from bytecache.stages.train.objective.loss import Divergence, LossParts
from bytecache.stages.train.objective.marginal import MarginalTerm
from bytecache.stages.train.objective.objective import Objective


class ByteLoss(nn.Module):
    """Loss of a batch of `collate_rows`.

    loss = lambda_token CE / n + lambda_kl D(teacher, student) / m, n the supervised tokens and m those of them with a
    supervised byte, of this batch, or of all batches of an optimiser step where the trainer says how many those are.

    Args:
        rows: the training rows; cuts of the student's tokenizer are counted on their text before the first step.
        lambda_token, lambda_kl, divergence, temperature, max_tail, chunk: as in `[train]`; by default as there.

    Raises:
        ConfigError: an option that `[train]` would not take.
    """

    def __init__(self, rows: StudentRows | MixedRows, **options: Any) -> None:
        super().__init__()
        known = ("lambda_token", "lambda_kl", "divergence", "temperature", "max_tail", "chunk")
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise ConfigError(f"ByteLoss has no option {unknown[0]!r}; it has {', '.join(known)}")
        try:
            settings = Train(**{name: value for name, value in options.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{first['loc'][0]} = {first['input']!r}: {first['msg']}") from None
        self.n_rows = rows.vocabulary.size
        divergence = Divergence(settings.divergence, settings.temperature, settings.max_tail)
        self.objective = Objective(settings, MarginalTerm(rows.vocabulary, self.n_rows, divergence), 0)
        for reader in rows.readers:
            self.objective.observe(reader)
        self._checked: set[int] = set()

    @property
    def chunk(self) -> int:
        """Positions whose logits exist at once; 0 = all."""
        return self.objective.chunk

    def forward(self, outputs: Any, labels: ByteLabels, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The scalar to differentiate.

        Args:
            outputs: a model's output with `logits`, or the logits float [R, T, V]. labels: those of the batch.
            num_items_in_batch: counts of the whole optimiser step, over all processes: `step_counts` (exact), or the
                supervised tokens alone, as transformers counts them; by default those of this batch.
        """
        return self.total(self.parts(outputs, labels), labels, num_items_in_batch)

    def of_model(
        self, model: nn.Module, batch: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The same of a batch with its labels that is still to be read, in pieces where `chunk` says so.

        Args:
            model: a causal model of transformers, also inside DistributedDataParallel or torch.compile.

        Raises:
            ConfigError: `chunk`, and a model whose logits cannot be made apart from it.
        """
        return self.total(self.parts_of_model(model, batch), batch["labels"], num_items_in_batch)

    def total(self, parts: LossParts, labels: ByteLabels, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The scalar of a batch's sums; see `forward`."""
        n_tokens, n_byte_tokens = (int(count) for count in labels["counts"][0, :2])
        if num_items_in_batch is not None:
            counts = torch.as_tensor(num_items_in_batch).flatten().tolist()
            # Who counts tokens alone is taken to have as many with bytes, in proportion, as this batch.
            share = n_byte_tokens / n_tokens if n_tokens else 1.0
            n_tokens, n_byte_tokens = counts if len(counts) == 2 else (counts[0], counts[0] * share)
        return self.objective.total(parts, n_tokens, n_byte_tokens)

    def parts(self, outputs: Any, labels: ByteLabels) -> LossParts:
        """Sums of the batch in nats: of the tokens' cross-entropy, and of the divergence."""
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
        if logits.shape[-1] != self.n_rows:
            raise ConfigError(
                f"logits have {logits.shape[-1]} columns, StudentRows was made for {self.n_rows}: pass rows="
                f"{logits.shape[-1]} there"
            )
        return self._scored(logits, None, labels)

    def parts_of_model(self, model: nn.Module, batch: Mapping[str, Any]) -> LossParts:
        """The same of a batch that is still to be read; see `of_model`."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if not self.chunk:
            return self.parts(model(**inputs), batch["labels"])
        inner = bare(model)
        if id(inner) not in self._checked:
            check_head_input(model)
            self._checked.add(id(inner))
        hidden = head_input(model, inputs)
        return self._scored(logits_of(inner), hidden, batch["labels"])

    def _scored(self, logits: Any, hidden: Tensor | None, labels: ByteLabels) -> LossParts:
        some = logits if hidden is None else hidden
        if tuple(some.shape[:2]) != tuple(labels["tokens"].shape):
            raise ConfigError(
                f"the model was given {tuple(some.shape[:2])} rows and tokens, the labels are of "
                f"{tuple(labels['tokens'].shape)}; {TOGETHER}"
            )
        if next(self.objective.buffers()).device != some.device:
            self.to(some.device)
        parts: LossParts = self.objective(logits, hidden, labels.to(some.device).micro_batch())
        return parts
