"""`teacher`: one token dump for each slice. A dump part's key holds its slice and the teacher's full identity."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bytecache.pipeline.commands.dataset import set_aside
from bytecache.pipeline.config import changed_keys
from bytecache.pipeline.context import Context
from bytecache.pipeline.fleet.ledger import Layout, read_json
from bytecache.pipeline.fleet.quarantine import quarantined
from bytecache.pipeline.plan.index import Plan, Unit, load_plan
from bytecache.pipeline.stores import Store, overlapped, refuse_no_files_in
from bytecache.pipeline.units import documents, receipts
from bytecache.pipeline.units.receipts import Receipt, unit_key
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work, outcome_line, run_job, warn_user
from bytecache.schemas.errors import ConfigError, EngineError, InputError, IntegrityError
from bytecache.schemas.files import file_sha256
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.settings import Teacher
from bytecache.stages.models.locate import model_name, public_name, resolve_model
from bytecache.stages.models.remembered import remembered

_NAMED = ("adapter", "noise")
"""Settings that an identity states by their public names, where they are set."""
START_FOLDER = "teacher/start"
"""Where a run keeps which start token was measured to be best."""


def teacher_job(context: Context, planned: Plan) -> Job:
    """One unit of work per unit of the plan."""
    store = context.store
    kind = str(planned.settings.get("kind", "text"))
    settings = context.settings.model_copy(update={"teacher": settle_start(context, kind)})
    identity, rendered = find_identity(settings.teacher, kind)

    def task(index: int) -> Task:
        unit = planned.units[index]
        inputs = unit_inputs(unit, identity, rendered)
        name = unit_name(unit)
        out = f"teacher/{name}-{unit_key('teacher', inputs)[:12]}.parquet"
        return Task("teacher", name, out, inputs, unit.n_bytes, unit)

    @contextmanager
    def open_work(stop: Callable[[], bool]) -> Iterator[Work]:
        from bytecache.stages.teacher.teacher import open_teacher

        engine = open_teacher(settings.teacher)

        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            with opened_slice(store, task.payload) as piece:
                return engine.dump_unit(piece, out, task.key, stop, tick)

        try:
            if engine.identity() != identity:
                raise EngineError(
                    f"teacher {settings.teacher.model} changed while it was loaded; rerun when it is at rest"
                )
            yield work
        finally:
            engine.close()

    shared = {"plan": planned.hash, "teacher": identity, **rendered}
    return Job("teacher", shared, planned.sizes, task, open_work, planned.edition)


def unit_name(unit: Unit) -> str:
    """What a unit of the plan is called in receipts and in the attributes of its shard."""
    return f"{unit.index:05d}-{unit.split}"


def unit_inputs(unit: Unit, identity: dict[str, Any], rendered: dict[str, str]) -> dict[str, Any]:
    """What determines a unit's dump part, and which stretch of it is the reference; see `find_identity`."""
    return {"slice": unit.sha256, "teacher": identity, **rendered}


@contextmanager
def opened_slice(store: Store, unit: Unit) -> Iterator[Path]:
    """The unit's text, checked against the plan; released at the end. Raises IntegrityError."""
    piece = store.get_path(unit.slice)
    if file_sha256(piece) != unit.sha256:
        raise IntegrityError(f"{piece}: content differs from the plan; run `bytecache plan` to repair it")
    yield piece
    store.release(unit.slice)


def settle_start(context: Context, kind: str) -> Teacher:
    """The teacher's settings with the start token that all workers of this run take (`stages.teacher.start`).

    Where `teacher.start` is "auto", whoever comes first measures it and the run keeps the record, one a teacher; in
    conversations the template decides.
    """
    settings, store = context.settings.teacher, context.store
    if settings.start != "auto" or kind == "chat" or settings.is_remote:
        return settings
    asked, key = _start_record(settings)
    if not store.exists(key):
        from bytecache.stages.teacher.check import check_teacher
        from bytecache.stages.teacher.start import measured_start

        check_teacher(settings)
        if documents.was_written(store, key):
            context.say(f"teacher: {key} was missing, the start token is measured again")
        measured = measured_start(settings)
        if store.put_json_if_absent(key, {**measured, "teacher": asked}):
            context.say(f"teacher: {start_line(measured)}")
    record = _whole_start(store, key)
    if record is None:
        raise IntegrityError(
            f"{store.name}: {key} is not as it was written; run `bytecache verify --repair` to set it aside, or "
            "delete it, and rerun the same command"
        )
    if not documents.was_written(store, key):
        documents.vouch_for(store, key)
    return settings.model_copy(update={"start": record["start"]})


def _start_record(settings: Teacher) -> tuple[dict[str, Any], str]:
    """What a measured start depends on as far as settings say, and where a run keeps it."""
    asked = settings.model_dump(include={"revision", "backend", "dtype", "end"}) | {"model": model_name(settings)}
    asked |= {"adapter": public_name(settings.adapter)} if settings.adapter else {}
    return asked, f"{START_FOLDER}/{unit_key('start', asked)[:12]}.json"


def _whole_start(store: Store, key: str) -> dict[str, Any] | None:
    """A record as it was written, or None; one altered token would be another teacher's identity."""
    record = read_json(store, key)
    altered = documents.was_written(store, key) and not documents.is_whole(store, key)
    return None if altered or record is None or not isinstance(record.get("start"), str) else record


def known_start(context: Context, kind: str) -> dict[str, Any] | None:
    """The record of this run's start token, if it was measured already."""
    settings = context.settings.teacher
    if settings.start != "auto" or kind == "chat" or settings.is_remote:
        return None
    return _whole_start(context.store, _start_record(settings)[1])


def start_line(record: dict[str, Any]) -> str:
    """A record of `stages.teacher.start` for people."""
    start, bits = record.get("start"), record.get("bits_per_byte") or {}
    if start not in bits:
        return "documents start with the configured token, the only plausible one"
    others = ", ".join(f"{name or 'none'} {value:.3f}" for name, value in bits.items() if name != start)
    return f"documents start with {start}: {bits[start]:.3f} bits/byte on a sample ({others})"


def find_identity(settings: Teacher, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The teacher's identity, and what units of this `corpus.kind` depend on besides; loads a checkpoint only once."""
    folder = resolve_model(settings)

    def identity() -> dict[str, Any]:
        from bytecache.stages.teacher.check import check_teacher
        from bytecache.stages.teacher.identity import teacher_identity

        check_teacher(settings)
        return teacher_identity(settings)

    def template() -> str:
        from bytecache.stages.tokens.chat import template_sha256

        return template_sha256(folder)

    asked = {"what": "identity", "name": model_name(settings), "settings": settings.model_dump(mode="json")}
    # Units of conversations depend on the chat template that they are rendered with.
    rendered = {"template": remembered(folder, {"what": "template"}, template)} if kind == "chat" else {}
    if settings.is_remote:
        return identity(), rendered  # what is served may be another model tomorrow
    return remembered(folder, asked, identity), rendered


def teacher(context: Context) -> Outcome:
    """Dump every unit that has no dump yet; the engine starts only if there is one."""
    job = teacher_job(context, load_plan(context.store, context.settings))
    outcome = run_job(context.store, job, context.stop)
    context.save_config("teacher/config.toml", changed=outcome.made > 0, of=outcome.content)
    context.say(outcome_line("teacher", outcome))
    say_set_aside(context, outcome.receipts)
    return outcome


def say_set_aside(context: Context, dumped: list[Receipt]) -> None:
    """Tell how many documents the teacher cannot reproduce, if there are any."""
    aside = set_aside(dumped)
    if aside:
        from bytecache.stages.tokens.misfits import words

        context.say(f"teacher: {sum(aside.values())} documents set aside because {words(aside)}")


def find_dumps(context: Context, planned: Plan) -> dict[int, Receipt]:
    """Sound dump receipts of every unit, made with the current teacher settings, in plan order.

    Units that workers set aside may be missing; what to make of that: `pipeline.commands.missing`.

    Raises InputError if some are missing, ConfigError if only dumps of other settings exist or several sets fit.
    """
    store = context.store
    groups, damaged = dump_groups(store)
    wanted = {unit.index: unit.sha256 for unit in planned.units}
    aside = {entry.unit for entry in quarantined(store, Layout("teacher", planned.edition))}
    fitting: dict[str, dict[int, Receipt]] = {}
    most, differences = 0, ""
    for group, by_slice in sorted(groups.items()):
        parts = {index: by_slice[sha256] for index, sha256 in wanted.items() if sha256 in by_slice}
        changes = teacher_changes(next(iter(parts.values())), context.settings.teacher) if parts else []
        if changes:
            differences = "; ".join(changes)
            continue
        most = max(most, len(parts))
        if parts and wanted.keys() - parts.keys() <= aside:
            fitting[group] = parts
    if len(fitting) > 1:
        raise ConfigError(
            f"{store.name} holds whole dumps of {len(fitting)} versions of this teacher or its software "
            f"({', '.join(fitting)}); delete the receipts of those you do not want in {receipts.FOLDER}/teacher"
        )
    if fitting:
        (dumps,) = fitting.values()
        return _whole(store, dumps)
    if differences and not most and not damaged:
        raise ConfigError(
            f"{store.name} holds dumps of other teacher settings only ({differences}); "
            "restore them or run `bytecache teacher`"
        )
    why = f" ({len(damaged)} receipts do not check, the first: {damaged[0]})" if damaged else ""
    raise InputError(
        f"{store.name} holds {most} of {len(wanted)} dump parts; run `bytecache teacher` to make the others{why}"
    )


def dump_groups(store: Store) -> tuple[dict[str, dict[str, Receipt]], list[str]]:
    """Dump receipts by group and sha256 of their slice, and what is wrong with each that does not check."""

    def read(key: str) -> Receipt | str | None:
        try:
            receipt = receipts.read_receipt(store, "teacher", key)
            return (receipts.key_fault(receipt) or receipt) if receipt else None
        except IntegrityError as error:
            return str(error)

    refuse_no_files_in(store, f"{receipts.FOLDER}/teacher")
    groups: dict[str, dict[str, Receipt]] = defaultdict(dict)
    damaged: list[str] = []
    for receipt in overlapped(read, [key for _, key in receipts.list_receipts(store, "teacher")]):
        if isinstance(receipt, Receipt):
            groups[receipt.group][str(receipt.inputs.get("slice"))] = receipt
        elif receipt:
            damaged.append(receipt)
    for line in damaged:
        warn_user(line)
    return groups, damaged


def _whole(store: Store, dumps: dict[int, Receipt]) -> dict[int, Receipt]:
    """The same dumps. Raises IntegrityError if the files of one are not as its receipt says."""
    for problems in overlapped(lambda receipt: receipts.problems(store, receipt), dumps.values()):
        if problems:
            raise IntegrityError(f"{'; '.join(problems)}; run `bytecache teacher` to make it again")
    return dumps


def teacher_changes(receipt: Receipt, settings: Teacher) -> list[str]:
    """How the settings that a dump was made with differ from the current ones."""
    return identity_changes(TeacherIdentity.of(receipt.inputs["teacher"], f"receipt {receipt.name}"), settings)


def identity_changes(identity: TeacherIdentity, settings: Teacher) -> list[str]:
    """How the settings in a teacher's identity differ from the current ones."""
    extra = identity.model_extra or {}
    old = {name: extra.get(name, "") for name in _NAMED} | identity.chosen()
    now = settings.resolved().model_dump() | {"model": model_name(settings)}
    now |= {name: public_name(now[name]) for name in _NAMED}
    return list(changed_keys(old, {name: now[name] for name in old if name in now}))
