"""`teacher --worker`, `convert --worker` and `retry`."""

from contextlib import nullcontext
from typing import Any

from bytecache.pipeline.commands.convert import convert, convert_job
from bytecache.pipeline.commands.dataset import TARGETS, read_index
from bytecache.pipeline.commands.missing import units_aside
from bytecache.pipeline.commands.straight import find_shards, is_straight, straight_job
from bytecache.pipeline.commands.teacher import find_dumps, identity_changes, teacher_job
from bytecache.pipeline.context import Context
from bytecache.pipeline.fleet.job import join
from bytecache.pipeline.fleet.ledger import STAGES, Layout, read_json
from bytecache.pipeline.fleet.quarantine import forget_job, quarantined, requeue_lost, retry
from bytecache.pipeline.fleet.worker import Share, Worker
from bytecache.pipeline.plan.index import Plan, current_edition, load_plan
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import Receipt
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work
from bytecache.schemas.dataset.editions import edition_of
from bytecache.schemas.errors import BytecacheError, ConfigError, InputError, IntegrityError
from bytecache.schemas.identity import TeacherIdentity

_SHOWN = 3


def teacher_worker(context: Context) -> Share:
    """Work on the plan's dumps, or on its shards at once (`teacher.keep`), together with any number of others."""
    planned = load_plan(context.store, context.settings)
    if is_straight(context.settings):
        share = _work(context, straight_job(context, planned))
        context.save_config(f"{TARGETS}/config.toml", changed=False, published=True)
        return share
    share = _work(context, teacher_job(context, planned))
    context.save_config("teacher/config.toml", changed=False)
    return share


def convert_worker(context: Context) -> Share:
    """Work on the shards together with others; whoever comes first when all are made publishes the index.

    Where the teacher's workers made the shards, the index is all there is to do.
    """
    planned = load_plan(context.store, context.settings)
    if is_straight(context.settings):
        shards, _ = find_shards(context, planned)
        identity = {"plan": planned.hash, "shards": [receipt.key for receipt in shards]}
        job, share = _index_job(context, planned, identity), Share("", 0, len(shards), 0)
    else:
        shards_job = _convert_job(context, planned)
        share = _work(context, shards_job)
        job = _index_job(context, planned, shards_job.identity)
    if not _is_published(context.store, planned):
        _work(context, job)
        if not _is_published(context.store, planned):
            raise InputError(
                f"{context.store.name}: {TARGETS}/dataset.json was published and is gone; run `bytecache convert`"
            )
    return share


def _work(context: Context, job: Job) -> Share:
    share = Worker(context.store, job, context.settings.fleet, context.stop).run()
    entries = quarantined(context.store, Layout(job.stage, job.edition))
    of_teacher = job.stage == "teacher" or is_straight(context.settings)
    if entries:
        shown = "; ".join(f"unit {entry.unit} ({entry.reasons[-1]})" for entry in entries[:_SHOWN] if entry.reasons)
        raise BytecacheError(
            f"{job.stage}: all units are done but {len(entries)}, which are set aside after repeated failure: {shown}; "
            f"`bytecache status` names them all; mend the cause and run `bytecache retry {job.stage}`, then a worker"
            + ("; or convert the rest with `--set convert.allow_quarantined=true`" if of_teacher else "")
        )
    context.say(
        f"{job.stage}: this worker made {share.made} of {len(job.measures)} units"
        + (f", {share.found} it took up were whole already" if share.found else "")
    )
    return share


def _convert_job(context: Context, planned: Plan) -> Job:
    """The shards, with the receipts of their parts read when a shard is claimed instead of all at once."""
    store = context.store
    layout = Layout("teacher", planned.edition)
    begun = read_json(store, layout.job)
    if begun is None:  # the dump was made without workers: find it by its receipts
        dump_of = find_dumps(context, planned)  # no quarantine either
        identity = next(iter(dump_of.values())).inputs["teacher"]
        return convert_job(context, planned, identity, dump_of.__getitem__)
    if not isinstance(begun.get("identity"), dict) or not isinstance(begun["identity"].get("teacher"), dict):
        raise IntegrityError(
            f"{store.name}/{layout.job} is no record of a teacher's job; run `bytecache retry teacher --new-job`"
        )
    identity = begun["identity"]["teacher"]
    changes = identity_changes(TeacherIdentity.of(identity, layout.job), context.settings.teacher)
    if changes:
        raise ConfigError(
            f"{store.name}: the workers' dump was made with other teacher settings ({'; '.join(changes[:4])}); restore "
            "them, or run `bytecache teacher`"
        )

    # The teacher, and the chat template where there is one: what `teacher_job` puts into a unit's key.
    shared = {name: value for name, value in begun["identity"].items() if name != "plan"}

    def receipt_of(index: int) -> Receipt | None:
        key = receipts.unit_key("teacher", {"slice": planned.units[index].sha256, **shared})
        receipt = receipts.read_receipt(store, "teacher", key)
        if receipt is not None and (fault := receipts.key_fault(receipt)):
            raise IntegrityError(fault)
        return receipt

    def dump(index: int) -> Receipt:
        receipt = receipt_of(index)
        if receipt is None:
            raise InputError(
                f"{store.name}: unit {index} of {len(planned.sizes)} has no dump; run `bytecache teacher --worker` to "
                "the end first"
            )
        return receipt

    aside = units_aside(context, planned, lambda index: receipt_of(index) is not None)
    return convert_job(context, planned, identity, dump, [entry.unit for entry in aside])


def _is_published(store: Store, planned: Plan) -> bool:
    """Whether there is an index, not of an edition before this plan's."""
    try:
        published = read_index(store)
    except IntegrityError:
        return True  # damage is not for workers to mend
    return published is not None and edition_of(published.info) >= planned.edition


def _index_job(context: Context, planned: Plan, identity: dict[str, Any]) -> Job:
    """One unit, the data set's index, so that one worker publishes it and another takes over if that one dies.

    `identity`: of the shards that it lists.
    """

    def task(index: int) -> Task:
        out = f"{Layout('index', planned.edition).root}/published.json"
        return Task("index", "index", out, identity, planned.n_bytes)

    def work(task: Task, out: Any, tick: Tick) -> dict[str, Any]:
        outcome: Outcome = convert(context)
        out.write_text(f"{len(outcome.receipts)}\n")
        return {"shards": len(outcome.receipts)}

    def open_work(stop: Any) -> Any:
        opened: Work = work
        return nullcontext(opened)

    return Job("index", identity, [planned.n_bytes], task, open_work, planned.edition)


# ---- retry


def retry_stage(context: Context, stage: str, new_job: bool, lost: bool) -> int:
    """Lift the quarantine of a stage; returns how many units may be tried again.

    Where the teacher's workers make the shards, its units are theirs: both names mean them.
    """
    if stage not in STAGES:
        raise InputError(f"{stage!r} is no stage of workers; name one of {', '.join(STAGES)}")
    stage = "convert" if is_straight(context.settings) else stage
    store = context.store
    layout = Layout(stage, current_edition(store))
    if new_job:
        count = forget_job(store, layout)
        if stage == "convert":
            forget_index(context)
        context.say(f"retry: the {stage} job is given up ({count} ledger objects); what it made stays")
        return 0
    if read_json(store, layout.job) is None:
        raise InputError(f"{store.name} holds no {stage} job of workers; nothing to retry")
    forgiven = retry(store, layout)
    if lost:
        planned = load_plan(store, context.settings)
        job = _job_of(context, planned, stage)
        join(store, job)
        forgiven += requeue_lost(store, job)
        if stage == "convert":
            forget_index(context)
    named = f": {', '.join(str(unit) for unit in forgiven[:20])}" if forgiven else ""
    context.say(f"retry: {len(forgiven)} units of {stage} may be tried again{named}")
    return len(forgiven)


def _job_of(context: Context, planned: Plan, stage: str) -> Job:
    """The job that workers of a stage share."""
    if is_straight(context.settings):
        return straight_job(context, planned)
    return teacher_job(context, planned) if stage == "teacher" else _convert_job(context, planned)


def forget_index(context: Context) -> None:
    """The index may have to be published again."""
    for key in [*context.store.list(Layout("index", current_edition(context.store)).root)]:
        context.store.delete(key)
