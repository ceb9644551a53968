"""Rows joined to batches for models of transformers: padded on either side, or packed behind one another.

A row is a micro-batch of one row that stands alone, so that worker processes and shuffling buffers may carry it; the
batch is what our own trainer would have made of the same rows: the tensors are equal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bytecache.schemas.errors import ConfigError
from bytecache.stages.train.batches.packing import pack
from bytecache.stages.train.batches.types import IGNORE, MicroBatch, SlotTargets
from bytecache.stages.train.objective.marginal import MarginalTerm

ROW = "row"
"""Name of a row in the records of `StudentRows.as_hub_dataset`."""
TOGETHER = (
    "with several processes accelerate and transformers.Trainer must not deal batches out: set dispatch_batches=False "
    '(accelerator_config={"dispatch_batches": False}), and give StudentRows rank=0, ranks=1'
)
"""The remedy where a batch arrives in pieces."""


class ByteLabels(dict[str, Any]):
    """A batch's labels: `tokens` and `inputs` int64 [R, T], and the teacher's targets, as tensors that trainers move.

    `tokens[:, t]` follows `input_ids[:, t]`: nothing needs to be shifted. Trainers that count supervised tokens by
    `labels.ne(-100)`, or by `labels[..., 1:].ne(-100)` since theirs are yet to be shifted, are answered.
    Tensors that have no rows have a first dimension of 1, so that accelerate, which cuts every tensor of a batch to its
    number of rows where it deals batches out, leaves them whole.
    """

    @classmethod
    def of(cls, micro: MicroBatch) -> "ByteLabels":
        """The labels of a micro-batch with targets."""
        assert micro.targets is not None
        flat = {
            "slot_token": micro.slot_token,
            "slot_counts": torch.tensor(micro.slot_counts),
            "slot_symbol": micro.slot_symbol,
            "slot_weight": micro.slot_weight,
            "slot_tail": micro.targets.tail,
            "entry_slot": micro.targets.slot,
            "entry_symbol": micro.targets.symbol,
            "entry_prob": micro.targets.prob,
            "counts": torch.tensor([micro.n_tokens, micro.n_byte_tokens, micro.n_bytes]),
        }
        whole = {"inputs": micro.input_ids, "tokens": micro.labels}
        if micro.position_ids is not None:
            whole["position_ids"] = micro.position_ids
        return cls(whole, **{name: value[None] for name, value in flat.items()})

    def __getitem__(self, key: Any) -> Any:
        """A tensor by its name; labels that a trainer would have shifted are the tokens."""
        if key == (Ellipsis, slice(1, None)):
            key = "tokens"
        return super().__getitem__(key)

    def ne(self, value: int) -> Tensor:
        """bool [R, T]: where a token is learned."""
        tokens: Tensor = self["tokens"]
        return tokens.ne(value)

    def to(self, device: torch.device | str, **_: Any) -> "ByteLabels":
        """The same labels on a device."""
        return ByteLabels({name: value.to(device) for name, value in self.items()})

    def micro_batch(self) -> MicroBatch:
        """What the objective reads. Raises ConfigError where the tensors no longer fit each other."""
        tokens, flat = self["tokens"], {name: value[0] for name, value in self.items() if len(value)}
        counts = flat["slot_counts"]
        if len(counts) != MarginalTerm.slots or int(counts.sum()) != len(flat["slot_token"]):
            raise ConfigError(f"the tensors of this batch were cut apart on their way; {TOGETHER}")
        n_tokens, n_byte_tokens, n_bytes = flat["counts"].tolist()
        return MicroBatch(
            self["inputs"], tokens, flat["slot_token"], counts.tolist(), flat["slot_symbol"], flat["slot_weight"],
            SlotTargets(flat["entry_slot"], flat["entry_symbol"], flat["entry_prob"], flat["slot_tail"]),
            n_tokens, n_byte_tokens, n_bytes, [tokens.shape[1]] * len(tokens), position_ids=self.get("position_ids"),
        )  # fmt: skip


def step_counts(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """int64 [2]: supervised tokens of all batches of an optimiser step, and those of them with a supervised byte.

    What `ByteLoss` wants as `num_items_in_batch`; over several processes, the sum over all of them.
    """
    return torch.stack([batch["labels"]["counts"][0, :2] for batch in batches]).sum(0)


def join_rows(rows: Sequence[MicroBatch], *, padding_side: str = "right", multiple_of: int = 1) -> MicroBatch:
    """One micro-batch of rows that each were one, padded on either side."""
    width = max(row.input_ids.shape[1] for row in rows)
    width += -width % multiple_of
    shift = [width - row.input_ids.shape[1] if padding_side == "left" else 0 for row in rows]

    def padded(values: Tensor, before: int, fill: int) -> Tensor:
        return functional.pad(values, (before, width - values.shape[1] - before), value=fill)

    input_ids = torch.cat([padded(row.input_ids, before, 0) for row, before in zip(rows, shift, strict=True)])
    labels = torch.cat([padded(row.labels, before, IGNORE) for row, before in zip(rows, shift, strict=True)])
    numbers = len(rows[0].slot_counts)
    # A row's slots are sorted by number; those of the batch are too, row after row within a number.
    pieces = [torch.split(torch.arange(len(row.slot_token)), row.slot_counts) for row in rows]
    begin = torch.tensor([0, *(len(row.slot_token) for row in rows)]).cumsum(0).tolist()
    order = torch.cat([begin[r] + pieces[r][number] for number in range(numbers) for r in range(len(rows))])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    token = torch.cat([row.slot_token + r * width + shift[r] for r, row in enumerate(rows)])
    targets = [row.targets for row in rows if row.targets is not None]
    slot = torch.cat([place[begin[r] + one.slot] for r, one in enumerate(targets)])
    return MicroBatch(
        input_ids, labels, token[order], [sum(row.slot_counts[number] for row in rows) for number in range(numbers)],
        torch.cat([row.slot_symbol for row in rows])[order], torch.cat([row.slot_weight for row in rows])[order],
        SlotTargets(
            slot, torch.cat([one.symbol for one in targets]), torch.cat([one.prob for one in targets]),
            torch.cat([one.tail for one in targets])[order],
        ),
        sum(row.n_tokens for row in rows), sum(row.n_byte_tokens for row in rows), sum(row.n_bytes for row in rows),
        [row.lengths[0] for row in rows],
    )  # fmt: skip


def collate_rows(
    rows: Sequence[MicroBatch | Mapping[str, MicroBatch]], *, padding_side: str = "right", multiple_of: int = 1,
    packed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A batch for a model of transformers: `input_ids`, `attention_mask`, `position_ids` int64 [R, T], and `labels`.

    Args:
        rows: of `StudentRows`. padding_side: "left" or "right". multiple_of: of which the width is a multiple.
        packed: all rows behind one another in a single sequence, R = 1, without padding and without
            `attention_mask`: a model of transformers then masks attention where `position_ids` begin anew
            (`check_packing` says whether yours does), unless it keeps a cache of keys: `use_cache` is off.

    Raises:
        ConfigError: another padding side, or packing together with either of them.
    """
    if padding_side not in ("left", "right"):
        raise ConfigError(f"padding_side = {padding_side!r}: left or right")
    if packed and (padding_side, multiple_of) != ("right", 1):
        raise ConfigError(f"packed rows have no padding: leave out padding_side = {padding_side!r} and {multiple_of=}")
    plain = [row[ROW] if isinstance(row, Mapping) else row for row in rows]
    joined = join_rows(plain, padding_side=padding_side, multiple_of=multiple_of)
    if packed:
        joined = pack(joined)
        assert joined.position_ids is not None
        # With a cache of keys a model of transformers takes the sequence for one text.
        batch = {"input_ids": joined.input_ids, "position_ids": joined.position_ids, "use_cache": False}
        return {**batch, "labels": ByteLabels.of(joined)}
    width = joined.input_ids.shape[1]
    length = torch.tensor(joined.lengths)[:, None]
    at = torch.arange(width)[None] - (width - length if padding_side == "left" else torch.zeros_like(length))
    mask = (at >= 0) & (at < length)
    return {
        "input_ids": joined.input_ids, "attention_mask": mask.long(), "position_ids": at.clamp(min=0),
        "labels": ByteLabels.of(joined),
    }  # fmt: skip
