"""Packing: the rows of a micro-batch behind one another in a single sequence, instead of padded to one length.

Every token's position counts from its own row's start. `transformers` models read a step back in the positions as the
start of another sequence and mask attention to it (a block-diagonal causal mask; the variable-length kernels of flash
attention where installed), so a row's logits are those it has alone; `check` proves that for a model before a run.
Slots keep their order, only their index moves from row * width + t to offset[row] + t.
Price: no padding; with a dense mask attention costs the square of the packed length, so on a CPU keep
`train.micro_tokens` small.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytecache.schemas.errors import ConfigError
from bytecache.stages.student.student import Student
from bytecache.stages.train.batches.types import MicroBatch, Step

TOLERANCE = 1e-3
"""Largest difference of a logit, in units of the largest logit: order of additions, far below any leak."""


def pack(micro: MicroBatch) -> MicroBatch:
    """The same rows in one sequence: R = 1, T = sum of `micro.lengths`, `position_ids` int64 [1, T]."""
    width = micro.input_ids.shape[1]
    count = np.asarray(micro.lengths, np.int64)
    offset = np.cumsum(count) - count
    within = np.arange(int(count.sum())) - np.repeat(offset, count)
    source = torch.from_numpy(np.repeat(np.arange(len(count)) * width, count) + within)
    start = torch.from_numpy(offset)

    def moved(place: Tensor) -> Tensor:
        return start[place // width] + place % width

    return replace(
        micro,
        input_ids=micro.input_ids.flatten()[source][None],
        labels=micro.labels.flatten()[source][None],
        slot_token=moved(micro.slot_token),
        teacher=micro.teacher and micro.teacher._replace(row=moved(micro.teacher.row)),
        lengths=[int(count.sum())],
        position_ids=torch.from_numpy(within)[None],
    )


def packed(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps with every micro-batch packed."""
    return (replace(step, micro=[pack(micro) for micro in step.micro]) for step in steps)


def check(student: Student) -> None:
    """Refuse a model whose packed rows see one another: ConfigError names the difference and the remedy."""

    def logits(ids: Tensor, positions: Tensor | None) -> Tensor:
        return student.forward(ids, positions)[0]

    apart = difference(student.model, logits)
    if not apart <= TOLERANCE:
        raise ConfigError(
            f"train.packing: rows of {type(student.model).__name__} see one another when packed (logits differ by "
            f"{apart:.2g} of the largest, limit {TOLERANCE:g}); set train.packing = false"
        )


def difference(model: Any, logits: Callable[[Tensor, Tensor | None], Tensor]) -> float:
    """How far the logits of packed rows are from those of rows alone, in units of the largest logit.

    Args:
        model: of transformers. logits: what it says of input_ids int64 [R, T] and position_ids, or None.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, rows, (2, 7), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.arange(7, device=ids.device).repeat(2)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = logits(ids, None).float()
            packed = logits(ids.reshape(1, -1), positions).float().reshape(alone.shape)
    finally:
        model.train(training)
    return float((alone - packed).abs().max() / alone.abs().max())
