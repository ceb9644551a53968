"""plan, teacher, convert: corpus to byte targets. Each takes a context and returns what it made.

A dump part's key holds its slice and the teacher's full identity; a shard's key holds the sha256 of its parts, the
settings of the conversion and a fingerprint of its code. Convert finds its parts by receipts, so it needs neither the
model nor the engine.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import receipts, units
from pipeline.config import changed_keys
from pipeline.context import Context
from pipeline.progress import human_bytes
from pipeline.receipts import Receipt, unit_key
from pipeline.runner import Job, Outcome, Task, Tick, Work, run_job
from pipeline.stores import Store, sha256_file
from pipeline.units import Plan, Unit
from schemas.errors import ConfigError, EngineError, InputError, IntegrityError
from schemas.settings import Teacher

if TYPE_CHECKING:
    from schemas.manifest import Dataset

TARGETS = "targets"
CONVERTER = (
    "stages.convert", "stages.lattice", "stages.fidelity", "stages.divergence",
    "schemas.shard_builder", "schemas.gather", "schemas.prior", "schemas.quantise", "schemas.packing",
    "schemas.byte_shard", "schemas.expansion", "schemas.zarr_zip",
)  # fmt: skip
"""Modules whose code decides the bytes of a shard and the figures of its certificate."""
_RESTATED = ("name", "license", "corpus_license", "teacher_license", "attribution")
"""What an index says about its shards that may be corrected afterwards."""


def plan(context: Context) -> tuple[Plan, bool]:
    """Cut the corpus into slices; returns the plan and whether it is new."""
    context.store.sweep()
    made, new = units.make_plan(context.store, context.settings, context.stop)
    context.save_config("plan/config.toml", changed=new)
    corpus = made.corpus
    skipped = f", {corpus['n_empty_skipped']} empty ones skipped" if corpus["n_empty_skipped"] else ""
    context.say(
        f"plan: {'new' if new else 'unchanged'}, {corpus['n_documents']} documents{skipped}, "
        f"{human_bytes(corpus['n_bytes'])} of text in {len(made.units)} units "
        f"({sum(unit.split == 'heldout' for unit in made.units)} held out)"
    )
    return made, new


def teacher_job(context: Context, planned: Plan) -> Job:
    """One unit of work per unit of the plan."""
    from stages.chat import template_sha256
    from stages.identity import resolve_model, teacher_identity

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
        from stages.teacher import open_teacher

        engine = open_teacher(settings.teacher)

        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            unit: Unit = task.payload
            piece = store.get_path(unit.slice)
            if sha256_file(piece) != unit.sha256:
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

    measures = [unit.n_bytes for unit in planned.units]
    return Job("teacher", {"plan": planned.hash, "teacher": identity, **rendered}, measures, task, open_work)


def teacher(context: Context) -> Outcome:
    """Dump every unit that has no dump yet; the engine starts only if there is one."""
    job = teacher_job(context, units.load_plan(context.store, context.settings))
    outcome = run_job(context.store, job, context.stop)
    context.save_config("teacher/config.toml", changed=outcome.made > 0)
    context.say(_summary("teacher", outcome))
    aside = set_aside(outcome.receipts)
    if aside:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(aside.items()))
        context.say(f"teacher: documents set aside because its tokenizer cannot reproduce them ({reasons})")
    return outcome


def set_aside(dumps: list[Receipt]) -> dict[str, int]:
    """Documents set aside by reason, over dump receipts."""
    found: dict[str, int] = defaultdict(int)
    for receipt in dumps:
        for reason, count in receipt.counts.get("set_aside", {}).items():
            found[reason] += count
    return dict(found)


def find_dumps(context: Context, planned: Plan) -> list[Receipt]:
    """Sound dump receipts of every unit, made with the current teacher settings, in plan order.

    Raises InputError if some are missing, ConfigError if only dumps of other settings exist or several sets fit.
    """
    store, settings = context.store, context.settings
    groups: dict[str, dict[str, Receipt]] = defaultdict(dict)
    for _, key in receipts.list_receipts(store, "teacher"):
        receipt = receipts.read_receipt(store, "teacher", key)
        if receipt is not None:
            groups[receipt.group][str(receipt.inputs.get("slice"))] = receipt
    wanted = [unit.sha256 for unit in planned.units]
    fitting: dict[str, list[Receipt]] = {}
    best, differences = 0, ""
    for group, by_slice in sorted(groups.items()):
        found = [by_slice[sha256] for sha256 in wanted if sha256 in by_slice]
        if not found:
            continue
        changes = teacher_changes(found[0], settings.teacher)
        if changes:
            differences = "; ".join(changes)
            continue
        best = max(best, len(found))
        if len(found) == len(wanted):
            fitting[group] = found
    if len(fitting) > 1:
        raise ConfigError(
            f"{store.name} holds whole dumps of {len(fitting)} versions of this teacher or its software "
            f"({', '.join(fitting)}); delete the receipts of those you do not want in {receipts.FOLDER}/teacher"
        )
    if fitting:
        (dumps,) = fitting.values()
        for receipt in dumps:
            problems = receipts.problems(store, receipt)
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
    from stages.identity import model_name

    old = {
        **identity.get("settings", {}),
        **{name: identity[name] for name in ("model", "revision") if name in identity},
    }
    now = settings.resolved().model_dump() | {"model": model_name(settings)}
    return list(changed_keys(old, {name: now[name] for name in old if name in now}))


def shard_groups(planned: Plan, shard_bytes: int) -> list[tuple[str, list[int], int]]:
    """(split, units, bytes of text) of every shard: whole units in plan order, up to `shard_bytes` of text."""
    groups: list[tuple[str, list[int], int]] = []
    for split in ("train", "heldout"):
        parts: list[int] = []
        size = 0
        for index, unit in enumerate(planned.units):
            if unit.split != split:
                continue
            if parts and size + unit.n_bytes > shard_bytes:
                groups.append((split, parts, size))
                parts, size = [], 0
            parts.append(index)
            size += unit.n_bytes
        if parts:
            groups.append((split, parts, size))
    return groups


def convert_job(context: Context, planned: Plan, identity: dict[str, Any], dump: Callable[[int], Receipt]) -> Job:
    """One unit of work per shard. `identity`: the teacher's; `dump(i)`: the receipt of the plan's unit i."""
    from schemas import byte_shard

    store, settings = context.store, context.settings
    shape = settings.convert.model_dump(exclude={"shard_bytes", "delete_dump"})
    code = receipts.code_fingerprint(*CONVERTER)[:16]
    groups = shard_groups(planned, settings.convert.shard_bytes)
    first = {"train": 0, "heldout": sum(split == "train" for split, _, _ in groups)}

    def task(index: int) -> Task:
        split, members, size = groups[index]
        parts = [dump(member) for member in members]
        inputs = {
            "split": split,
            "parts": [file.sha256 for part in parts for file in part.files],
            "convert": shape,
            "format": [byte_shard.FORMAT, byte_shard.VERSION],
            "code": code,
        }
        name = f"{split}-{index - first[split]:05d}"
        out = f"{TARGETS}/{name}-{unit_key('convert', inputs)[:12]}.zarr.zip"
        return Task("convert", name, out, inputs, size, payload=(split, parts))

    @contextmanager
    def open_work(stop: Callable[[], bool]) -> Iterator[Work]:
        from stages.convert import convert_units

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
        "convert": settings.convert.model_dump(exclude={"delete_dump"}),
        "format": [byte_shard.FORMAT, byte_shard.VERSION],
        "code": code,
    }
    return Job("convert", shared, [size for _, _, size in groups], task, open_work)


def convert(context: Context, dumps: list[Receipt] | None = None) -> Outcome:
    """Turn the dump into shards and publish the data set's index last. `dumps`: receipts, if just made."""
    from stages.fidelity import summary_line

    planned = units.load_plan(context.store, context.settings)
    found = dumps if dumps is not None else find_dumps(context, planned)
    info = _dataset_info(context, planned, found)
    refuse_other_dataset(context, info)
    job = convert_job(context, planned, info["teacher"], lambda index: found[index])
    outcome = run_job(context.store, job, context.stop)
    index_is_new = _publish_index(context, outcome.receipts, info)
    context.save_config(f"{TARGETS}/config.toml", changed=outcome.made > 0 or index_is_new)
    context.say(_summary("convert", outcome))
    context.say(summary_line(_certificate(outcome.receipts, info["teacher"])))
    if context.settings.convert.delete_dump:
        _delete_dump(context, found)
    return outcome


def _certificate(shards: list[Receipt], teacher: dict[str, Any]) -> dict[str, Any] | None:
    """The fidelity of all shards together; None where no dump part had reference windows."""
    from stages.fidelity import Fidelity

    reference: dict[str, Any] = next((r.counts["reference"] for r in shards if r.counts.get("reference")), {})
    return Fidelity(receipt.counts.get("fidelity") for receipt in shards).certificate(teacher, reference)


def _delete_dump(context: Context, dumps: list[Receipt]) -> None:
    """Remove the dump of a published data set whose every byte was read back. Raises IntegrityError if one differs."""
    from schemas.verification import verify_dataset

    if all(receipt.deleted and not context.store.exists(file.path) for receipt in dumps for file in receipt.files):
        return
    problems = verify_dataset(context.store.folder(TARGETS), deep=True)
    if problems:
        listed = "; ".join(f"{problem.file}: {problem.detail}" for problem in problems[:3])
        raise IntegrityError(f"the dump is kept, since its targets are not whole ({listed}); run `verify --repair`")
    freed = sum(receipts.delete_files(context.store, receipt) for receipt in dumps)
    context.say(f"convert: the targets are whole, the dump is deleted ({human_bytes(freed)})")


def dataset_identity(context: Context, planned: Plan, teacher: dict[str, Any]) -> dict[str, Any]:
    """What tells one data set from another: whose targets, of which text, how converted. `teacher`: its identity."""
    return {
        "teacher": teacher,
        "corpus": planned.corpus,
        "settings": {
            "plan": planned.settings,
            "convert": context.settings.convert.model_dump(exclude={"delete_dump"}),
            "conversion_code": receipts.code_fingerprint(*CONVERTER)[:16],
        },
    }


def _dataset_info(context: Context, planned: Plan, dumps: list[Receipt]) -> dict[str, Any]:
    """What the index says about where its targets came from; `software` and `creation` explain, the rest identifies."""
    identity = dumps[0].inputs["teacher"]
    return {
        **dataset_identity(context, planned, identity),
        "tokenizer": {
            "vocabulary_sha256": identity.get("vocabulary", ""),
            **{name: dumps[0].inputs[name] for name in ("template",) if name in dumps[0].inputs},
        },
        "software": receipts.software_versions(),
        "creation": {"plan": planned.hash, "set_aside": set_aside(dumps)},
        "name": context.settings.dataset.name,
        "license": context.settings.dataset.license,
        "corpus_license": context.settings.corpus.license,
        "teacher_license": context.settings.dataset.teacher_license,
        "attribution": context.settings.corpus.attribution,
    }


def read_index(store: Store) -> "Dataset | None":
    """The index of the data set in a run, or None if none was published; shards are not touched.

    Raises IntegrityError if it is damaged.
    """
    from schemas.manifest import DATASET, MANIFEST, read_dataset

    if not store.exists(f"{TARGETS}/{DATASET}"):
        return None
    if store.exists(f"{TARGETS}/{MANIFEST}"):  # absent: read_dataset says so
        store.get_path(f"{TARGETS}/{MANIFEST}")
    return read_dataset(store.get_path(f"{TARGETS}/{DATASET}").parent)


def refuse_other_dataset(context: Context, info: dict[str, Any]) -> None:
    """A published data set is never changed: somebody may be reading it. `info`: see `dataset_identity`."""
    try:
        dataset = read_index(context.store)
        old = dataset.info if dataset else info
    except IntegrityError:
        return  # a damaged index is rebuilt
    changes: list[str] = []
    for name in ("teacher", "corpus", "settings"):
        changes += changed_keys(_flat(old.get(name, {})), _flat(info[name]))
    if changes:
        raise ConfigError(
            f"{context.store.name}/{TARGETS} holds a data set made otherwise ({'; '.join(changes[:4])}); restore that, "
            "delete the folder, or choose a new run.dir"
        )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _publish_index(context: Context, shards: list[Receipt], info: dict[str, Any]) -> bool:
    """Write manifest.parquet and dataset.json unless they already say the same; True if written."""
    from schemas import card
    from schemas.manifest import ShardEntry, index_documents

    store = context.store
    entries = []
    for receipt in shards:
        (file,) = receipt.files
        fixed = {
            "file": Path(file.path).name,
            "split": receipt.inputs["split"],
            "sha256": file.sha256,
            "size": file.size,
            "key": receipt.key,
        }
        counted = {name: receipt.counts[name] for name in ShardEntry.model_fields if name not in fixed}
        entries.append(ShardEntry(**fixed, **counted))
    if not any(entry.n_documents for entry in entries if entry.split == "train"):
        raise InputError(
            "the teacher's tokenizer could reproduce no training document; choose another teacher, or clean the corpus "
            f"(reasons: {info['creation']['set_aside']})"
        )
    certificate = _certificate(shards, info["teacher"])
    with suppress(IntegrityError):
        dataset = read_index(store)
        if (
            dataset is not None
            and dataset.fidelity == certificate
            and all(dataset.info.get(name) == info[name] for name in _RESTATED)
            and sorted(dataset.entries, key=_by_file) == sorted(entries, key=_by_file)
        ):
            return False
    # Shards of a conversion with other settings that was never published; an index must list all of its folder.
    listed = {entry.file for entry in entries}
    for key in list(store.list(TARGETS)):
        if key.endswith(".zarr.zip") and Path(key).name not in listed:
            store.delete(key)
    keys = {receipt.key for receipt in shards}
    for _, key in list(receipts.list_receipts(store, "convert")):
        if key not in keys:
            store.delete(receipts.receipt_path("convert", key))
    for name, raw in index_documents(entries, info, certificate).items():
        key = f"{TARGETS}/{name}"
        if name == card.FILE and store.exists(key) and not card.is_ours(store.get_path(key)):
            continue  # somebody wrote their own
        store.replace(key, store.write_temp(name, raw))
    return True


def _by_file(entry: Any) -> str:
    return str(entry.file)


def _summary(stage: str, outcome: Outcome) -> str:
    size = sum(file.size for receipt in outcome.receipts for file in receipt.files)
    total = len(outcome.receipts)
    if not outcome.made:
        return f"{stage}: nothing to do, {total} of {total} units are whole ({human_bytes(size)})"
    return f"{stage}: {outcome.made} units made, {total - outcome.made} were already whole ({human_bytes(size)} in all)"
