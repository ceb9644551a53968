"""What a whole corpus will take, from a pilot of a few units: tokens, hours, bytes, money, each with an interval.

The pilot takes units evenly spread over the plan. A quantity y (tokens, seconds, bytes) of a unit is nearly
proportional to its text x and made of its documents, so its variance is about s2 x. The total is the ratio estimate
X sum(y) / sum(x); with r the text that was not piloted, its squared error is s2 r X / sum(x) (Royall, Biometrika 57,
1970). s2 is the mean of e2 / x over the pilot, e = y - x sum(y) / sum(x), each residual divided by 1 - x / sum(x) as if
its unit had been left out (the jackknife): two or three units that happen to agree are no proof. The interval is
Student's t at 90 % with n - 1 degrees of freedom: wide from two or three units, as it should be. A shard's fixed size
is told apart by converting the units singly and together. Work of the configured settings stays in the run; that of
other presets is done in a scratch folder. Price: the pilot's own teacher time. Measured error:
benchmarks/results/estimate_error.json.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline import units
from pipeline.commands_data import shard_groups, teacher_job
from pipeline.context import Context
from pipeline.plan import Plan
from pipeline.progress import human_bytes
from pipeline.receipts import Receipt
from pipeline.runner import finished, run_job
from pipeline.stores import LocalStore
from schemas.errors import ConfigError
from schemas.settings import Convert, Section, Settings, Teacher

_T90 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""Student's t, two-sided 90 %, for 1 to 10 degrees of freedom; above, 1.645 + 1.6 / df is within 0.01."""


_PRESETS: dict[type[Section], tuple[str, tuple[str, ...]]] = {
    Teacher: ("preset", ("tau", "depth", "static")),
    Convert: ("precision", ("rate", "prune")),
}
"""The key that names a section's preset, and the keys that would override what it stands for."""


@dataclass(frozen=True)
class Predicted:
    """A total and its 90 % interval; from one unit there is no interval and `low`, `high` are 0 and infinity."""

    value: float
    low: float
    high: float

    def times(self, factor: float, plus: float = 0.0) -> "Predicted":
        """factor x + plus, for a factor of at least 0."""
        return Predicted(*(bound * factor + plus for bound in (self.value, self.low, self.high)))


@dataclass(frozen=True)
class Variant:
    """What one pair of presets will take: totals over the corpus. Hours are of one machine like the pilot's.

    `teacher`, `convert`: names of presets, "" = as configured. `branch_ratio`: rows per canonical token.
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


def ratio_total(sizes: Sequence[float], values: Sequence[float], all_sizes: Sequence[float]) -> Predicted:
    """Predict the sum of a quantity over all units from its `values` in units of `sizes` (bytes of text)."""
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    n, total = len(x), float(np.sum(all_sizes))
    rate = float(y.sum() / x.sum())
    if n >= len(all_sizes):
        return Predicted(float(y.sum()), float(y.sum()), float(y.sum()))
    if n < 2:
        return Predicted(rate * total, 0.0, math.inf)
    left_out = (y - rate * x) / (1 - x / x.sum())
    variance = float(np.mean(left_out**2 / x))
    error = math.sqrt(variance * max(total - float(x.sum()), 0.0) * total / float(x.sum()))
    quantile = _T90[n - 2] if n - 1 <= len(_T90) else 1.645 + 1.6 / (n - 1)
    # What the sample has been counted already: the rest cannot be negative.
    return Predicted(
        rate * total, max(rate * total - quantile * error, float(y.sum())), rate * total + quantile * error
    )


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
    price: float = 0.0,
    core_price: float = 0.0,
    workers: int = 1,
) -> list[Variant]:
    """Pilot every named preset ("" = as configured) and predict; plans first if that was not done.

    `price`: dollars an hour of the teacher's machine; `core_price`: of a core that converts; `workers`: each pays for
    its engine's start. Raises what planning, the teacher and the converter raise.
    """
    planned, _ = units.make_plan(context.store, context.settings, context.stop)
    found = []
    with tempfile.TemporaryDirectory(prefix="bytecache-estimate-") as scratch:
        for number, teacher in enumerate(teacher_presets):
            settings = context.settings.model_copy(update={"teacher": with_preset(context.settings.teacher, teacher)})
            mine = replace(context, settings=settings)
            if settings.teacher != context.settings.teacher:
                mine.store = _copy_slices(context, planned, Path(scratch) / f"run-{number}", count)
            pilot = run_pilot(mine, planned, count)
            for convert in convert_presets:
                section = with_preset(settings.convert, convert)
                converted = convert_pilot(section, pilot, Path(scratch), context.stop)
                found.append(predict(teacher, convert, settings, planned, pilot, converted, price, core_price, workers))
            if mine.store is not context.store:
                shutil.rmtree(Path(scratch) / f"run-{number}", ignore_errors=True)
    return found


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
    from stages.convert import convert_units

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
    teacher: str, convert: str, settings: Settings, planned: Plan, pilot: Pilot,
    converted: tuple[list[int], float, list[float]], price: float, core_price: float, workers: int,
) -> Variant:  # fmt: skip
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
        1 / 3600, workers * pilot.startup / 3600
    )
    convert_hours = total(seconds).times(1 / 3600)
    shards = len(shard_groups(planned, settings.convert.shard_bytes))
    shard_bytes = total([size - fixed for size in sizes]).times(1.0, shards * fixed)
    return Variant(
        teacher=teacher,
        convert=convert,
        tokens=tokens,
        branch_ratio=ratio.times(1 / tokens.value),
        teacher_hours=hours,
        convert_hours=convert_hours,
        dump_bytes=total([float(receipt.files[0].size) for receipt in pilot.dumps]),
        shard_bytes=shard_bytes,
        shard_ratio=shard_bytes.times(1 / planned.n_bytes),
        dollars=Predicted(*(
            price * one + core_price * two
            for one, two in zip(_bounds(hours), _bounds(convert_hours), strict=True)
        )),
    )  # fmt: skip


def _bounds(found: Predicted) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def within_budget(found: Sequence[Variant], ratio: float = math.inf, dollars: float = math.inf) -> Variant:
    """The most precise of `found` (given from cheap to precise) whose upper bounds keep the budgets.

    `ratio`: bytes of shards per byte of text. Teacher effort counts before storage precision. Raises ConfigError,
    naming the cheapest, if none does.
    """
    fitting = [one for one in found if one.shard_ratio.high <= ratio and one.dollars.high <= dollars]
    if fitting:
        return fitting[-1]
    least = min(found, key=lambda one: one.shard_ratio.high)
    cheapest = min(found, key=lambda one: one.dollars.high)
    raise ConfigError(
        f"no preset keeps the budget: the smallest takes up to {least.shard_ratio.high:.2f} bytes per text byte, the "
        f"cheapest up to ${cheapest.dollars.high:.2f}; raise the budget, or pilot more units for narrower intervals"
    )


def settings_of(variant: Variant) -> str:
    """The options that choose a variant."""
    named = {"teacher.preset": variant.teacher, "convert.precision": variant.convert}
    return " ".join(f"--set {key}={name}" for key, name in named.items() if name) or "(the configuration as it is)"


def meaning_of(variant: Variant, settings: Settings) -> str:
    """The numbers that a variant's presets stand for."""
    teacher = with_preset(settings.teacher, variant.teacher).resolved()
    convert = with_preset(settings.convert, variant.convert)
    return (
        f"tau {teacher.tau:g}, depth {teacher.depth}, static {teacher.static:g}; precision {convert.precision}; "
        f"top_k {teacher.top_k} as configured, since it changes the size of the dump alone"
    )


def as_json(found: Sequence[Variant]) -> list[dict[str, Any]]:
    """Plain objects; an interval without an end has null there."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(one) for name, one in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [clean(asdict(one)) for one in found]


def table(found: Sequence[Variant], planned_bytes: int, dollars: bool) -> str:
    """For a person: one row per variant, "value (low to high)"."""
    head = ["teacher", "convert", "tokens", "rows per token", "teacher hours", "dump", "shards", "bytes per text byte"]
    lines = [f"{human_bytes(planned_bytes)} of text; predicted totals with 90 % intervals", ""]
    lines += ["| " + " | ".join([*head, *(["dollars"] if dollars else [])]) + " |"]
    lines += ["|---|---|" + "---:|" * (len(head) - 2 + dollars)]
    for one in found:
        cells = [one.teacher or "as configured", one.convert or "as configured"]
        cells += [_cell(one.tokens, "{:,.0f}".format), _cell(one.branch_ratio, "{:.2f}".format)]
        cells += [_cell(one.teacher_hours, "{:.3g}".format), _cell(one.dump_bytes, human_bytes)]
        cells += [_cell(one.shard_bytes, human_bytes), _cell(one.shard_ratio, "{:.2f}".format)]
        cells += [_cell(one.dollars, "{:.2f}".format)] if dollars else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: Predicted, show: Callable[[float], str]) -> str:
    if not math.isfinite(found.high):
        return show(found.value)
    return f"{show(found.value)} ({show(found.low)} to {show(found.high)})"
