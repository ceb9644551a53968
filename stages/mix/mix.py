"""Several teachers' targets of the same documents as one shard, position by position.

A shard of the first data set gives the order; of the others the shards that hold its documents are read, a few at a
time. At each position the rows are pooled (`stages.mix.pool`). What at least one teacher lists is listed, with its
pooled probability (of a teacher that does not list it, its share of that teacher's tail, as the shard's prior weighs
it); the pooled mass of everything else is the tail, so nothing is renormalised away. The divergence between the
teachers at each position is written beside the shard.

Price: 15 microseconds a position and teacher; memory: the shards that are read, and dense rows of `PIECE` positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas.arrays import END, F32, F64, SYMBOLS, U8
from bytecache.schemas.errors import ConfigError, InputError, Interrupted
from bytecache.schemas.shard.builder import Precision, ShardBuilder
from bytecache.schemas.shard.reader import ByteShard
from bytecache.stages.mix.documents import Documents, Name, Place
from bytecache.stages.mix.pool import LEAST, POOLS, disagreement, pooled, weights_of
from bytecache.stages.targets.source import load_shard

PIECE = 4096
"""Positions whose dense rows are in memory at a time."""
HELD = 4
"""Shards of each data set that are kept, besides the first one's."""


@dataclass(frozen=True)
class Mixing:
    """How to mix. `weights`: one a data set, summing to 1. `routes`: (pattern of document names, weights instead)."""

    pool: str
    weights: tuple[float, ...]
    routes: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ConfigError(f"pool {self.pool!r} is unknown; one of {', '.join(POOLS)}")
        for weights in (self.weights, *(weights for _, weights in self.routes)):
            fits = len(weights) == len(self.weights) and all(0 <= weight <= 1 for weight in weights)
            if not fits or abs(sum(weights) - 1) > 1e-9:
                raise ConfigError(
                    f"weights {', '.join(map(str, weights))}: give one for each of {len(self.weights)} data sets, "
                    "from 0 to 1, which sum to 1"
                )

    def of(self, doc_id: str) -> tuple[float, ...]:
        """The weights of a document: those of the first route that fits its name, else the common ones."""
        return next((weights for pattern, weights in self.routes if fnmatchcase(doc_id, pattern)), self.weights)

    def as_json(self) -> dict[str, Any]:
        """For the key and the index."""
        routes = [{"documents": pattern, "weights": list(weights)} for pattern, weights in self.routes]
        return {"pool": self.pool, "weights": list(self.weights), "routes": routes}


@dataclass(frozen=True)
class Part:
    """A document that is to be mixed: its name, and its place in each data set."""

    name: Name
    places: tuple[Place, ...]


@dataclass
class Tally:
    """What was mixed, summed over supervised positions."""

    positions: int = 0
    bytes: int = 0
    jsd: float = 0.0
    silent: list[int] = field(default_factory=list)
    """positions at which each teacher said nothing"""
    nll: list[float] = field(default_factory=list)
    """nats over the text of each teacher, END not included; the last is the mixture's"""
    weight: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "jsd_sum": self.jsd, "silent": self.silent, "nll": self.nll, "weight_sum": self.weight,
            "mixed_positions": self.positions, "mixed_bytes": self.bytes,
        }  # fmt: skip


def parts_by_shard(sets: Sequence[Documents], common: Mapping[Name, int]) -> list[list[Part]]:
    """For every shard of the first data set, in order, those of its documents that are to be mixed, in order.

    `common`: how often each is in all data sets; of equal ones the first are taken.
    """
    by_entry: list[list[tuple[int, Part]]] = [[] for _ in sets[0].dataset.entries]
    for name, count in common.items():
        for places in islice(zip(*(one.places[name] for one in sets), strict=False), count):
            by_entry[places[0].entry].append((places[0].document, Part(name, places)))
    return [[part for _, part in sorted(parts, key=lambda each: each[0])] for parts in by_entry]


class Mixer:
    """Mixes shards of `sets` into new ones; keeps the shards read last."""

    def __init__(self, sets: Sequence[Documents], mixing: Mixing) -> None:
        self.sets, self.mixing = sets, mixing
        self._shards: list[dict[int, ByteShard]] = [{} for _ in sets]

    def mix(
        self, parts: Sequence[Part], builder: ShardBuilder, stop: Callable[[], bool], tick: Callable[[int], None]
    ) -> tuple[F32, Tally]:
        """Append the mixture of documents to a builder; returns the divergence at each position, and a tally.

        Raises IntegrityError for a source that is not as its manifest says, InputError where masks differ, Interrupted.
        """
        tally = Tally(silent=[0] * len(self.sets), nll=[0.0] * (len(self.sets) + 1), weight=[0.0] * len(self.sets))
        divergences: list[F32] = []
        for part in parts:
            rows = _Document([self._shard(number, place.entry) for number, place in enumerate(part.places)], part)
            divergences += rows.append(builder, self.mixing, tally, stop)
            builder.end_document(part.name[1])
            tick(len(rows.mask) - 1)
        return np.concatenate(divergences) if divergences else np.zeros(0, np.float32), tally

    def _shard(self, number: int, entry: int) -> ByteShard:
        held = self._shards[number]
        if entry not in held:
            while len(held) >= HELD:
                del held[next(iter(held))]
            dataset = self.sets[number].dataset
            held[entry] = load_shard(dataset, dataset.entries[entry])
        return held[entry]


class _Document:
    """One document in each of its shards."""

    def __init__(self, shards: Sequence[ByteShard], part: Part) -> None:
        self.shards, self.part = shards, part
        self.start = [int(shard.doc_start[place.document]) for shard, place in zip(shards, part.places, strict=True)]
        n = int(shards[0].doc_start[part.places[0].document + 1]) - self.start[0]
        masks = np.stack([shard.mask[lo : lo + n] for shard, lo in zip(shards, self.start, strict=True)])
        differing = np.flatnonzero((masks != masks[0]).any(0))
        if len(differing) and differing[0] < n - 1:
            raise InputError(
                f"document {part.name[1]!r}: the data sets do not supervise the same positions (the first at "
                f"{int(differing[0])}); mix data sets of the same prompts"
            )
        self.mask: U8 = masks.min(0)  # whether a teacher says END after an answer is its template's matter
        self.text: U8 = shards[0].text[self.start[0] : self.start[0] + n]
        self.true = shards[0].symbols(self.start[0], self.start[0] + n)

    def append(self, builder: ShardBuilder, mixing: Mixing, tally: Tally, stop: Callable[[], bool]) -> list[F32]:
        """Append all positions, piece by piece; returns the divergences of each piece."""
        n = len(self.mask)
        with np.errstate(divide="ignore"):
            scores = np.log(np.array(mixing.of(self.part.name[1]), np.float64))
        divergences = []
        for lo in range(0, n, PIECE):
            if stop():
                raise Interrupted("mix stopped by a signal; rerun the same command to continue")
            hi = min(lo + PIECE, n)
            rows, listed, speaks = self._rows(lo, hi)
            at = np.arange(hi - lo)
            likelihoods = rows[:, at, self.true[lo:hi]]
            weights, scores = weights_of(mixing.pool, scores, likelihoods, speaks)
            mixed = pooled(mixing.pool, rows, weights)
            nothing = weights.sum(0) == 0
            listed &= ~nothing[:, None]
            tail = np.where(listed, 0.0, mixed).sum(1)
            tail[nothing] = 1.0
            probs = np.where(listed, mixed, 0.0).astype(np.float32)
            stop_at = hi - (hi == n)
            builder.append(self.text[lo:stop_at], probs, np.minimum(tail, 1.0).astype(np.float32), self.mask[lo:hi])
            divergence = np.where(self.mask[lo:hi] == 1, disagreement(rows, speaks), 0.0)
            divergences.append(divergence.astype(np.float32))
            _count(tally, self.mask[lo:hi] == 1, self.true[lo:hi], (likelihoods, mixed, weights, speaks), divergence)
        return divergences

    def _rows(self, lo: int, hi: int) -> tuple[F64, Any, Any]:
        """float64 [T, n, 257] what each teacher says, bool [n, 257] what any lists, bool [T, n] who says anything."""
        rows = np.zeros((len(self.shards), hi - lo, SYMBOLS))
        listed = np.zeros((hi - lo, SYMBOLS), np.bool_)
        speaks = np.zeros((len(self.shards), hi - lo), np.bool_)
        for number, (shard, start) in enumerate(zip(self.shards, self.start, strict=True)):
            a, b = start + lo, start + hi
            known = shard.dense(a, b).astype(np.float64)
            tail = shard.tails(a, b).astype(np.float64)
            spread = known + shard.tail_weights(a, b) * tail[:, None]
            rows[number] = spread / spread.sum(1, keepdims=True)
            speaks[number] = (tail < 1.0) & (self.mask[lo:hi] == 1)
            listed |= (known > 0) & speaks[number][:, None]
        return rows, listed, speaks


def _count(tally: Tally, supervised: Any, true: Any, said: tuple[Any, ...], divergence: F64) -> None:
    likelihoods, mixed, weights, speaks = said
    tally.positions += int(supervised.sum())
    tally.jsd += float(divergence.sum())
    text = supervised & (true != END) & (weights.sum(0) > 0)
    tally.bytes += int(text.sum())
    of_mixture = mixed[np.arange(len(true)), true]
    for number, each in enumerate((*likelihoods, of_mixture)):
        tally.nll[number] -= float(np.log(np.maximum(each[text], LEAST)).sum())
    for number in range(len(likelihoods)):
        tally.silent[number] += int((supervised & ~speaks[number]).sum())
        tally.weight[number] += float(weights[number][supervised].sum())


def mix_shard(
    mixer: Mixer, parts: Sequence[Part], out: Path, spent: tuple[float, Precision], attrs: dict[str, Any],
    stop: Callable[[], bool], tick: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, Any], F32]:  # fmt: skip
    """Write the mixture of documents as a shard at `out`; returns its counts, and the divergence at each position.

    `spent`: `prune` and the precision of the builder.
    """
    builder = ShardBuilder(*spent)
    divergence, tally = mixer.mix(parts, builder, stop, lambda size: tick({"bytes": size}))
    counts = dict(builder.write(out, attrs))
    return counts | tally.as_json(), divergence
