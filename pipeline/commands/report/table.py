"""The table that a run ends with, from receipts alone, so that it can be printed any time."""

import math
from collections.abc import Iterator
from typing import Any

from bytecache.pipeline.commands.dataset import teacher_counts
from bytecache.pipeline.commands.evaluate import BEFORE, ORIGINAL
from bytecache.pipeline.commands.report.facts import in_order, retention, text_differs
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt

LN2 = math.log(2.0)
_HELD_OUT = {BEFORE: "before training", ORIGINAL: "the original"}


def as_table(rows: list[tuple[str, str]]) -> str:
    """Markdown of two columns."""
    return "\n".join(["| what | value |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def summary_rows(
    text_bytes: int, dumps: list[Receipt], shards: list[Receipt], runs: list[Receipt], results: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Sizes, times, throughputs and bits per byte; times are those of the work when it was done."""
    rows: list[tuple[str, str]] = []

    def row(name: str, value: str) -> None:
        rows.append((name, value))

    def seconds(units: list[Receipt]) -> float:
        return sum(receipt.timings.get("seconds", 0.0) for receipt in units)

    def size(units: list[Receipt]) -> int:
        return sum(file.size for receipt in units for file in receipt.files)

    def total(units: list[Receipt], name: str) -> float:
        return float(sum(receipt.counts.get(name) or 0 for receipt in units))

    def taught(name: str) -> float:
        return float(sum(teacher_counts(receipt).get(name) or 0 for receipt in dumps))

    row("corpus", f"{human_bytes(text_bytes)} in {len(dumps)} units")
    scored = taught("bytes") or text_bytes
    tokens = taught("tokens")
    straight = bool(dumps) and dumps[0].stage == "convert"
    row("teacher: tokens (branches)", f"{tokens:,.0f} ({taught('branches'):,.0f})")
    row("teacher: time, speed", f"{seconds(dumps):.0f} s, {tokens / max(seconds(dumps), 1e-9):,.0f} tokens/s")
    if straight:
        row("dump", 'none, teacher.keep = "targets"; converted beside the engine')
    else:
        row("dump: size", f"{human_bytes(size(dumps))}, {size(dumps) / scored:.2f} bytes per text byte")
        speed = scored / 1e6 / max(seconds(shards), 1e-9)
        row("convert: time, speed", f"{seconds(shards):.1f} s, {speed:.3f} MB text/s")
    row("targets: size", f"{human_bytes(size(shards))}, {size(shards) / scored:.2f} bytes per text byte")
    for name, title in (("canonical_nll", "canonical tokens"), ("teacher_nll", "as a byte model")):
        if any(name in receipt.counts for receipt in shards):
            row(f"teacher, {title}", f"{total(shards, name) / LN2 / scored:.4f} bits/byte, all text")
    return [*rows, *_student_rows(runs), *_held_out_rows(results)]


def _student_rows(runs: list[Receipt]) -> Iterator[tuple[str, str]]:
    for receipt in runs:
        if skipped := sum(receipt.counts.get("skipped_documents", {}).values()):
            yield f"train {receipt.name}: documents that the student cannot read", f"{skipped:,}"
        speed, seconds = receipt.counts.get("text_bytes_per_s", 0.0), receipt.timings.get("seconds", 0.0)
        yield f"train {receipt.name}: time, speed", f"{seconds:.0f} s, {human_bytes(speed)}/s of text"


def _held_out_rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    kept = retention(results)
    for result in in_order(results):
        name = str(result["name"])
        held_out = f"held out, {_HELD_OUT.get(name, f'student {name}')}"
        way = f", retention {kept[name]:.1%}" if name in kept and name not in _HELD_OUT else ""
        yield f"{held_out}: tokens", f"{result['token_bits_per_byte']:.4f} bits/byte{way}"
        if name not in _HELD_OUT:
            yield f"{held_out}: byte head or choices", f"{result['head_bits_per_byte']:.4f} bits/covered byte"
            # Of a student without a run nothing is known of its tokenizer's cuts: its KL would be of fewer choices.
            yield f"{held_out}: KL to the teacher", f"{result['kl_nats_per_byte']:.4f} nats/covered byte"
    if words := text_differs(results):
        yield "held out, of other text each, so not to be compared", words
    if results:
        yield "held out, teacher", f"{results[0]['teacher_bits_per_byte']:.4f} bits/byte"
        share = results[0]["head_time_share"]
        yield "objective's share of a step's time", "not measured" if share is None else f"{share:.1%}"
