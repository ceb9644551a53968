"""`run`: every stage in order. The table and the page at the end are made of receipts and logs: they cost no work."""

from bytecache.pipeline.commands.convert import convert
from bytecache.pipeline.commands.dataset import TARGETS
from bytecache.pipeline.commands.evaluate import Measured, evaluate
from bytecache.pipeline.commands.export import export, export_task
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.report.facts import Facts, arms_of, curve_of, stage_rows
from bytecache.pipeline.commands.report.page import report_page
from bytecache.pipeline.commands.report.table import as_table, summary_rows
from bytecache.pipeline.commands.straight import is_straight, refuse_readers_of_dumps, teach
from bytecache.pipeline.commands.train import DISTILLED, train, trained
from bytecache.pipeline.context import Context
from bytecache.pipeline.units.documents import write_document
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import is_transfer

Stages = dict[str, list[Receipt]]
"""Receipts of each stage, by its name for people."""


def run(context: Context) -> bool:
    """Run what is not done yet; False if there was nothing to do.

    Ends with the table (also report/summary.md), the page report/report.html and how to load the student.
    Raises ConfigError with dataset.source: `run` makes the data set it trains on.
    """
    if context.settings.dataset.source:
        raise ConfigError(
            f"dataset.source = {context.settings.dataset.source!r}: `run` makes its own data set; leave it empty, or "
            "use `bytecache train`, `evaluate` and `export`"
        )
    refuse_readers_of_dumps(context.settings)
    if not context.store.exists(f"{TARGETS}/dataset.json"):
        # What would stop the training is better known before the teacher has been paid for, and the teacher before the
        # corpus has been read.
        from bytecache.stages.student.check import check_student
        from bytecache.stages.teacher.check import check_teacher

        check_teacher(context.settings.teacher)
        check_student(context.settings.student, context.settings.train, chat=context.settings.corpus.kind == "chat")
    planned, new = plan(context)
    dumped = teach(context)
    converted = convert(context, dumped.receipts)
    n_made = int(new) + dumped.made + converted.made + train(context)
    measured = Measured([], {}, [], 0)
    if planned.n_heldout:
        measured = evaluate(context)
    else:
        context.say("evaluate: skipped, the plan has no held-out documents (corpus.heldout_fraction)")
    n_made += measured.made + export(context)
    runs = trained(context)
    rows = summary_rows(planned.n_bytes, dumped.receipts, converted.receipts, runs, measured.results)
    table = as_table(rows)
    write_document(context.store, "report/summary.md", table)
    stages: Stages = {
        "teacher": dumped.receipts,
        "convert": [] if is_straight(context.settings) else converted.receipts,
    }
    stages |= {f"train {run.name}": [run] for run in runs} | {"evaluate": measured.receipts}
    write_document(context.store, "report/report.html", _page(context, rows, runs, measured, stages))
    if not n_made:
        context.say(f"run: nothing to do, every output of {context.store.name} is whole")
    context.say("")
    context.say(table)
    context.say(f"In pictures: {context.settings.run.dir}/report/report.html. To sample from the student:")
    context.say("")
    for line in loading_lines(context, runs):
        context.say(f"    {line}")
    return n_made > 0


def loading_lines(context: Context, runs: list[Receipt]) -> list[str]:
    """Two lines of Python that load the exported student and sample from it, in transformers 4 and 5."""
    (run,) = [run for run in runs if run.name == DISTILLED]
    folder = f"{context.settings.run.dir}/{export_task(run).out}"
    if "://" in folder:
        folder = folder.rpartition("/")[2]  # of which somebody has to make a copy first
    asked = "'The `import` statement', do_sample=True, max_new_tokens=60"
    return [
        "from transformers import pipeline",
        f'print(pipeline("text-generation", {folder!r})({asked})[0]["generated_text"])',
    ]


def _page(
    context: Context, rows: list[tuple[str, str]], runs: list[Receipt], measured: Measured, stages: Stages
) -> str:
    """The page with pictures, from receipts and the logs of training."""
    student = context.settings.student
    what = f"{student.model} under {student.tokenizer}" if is_transfer(student) else student.model or "a new student"
    return report_page(
        Facts(
            title=f"{what}, taught by {context.settings.teacher.model}",
            table=rows,
            arms=arms_of(measured.results),
            teacher_bits=measured.results[0]["teacher_bits_per_byte"] if measured.results else None,
            curves={run.name: curve_of(context.store, run) for run in runs},
            stages=list(stage_rows(stages)),
            passage=measured.passage,
            loading=loading_lines(context, runs),
        )
    )
