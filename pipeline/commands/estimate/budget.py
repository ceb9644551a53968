"""The most precise presets, and the most of the tokens' top k, that a budget allows.

What the targets are depends on the teacher's effort and the shards' precision; the top k of every position (for
baselines, and for those who want tokens) makes the dump larger and nothing else. So k gives way first: of the most
precise presets that keep the budget with some k, the largest such k, from the configured one downwards by halves.
Where the dump is deleted after conversion, or nothing limits or prices bytes that are kept, k stays as configured; so
it does where the configured trainer reads the top k.

Measured, not modelled: the two columns of a pilot's parts are cut to each k and packed as a dump packs them, in memory.
Price: 0.2 s per MB of those columns for all k together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bytecache.pipeline.commands.estimate.prediction import Predicted
from bytecache.pipeline.commands.estimate.traffic import Traffic
from bytecache.schemas.dump.top_k import top_k_sizes
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import BASELINES, Settings


@dataclass(frozen=True)
class Budget:
    """Upper ends of what a run may take; infinity = no limit.

    `ratio`: bytes of shards per byte of text. `gigabytes`: what is kept, shards and the dump unless it is deleted, 1e9
    bytes. `gb_price`: dollars for each of those, for as long as they are kept and as often as they travel.
    """

    ratio: float = math.inf
    dollars: float = math.inf
    gigabytes: float = math.inf
    gb_price: float = 0.0

    @property
    def limits(self) -> bool:
        """Whether there is anything to keep."""
        return min(self.ratio, self.dollars, self.gigabytes) < math.inf

    @property
    def weighs_bytes(self) -> bool:
        """Whether the size of the dump matters to it."""
        return self.gigabytes < math.inf or (self.dollars < math.inf and self.gb_price > 0)


@dataclass(frozen=True)
class Costs:
    """Dollars an hour of the teacher's machine, and of a core that converts; `workers` pay for their engine's start."""

    price: float = 0.0
    core_price: float = 0.0
    workers: int = 1


@dataclass(frozen=True)
class Kept:
    """What one k comes to, for the whole corpus: the dump; dump and shards as far as they are kept; dollars in all."""

    dump_bytes: Predicted
    kept_bytes: Predicted
    dollars: Predicted


@dataclass(frozen=True)
class Variant:
    """What one pair of presets will take: totals over the corpus. Hours are of one machine like the pilot's.

    `teacher`, `convert`: names of presets, "" = as configured. `branch_ratio`: rows per canonical token. `dump_bytes`,
    `dollars`: with the configured top_k; `by_top_k`: these with others too, the configured one first. `traffic`: what
    it asks of a shared store, by way of the dump and straight to targets.
    """

    teacher: str
    convert: str
    tokens: Predicted
    branch_ratio: Predicted
    teacher_hours: Predicted
    convert_hours: Predicted
    dump_bytes: Predicted
    shard_bytes: Predicted
    shard_ratio: Predicted
    dollars: Predicted
    by_top_k: dict[int, Kept]
    traffic: tuple[Traffic, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A variant with its k, and why that."""

    variant: Variant
    top_k: int
    why: str


def candidates(settings: Settings, budget: Budget) -> list[int]:
    """The k to weigh, the configured one first."""
    k = settings.teacher.top_k
    gone = settings.convert.delete_dump or settings.teacher.keep == "targets"
    if not budget.weighs_bytes or gone or settings.train.head in BASELINES:
        return [k]
    return [k, *(k >> shift for shift in range(1, k.bit_length() + 1))]


def dump_sizes(files: Sequence[Path], wanted: Sequence[int]) -> dict[int, list[float]]:
    """Bytes that each part would have with each k; with the first as it is."""
    sizes: dict[int, list[float]] = {wanted[0]: [float(file.stat().st_size) for file in files]}
    if len(wanted) > 1:
        parts = [top_k_sizes(file, wanted) for file in files]
        for k in wanted[1:]:
            saved = [part[wanted[0]] - part[k] for part in parts]
            sizes[k] = [size - less for size, less in zip(sizes[wanted[0]], saved, strict=True)]
    return sizes


def within_budget(variants: Sequence[Variant], budget: Budget, settings: Settings) -> Choice:
    """The most precise of `variants` (from cheap to precise) whose upper bounds keep the budget, with its k.

    Teacher effort counts before storage precision, and that before k. Raises ConfigError, naming the least there is.
    """
    for variant in reversed(variants):
        if variant.shard_ratio.high > budget.ratio:
            continue
        larger = ""
        for k, amounts in variant.by_top_k.items():
            over = _over(amounts, budget)
            if not over:
                return Choice(variant, k, larger or _unchanged(settings, budget))
            larger = f"with {k}, {over}"
    least = min(variants, key=lambda one: one.shard_ratio.high).shard_ratio.high
    every = [amounts for one in variants for amounts in one.by_top_k.values()]
    cheapest, smallest = min(one.dollars.high for one in every), min(one.kept_bytes.high for one in every)
    bytes_kept = f", at least {smallest / 1e9:.3g} GB are kept" if budget.gigabytes < math.inf else ""
    raise ConfigError(
        f"no preset keeps the budget: the smallest takes up to {least:.2f} bytes per text byte, the cheapest up to "
        f"${cheapest:.2f}{bytes_kept}; raise the budget, or pilot more units for narrower intervals"
    )


def _over(amounts: Kept, budget: Budget) -> str:
    if amounts.kept_bytes.high > budget.gigabytes * 1e9:
        return f"dump and shards take up to {amounts.kept_bytes.high / 1e9:.3g} GB"
    if amounts.dollars.high > budget.dollars:
        return f"all costs up to ${amounts.dollars.high:.2f}"
    return ""


def _unchanged(settings: Settings, budget: Budget) -> str:
    if settings.teacher.keep == "targets":
        return "as configured: no dump is kept (teacher.keep)"
    if settings.convert.delete_dump:
        return "as configured: the dump is not kept (convert.delete_dump)"
    if settings.train.head in BASELINES:
        return f"as configured: train.head = {settings.train.head} reads it"
    if not budget.weighs_bytes:
        return "as configured: it makes the dump larger, which this budget does not limit or price"
    return "as configured: it keeps the budget"
