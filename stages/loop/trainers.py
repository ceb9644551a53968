"""`ByteLossMixin`: transformers.Trainer and TRL's SFTTrainer with the byte loss, without a setting to remember.

    class Trainer(ByteLossMixin, SFTTrainer): ...

TRL's trainer takes no dataset but the hub's, prepares it, and gives `compute_loss_func` one forward pass more; so the
loss is an override of `compute_loss`, as its authors advise, and rows are passed as records that need no preparing.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bytecache.schemas.errors import ConfigError
from bytecache.stages.loop.batches import collate_rows, step_counts
from bytecache.stages.loop.loss import ByteLoss
from bytecache.stages.loop.rows import MixedRows, StudentRows

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class ByteLossMixin(_Base):  # type: ignore[misc]  # transformers has no types
    """In front of a trainer class; makes its loss `ByteLoss` and its data `StudentRows` or `MixedRows`.

    What such data needs is set in the arguments: `remove_unused_columns` and `dispatch_batches` off, TRL's preparation
    skipped. Every process reads all rows and takes the batches that the trainer deals it. The log gains `token_nll` and
    `byte_kl`, nats per supervised token.

    Args:
        model, args: as ever; the arguments must be given. train_dataset, eval_dataset: rows.
        byte_loss: by default `ByteLoss(train_dataset)`.
        data_collator: by default `collate_rows`; `partial(collate_rows, packed=True)` packs.
        options: the trainer's own, by name.

    Raises:
        ConfigError: data that are no rows, no arguments, or TRL's own packing, padding-free batches or loss.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *, train_dataset: StudentRows | MixedRows | None = None,
        eval_dataset: StudentRows | MixedRows | None = None, byte_loss: ByteLoss | None = None,
        data_collator: Callable[..., dict[str, Any]] = collate_rows, **options: Any,
    ) -> None:  # fmt: skip
        if args is None:
            raise ConfigError(
                "args is missing: rows have no end that a trainer could know, so pass arguments with max_steps"
            )
        if byte_loss is None and train_dataset is None:
            raise ConfigError("train_dataset is missing: pass StudentRows, or byte_loss where nothing is trained")
        args.remove_unused_columns = False
        args.accelerator_config.dispatch_batches = False
        wanted = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for name, rows in wanted.items():
            if rows is not None and not isinstance(rows, StudentRows | MixedRows):
                raise ConfigError(f"{name} is {type(rows).__name__}: pass StudentRows or MixedRows")
            if rows is not None:
                rows.dealt_by_trainer()
        if hasattr(args, "dataset_kwargs"):
            _refuse_trl_options(args)
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
            wanted = {name: rows and rows.as_hub_dataset() for name, rows in wanted.items()}
        self.byte_loss = byte_loss if byte_loss is not None else ByteLoss(train_dataset)  # type: ignore[arg-type]
        self._byte_sums = torch.zeros(4)
        super().__init__(model, args, data_collator=data_collator, **wanted, **options)
        self.loss_is_scaled_for_ga = True  # shares of the whole step's sum, never a batch's mean

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The batches of an optimiser step, and its counts over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._counts(batches, device) if batches else None

    def _counts(self, batches: Iterable[dict[str, Any]], device: torch.device) -> Tensor:
        counts = step_counts(list(batches)).to(device)
        gathered: Tensor = self.accelerator.gather(counts[None]).sum(0)
        return gathered

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The byte loss, for the sum that processes make of it; see `transformers.Trainer`."""
        parts = self.byte_loss.parts_of_model(model, inputs)
        exact = num_items_in_batch is not None and torch.as_tensor(num_items_in_batch).numel() == 2
        loss = self.byte_loss.total(parts, inputs["labels"], num_items_in_batch if exact else None)
        if model.training:
            counts = inputs["labels"]["counts"][0, :2].cpu()
            sums = torch.stack([parts.token.detach(), (parts.kl + parts.open).detach()]).float().cpu()
            self._byte_sums += torch.cat([sums, counts.float()])
            if exact:  # gradients are averaged over processes, and these are shares of one sum
                loss = loss * self.accelerator.num_processes
            elif self.args.gradient_accumulation_steps > 1:
                raise ConfigError(
                    "the trainer did not pass on the counts of its step; use a release that has get_batch_samples"
                )
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Log with the terms of this process since the last time."""
        token, kl, n_tokens, n_byte_tokens = self._byte_sums.tolist()
        if n_tokens and "loss" in logs:
            logs = {**logs, "token_nll": token / n_tokens, "byte_kl": kl / max(n_byte_tokens, 1)}
            self._byte_sums.zero_()
        super().log(logs, *rest, **options)


def _refuse_trl_options(args: Any) -> None:
    for name in ("packing", "padding_free", "eval_packing"):
        if getattr(args, name, False):
            raise ConfigError(
                f"{name} = True: TRL packs token ids alone; pass data_collator=partial(collate_rows, packed=True)"
            )
    if getattr(args, "loss_type", "nll") not in (None, "nll"):
        raise ConfigError(f"loss_type = {args.loss_type!r}: the loss is ByteLoss; leave it out")
