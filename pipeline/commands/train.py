"""`train`: byte targets to a distilled student and its control.

A run's key holds the data set's content hash, the student's and the training settings and the seed; its folder
is `train/<name>-<key12>`. The stage writes checkpoints there and resumes from the newest whole one by itself; the
receipt, written after the last step, is what makes the run done. A run of more steps begins with the end of a shorter
one, where that is what it would have come to by itself.
"""

import io
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecache.pipeline.commands.dataset import TARGETS
from bytecache.pipeline.commands.student import RECORD, make_student, student_task
from bytecache.pipeline.context import Context
from bytecache.pipeline.stores import Store, disk_errors, refuse_no_file
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.progress import Reporter
from bytecache.pipeline.units.receipts import Receipt, record_file, unit_key
from bytecache.pipeline.units.runner import Task, Tick, commit_receipt, finished, receipt_of, warn_user
from bytecache.schemas.dataset.editions import edition_of
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError, Interrupted
from bytecache.schemas.files import put_in_place, scratch_folder
from bytecache.schemas.settings import BASELINES, NEUTRAL, Train

if TYPE_CHECKING:
    from bytecache.schemas.dataset.index import Dataset
    from bytecache.stages.train.batches.teacher_tokens import TokenDump
    from bytecache.stages.train.parallel import World

DISTILLED, CONTROL = "distilled", "control"


def run_names(settings: Train, only: str = "") -> list[str]:
    """The runs to train: the distilled student, and its control if asked for. `only` names one of them."""
    names = [DISTILLED, CONTROL] if settings.control else [DISTILLED]
    if only and only not in (DISTILLED, CONTROL):
        raise ConfigError(f"--only {only}: unknown run; runs: {DISTILLED}, {CONTROL}")
    return [only] if only else names


def open_targets(context: Context) -> "Dataset":
    """The data set to learn from: dataset.source (a folder or URL), else this run's own, if it was published.

    Raises InputError if it was not, IntegrityError or StorageError for an index that is damaged or out of reach.
    """
    from bytecache.stages.targets.source import open_dataset

    settings = context.settings.dataset
    if not settings.source:
        refuse_no_file(context.store, f"{TARGETS}/dataset.json", f"{TARGETS}/manifest.parquet")
    if not settings.source and not context.store.exists(f"{TARGETS}/dataset.json"):
        raise InputError(
            f"{context.store.name} holds no data set; run `bytecache convert` with this run.dir first "
            f"({TARGETS}/dataset.json is missing)"
        )
    limit = int(settings.cache_gib * 2**30)
    place = settings.source.reveal() or context.store.folder(TARGETS)
    try:
        return open_dataset(
            place, cache_dir=settings.cache_dir, cache_bytes=limit, private_redirects=settings.private_redirects
        )
    except IntegrityError as error:
        if settings.source:
            raise
        raise IntegrityError(f"{error}; here `bytecache convert` makes it again") from None


def train_task(context: Context, name: str, dataset: str) -> Task:
    """The task of one training run; `out` is its folder."""
    settings = context.settings
    shape = settings.train.model_dump(exclude=set(NEUTRAL))
    if name == CONTROL:
        shape["lambda_kl"] = 0.0
    inputs = {
        "name": name,
        "dataset": dataset,
        "student": settings.student.model_dump(),
        "train": shape,
        "seed": settings.run.seed,
    }
    return Task("train", name, f"train/{name}-{unit_key('train', inputs)[:12]}", inputs, settings.train.steps)


def train(context: Context, only: str = "") -> int:
    """Train what is not trained yet; returns how many runs this call finished.

    Every process of a torchrun calls this; the first one alone prepares, reports and writes.
    """
    if os.environ.get("RANK", "0") != "0":
        context = replace(context, say=lambda line: None)
    targets = open_targets(context)
    store, dataset = context.store, targets.content_sha256
    tasks = [train_task(context, name, dataset) for name in run_names(context.settings.train, only)]
    pending = [task for task in tasks if finished(store, task, warn_user) is None]
    for task in tasks:
        if task not in pending:
            context.say(f"train {task.name}: nothing to do, {task.measure} steps are done ({task.out})")
    # What was trained from the student is evaluated and exported with it, so a finished run looks after it too.
    if pending or finished(store, student_task(context, dataset)) is None:
        from bytecache.stages.train.parallel import joined

        with joined(context.settings.train.parallel) as world:
            if world.main:
                make_student(context, targets)
                for task in pending:
                    _begin_with_a_shorter_run(context, task)
            world.wait()
            for task in pending:
                _train_one(context, world, task, targets)
    return len(pending)


def _begin_with_a_shorter_run(context: Context, task: Task) -> None:
    """Give a run that has no checkpoint the last one of a finished run that differs in nothing but fewer steps.

    Only where the schedules do not depend on the number of steps: the result is that of a run in one go, to the bit.
    """
    from bytecache.stages.train.run import can_be_extended

    store, settings = context.store, context.settings.train
    shorter = _shorter_runs(store, task)
    if not shorter or any(re.search(r"/step-\d+\.json$", key) for key in store.list(task.out)):
        return
    before = max(shorter, key=lambda receipt: int(receipt.inputs["train"]["steps"]))
    steps = int(before.inputs["train"]["steps"])
    if not can_be_extended(settings):
        context.say(
            f"train {task.name}: begins anew instead of after the {steps} steps that are done, since train.schedule = "
            f'"{settings.schedule}" and train.kl_schedule = "{settings.kl_schedule}" depend on how many there are in '
            'all; runs with "constant" for both can be extended'
        )
        return
    place = Path(str(before.counts["checkpoint"]))
    source, out = store.folder(place.parent.as_posix()), store.folder(task.out)
    with disk_errors(f"train {task.name}, writing {out}"), scratch_folder(out.parent) as scratch:
        out.mkdir(parents=True, exist_ok=True)
        # The record of a checkpoint last: without it there is none.
        for name in (place.name, "metrics.jsonl", place.with_suffix(".json").name):
            if (source / name).is_file():
                shutil.copyfile(source / name, scratch / name)
                put_in_place(scratch / name, out / name)
    context.say(f"train {task.name}: goes on after the {steps} steps of {place.parent.as_posix()}")


def _shorter_runs(store: Store, task: Task) -> list[Receipt]:
    """Receipts of finished runs like this one but for fewer steps."""
    shorter = []
    for stage, key in receipts.list_receipts(store, "train"):
        with suppress(IntegrityError):  # a damaged one is the business of `verify`
            receipt = receipts.read_receipt(store, stage, key)
            shape = receipt.inputs.get("train") if receipt else None
            if not receipt or not isinstance(shape, dict) or receipts.problems(store, receipt):
                continue
            steps = int(shape.get("steps", 0))
            same = {**receipt.inputs, "train": {**shape, "steps": task.inputs["train"]["steps"]}} == task.inputs
            shorter += [receipt] if same and steps < task.inputs["train"]["steps"] else []
    return shorter


def _train_one(context: Context, world: "World", task: Task, targets: "Dataset") -> None:
    from bytecache.stages.train.train import train as train_stage

    store, settings = context.store, context.settings
    start = student_task(context, targets.content_sha256).out
    folder = store.folder(start, RECORD)
    out = store.folder(task.out)
    silent = None if world.main else io.StringIO()
    with Reporter(f"train {task.name}", 1, settings.train.steps, measure="steps", stream=silent) as progress:
        started = time.monotonic()
        try:
            with disk_errors(f"train {task.name}, writing {out}"):
                result = train_stage(
                    settings.train,
                    folder,
                    targets,
                    out,
                    name=task.name,
                    seed=settings.run.seed,
                    lambda_kl=task.inputs["train"]["lambda_kl"],
                    stop=context.stop,
                    report=_reporting(context, task, progress),
                    dump=_token_dump(context) if task.inputs["train"]["lambda_kl"] else None,
                )
        except Interrupted:
            if world.main:
                store.publish(task.out)
            raise
    if world.main:
        counts = {**result, "student": start, "edition": edition_of(targets.info)}
        _commit_run(context, task, counts, time.monotonic() - started)


def _reporting(context: Context, task: Task, progress: Reporter) -> Tick:
    """What is told of every step: to the user, and to a store that a checkpoint may have to go to."""
    store, settings = context.store, context.settings.train
    first = True

    def report(record: dict[str, Any]) -> None:
        nonlocal first
        if first:
            progress.done, first = int(record["step"]) - 1, False
        progress.tick({"steps": 1, "tokens": record.get("tokens", 0)})
        if (int(record["step"]) - 1) % settings.checkpoint_every == 0:
            store.publish(task.out)  # the step before this one may have ended with a checkpoint
        if record["step"] % settings.checkpoint_every == 0 or record["step"] == settings.steps:
            progress.line({"stage": "train", **record, **progress.rates()})

    return report


def _commit_run(context: Context, task: Task, counts: dict[str, Any], seconds: float) -> None:
    """Publish a run that ended, then its receipt, and say what it did. `counts`: as training gave them, and more."""
    store = context.store
    store.publish(task.out)
    checkpoint = Path(counts["checkpoint"])
    keys = [f"{task.out}/{name}" for name in (checkpoint.name, checkpoint.with_suffix(".json").name)]
    beside = [record_file(store, key) for key in store.list(task.out) if key not in keys and _is_record(key)]
    context.save_config(f"{task.out}/config.toml")
    files = [record_file(store, key) for key in keys]
    receipt = receipt_of(task, files, {**counts, "checkpoint": keys[0]}, seconds)
    commit_receipt(store, receipt.model_copy(update={"beside": tuple(beside)}))
    if skipped := counts["skipped_documents"]:
        from bytecache.stages.tokens.misfits import words

        context.say(
            f"train {task.name}: {sum(skipped.values())} documents skipped because of the student: {words(skipped)}"
        )
    seen = f" on edition {counts['edition']} of the data set" if counts["edition"] > 1 else ""
    loss = counts["terms"].get("loss", float("nan"))
    context.say(f"train {task.name}: {context.settings.train.steps} steps{seen}, loss {loss:.4f} ({task.out})")


def _is_record(key: str) -> bool:
    """Whether a file of a run is one that training wrote beside the last checkpoint: older ones, and its logs."""
    parts = key.split("/")[2:]
    return parts[0].startswith("step-") or parts[0] in ("metrics.jsonl", "tensorboard")


def _token_dump(context: Context) -> "TokenDump | None":
    """The teacher's tokens, where `train.head` is a baseline that asks for them."""
    from bytecache.stages.teacher.identity import vocabulary_from
    from bytecache.stages.train.batches.teacher_tokens import TokenDump

    settings = context.settings
    if settings.train.head not in BASELINES:
        return None
    folder = context.store.folder("teacher")
    if settings.train.head == "uld":
        return TokenDump(folder)
    return TokenDump(folder, vocabulary_from(settings.teacher))


def trained(context: Context, only: str = "", dataset: str = "") -> list[Receipt]:
    """Receipts of the finished runs of the current settings; `dataset`: its content hash, if known already.

    Raises InputError if one asked for is not finished.
    """
    dataset = dataset or open_targets(context).content_sha256
    runs = []
    for name in run_names(context.settings.train, only):
        damage: list[str] = []
        receipt = finished(context.store, train_task(context, name, dataset), damage.append)
        if damage:
            raise IntegrityError(f"{context.store.name}: {damage[0]}; run `bytecache train` to make it again")
        if receipt is not None:
            runs.append(receipt)
        elif only:
            raise InputError(f"{context.store.name} holds no finished run {name}; run `bytecache train` first")
    if not runs:
        raise InputError(f"{context.store.name} holds no run trained with these settings; run `bytecache train` first")
    return runs


def run_files(store: Store, run: Receipt) -> tuple[Path, Path]:
    """Local folder of the student that a finished run began from, and local file of its last checkpoint."""
    checkpoint = Path(run.counts["checkpoint"])
    folder = store.folder(checkpoint.parent.as_posix())
    return store.folder(run.counts["student"], RECORD), folder / checkpoint.name
