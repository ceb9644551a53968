"""plan, teacher, convert: corpus to byte targets. Each takes a context and returns what it made.

A dump part's key holds its slice and the teacher's full identity; a shard's key holds the sha256 of its parts, the
settings of the conversion and a fingerprint of its code. Convert finds its parts by receipts, so it needs neither the
model nor the engine.
"""

from collections import defaultdict
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
    set_aside,
)
from bytecache.pipeline.commands.missing import describe, summary, units_aside
from bytecache.pipeline.config import changed_keys
from bytecache.pipeline.context import Context
from bytecache.pipeline.fleet.ledger import Layout
from bytecache.pipeline.fleet.quarantine import quarantined
from bytecache.pipeline.plan import make as planning
from bytecache.pipeline.plan.index import Plan, Split, Unit, load_plan
from bytecache.pipeline.stores import overlapped
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt, unit_key
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work, run_job
from bytecache.schemas.errors import ConfigError, EngineError, InputError, IntegrityError
from bytecache.schemas.files import file_sha256
from bytecache.schemas.settings import Teacher


def plan(context: Context) -> tuple[Plan, bool]:
    """Cut the corpus into slices; returns the plan and whether it is new."""
    context.store.sweep()
    made, new = planning.make_plan(context.store, context.settings, context.stop)
    context.save_config("plan/config.toml", changed=new)
    corpus = made.corpus
    skipped = f", {corpus['n_empty_skipped']} empty ones skipped" if corpus["n_empty_skipped"] else ""
    context.say(
        f"plan: {'new' if new else 'unchanged'}, {corpus['n_documents']} documents{skipped}, "
        f"{human_bytes(corpus['n_bytes'])} of text in {len(made.sizes)} units "
        f"({made.n_heldout} held out)"
    )
    return made, new


def teacher_job(context: Context, planned: Plan) -> Job:
    """One unit of work per unit of the plan."""
    from bytecache.stages.teacher.identity import resolve_model, teacher_identity
    from bytecache.stages.tokens.chat import template_sha256

    store, settings = context.store, context.settings
    identity = teacher_identity(settings.teacher)
    # Units of conversations depend on the chat template that they are rendered with.
    chat = planned.settings.get("kind") == "chat"
    rendered = {"template": template_sha256(resolve_model(settings.teacher))} if chat else {}
    group = unit_key("teacher", {**identity, **rendered})[:12]

    def task(index: int) -> Task:
        unit = planned.units[index]
        inputs = {"slice": unit.sha256, "teacher": identity, **rendered}
        name = f"{unit.index:05d}-{unit.split}"
        out = f"teacher/{name}-{unit_key('teacher', inputs)[:12]}.parquet"
        return Task("teacher", name, out, inputs, unit.n_bytes, group, unit)

    @contextmanager
    def open_work(stop: Callable[[], bool]) -> Iterator[Work]:
        from bytecache.stages.teacher.teacher import open_teacher

        engine = open_teacher(settings.teacher)

        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            unit: Unit = task.payload
            piece = store.get_path(unit.slice)
            if file_sha256(piece) != unit.sha256:
                raise IntegrityError(f"{piece}: content differs from the plan; run `bytecache plan` to repair it")
            counts = engine.dump_unit(piece, out, task.key, stop, tick)
            store.release(unit.slice)
            return counts

        try:
            if engine.identity() != identity:
                raise EngineError(
                    f"teacher {settings.teacher.model} changed while it was loaded; rerun when it is at rest"
                )
            yield work
        finally:
            engine.close()

    return Job("teacher", {"plan": planned.hash, "teacher": identity, **rendered}, planned.sizes, task, open_work)


def teacher(context: Context) -> Outcome:
    """Dump every unit that has no dump yet; the engine starts only if there is one."""
    job = teacher_job(context, load_plan(context.store, context.settings))
    outcome = run_job(context.store, job, context.stop)
    context.save_config("teacher/config.toml", changed=outcome.made > 0)
    context.say(_summary("teacher", outcome))
    aside = set_aside(outcome.receipts)
    if aside:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(aside.items()))
        context.say(f"teacher: documents set aside because its tokenizer cannot reproduce them ({reasons})")
    return outcome


def find_dumps(context: Context, planned: Plan) -> dict[int, Receipt]:
    """Sound dump receipts of every unit, made with the current teacher settings, in plan order.

    Units that workers set aside may be missing; what to make of that: `pipeline.commands.missing`.

    Raises InputError if some are missing, ConfigError if only dumps of other settings exist or several sets fit.
    """
    store, settings = context.store, context.settings
    groups: dict[str, dict[str, Receipt]] = defaultdict(dict)
    keys = [key for _, key in receipts.list_receipts(store, "teacher")]
    for receipt in overlapped(lambda key: receipts.read_receipt(store, "teacher", key), keys):
        if receipt is not None:
            groups[receipt.group][str(receipt.inputs.get("slice"))] = receipt
    wanted = {unit.index: unit.sha256 for unit in planned.units}
    aside = {entry.unit for entry in quarantined(store, Layout("teacher"))}
    fitting: dict[str, dict[int, Receipt]] = {}
    best, differences = 0, ""
    for group, by_slice in sorted(groups.items()):
        found = {index: by_slice[sha256] for index, sha256 in wanted.items() if sha256 in by_slice}
        if not found:
            continue
        changes = teacher_changes(next(iter(found.values())), settings.teacher)
        if changes:
            differences = "; ".join(changes)
            continue
        best = max(best, len(found))
        if wanted.keys() - found.keys() <= aside:
            fitting[group] = found
    if len(fitting) > 1:
        raise ConfigError(
            f"{store.name} holds whole dumps of {len(fitting)} versions of this teacher or its software "
            f"({', '.join(fitting)}); delete the receipts of those you do not want in {receipts.FOLDER}/teacher"
        )
    if fitting:
        (dumps,) = fitting.values()
        for problems in overlapped(lambda receipt: receipts.problems(store, receipt), dumps.values()):
            if problems:
                raise IntegrityError(f"{'; '.join(problems)}; run `bytecache teacher` to make it again")
        return dumps
    if differences and not best:
        raise ConfigError(
            f"{store.name} holds dumps of other teacher settings only ({differences}); "
            "restore them or run `bytecache teacher`"
        )
    raise InputError(
        f"{store.name} holds {best} of {len(wanted)} dump parts; run `bytecache teacher` to make the others"
    )


def teacher_changes(receipt: Receipt, settings: Teacher) -> list[str]:
    """How the settings that a dump was made with differ from the current ones."""
    return identity_changes(receipt.inputs["teacher"], settings)


def identity_changes(identity: dict[str, Any], settings: Teacher) -> list[str]:
    """How the settings in a teacher's identity differ from the current ones."""
    from bytecache.stages.teacher.identity import model_name

    old = {
        **identity.get("settings", {}),
        **{name: identity[name] for name in ("model", "revision") if name in identity},
    }
    now = settings.resolved().model_dump() | {"model": model_name(settings)}
    return list(changed_keys(old, {name: now[name] for name in old if name in now}))


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
    coarser_effort(settings.convert, identity.get("settings", {}))
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
    context.save_config(f"{TARGETS}/config.toml", changed=outcome.made > 0 or index_is_new)
    context.say(_summary("convert", outcome))
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


def _summary(stage: str, outcome: Outcome) -> str:
    size = sum(file.size for receipt in outcome.receipts for file in receipt.files)
    total = len(outcome.receipts)
    if not outcome.made:
        return f"{stage}: nothing to do, {total} of {total} units are whole ({human_bytes(size)})"
    return f"{stage}: {outcome.made} units made, {total - outcome.made} were already whole ({human_bytes(size)} in all)"
