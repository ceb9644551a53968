"""Rows of the student's tokens with the teacher's targets: a dataset for any DataLoader, and its collator.

`StudentRows` reads a data set in the order of `stages.targets.order` and yields one row after another: a run of tokens
of one document, as a micro-batch of one row that stands alone, so that worker processes and shuffling buffers may carry
it. `collate_rows` joins rows to a batch as our own trainer would have made it of the same rows: the tensors are equal.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset, get_worker_info

from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import ConfigError
from bytecache.stages.loop.vocabulary import student_vocabulary
from bytecache.stages.targets.order import Order
from bytecache.stages.targets.source import open_dataset
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import IGNORE, MicroBatch, SlotTargets
from bytecache.stages.train.objective.marginal import MarginalTerm


class StudentRows(IterableDataset[MicroBatch]):
    """Rows of a data set in training order.

    Args:
        place: a folder, an fsspec URL, or a Dataset from `open_dataset`.
        tokenizer: the student's: a fast tokenizer or its folder. rows: width of the student's logits.
        window: bytes of text that a row covers at most. max_tokens: of a row; longer ones are split.
        seed: of the order. epochs: readings of the split; 0 = never ends. split: "train" or "heldout".
        rank, ranks: this process's share; by default that of torch.distributed, if it is initialised. accelerate and
            transformers.Trainer deal batches out themselves: give 0 and 1 there.

    Raises:
        InputError: a tokenizer without exact bytes, an empty split. ConfigError: impossible arguments.
        IntegrityError, StorageError: while iterating, a shard that is damaged or out of reach.
    """

    def __init__(
        self, place: str | os.PathLike[str] | Dataset, tokenizer: Any, rows: int, *, window: int = 2048,
        max_tokens: int = 2048, seed: int = 0, epochs: int = 0, split: str = "train", rank: int | None = None,
        ranks: int | None = None,
    ) -> None:  # fmt: skip
        if window < 1 or max_tokens < 2 or epochs < 0:
            raise ConfigError(f"window {window}, max_tokens {max_tokens}, epochs {epochs}: too small")
        if (rank is None) != (ranks is None):
            raise ConfigError(f"rank {rank} of {ranks}: give both or neither")
        self.dataset = open_dataset(place)
        self.vocabulary, self.end_id = student_vocabulary(tokenizer, rows)
        self.window, self.max_tokens, self.seed, self.epochs, self.split = window, max_tokens, seed, epochs, split
        self._layout = (rank, ranks)
        self._reader: stream.ShardReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process gets: everything but the shards in memory, which it loads itself."""
        return {**self.__dict__, "_reader": None}

    @property
    def reader(self) -> stream.ShardReader:
        """The tokenised shards, in this process."""
        if self._reader is None:
            self._reader = stream.ShardReader(
                self.dataset.where, self.dataset, self.split, self.vocabulary, self.end_id, max_tokens=self.max_tokens
            )
        return self._reader

    def __iter__(self) -> Iterator[MicroBatch]:
        rank, ranks = self._layout
        if rank is None or ranks is None:
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = self.reader
        reader.require_text()
        order = Order(self.dataset.content_sha256, reader.positions, self.window, self.seed)
        with closing(reader.shelf.follow(order.pools(0, self.epochs))) as windows:
            for window in islice(windows, rank * shares + share, None, ranks * shares):
                for row in stream.cut(reader[window.shard], window.lo, window.hi, self.max_tokens):
                    yield stream.collate([row], with_targets=True, byte_reduction="sum", limit=MarginalTerm.slots)

    def skipped_documents(self) -> dict[str, int]:
        """Documents that the tokenizer cannot spell, by reason, in the shards that this process has used so far."""
        return self.reader.skipped_documents()


class ByteLabels(dict[str, Any]):
    """A batch's labels: `inputs`, `tokens` int64 [R, T] and the teacher's targets, as tensors that a trainer may move.

    `tokens[:, t]` follows `input_ids[:, t]`: nothing needs to be shifted. Trainers that count supervised tokens by
    `labels.ne(-100)`, or by `labels[..., 1:].ne(-100)` since theirs are yet to be shifted, are answered.
    """

    def __getitem__(self, key: Any) -> Any:
        """A tensor by its name; labels that a trainer would have shifted are the tokens."""
        if key == (Ellipsis, slice(1, None)):
            key = "tokens"
        return super().__getitem__(key)

    def ne(self, value: int) -> Tensor:
        """bool [R, T]: where a token is learned."""
        tokens: Tensor = self["tokens"]
        return tokens.ne(value)

    def to(self, device: torch.device | str) -> "ByteLabels":
        """The same labels on a device."""
        return ByteLabels(
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.items()}
        )

    def micro_batch(self) -> MicroBatch:
        """What the objective reads."""
        tokens, counts = self["tokens"], self["slot_counts"]
        if len(counts) != MarginalTerm.slots or int(counts.sum()) != len(self["slot_token"]):
            raise ConfigError(
                "the tensors of this batch were cut apart on their way; with accelerate and transformers.Trainer set "
                'dispatch_batches=False (accelerator_config={"dispatch_batches": False}), and give StudentRows '
                "rank=0, ranks=1, since accelerate then deals the batches out"
            )
        return MicroBatch(
            self["inputs"], tokens, self["slot_token"], counts.tolist(),
            self["slot_symbol"], self["slot_weight"],
            SlotTargets(self["entry_slot"], self["entry_symbol"], self["entry_prob"], self["slot_tail"]),
            int(self["counts"][0]), int(self["counts"][1]), int(self["counts"][2]), [tokens.shape[1]] * len(tokens),
        )  # fmt: skip


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
    rows: Sequence[MicroBatch], *, padding_side: str = "right", multiple_of: int = 1
) -> dict[str, Tensor | ByteLabels]:
    """A batch for a model of transformers: `input_ids`, `attention_mask`, `position_ids` int64 [R, T], and `labels`.

    Args:
        rows: of `StudentRows`. padding_side: "left" or "right". multiple_of: of which the width is a multiple.
    """
    if padding_side not in ("left", "right"):
        raise ConfigError(f"padding_side = {padding_side!r}: left or right")
    joined = join_rows(rows, padding_side=padding_side, multiple_of=multiple_of)
    assert joined.targets is not None
    width = joined.input_ids.shape[1]
    length = torch.tensor(joined.lengths)[:, None]
    at = torch.arange(width)[None] - (width - length if padding_side == "left" else torch.zeros_like(length))
    mask = (at >= 0) & (at < length)
    labels = ByteLabels(
        inputs=joined.input_ids,
        tokens=joined.labels,
        slot_token=joined.slot_token,
        slot_counts=torch.tensor(joined.slot_counts),
        slot_symbol=joined.slot_symbol,
        slot_weight=joined.slot_weight,
        slot_tail=joined.targets.tail,
        entry_slot=joined.targets.slot,
        entry_symbol=joined.targets.symbol,
        entry_prob=joined.targets.prob,
        counts=torch.tensor([joined.n_tokens, joined.n_byte_tokens, joined.n_bytes]),
    )
    return {
        "input_ids": joined.input_ids, "attention_mask": mask.long(), "position_ids": at.clamp(min=0), "labels": labels
    }  # fmt: skip
