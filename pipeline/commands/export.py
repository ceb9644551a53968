"""`export`: a trained student as a plain checkpoint."""

import time
from functools import partial

from bytecache.pipeline.commands.train import DISTILLED, run_files, trained
from bytecache.pipeline.context import Context
from bytecache.pipeline.stores import disk_errors
from bytecache.pipeline.units.aside import make_folder
from bytecache.pipeline.units.receipts import Receipt, record_file, unit_key
from bytecache.pipeline.units.runner import Task, commit_receipt, finished, receipt_of
from bytecache.schemas.errors import ConfigError, Interrupted


def export_task(run: Receipt) -> Task:
    """The task of exporting a finished run; `out` is the folder of the plain checkpoint."""
    inputs = {"name": run.name, "checkpoint": run.counts["sha256"]}
    return Task("export", run.name, f"export/{run.name}-{unit_key('export', inputs)[:12]}", inputs, 1)


def export(context: Context, only: str = "") -> int:
    """Write a finished run (the distilled one unless `only`) as a plain checkpoint; returns how many are new."""
    store = context.store
    n_made = 0
    for run in trained(context, only or DISTILLED):
        task = export_task(run)
        if finished(store, task) is not None:
            context.say(f"export {run.name}: nothing to do, {task.out} is whole")
            continue
        if context.stop():
            raise Interrupted("export stopped by a signal before it began; rerun the same command")
        from bytecache.stages.export import export as export_stage

        started = time.monotonic()
        folder = store.folder(task.out, "export.json")
        with disk_errors(f"export {run.name}, writing {folder}"):
            make = partial(export_stage, *run_files(store, run), folder)
            result, moved = make_folder(store, task, make, (ConfigError, ValueError))
            if moved:
                context.say(f"export {run.name}: {task.out} was damaged: set aside ({moved[0]}, ...) and made again")
            store.publish(task.out)
        files = [record_file(store, key) for key in store.list(task.out)]
        # Beside the folder, not in it: the folder is a plain checkpoint and nothing else.
        context.save_config(f"{task.out}.config.toml")
        commit_receipt(store, receipt_of(task, files, result, time.monotonic() - started))
        context.say(f"export {run.name}: {folder} loads with AutoModelForCausalLM")
        n_made += 1
    return n_made
