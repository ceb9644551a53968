"""Several processes that train one student: who they are, and how their gradients and sums meet.

Started by `torchrun` or `accelerate launch`, which set RANK, WORLD_SIZE and LOCAL_RANK; otherwise a world of one, in
which every call below does nothing. Ranks take every `size`-th window of a step (`stream.steps`), so the data and
their order are those of one process. A step's counts are summed over ranks *before* its loss is divided by them, and
gradients are summed, so the result is that of one process up to the order of additions.

DDP keeps a copy of everything on every rank and sums gradients at a step's last micro-batch only. FSDP2
(`fully_shard`) divides weights, gradients and moments by rank, layer by layer. Both average over ranks, hence the loss
is multiplied by `size`. A rank with fewer micro-batches than another runs blank ones, since collectives must pair up.
Price, DDP: one all-reduce of the gradients a step; both: two small ones for counts and terms.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bytecache.schemas.errors import ConfigError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes of a run; `rank` 0 alone writes files."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    strategy: str = "ddp"

    @property
    def main(self) -> bool:
        """Whether this process writes checkpoints, logs and receipts."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module to call in training. Make the optimiser afterwards: `fully_shard` replaces parameters."""
        if self.size == 1:
            return module
        if self.strategy == "ddp":
            # A control has no use for its head; micro-batches differ in the terms they feed.
            return DistributedDataParallel(module, find_unused_parameters=True, forward_sync_buffers=False)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in _layers(module):
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: DDP exchanges gradients at the last one only."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return nullcontext()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in float64 and in rank order."""
        return self._reduce(values, distributed.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Maxima over ranks."""
        return self._reduce(values, distributed.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        exchanged = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(exchanged, op=how)
        return [float(value) for value in exchanged]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            distributed.barrier()


def _layers(module: nn.Module) -> list[nn.Module]:
    """Decoder layers: the longest list of modules of one class."""
    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    return max((layers for layers in lists if len({type(layer) for layer in layers}) == 1), key=len, default=[])


@contextmanager
def joined(strategy: str = "ddp", device: str = "") -> Iterator[World]:
    """The world of this process, as the launcher's environment describes it.

    Args:
        strategy: "ddp" or "fsdp". device: a torch device; empty = CUDA where there is one, else the CPU.

    Raises:
        ConfigError: an environment that names a world without saying who this process is.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), strategy=strategy)
        return
    try:
        rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"WORLD_SIZE = {size} but {error} is no rank; start with torchrun or accelerate") from error
    place = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    mine = not distributed.is_initialized()
    if mine:
        distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(rank, size, place, strategy)
    finally:
        if mine:
            distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; a collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, model: Tensor) -> Tensor:
    """`full` on the device of `model`, this rank's shard of it where `model` is sharded."""
    if isinstance(model, DTensor):
        return distribute_tensor(
            full.to(model.device_mesh.device_type), model.device_mesh, model.placements, src_data_rank=None
        )
    return full.to(model.device)
