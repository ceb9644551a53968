"""`convert`: token dumps to byte-target shards and their index.

A shard's key holds the sha256 of its parts, the settings of the conversion and a fingerprint of its code. Convert finds
its parts by receipts, so it needs neither the model nor the engine.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bytecache.pipeline.commands.dataset import (
    CONVERTER,
    TARGETS,
    certificate,
    dataset_identity,
    dataset_info,
    keep_settings,
    publish_index,
    refuse_other_dataset,
)
from bytecache.pipeline.commands.editions import forget_parts
from bytecache.pipeline.commands.groups import numbered_groups
from bytecache.pipeline.commands.missing import describe, summary, units_aside
from bytecache.pipeline.commands.straight import find_shards, is_straight
from bytecache.pipeline.commands.teacher import dump_groups, find_dumps
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan.index import Plan, load_plan
from bytecache.pipeline.stores import Store, refuse_no_file
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt, unit_key
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work, outcome_line, run_job
from bytecache.schemas.errors import InputError, IntegrityError
from bytecache.schemas.identity import TeacherIdentity


def _format_and_code() -> dict[str, Any]:
    from bytecache.schemas.shard.codes import FORMAT, VERSION

    return {"format": [FORMAT, VERSION], "code": receipts.code_fingerprint(*CONVERTER)[:16]}


def _inputs(shape: dict[str, object], common: dict[str, Any], split: str, parts: Sequence[Receipt]) -> dict[str, Any]:
    """What determines a shard."""
    sources = [file.sha256 for part in parts for file in part.files]
    return {"split": split, "parts": sources, "convert": shape, **common}


def requeue_parts(context: Context, planned: Plan) -> list[str]:
    """Forget dump parts that convert.delete_dump removed and that a shard still to be made needs; returns their names.

    A shard of an older edition was made of them; after a change beside them another one may have to be.
    """
    store, requeued = context.store, list[str]()
    shape, common = context.settings.convert.shaping_a_shard(), _format_and_code()
    for by_slice in dump_groups(store)[0].values():
        if not any(receipt.deleted for receipt in by_slice.values()):
            continue
        for group in numbered_groups(planned, context.settings.convert.shard_bytes):
            parts = [by_slice.get(planned.units[member].sha256) for member in group.members]
            known = [part for part in parts if part is not None]
            key = unit_key("convert", _inputs(shape, common, group.split, known))
            if len(known) < len(parts) or not store.exists(receipts.receipt_path("convert", key)):
                requeued += forget_parts(store, known)
    return requeued


def convert_job(
    context: Context,
    planned: Plan,
    identity: dict[str, Any],
    dump: Callable[[int], Receipt],
    missing: Sequence[int] = (),
) -> Job:
    """One unit of work per shard. `identity`: the teacher's; `dump(i)`: the receipt of the plan's unit i.

    `missing`: units of the plan to go without; shards that hold none of them are the same as with all units.
    Raises ConfigError if another data set was published here.
    """
    from bytecache.stages.convert.effort import coarser_effort

    refuse_other_dataset(context, dataset_identity(context, planned, identity, missing), planned.edition)
    settings = context.settings.convert
    coarser_effort(settings, TeacherIdentity.of(identity, context.store.name).settings)
    shape, common = settings.shaping_a_shard(), _format_and_code()
    groups = numbered_groups(planned, settings.shard_bytes, frozenset(missing))

    def task(index: int) -> Task:
        group = groups[index]
        parts = [dump(member) for member in group.members]
        inputs = _inputs(shape, common, group.split, parts)
        out = f"{TARGETS}/{group.name}-{unit_key('convert', inputs)[:12]}.zarr.zip"
        return Task("convert", group.name, out, inputs, group.size, payload=(group.split, parts))

    shared = {
        "plan": planned.hash,
        "teacher": identity,
        "convert": settings.shaping(),
        **common,
        **({"missing": list(missing)} if missing else {}),
    }
    opening = partial(_open_work, context, shape)
    return Job("convert", shared, [group.size for group in groups], task, opening, planned.edition)


@contextmanager
def _open_work(context: Context, shape: dict[str, object], stop: Callable[[], bool]) -> Iterator[Work]:
    """Converts the dump parts of a task's payload, with the settings `shape` among the shard's attributes."""
    from bytecache.stages.convert.convert import convert_units

    store = context.store

    def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
        split, parts = task.payload
        paths = [path for part in parts for path in _part_files(store, part, task.name)]
        attrs = {"split": split, "convert": shape, "units": [part.key[:12] for part in parts]}
        counts = convert_units(paths, out, context.settings.convert, attrs, stop, tick)
        for part in parts:
            for file in part.files:
                store.release(file.path)
        return counts

    yield work


def _part_files(store: Store, part: Receipt, shard: str) -> list[Path]:
    """A dump part's files on this machine. Raises InputError where it was deleted, IntegrityError if it is damaged."""
    if part.deleted:
        raise InputError(
            f"{shard} needs the dump part {part.name}, which convert.delete_dump removed; run "
            "`bytecache plan` or `bytecache verify --repair`, then `bytecache teacher`"
        )
    refuse_no_file(store, *(file.path for file in part.files))
    problems = receipts.problems(store, part)
    if problems:
        raise IntegrityError(f"{'; '.join(problems)}; run `bytecache teacher` to make it again")
    return [store.get_path(file.path) for file in part.files]


def convert(context: Context, dumps: list[Receipt] | None = None) -> Outcome:
    """Turn the dump into shards and publish the data set's index last. `dumps`: receipts, if just made.

    Where the teacher's workers made the shards (`teacher.keep`) only the index is left to publish.
    """
    if is_straight(context.settings):
        return publish_straight(context)
    planned = load_plan(context.store, context.settings)
    dump_of = dict(enumerate(dumps)) if dumps is not None else find_dumps(context, planned)
    aside = units_aside(context, planned, dump_of.__contains__)
    parts = list(dump_of.values())
    info = dataset_info(context, planned, parts, describe(context, planned, aside))
    job = convert_job(context, planned, info["teacher"], dump_of.__getitem__, [one.unit for one in aside])
    outcome = run_job(context.store, job, context.stop)
    _publish(context, outcome, info)
    if context.settings.convert.delete_dump:
        _delete_dump(context, parts)
    return outcome


def publish_straight(context: Context) -> Outcome:
    """Publish the index of shards that the teacher's workers made; see `find_shards` for what it raises."""
    planned = load_plan(context.store, context.settings)
    shards, aside = find_shards(context, planned)
    info = dataset_info(context, planned, shards, describe(context, planned, aside))
    refuse_other_dataset(context, info, planned.edition)
    outcome = Outcome(shards, 0)
    _publish(context, outcome, info)
    return outcome


def _publish(context: Context, outcome: Outcome, info: dict[str, Any]) -> None:
    """The index over the shards of `outcome`, and what there is to say of them."""
    from bytecache.stages.fidelity.certificate import summary_line

    index_is_new = publish_index(context, outcome.receipts, info)
    keep_settings(context, changed=outcome.made > 0 or index_is_new)
    context.say(outcome_line("convert", outcome))
    edition = info["edition"]
    if edition["number"] > 1:
        context.say(f"convert: edition {edition['number']} of the data set, after {edition['parent'][:12] or 'none'}")
    context.say(summary_line(certificate(outcome.receipts, info["teacher"])))
    if missing := info["creation"].get("missing"):
        context.say(f"convert: {summary(missing)}")


def _delete_dump(context: Context, dumps: list[Receipt]) -> None:
    """Remove the dump of a published data set whose every byte was read back. Raises IntegrityError if one differs."""
    from bytecache.schemas.dataset.verification import verify_dataset

    if all(receipt.deleted and not context.store.exists(file.path) for receipt in dumps for file in receipt.files):
        return
    problems = verify_dataset(context.store.folder(TARGETS), deep=True)
    if problems:
        listed = "; ".join(f"{problem.file}: {problem.detail}" for problem in problems[:3])
        raise IntegrityError(f"the dump is kept, since its targets are not whole ({listed}); run `verify --repair`")
    freed = sum(receipts.delete_files(context.store, receipt) for receipt in dumps)
    context.say(f"convert: the targets are whole, the dump is deleted ({human_bytes(freed)})")
