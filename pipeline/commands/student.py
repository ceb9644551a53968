"""The untrained student of a run: made once, with a receipt, and made again where it is missing or damaged.

Distilled and control students begin from the same folder, `train/student-<key12>`, named by its recipe. `train` looks
after it; `evaluate` and `export` read it. The same recipe makes the same bytes.
"""

import time
from typing import TYPE_CHECKING, Any

from bytecache.pipeline.context import Context
from bytecache.pipeline.stores import disk_errors
from bytecache.pipeline.units.aside import make_folder
from bytecache.pipeline.units.receipts import record_file, unit_key
from bytecache.pipeline.units.runner import Task, commit_receipt, finished, receipt_of, warn_user

if TYPE_CHECKING:
    from bytecache.schemas.dataset.index import Dataset

RECORD = "student.json"


def student_task(context: Context, dataset: str) -> Task:
    """The task of making the student for a data set (its content hash); `out` is its folder."""
    settings = context.settings
    recipe = {"dataset": dataset, "student": settings.student.model_dump(), "seed": settings.run.seed}
    return Task("student", "student", f"train/student-{unit_key('student', recipe)[:12]}", recipe, 1)


def make_student(context: Context, targets: "Dataset") -> None:
    """See that the student is there and whole; a damaged one is set aside and made again from its recipe."""
    from bytecache.stages.student import student
    from bytecache.stages.student.check import check_student

    store, settings = context.store, context.settings
    task = student_task(context, targets.content_sha256)
    if finished(store, task, warn_user) is not None:
        return
    if store.exists(f"{task.out}/{RECORD}"):
        context.say(f"train: {task.out} is there without a sound receipt; it is checked, or made again")

    def prepare() -> dict[str, Any]:
        folder = store.folder(task.out, RECORD)
        if not folder.exists():
            check_student(settings.student, settings.train)
        return student.prepare(settings.student, targets, folder, seed=settings.run.seed)

    started = time.monotonic()
    with disk_errors(f"preparing the student, writing {store.name}/{task.out}"):
        info, moved = make_folder(store, task, prepare)
        if moved:
            context.say(f"train: the student in {task.out} was damaged: set aside ({moved[0]}, ...) and made again")
        store.publish(task.out)
    for note in info.get("notes", []):
        context.say(note)
    files = [record_file(store, f"{task.out}/{name}") for name in (*sorted(info["files"]), RECORD)]
    counts: dict[str, Any] = {name: info[name] for name in ("parameters", "vocabulary", "transfer") if name in info}
    commit_receipt(store, receipt_of(task, files, counts, time.monotonic() - started))
