"""`evaluate`: bits per byte, divergence from the teacher and calibration of the trained students."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bytecache.pipeline.commands.export import export, export_task
from bytecache.pipeline.commands.student import RECORD, student_task
from bytecache.pipeline.commands.train import open_targets, run_files, trained
from bytecache.pipeline.context import Context
from bytecache.pipeline.stores import json_bytes
from bytecache.pipeline.units.documents import is_whole, write_document
from bytecache.pipeline.units.progress import Reporter
from bytecache.pipeline.units.receipts import Receipt, unit_key
from bytecache.pipeline.units.runner import Task, Tick, Work, run_units
from bytecache.schemas.settings import is_transfer

if TYPE_CHECKING:
    from bytecache.schemas.dataset.index import Dataset

_REPORT = ("report/report.json", "report/report.md")
BEFORE, ORIGINAL = "before", "original"
"""Names of the references of a student that is an existing model under another tokenizer."""
PASSAGE = "passage"


class Measured(NamedTuple):
    """What `evaluate` found."""

    results: list[dict[str, Any]]
    """figures of each student, as report.json has them"""
    passage: dict[str, Any]
    """see `stages.evaluate.passage`; empty if there is none"""
    receipts: list[Receipt]
    made: int
    """how many units were computed now"""


def evaluate_tasks(context: Context, dataset: str, only: str = "") -> list[Task]:
    """One task per finished run on the data set of this content; unless `only`, its references and the passage too."""
    runs = trained(context, only, dataset)
    student = student_task(context, dataset)
    beside = {"student": student.key, "dataset": dataset, "split": "heldout"}
    tasks = [
        _task(run.name, {"checkpoint": run.counts["sha256"], "dataset": dataset, "split": "heldout"}, context, run)
        for run in runs
    ]
    if only:
        return tasks
    if is_transfer(context.settings.student):
        tasks += [_task(name, beside, context, student.out) for name in (BEFORE, ORIGINAL)]
    shown = {run.name: run.counts["sha256"] for run in runs}
    return [*tasks, _task(PASSAGE, {"dataset": dataset, "split": "heldout", "checkpoints": shown}, None, runs)]


def _task(name: str, more: dict[str, Any], context: Context | None, payload: Any) -> Task:
    """A unit of this stage; `context`: where the windows of its students matter."""
    inputs = {"name": name, **more}
    if context is not None:
        shape = context.settings.train
        inputs["windows"] = [shape.batch, shape.heldout_bytes or shape.window_bytes, shape.context_bytes]
    return Task("evaluate", name, f"report/{name}-{unit_key('evaluate', inputs)[:12]}.json", inputs, 1, payload=payload)


def evaluate(context: Context, only: str = "") -> Measured:
    """Held-out figures of every finished run and its references; also report/report.json and .md."""
    store = context.store
    targets = open_targets(context)
    tasks = evaluate_tasks(context, targets.content_sha256, only)
    outcome = run_units(store, tasks, lambda: _work(context, targets), context.stop, reporter=_reporter(len(tasks)))
    results = [receipt.counts for receipt in outcome.receipts if receipt.name != PASSAGE]
    report = json_bytes(results)
    if outcome.made or not all(is_whole(store, key) for key in _REPORT) or store.read_bytes(_REPORT[0]) != report:
        from bytecache.stages.evaluate.evaluate import report_table

        write_document(store, _REPORT[1], report_table(results))
        write_document(store, _REPORT[0], report.decode("utf-8"))
    context.save_config("report/config.toml", changed=outcome.made > 0, of=outcome.content)
    total = len(outcome.receipts)
    done = f"{outcome.made} of {total} units made" if outcome.made else f"nothing to do, {total} units are whole"
    context.say(f"evaluate: {done} ({', '.join(_REPORT)})")
    passage = next((receipt.counts for receipt in outcome.receipts if receipt.name == PASSAGE), {})
    return Measured(results, passage, outcome.receipts, outcome.made)


def _work(context: Context, targets: "Dataset") -> Work:
    """Does one unit: a trained student, a reference, or the passage."""
    from bytecache.stages.evaluate.evaluate import evaluate as evaluate_stage
    from bytecache.stages.evaluate.passage import show_passage
    from bytecache.stages.evaluate.references import evaluate_untrained
    from bytecache.stages.models.locate import locate

    store, settings = context.store, context.settings

    def measured(task: Task, place: Path) -> dict[str, Any]:
        if task.name == PASSAGE:
            return show_passage(targets, {run.name: run_files(store, run) for run in task.payload}, place)
        if task.name == BEFORE:
            return evaluate_untrained(settings.train, store.folder(task.payload, RECORD), targets, name=task.name)
        if task.name == ORIGINAL:
            folder = locate(settings.student.model, "student.model")
            return evaluate_untrained(settings.train, folder, targets, name=task.name)
        student, checkpoint = run_files(store, task.payload)
        return evaluate_stage(settings.train, student, targets, checkpoint, name=task.name)

    def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
        result = measured(task, out.parent)
        out.write_bytes(json_bytes(result))
        return result

    return work


def _reporter(total: int) -> Callable[[int, int], Reporter]:
    def make(done_units: int, done: int) -> Reporter:
        return Reporter("evaluate", total, total, done_units=done_units, done=done, measure="runs")

    return make


def measure_exported(context: Context, tasks: list[str], limit: int, only: str = "") -> None:
    """Run lm-eval-harness tasks on the finished runs, exported first; report/lm-eval.json and .md."""
    from bytecache.stages.evaluate.harness import measure, table

    results = {}
    for run in trained(context, only):
        export(context, run.name)
        results[run.name] = measure(context.store.folder(export_task(run).out), tasks, limit=limit)
    facts = json_bytes({"limit": limit, "results": results}).decode("utf-8")
    write_document(context.store, "report/lm-eval.json", facts)
    write_document(context.store, "report/lm-eval.md", table(results))
