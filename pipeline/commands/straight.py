"""`teacher.keep = "targets"`: the teacher's workers convert what they evaluate and publish shards, and nothing else.

One unit of this job is a shard: consecutive units of the plan, as `convert` would group them, evaluated by one worker
and converted in a process beside its engine while they come. So shards of the wanted size need no second pass over
their bytes, and `convert.shard_bytes` is what a kill can lose. A shard is, to the byte, the one that a conversion of
the dump makes at the same settings. `convert` then finds the shards by their receipts and publishes the index.

A receipt's key holds what a dump part's and a shard's hold, but for the fingerprint of the conversion's code: a
comment changed there would cost the teacher's work. The fingerprint is among the receipt's counts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bytecache.pipeline.commands.dataset import CONVERTER, TARGETS, refuse_other_dataset, straight_identity
from bytecache.pipeline.commands.groups import ShardGroup, numbered_groups
from bytecache.pipeline.commands.teacher import (
    find_identity,
    identity_changes,
    opened_slice,
    say_set_aside,
    settle_start,
    teacher,
    unit_inputs,
    unit_name,
)
from bytecache.pipeline.config import RESOLVED_FILE
from bytecache.pipeline.context import Context
from bytecache.pipeline.fleet.ledger import Layout
from bytecache.pipeline.fleet.quarantine import Entry, quarantined
from bytecache.pipeline.plan.index import Plan, load_plan
from bytecache.pipeline.stores import overlapped
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import Receipt, unit_key
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work, outcome_line, run_job
from bytecache.schemas.errors import ConfigError, EngineError, InputError, IntegrityError
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.settings import BASELINES, Settings


def is_straight(settings: Settings) -> bool:
    """Whether the teacher's workers make the targets themselves."""
    return settings.teacher.keep == "targets"


def refuse_readers_of_dumps(settings: Settings) -> None:
    """Raises ConfigError for a student that reads what this mode does not keep."""
    if is_straight(settings) and settings.train.head in BASELINES:
        raise ConfigError(
            f"train.head = {settings.train.head!r} reads the teacher's tokens, which are in the dump alone, and "
            'teacher.keep = "targets" keeps none: set teacher.keep = "dump", or choose another head'
        )


def teach(context: Context) -> Outcome:
    """Do every unit of the teacher's that is not done yet: dump parts, or shards at once (`teacher.keep`)."""
    if not is_straight(context.settings):
        return teacher(context)
    job = straight_job(context, load_plan(context.store, context.settings))
    outcome = run_job(context.store, job, context.stop)
    context.save_config(f"{TARGETS}/{RESOLVED_FILE}", changed=outcome.made > 0, published=True, of=outcome.content)
    context.say(outcome_line("teacher, straight to targets", outcome))
    say_set_aside(context, outcome.receipts)
    return outcome


class _Shared(NamedTuple):
    """What all shards of a job have in common."""

    teacher: dict[str, Any]
    rendered: dict[str, str]
    shape: dict[str, object]
    format: list[Any]

    @classmethod
    def of(cls, settings: Settings, teacher: dict[str, Any], rendered: dict[str, str]) -> "_Shared":
        from bytecache.schemas.shard.codes import FORMAT, VERSION

        return cls(teacher, rendered, settings.convert.shaping_a_shard(), [FORMAT, VERSION])

    def inputs(self, planned: Plan, group: ShardGroup) -> dict[str, Any]:
        """What determines a shard."""
        return {
            "split": group.split,
            "slices": [planned.units[member].sha256 for member in group.members],
            "teacher": self.teacher,
            **self.rendered,
            "convert": self.shape,
            "format": self.format,
        }


def straight_job(context: Context, planned: Plan) -> Job:
    """One unit of work per shard. Raises ConfigError for settings that this mode cannot honour."""
    from bytecache.stages.convert.effort import coarser_effort

    kind = str(planned.settings.get("kind", "text"))
    refuse_readers_of_dumps(context.settings)
    settings = context.settings.model_copy(update={"teacher": settle_start(context, kind)})
    identity, rendered = find_identity(settings.teacher, kind)
    coarser_effort(settings.convert, TeacherIdentity.of(identity, context.store.name).settings)
    refuse_other_dataset(context, straight_identity(context, planned, identity), planned.edition)
    shared = _Shared.of(settings, identity, rendered)
    groups = numbered_groups(planned, settings.convert.shard_bytes)

    def task(index: int) -> Task:
        group = groups[index]
        inputs = shared.inputs(planned, group)
        out = f"{TARGETS}/{group.name}-{unit_key('convert', inputs)[:12]}.zarr.zip"
        return Task("convert", group.name, out, inputs, group.size, group)

    whole = {
        "plan": planned.hash,
        "teacher": identity,
        **rendered,
        "convert": settings.convert.shaping(),
        "format": shared.format,
        "keep": "targets",
    }
    opening = partial(_open_work, context, planned, settings, shared)
    return Job("convert", whole, [group.size for group in groups], task, opening, planned.edition)


@contextmanager
def _open_work(context: Context, planned: Plan, settings: Settings, shared: _Shared, stop: Any) -> Iterator[Work]:
    """An engine, and the conversion beside it."""
    from bytecache.stages.convert.beside import ConversionBeside
    from bytecache.stages.teacher.teacher import open_teacher

    code = receipts.code_fingerprint(*CONVERTER)[:16]
    beside = ConversionBeside(settings.convert)
    try:
        engine = open_teacher(settings.teacher)
        try:
            if engine.identity() != shared.teacher:
                raise EngineError(
                    f"teacher {settings.teacher.model} changed while it was loaded; rerun when it is at rest"
                )

            def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
                group: ShardGroup = task.payload
                units = [planned.units[member] for member in group.members]
                keys = [unit_key("teacher", unit_inputs(unit, shared.teacher, shared.rendered)) for unit in units]
                beside.begin(out, {"split": group.split, "convert": shared.shape, "units": [key[:12] for key in keys]})
                said: list[dict[str, Any]] = []
                for unit, key in zip(units, keys, strict=True):
                    name = unit_name(unit)
                    with opened_slice(context.store, unit) as piece:
                        open_sink = partial(_part_beside, beside, name, settings.teacher.resolved().rounding)
                        said.append(engine.evaluate_unit(piece, key, open_sink, stop, tick))
                return beside.finish(stop) | {"teacher": summed(said), "conversion_code": code}

            yield work
        finally:
            engine.close()
    finally:
        beside.close()


def _part_beside(beside: Any, name: str, divergence: float, meta: dict[str, Any]) -> Any:
    return beside.part(name, meta, divergence)


def summed(said: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several units (`Teacher.evaluate_unit`) as those of one."""
    total: dict[str, Any] = {"set_aside": {}, "set_aside_documents": []}
    for counts in said:
        for name, value in counts.items():
            if isinstance(value, dict):
                for reason, count in value.items():
                    total[name][reason] = total[name].get(reason, 0) + count
            elif isinstance(value, list):
                total[name] = (total[name] + value)[:100]
            else:
                total[name] = total.get(name, 0) + value
    return total


def find_shards(context: Context, planned: Plan) -> tuple[list[Receipt], list[Entry]]:
    """Sound receipts of every shard, made with the current settings, and units that workers set aside (none have any).

    Needs neither the model nor the engine. Raises InputError where shards are missing, ConfigError where only those of
    other settings are there, IntegrityError where a file is not as its receipt says.
    """
    store = context.store
    shape = context.settings.convert.shaping_a_shard()
    groups = numbered_groups(planned, context.settings.convert.shard_bytes)
    by_slices, differences = _receipts_by_slices(context, shape)
    wanted = [(group.split, *(planned.units[member].sha256 for member in group.members)) for group in groups]
    aside = {entry.unit: entry for entry in quarantined(store, Layout("convert", planned.edition))}
    missing = [number for number, slices in enumerate(wanted) if slices not in by_slices]
    lacking = [number for number in missing if number not in aside or not context.settings.convert.allow_quarantined]
    if lacking:
        if differences and len(missing) == len(wanted):
            raise ConfigError(
                f"{store.name} holds shards of other settings only ({differences}); restore them or run "
                "`bytecache teacher`"
            )
        set_aside = f", {len(aside)} set aside by workers (`bytecache status` names them)" if aside else ""
        raise InputError(
            f"{store.name} holds {len(wanted) - len(missing)} of {len(wanted)} shards{set_aside}; run `bytecache "
            "teacher` to make the others"
        )
    shards = [by_slices[slices] for slices in wanted if slices in by_slices]
    if len({unit_key("convert", {"teacher": shard.inputs["teacher"]}) for shard in shards}) > 1:
        raise ConfigError(
            f"{store.name} holds shards of several versions of this teacher or its software; delete the receipts of "
            f"those you do not want in {receipts.FOLDER}/convert"
        )
    for problems in overlapped(lambda receipt: receipts.problems(store, receipt), shards):
        if problems:
            raise IntegrityError(f"{'; '.join(problems)}; run `bytecache teacher` to make it again")
    gone = [
        Entry(member, aside[number].attempts, aside[number].reasons)
        for number in missing
        for member in groups[number].members
    ]
    return shards, gone


def _receipts_by_slices(context: Context, shape: dict[str, object]) -> tuple[dict[tuple[str, ...], Receipt], str]:
    """Receipts of shards that this mode made with the current settings, and what differs where others are there."""
    store = context.store
    by_slices: dict[tuple[str, ...], Receipt] = {}
    differences = ""
    for _, key in receipts.list_receipts(store, "convert"):
        try:
            receipt = receipts.read_receipt(store, "convert", key)
        except IntegrityError as error:
            context.say(f"convert: {error}")
            continue
        if receipt is None or receipts.key_fault(receipt) or "slices" not in receipt.inputs:
            continue
        identity = TeacherIdentity.of(receipt.inputs["teacher"], f"receipt {receipt.name}")
        changes = identity_changes(identity, context.settings.teacher)
        if receipt.inputs["convert"] != shape:
            changes = [*changes, "convert"]
        if changes:
            differences = "; ".join(changes)
            continue
        by_slices[(receipt.inputs["split"], *receipt.inputs["slices"])] = receipt
    return by_slices, differences
