"""Which of the windows of a sequence this process reads: its rank's, and of those its DataLoader worker's."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

from bytecache.schemas.errors import ConfigError


class Layout(NamedTuple):
    """A process's place among those that share a sequence."""

    rank: int
    ranks: int
    worker: int
    workers: int


@dataclass(frozen=True)
class Share:
    """A rank's share; of torch.distributed's, if that is initialised when it is asked, where none is given.

    Raises:
        ConfigError: one of the two alone, or a rank that is none.
    """

    rank: int | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        rank, ranks = self.rank, self.ranks
        if (rank is None) != (ranks is None) or (ranks is not None and not 0 <= (rank or 0) < ranks):
            raise ConfigError(f"rank {rank} of {ranks}: give both, with 0 <= rank < ranks, or neither")

    def layout(self) -> Layout:
        """That of the calling process, a worker of a DataLoader or not."""
        rank, ranks = self.rank, self.ranks
        if rank is None or ranks is None:
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)
        worker = get_worker_info()
        return Layout(rank, ranks, worker.id, worker.num_workers) if worker else Layout(rank, ranks, 0, 1)
