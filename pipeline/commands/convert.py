"""`convert`: token dumps to byte-target shards and their index.

A shard's key holds the sha256 of its parts, the settings of the conversion and a fingerprint of its code. Convert finds
its parts by receipts, so it needs neither the model nor the engine.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.pipeline.commands.dataset import (
    CONVERTER,
    TARGETS,
    certificate,
    dataset_identity,
    dataset_info,
    publish_index,
    refuse_other_dataset,
)
from bytecache.pipeline.commands.editions import forget_parts
from bytecache.pipeline.commands.missing import describe, summary, units_aside
from bytecache.pipeline.commands.teacher import dump_groups, find_dumps
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan.index import Plan, Split, load_plan
from bytecache.pipeline.plan.slices import slice_ends
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt, unit_key
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work, outcome_line, run_job
from bytecache.schemas.errors import InputError, IntegrityError
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.settings import Convert


def shard_groups(planned: Plan, shard_bytes: int) -> list[tuple[str, list[int], int]]:
    """(split, units, bytes of text) of every shard: whole units in plan order, up to `shard_bytes` of text.

    Where a shard ends is for the content of the units to say, as it is for documents where a unit ends
    (`pipeline.plan.slices`): units that come or go in a new edition leave all shards but those around them as they are.
    """
    groups: list[tuple[str, list[int], int]] = []
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        members = np.array(planned.of_split(split), np.int64)
        sizes = np.array(planned.sizes, np.int64)[members]
        ends = slice_ends(sizes, planned.marks[members], shard_bytes, whole=True)
        for low, high in itertools.pairwise([0, *ends]):
            groups.append((split, members[low:high].tolist(), int(sizes[low:high].sum())))
    return groups


def _shape(settings: Convert) -> dict[str, Any]:
    """The settings that decide a shard once its parts are known."""
    return {name: value for name, value in settings.shaping().items() if name != "shard_bytes"}


def _format_and_code() -> dict[str, Any]:
    from bytecache.schemas.shard import reader as byte_shard

    return {"format": [byte_shard.FORMAT, byte_shard.VERSION], "code": receipts.code_fingerprint(*CONVERTER)[:16]}


def _inputs(settings: Convert, split: str, parts: Sequence[Receipt]) -> dict[str, Any]:
    """What determines a shard."""
    sources = [file.sha256 for part in parts for file in part.files]
    return {"split": split, "parts": sources, "convert": _shape(settings), **_format_and_code()}


def requeue_parts(context: Context, planned: Plan) -> list[str]:
    """Forget dump parts that convert.delete_dump removed and that a shard still to be made needs; returns their names.

    A shard of an older edition was made of them; after a change beside them another one may have to be.
    """
    store, requeued = context.store, list[str]()
    for by_slice in dump_groups(store)[0].values():
        if not any(receipt.deleted for receipt in by_slice.values()):
            continue
        for split, members, _ in shard_groups(planned, context.settings.convert.shard_bytes):
            parts = [by_slice.get(planned.units[member].sha256) for member in members]
            known = [part for part in parts if part is not None]
            key = unit_key("convert", _inputs(context.settings.convert, split, known))
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
    from bytecache.stages.convert.coarser import coarser_effort

    refuse_other_dataset(context, dataset_identity(context, planned, identity, missing), planned.edition)
    store, settings = context.store, context.settings
    coarser_effort(settings.convert, TeacherIdentity.of(identity, store.name).settings)
    shape = _shape(settings.convert)
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
        inputs = _inputs(settings.convert, split, parts)
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
                        "`bytecache plan` or `bytecache verify --repair`, then `bytecache teacher`"
                    )
                problems = receipts.problems(store, part)
                if problems:
                    raise IntegrityError(f"{'; '.join(problems)}; run `bytecache teacher` to make it again")
                paths += [store.get_path(file.path) for file in part.files]
            attrs = {"split": split, "convert": shape, "units": [part.key[:12] for part in parts]}
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
        **_format_and_code(),
        **({"missing": list(missing)} if missing else {}),
    }
    return Job("convert", shared, [size for _, _, size, _ in groups], task, open_work, planned.edition)


def convert(context: Context, dumps: list[Receipt] | None = None) -> Outcome:
    """Turn the dump into shards and publish the data set's index last. `dumps`: receipts, if just made."""
    from bytecache.stages.fidelity.certificate import summary_line

    planned = load_plan(context.store, context.settings)
    found = dict(enumerate(dumps)) if dumps is not None else find_dumps(context, planned)
    aside = units_aside(context, planned, found.__contains__)
    parts = list(found.values())
    info = dataset_info(context, planned, parts, describe(context, planned, aside))
    job = convert_job(context, planned, info["teacher"], found.__getitem__, [one.unit for one in aside])
    outcome = run_job(context.store, job, context.stop)
    index_is_new = publish_index(context, outcome.receipts, info)
    context.save_config(f"{TARGETS}/config.toml", changed=outcome.made > 0 or index_is_new, published=True)
    context.say(outcome_line("convert", outcome))
    if planned.edition > 1:
        context.say(
            f"convert: edition {planned.edition} of the data set, after {info['edition']['parent'][:12] or 'none'}"
        )
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
