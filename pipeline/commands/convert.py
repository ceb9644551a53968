"""`convert`: token dumps to byte-target shards and their index.

A shard's key holds the sha256 of its parts, the settings of the conversion and a fingerprint of its code. Convert finds
its parts by receipts, so it needs neither the model nor the engine.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bytecache.pipeline.commands.dataset import (
    CONVERTER,
    TARGETS,
    certificate,
    dataset_identity,
    dataset_info,
    publish_index,
    refuse_other_dataset,
)
from bytecache.pipeline.commands.missing import describe, summary, units_aside
from bytecache.pipeline.commands.teacher import find_dumps
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan.index import Plan, Split, load_plan
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt, unit_key
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work, outcome_line, run_job
from bytecache.schemas.errors import InputError, IntegrityError
from bytecache.schemas.identity import TeacherIdentity


def shard_groups(planned: Plan, shard_bytes: int) -> list[tuple[str, list[int], int]]:
    """(split, units, bytes of text) of every shard: whole units in plan order, up to `shard_bytes` of text."""
    groups: list[tuple[str, list[int], int]] = []
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
    from bytecache.schemas.shard import reader as byte_shard
    from bytecache.stages.convert.coarser import coarser_effort

    refuse_other_dataset(context, dataset_identity(context, planned, identity, missing))
    store, settings = context.store, context.settings
    coarser_effort(settings.convert, TeacherIdentity.of(identity, store.name).settings)
    shape = {name: value for name, value in settings.convert.shaping().items() if name != "shard_bytes"}
    code = receipts.code_fingerprint(*CONVERTER)[:16]
    cut = shard_groups(planned, settings.convert.shard_bytes)
    n_train = sum(split == "train" for split, _, _ in cut)
    numbers = [index - (0 if split == "train" else n_train) for index, (split, _, _) in enumerate(cut)]
    groups = [
        (split, kept, sum(planned.sizes[member] for member in kept), number)
        for (split, members, _), number in zip(cut, numbers, strict=True)
        if (kept := [member for member in members if member not in missing])
    ]

    def task(index: int) -> Task:
        split, members, size, number = groups[index]
        parts = [dump(member) for member in members]
        inputs = {
            "split": split,
            "parts": [file.sha256 for part in parts for file in part.files],
            "convert": shape,
            "format": [byte_shard.FORMAT, byte_shard.VERSION],
            "code": code,
        }
        name = f"{split}-{number:05d}"
        out = f"{TARGETS}/{name}-{unit_key('convert', inputs)[:12]}.zarr.zip"
        return Task("convert", name, out, inputs, size, payload=(split, parts))

    @contextmanager
    def open_work(stop: Callable[[], bool]) -> Iterator[Work]:
        from bytecache.stages.convert.convert import convert_units

        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            split, parts = task.payload
            paths = []
            for part in parts:
                if part.deleted:
                    raise InputError(
                        f"{task.name} needs the dump part {part.name}, which convert.delete_dump removed; run "
                        "`bytecache verify --repair`, then `bytecache teacher`, or choose a new run.dir"
                    )
                problems = receipts.problems(store, part)
                if problems:
                    raise IntegrityError(f"{'; '.join(problems)}; run `bytecache teacher` to make it again")
                paths += [store.get_path(file.path) for file in part.files]
            attrs = {"split": split, "convert": shape, "units": [part.name for part in parts]}
            counts = convert_units(paths, out, settings.convert, attrs, stop, tick)
            for part in parts:
                for file in part.files:
                    store.release(file.path)
            return counts

        yield work

    shared = {
        "plan": planned.hash,
        "teacher": identity,
        "convert": settings.convert.shaping(),
        "format": [byte_shard.FORMAT, byte_shard.VERSION],
        "code": code,
        **({"missing": list(missing)} if missing else {}),
    }
    return Job("convert", shared, [size for _, _, size, _ in groups], task, open_work)


def convert(context: Context, dumps: list[Receipt] | None = None) -> Outcome:
    """Turn the dump into shards and publish the data set's index last. `dumps`: receipts, if just made."""
    from bytecache.stages.fidelity.certificate import summary_line

    planned = load_plan(context.store, context.settings)
    found = dict(enumerate(dumps)) if dumps is not None else find_dumps(context, planned)
    aside = units_aside(context, found.__contains__)
    parts = list(found.values())
    info = dataset_info(context, planned, parts, describe(context, planned, aside))
    job = convert_job(context, planned, info["teacher"], found.__getitem__, [one.unit for one in aside])
    outcome = run_job(context.store, job, context.stop)
    index_is_new = publish_index(context, outcome.receipts, info)
    context.save_config(f"{TARGETS}/config.toml", changed=outcome.made > 0 or index_is_new, published=True)
    context.say(outcome_line("convert", outcome))
    context.say(summary_line(certificate(outcome.receipts, info["teacher"])))
    if aside:
        context.say(f"convert: {summary(info['creation']['missing'])}")
    if context.settings.convert.delete_dump:
        _delete_dump(context, parts)
    return outcome


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
