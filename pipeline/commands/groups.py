"""Which units of a plan make which shard: whole units in plan order, training apart from held-out text."""

import itertools
from typing import NamedTuple

import numpy as np

from bytecache.pipeline.plan.index import Plan, Split
from bytecache.pipeline.plan.slices import slice_ends


class ShardGroup(NamedTuple):
    """The units of one shard."""

    split: Split
    number: int
    """Of the shard within its split."""
    members: list[int]
    """Numbers of its units in the plan."""
    size: int
    """Bytes of text."""

    @property
    def name(self) -> str:
        """Of the shard."""
        return f"{self.split}-{self.number:05d}"


def shard_groups(planned: Plan, shard_bytes: int) -> list[tuple[Split, list[int], int]]:
    """(split, units, bytes of text) of every shard: whole units in plan order, up to `shard_bytes` of text.

    Where a shard ends is for the content of the units to say, as it is for documents where a unit ends
    (`pipeline.plan.slices`): units that come or go in a new edition leave all shards but those around them as they are.
    """
    groups: list[tuple[Split, list[int], int]] = []
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        members = np.array(planned.of_split(split), np.int64)
        sizes = np.array(planned.sizes, np.int64)[members]
        ends = slice_ends(sizes, planned.marks[members], shard_bytes, whole=True)
        for low, high in itertools.pairwise([0, *ends]):
            groups.append((split, members[low:high].tolist(), int(sizes[low:high].sum())))
    return groups


def numbered_groups(planned: Plan, shard_bytes: int, missing: frozenset[int] = frozenset()) -> list[ShardGroup]:
    """Every shard with its number; `missing` units are left out, and shards of nothing else."""
    cut = shard_groups(planned, shard_bytes)
    n_train = sum(split == "train" for split, _, _ in cut)
    groups = []
    for index, (split, members, _) in enumerate(cut):
        present = [member for member in members if member not in missing]
        if present:
            size = sum(planned.sizes[member] for member in present)
            groups.append(ShardGroup(split, index - (0 if split == "train" else n_train), present, size))
    return groups
