"""Which units of a plan make which shard: whole units in plan order, training apart from held-out text."""

from typing import NamedTuple

from bytecache.pipeline.plan.index import Plan, Split


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
    """(split, units, bytes of text) of every shard: whole units in plan order, up to `shard_bytes` of text."""
    groups: list[tuple[Split, list[int], int]] = []
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        parts: list[int] = []
        size = 0
        for index in planned.of_split(split):
            if parts and size + planned.sizes[index] > shard_bytes:
                groups.append((split, parts, size))
                parts, size = [], 0
            parts.append(index)
            size += planned.sizes[index]
        if parts:
            groups.append((split, parts, size))
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
