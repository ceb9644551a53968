"""What passes between the batches, the objective and the trainer."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""Label of positions that carry no token loss."""
SLOTS = 10
"""Bytes of a token that byte heads predict; longer tokens are supervised on their first ten only."""


class SlotTargets(NamedTuple):
    """Teacher targets of S slots as E flat entries; (slot, symbol) pairs are unique.

    slot int64 [E], symbol int64 [E] in 0..256 (`marginal.py` has one more), prob float32 [E]; tail float32 [S], the
    unlisted mass, 0..1.
    """

    slot: Tensor
    symbol: Tensor
    prob: Tensor
    tail: Tensor


class TokenTargets(NamedTuple):
    """What the teacher says at A common places of a micro-batch.

    row int64 [A]: flat position whose logits predict the student's token there. ids int64 [A, K], prob float32 [A, K]:
    see `teacher_tokens.TeacherTokens`. whole bool [A]: the teacher's token of the text ends where the student's does.
    """

    row: Tensor
    ids: Tensor
    prob: Tensor
    whole: Tensor

    def split(self, rows: int, size: int) -> list["TokenTargets"]:
        """The places of rows [0, size), [size, 2 size), ..., each with its own row numbers."""
        parts = []
        for first in range(0, rows, size):
            mine = (self.row >= first) & (self.row < first + size)
            parts.append(TokenTargets(self.row[mine] - first, self.ids[mine], self.prob[mine], self.whole[mine]))
        return parts


@dataclass(frozen=True)
class MicroBatch:
    """R rows padded to T tokens. Slots are the supervised first bytes of the tokens, sorted by slot number.

    input_ids, labels int64 [R, T]: labels[:, t] follows input_ids[:, t]; IGNORE where unsupervised or padding.
    slot_token int64 [S]: flat index (r * T + t) of the input position whose hidden state predicts the slot's token.
    slot_counts: slots per slot number. slot_symbol int64 [S], slot_weight float32 [S].
    targets: the teacher's share, None when not asked for. Counts: predicted tokens, those of them with a supervised
    byte, supervised text bytes. lengths: tokens of each row before padding.
    position_ids int64 [R, T]: only where rows are packed (`packing`), else a token's place in its row.
    teacher: its tokens, where a baseline asks for them. prepared: what the objective made of the rest ahead of time.
    """

    input_ids: Tensor
    labels: Tensor
    slot_token: Tensor
    slot_counts: list[int]
    slot_symbol: Tensor
    slot_weight: Tensor
    targets: SlotTargets | None
    n_tokens: int
    n_byte_tokens: int
    n_bytes: int
    lengths: list[int]
    position_ids: Tensor | None = None
    teacher: TokenTargets | None = None
    prepared: Any = None

    @property
    def n_real(self) -> int:
        """Tokens before padding."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            slot_token=self.slot_token.to(device),
            slot_symbol=self.slot_symbol.to(device),
            slot_weight=self.slot_weight.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            targets=self.targets and SlotTargets(*(t.to(device) for t in self.targets)),
            teacher=self.teacher and TokenTargets(*(t.to(device) for t in self.teacher)),
        )


@dataclass(frozen=True)
class Step:
    """One optimiser step's data on this rank."""

    number: int
    micro: list[MicroBatch]
    skipped: dict[str, int]

    @property
    def n_tokens(self) -> int:
        """Predicted tokens."""
        return sum(m.n_tokens for m in self.micro)

    @property
    def n_byte_tokens(self) -> int:
        """Predicted tokens with at least one supervised byte."""
        return sum(m.n_byte_tokens for m in self.micro)

    @property
    def n_bytes(self) -> int:
        """Text bytes of the predicted tokens."""
        return sum(m.n_bytes for m in self.micro)
