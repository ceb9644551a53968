"""`run`: every stage in order, and the table at the end, from receipts alone (so it can be printed any time)."""

import math
from collections.abc import Iterator
from typing import Any

from bytecache.pipeline.commands.convert import convert
from bytecache.pipeline.commands.dataset import TARGETS, teacher_counts
from bytecache.pipeline.commands.evaluate import evaluate
from bytecache.pipeline.commands.export import export
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.straight import refuse_readers_of_dumps, teach
from bytecache.pipeline.commands.train import train, trained
from bytecache.pipeline.context import Context
from bytecache.pipeline.units.documents import write_document
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.errors import ConfigError

LN2 = math.log(2.0)


def run(context: Context) -> bool:
    """Run what is not done yet; False if there was nothing to do. Ends with the table (also report/summary.md).

    Raises ConfigError with dataset.source: `run` makes the data set it trains on.
    """
    from bytecache.stages.student.check import check_student

    if context.settings.dataset.source:
        raise ConfigError(
            f"dataset.source = {context.settings.dataset.source!r}: `run` makes its own data set; leave it empty, or "
            "use `bytecache train`, `evaluate` and `export`"
        )
    refuse_readers_of_dumps(context.settings)
    if not context.store.exists(f"{TARGETS}/dataset.json"):
        # What would stop the training is better known before the teacher has been paid for.
        check_student(context.settings.student, context.settings.train, chat=context.settings.corpus.kind == "chat")
    planned, new = plan(context)
    dumped = teach(context)
    converted = convert(context, dumped.receipts)
    n_made = int(new) + dumped.made + converted.made + train(context)
    results: list[dict[str, Any]] = []
    if planned.n_heldout:
        results, count = evaluate(context)
        n_made += count
    else:
        context.say("evaluate: skipped, the plan has no held-out documents (corpus.heldout_fraction)")
    n_made += export(context)
    table = summary_table(planned.n_bytes, dumped.receipts, converted.receipts, trained(context), results)
    write_document(context.store, "report/summary.md", table)
    if not n_made:
        context.say(f"run: nothing to do, every output of {context.store.name} is whole")
    context.say("")
    context.say(table)
    return n_made > 0


def summary_table(
    text_bytes: int, dumps: list[Receipt], shards: list[Receipt], runs: list[Receipt], results: list[dict[str, Any]]
) -> str:
    """Sizes, times, throughputs and bits per byte as a Markdown table; times are those of the work when it was done."""
    lines = ["| what | value |", "|---|---:|"]

    def row(name: str, value: str) -> None:
        lines.append(f"| {name} | {value} |")

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
    for name, value in [*_student_rows(runs), *_held_out_rows(results)]:
        row(name, value)
    return "\n".join(lines) + "\n"


def _student_rows(runs: list[Receipt]) -> Iterator[tuple[str, str]]:
    for receipt in runs:
        if skipped := sum(receipt.counts.get("skipped_documents", {}).values()):
            yield f"train {receipt.name}: documents that the student cannot read", f"{skipped:,}"
        speed, seconds = receipt.counts.get("text_bytes_per_s", 0.0), receipt.timings.get("seconds", 0.0)
        yield f"train {receipt.name}: time, speed", f"{seconds:.0f} s, {human_bytes(speed)}/s of text"


def _held_out_rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for result in results:
        held_out = f"held out, student {result['name']}"
        yield f"{held_out}: tokens", f"{result['token_bits_per_byte']:.4f} bits/byte"
        yield f"{held_out}: byte head or choices", f"{result['head_bits_per_byte']:.4f} bits/covered byte"
        yield f"{held_out}: KL to the teacher", f"{result['kl_nats_per_byte']:.4f} nats/covered byte"
    if results:
        yield "held out, teacher", f"{results[0]['teacher_bits_per_byte']:.4f} bits/byte"
        share = results[0]["head_time_share"]
        yield "objective's share of a step's time", "not measured" if share is None else f"{share:.1%}"
