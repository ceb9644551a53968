"""The facts of a run that its page shows, from receipts and the logs of training.

Retention is the part of the way from the student before training to the original that a run went, in bits per byte of
held-out text: (arm - before) / (original - before). It is said only where the original is the better one of the two.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytecache.pipeline.commands.evaluate import BEFORE, ORIGINAL
from bytecache.pipeline.commands.train import CONTROL, DISTILLED
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units.receipts import Receipt

ORDER = (BEFORE, CONTROL, DISTILLED, ORIGINAL)
"""Of the arms, for people."""
LABELS = {
    BEFORE: "before training", CONTROL: "control: cross-entropy alone", DISTILLED: "distilled from the cache",
    ORIGINAL: "the original, its own tokenizer",
}  # fmt: skip
Point = tuple[int, float]
"""A step, from 1, and bits per byte of the text that it was about to learn."""


@dataclass(frozen=True)
class Facts:
    """What the page shows; every text in it may be a stranger's."""

    title: str
    table: list[tuple[str, str]]
    arms: list[dict[str, Any]]
    """name, bits, retention (None: not defined), in `ORDER`"""
    teacher_bits: float | None = None
    curves: dict[str, list[Point]] = field(default_factory=dict)
    stages: list[tuple[str, float, int]] = field(default_factory=list)
    """name, seconds of work, bytes of its outputs"""
    passage: dict[str, Any] = field(default_factory=dict)
    """see `stages.evaluate.passage`"""
    loading: list[str] = field(default_factory=list)
    """lines of Python that sample from the exported student"""


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of students in `ORDER`."""
    return sorted(results, key=lambda result: ORDER.index(result["name"]) if result["name"] in ORDER else len(ORDER))


def text_differs(results: list[dict[str, Any]]) -> str:
    """How much text each student read, where it was not the same for all; else nothing."""
    sizes = {result["name"]: int(result["text_bytes"]) for result in in_order(results)}
    return ", ".join(f"{name} {size:,d} B" for name, size in sizes.items()) if len(set(sizes.values())) > 1 else ""


def retention(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of every arm that has one, by name; none where not all could read the same documents (`text_differs`)."""
    if text_differs(results):
        return {}
    bits = {result["name"]: float(result["token_bits_per_byte"]) for result in results}
    way = bits.get(ORIGINAL, math.nan) - bits.get(BEFORE, math.nan)
    if not way < 0:
        return {}
    return {name: (value - bits[BEFORE]) / way for name, value in bits.items()}


def arms_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`Facts.arms` of a report."""
    kept = retention(results)
    return [
        {
            "name": result["name"], "bits": float(result["token_bits_per_byte"]),
            "retention": kept.get(result["name"]),
        }
        for result in in_order(results)
    ]  # fmt: skip


def curve_of(store: Store, run: Receipt) -> list[Point]:
    """The loss of every step of a run, in bits per byte; empty where its log is gone, as `verify --repair` may say."""
    key = f"{Path(str(run.counts['checkpoint'])).parent.as_posix()}/metrics.jsonl"
    if not store.exists(key):
        return []
    return sorted(_points(store.read_bytes(key).decode("utf-8", errors="replace")).items())


def _points(log: str) -> dict[int, float]:
    """Bits per byte by step; of a step that was done twice, the last one."""
    points: dict[int, float] = {}
    for line in log.splitlines():
        try:
            record = json.loads(line)
            bits = record["token_nll"] * record["tokens"] / record["text_bytes"] / math.log(2)
            points[int(record["step"])] = float(bits)
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # a line that a kill cut off, or a step without text
    return {step: bits for step, bits in points.items() if math.isfinite(bits)}


def smoothed(points: list[Point], width: int) -> list[Point]:
    """The running mean over `width` steps, shorter at the start."""
    means = []
    for place, (step, _) in enumerate(points):
        some = [bits for _, bits in points[max(0, place + 1 - width) : place + 1]]
        means.append((step, sum(some) / len(some)))
    return means


def stage_rows(stages: dict[str, list[Receipt]]) -> Iterator[tuple[str, float, int]]:
    """Name, seconds and bytes of each stage that made anything."""
    for name, stage_receipts in stages.items():
        if stage_receipts:
            seconds = sum(receipt.timings.get("seconds", 0.0) for receipt in stage_receipts)
            yield name, seconds, sum(file.size for receipt in stage_receipts for file in receipt.files)
