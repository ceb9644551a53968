"""What a whole corpus will take, from a pilot of a few units: tokens, hours, bytes, money, each with an interval.

The pilot takes units evenly spread over the plan; `prediction` beside this file has the statistics, `budget` chooses.
A shard's fixed size is told apart by converting the units singly and together. Work of the configured settings stays in
the run; that of other presets is done in a scratch folder. Price: the pilot's own teacher time.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from bytecache.pipeline.commands.estimate.budget import (
    Budget,
    Choice,
    Costs,
    Kept,
    Variant,
    candidates,
    dump_sizes,
    within_budget,
)
from bytecache.pipeline.commands.estimate.prediction import Predicted, ratio_total
from bytecache.pipeline.commands.estimate.traffic import Amounts, both_modes, traffic_lines
from bytecache.pipeline.commands.groups import shard_groups
from bytecache.pipeline.commands.teacher import teacher_job
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan import make as planning
from bytecache.pipeline.plan.index import Plan, load_plan
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt
from bytecache.pipeline.units.runner import finished, run_job
from bytecache.schemas.settings import Convert, Section, Settings, Teacher

NO_BUDGET, NO_COSTS = Budget(), Costs()
_PRESETS: dict[type[Section], tuple[str, tuple[str, ...]]] = {
    Teacher: ("preset", ("tau", "depth", "static")),
    Convert: ("precision", ("rate", "prune")),
}
"""The key that names a section's preset, and the keys that would override what it stands for."""


def presets(section: type[Section]) -> list[str]:
    """Names of a section's presets, from the cheapest to the most precise."""
    return [str(name) for name in get_args(section.model_fields[_PRESETS[section][0]].annotation)]


def with_preset(section: Section, name: str) -> Any:
    """The section with a preset, and with the defaults of what a preset decides; "" changes nothing."""
    if not name:
        return section
    field, decided = _PRESETS[type(section)]
    plain = type(section)()
    return section.model_copy(update={field: name, **{key: getattr(plain, key) for key in decided}})


def choose_units(count: int, total: int) -> list[int]:
    """`count` indices spread evenly over `total`."""
    count = min(count, total)
    return [int((number + 0.5) * total / count) for number in range(count)]


@dataclass(frozen=True)
class Pilot:
    """Dumps of the chosen units: `sizes` of their text, receipts, local files, seconds to start the engine."""

    chosen: list[int]
    sizes: list[int]
    dumps: list[Receipt]
    files: list[Path]
    startup: float


def run_pilot(context: Context, planned: Plan, count: int) -> Pilot:
    """Dump `count` units of the plan, or take what is there if that is as much."""
    job = teacher_job(context, planned)
    done = [index for index in range(len(planned.units)) if finished(context.store, job.task(index))]
    chosen = done if len(done) >= count else choose_units(count, len(planned.units))
    part = replace(job, measures=[job.measures[index] for index in chosen], task=lambda at: job.task(chosen[at]))
    began = time.monotonic()
    outcome = run_job(context.store, part, context.stop)
    wall = time.monotonic() - began
    spent = sum(receipt.timings["seconds"] for receipt in outcome.receipts) if outcome.made == len(chosen) else wall
    files = [context.store.get_path(receipt.files[0].path) for receipt in outcome.receipts]
    return Pilot(chosen, [planned.sizes[i] for i in chosen], outcome.receipts, files, max(wall - spent, 0.0))


def estimate(
    context: Context,
    *,
    count: int,
    teacher_presets: Sequence[str],
    convert_presets: Sequence[str],
    costs: Costs = NO_COSTS,
    budget: Budget = NO_BUDGET,
) -> list[Variant]:
    """Pilot every named preset ("" = as configured) and predict; plans first if that was not done.

    `budget`: the price of bytes, and whether other top_k are weighed. Raises what planning, the teacher and the
    converter raise.
    """
    planned, _ = planning.make_plan(context.store, context.settings, context.stop)
    variants = []
    with tempfile.TemporaryDirectory(prefix="bytecache-estimate-") as scratch:
        for number, teacher in enumerate(teacher_presets):
            settings = context.settings.model_copy(update={"teacher": with_preset(context.settings.teacher, teacher)})
            trial = replace(context, settings=settings)
            if settings.teacher != context.settings.teacher or settings.teacher.keep == "targets":
                trial.store = _copy_slices(context, planned, Path(scratch) / f"run-{number}", count)
            pilot = run_pilot(trial, planned, count)
            dumps = dump_sizes(pilot.files, candidates(settings, budget))
            for convert in convert_presets:
                section = with_preset(settings.convert, convert)
                converted = convert_pilot(section, pilot, Path(scratch), context.stop)
                work = predict((teacher, convert), settings, planned, pilot, converted, costs)
                variants.append(with_dumps(work, settings, planned, pilot, dumps, budget.gb_price))
            if trial.store is not context.store:
                shutil.rmtree(Path(scratch) / f"run-{number}", ignore_errors=True)
    return variants


def _copy_slices(context: Context, planned: Plan, folder: Path, count: int) -> LocalStore:
    store = LocalStore(folder)
    for index in choose_units(count, len(planned.units)):
        key = planned.units[index].slice
        store.put_if_absent(key, store.write_temp(key, context.store.read_bytes(key)))
    return store


def convert_pilot(
    section: Convert, pilot: Pilot, scratch: Path, stop: Callable[[], bool]
) -> tuple[list[int], float, list[float]]:
    """Convert the pilot: bytes of each unit's own shard, bytes that a shard holds beside its units, seconds of each."""
    from bytecache.stages.convert.convert import convert_units

    def shard(files: list[Path]) -> tuple[int, float]:
        out = scratch / "shard.zarr.zip"
        began = time.monotonic()
        convert_units(files, out, section, {}, stop, lambda done: None)
        size, seconds = out.stat().st_size, time.monotonic() - began
        out.unlink()
        return size, seconds

    smallest = min(range(len(pilot.files)), key=lambda at: pilot.sizes[at])
    shard([pilot.files[smallest]])  # compiles
    singly = [shard([file]) for file in pilot.files]
    sizes = [size for size, _ in singly]
    fixed = 0.0
    if len(sizes) > 1:
        together, _ = shard(pilot.files)
        fixed = max((sum(sizes) - together) / (len(sizes) - 1), 0.0)
    return sizes, min(fixed, min(sizes)), [seconds for _, seconds in singly]


def predict(
    named: tuple[str, str], settings: Settings, planned: Plan, pilot: Pilot,
    converted: tuple[list[int], float, list[float]], costs: Costs,
) -> Variant:  # fmt: skip
    """Totals over the plan of one pair of presets, the teacher's and the converter's, without its dump (`with_dumps`).

    `converted`: what `convert_pilot` returned.
    """
    everything = [float(size) for size in planned.sizes]

    def total(values: Sequence[float]) -> Predicted:
        return ratio_total(pilot.sizes, values, everything)

    def counted(name: str) -> list[float]:
        return [float(receipt.counts.get(name) or 0) for receipt in pilot.dumps]

    sizes, fixed, seconds = converted
    tokens = total(counted("tokens"))
    rows = [one + two for one, two in zip(counted("tokens"), counted("branches"), strict=True)]
    ratio = ratio_total(counted("tokens"), rows, [tokens.value * size / planned.n_bytes for size in everything])
    hours = total([receipt.timings["seconds"] for receipt in pilot.dumps]).times(
        1 / 3600, costs.workers * pilot.startup / 3600
    )
    convert_hours = total(seconds).times(1 / 3600)
    shards = len(shard_groups(planned, settings.convert.shard_bytes))
    shard_bytes = total([size - fixed for size in sizes]).times(1.0, shards * fixed)
    return Variant(
        teacher=named[0],
        convert=named[1],
        tokens=tokens,
        branch_ratio=ratio.times(1 / tokens.value),
        teacher_hours=hours,
        convert_hours=convert_hours,
        dump_bytes=Predicted(0.0, 0.0, 0.0),
        shard_bytes=shard_bytes,
        shard_ratio=shard_bytes.times(1 / planned.n_bytes),
        dollars=Predicted(*(
            costs.price * one + costs.core_price * two
            for one, two in zip(_bounds(hours), _bounds(convert_hours), strict=True)
        )),
        by_top_k={},
    )  # fmt: skip


def with_dumps(
    work: Variant, settings: Settings, planned: Plan, pilot: Pilot, sizes: dict[int, list[float]], gb_price: float
) -> Variant:
    """The variant with its dump: `sizes` of the pilot's parts for every top_k, the configured one first."""
    by_top_k = {}
    for k, parts in sizes.items():
        dump = ratio_total(pilot.sizes, parts, [float(size) for size in planned.sizes])
        gone = settings.convert.delete_dump or settings.teacher.keep == "targets"
        kept_bytes = work.shard_bytes if gone else work.shard_bytes.plus(dump)
        by_top_k[k] = Kept(dump, kept_bytes, work.dollars.plus(kept_bytes.times(gb_price / 1e9)))
    configured = by_top_k[settings.teacher.top_k]
    amounts = Amounts(
        planned.n_bytes, len(planned.sizes), len(shard_groups(planned, settings.convert.shard_bytes)),
        work.teacher_hours.value + work.convert_hours.value, settings.fleet.heartbeat_s,
    )  # fmt: skip
    return replace(
        work, dump_bytes=configured.dump_bytes, dollars=configured.dollars, by_top_k=by_top_k,
        traffic=both_modes(amounts, configured.dump_bytes, work.shard_bytes),
    )  # fmt: skip


def _bounds(predicted: Predicted) -> tuple[float, float, float]:
    return predicted.value, predicted.low, predicted.high


def settings_of(choice: Choice, settings: Settings) -> str:
    """The options that choose a variant and its k."""
    variant = choice.variant
    named = {"teacher.preset": variant.teacher, "convert.precision": variant.convert}
    if choice.top_k != settings.teacher.top_k:
        named["teacher.top_k"] = str(choice.top_k)
    return " ".join(f"--set {key}={name}" for key, name in named.items() if name) or "(the configuration as it is)"


def meaning_of(choice: Choice, settings: Settings) -> str:
    """The numbers that a variant's presets stand for, and why its k."""
    teacher = with_preset(settings.teacher, choice.variant.teacher).resolved()
    convert = with_preset(settings.convert, choice.variant.convert)
    return (
        f"tau {teacher.tau:g}, depth {teacher.depth}, static {teacher.static:g}; precision {convert.precision}; "
        f"top_k {choice.top_k}, {choice.why}"
    )


class Report(NamedTuple):
    """What an estimate found, and what of it keeps the budget."""

    text_bytes: int
    units: int
    variants: list[Variant]
    chosen: str
    """options of the most precise variant within the budget; "" without a budget, or where none is"""
    meaning: str
    """what they stand for"""


def report(context: Context, variants: list[Variant], budget: Budget) -> Report:
    """The report about the variants of the planned corpus."""
    planned, settings = load_plan(context.store, context.settings), context.settings
    best = within_budget(variants, budget, settings) if budget.limits else None
    words = (settings_of(best, settings), meaning_of(best, settings)) if best else ("", "")
    return Report(planned.n_bytes, len(planned.sizes), variants, *words)


def report_json(report: Report) -> str:
    """For programs."""
    fields = {"text_bytes": report.text_bytes, "units": report.units, "variants": as_json(report.variants)}
    chosen = {"chosen": report.chosen, "meaning": report.meaning} if report.chosen else {}
    return json.dumps(fields | chosen, indent=2)


def report_text(report: Report, dollars: bool, keep: str = "dump") -> str:
    """For a person; `dollars`: whether there are prices; `keep`: the setting of the teacher."""
    text = table(report.variants, report.text_bytes, dollars, keep)
    return f"{text}\n\nwithin the budget: {report.chosen}\n({report.meaning})" if report.chosen else text


def as_json(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Plain objects; an interval without an end has null there."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(one) for name, one in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [clean(asdict(variant)) for variant in variants]


def table(variants: Sequence[Variant], planned_bytes: int, dollars: bool, keep: str = "dump") -> str:
    """For a person: one row per variant, "value (low to high)"; then what the last asks of a store in either mode."""
    head = ["teacher", "convert", "tokens", "rows per token", "teacher hours", "dump", "shards", "bytes per text byte"]
    lines = [f"{human_bytes(planned_bytes)} of text; predicted totals with 90 % intervals", ""]
    lines += ["| " + " | ".join([*head, *(["dollars"] if dollars else [])]) + " |"]
    lines += ["|---|---|" + "---:|" * (len(head) - 2 + dollars)]
    for one in variants:
        cells = [one.teacher or "as configured", one.convert or "as configured"]
        cells += [_cell(one.tokens, "{:,.0f}".format), _cell(one.branch_ratio, "{:.2f}".format)]
        cells += [_cell(one.teacher_hours, "{:.3g}".format), _cell(one.dump_bytes, human_bytes)]
        cells += [_cell(one.shard_bytes, human_bytes), _cell(one.shard_ratio, "{:.2f}".format)]
        cells += [_cell(one.dollars, "{:.2f}".format)] if dollars else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *traffic_lines(variants[-1].traffic, planned_bytes, keep)]).rstrip()


def _cell(predicted: Predicted, show: Callable[[float], str]) -> str:
    if not math.isfinite(predicted.high):
        return show(predicted.value)
    return f"{show(predicted.value)} ({show(predicted.low)} to {show(predicted.high)})"
