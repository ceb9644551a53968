"""`evaluate`: bits per byte, divergence from the teacher and calibration of the trained students."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecache.pipeline.context import Context
from bytecache.pipeline.stores import json_bytes
from bytecache.pipeline.units.documents import is_whole, write_document
from bytecache.pipeline.units.progress import Reporter
from bytecache.pipeline.units.receipts import Receipt, unit_key
from bytecache.pipeline.units.runner import Task, Tick, Work, run_units

if TYPE_CHECKING:
    pass
from bytecache.pipeline.commands.export import export, export_task
from bytecache.pipeline.commands.train import open_targets, run_files, trained

_REPORT = ("report/report.json", "report/report.md")


def evaluate_tasks(context: Context, dataset: str, only: str = "") -> list[Task]:
    """One task per finished run on the data set of this content."""
    tasks = []
    for run in trained(context, only, dataset):
        inputs = {"name": run.name, "checkpoint": run.counts["sha256"], "dataset": dataset, "split": "heldout"}
        shape = context.settings.train
        inputs["windows"] = [shape.batch, shape.window_bytes, shape.context_bytes]
        out = f"report/{run.name}-{unit_key('evaluate', inputs)[:12]}.json"
        tasks.append(Task("evaluate", run.name, out, inputs, 1, payload=run))
    return tasks


def evaluate(context: Context, only: str = "") -> tuple[list[dict[str, Any]], int]:
    """Held-out figures of every finished run, and how many were computed now; also report/report.json and .md."""
    store, settings = context.store, context.settings
    targets = open_targets(context)

    def open_work() -> Work:
        from bytecache.stages.evaluate.evaluate import evaluate as evaluate_stage

        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            run: Receipt = task.payload
            student, checkpoint = run_files(store, run)
            result = evaluate_stage(settings.train, student, targets, checkpoint, name=run.name)
            out.write_bytes(json_bytes(result))
            return result

        return work

    tasks = evaluate_tasks(context, targets.content_sha256, only)
    outcome = run_units(store, tasks, open_work, context.stop, reporter=_reporter(len(tasks)))
    results = [receipt.counts for receipt in outcome.receipts]
    report = json_bytes(results)
    if outcome.made or not all(is_whole(store, key) for key in _REPORT) or store.read_bytes(_REPORT[0]) != report:
        from bytecache.stages.evaluate.evaluate import report_table

        write_document(store, _REPORT[1], report_table(results))
        write_document(store, _REPORT[0], report.decode("utf-8"))
    context.save_config("report/config.toml", changed=outcome.made > 0)
    done = f"{outcome.made} runs measured" if outcome.made else f"nothing to do, {len(results)} runs are measured"
    context.say(f"evaluate: {done} (report/report.json, report/report.md)")
    return results, outcome.made


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
