"""The stages, one command each, and `run` for all of them."""

from typing import TYPE_CHECKING, Annotated

import typer

from bytecache.pipeline.cli.options import Given, OnlyOption, WorkerOption, run_stage, takes_settings
from bytecache.pipeline.cli.terminal import say

if TYPE_CHECKING:
    from bytecache.pipeline.context import Context

app = typer.Typer()


@app.command()
@takes_settings("corpus.source", "corpus.jobs")
def plan(given: Given) -> None:
    """Cut the corpus into units of work.

    Reads: corpus.source (JSONL, Parquet, Arrow, text, a folder). Writes: plan/ in the run folder (plan.json, units/,
    slices/).

    The split into train and held-out documents and the slices are fixed here; planning again with the same text and
    settings changes nothing, with others it is refused. A corpus of several files is read by several processes
    (--jobs; a file by one); the plan is the same for any number.

    Example: bytecache plan --source books.jsonl --run-dir runs/books
    """
    from bytecache.pipeline.commands.plan import plan as command

    run_stage(given, command)


@app.command()
@takes_settings("teacher.model", "teacher.backend", "teacher.preset", "teacher.tau", "teacher.depth")
def teacher(given: Given, worker: WorkerOption = False) -> None:
    """Run the teacher over every unit and dump its path masses.

    Reads: plan/. Writes: teacher/, one Parquet part per unit, each with a receipt; with teacher.keep = "targets" no
    dump, but the shards of targets/, converted beside the engine.

    Units with a valid receipt are skipped; with all of them done the engine is not even started. SIGTERM finishes or
    abandons the unit in flight and exits with code 75; rerun the same command to continue.

    With --worker, any number of processes on any machines share the units: same settings, same run folder.

    Example: bytecache teacher --run-dir runs/books --teacher HuggingFaceTB/SmolLM2-135M --depth 2 --tau 0.01
    """

    def command(context: "Context") -> None:
        from bytecache.pipeline.commands import workers as commands
        from bytecache.pipeline.commands.straight import teach as alone

        commands.teacher_worker(context) if worker else alone(context)

    run_stage(given, command)


@app.command()
@takes_settings()
def convert(given: Given, worker: WorkerOption = False) -> None:
    """Turn the dump into byte targets, the data set that students train from.

    Reads: plan/ and teacher/ (no model, no GPU). Writes: targets/, Zarr shards with manifest.parquet and
    dataset.json, a folder to share.

    With --worker, any number of processes share the shards; the last to finish publishes the index. Where the teacher's
    workers made the shards (teacher.keep = "targets"), the index is all that is left to publish.

    Example: bytecache convert --run-dir runs/books --set convert.prune=1e-4
    """

    def command(context: "Context") -> None:
        from bytecache.pipeline.commands import workers as commands
        from bytecache.pipeline.commands.convert import convert as alone

        commands.convert_worker(context) if worker else alone(context)

    run_stage(given, command)


@app.command()
@takes_settings()
def train(given: Given, only: OnlyOption = "") -> None:
    """Train the student, and its control without the teacher's targets (train.control).

    Reads: targets/. Writes: train/distilled-KEY/ and train/control-KEY/ with checkpoints and metrics.jsonl.

    Resumes from the newest whole checkpoint, with any number of processes; SIGTERM saves one and exits with code 75.
    Several processes: torchrun --nproc-per-node 8 -m bytecache train ... (train.parallel: ddp or fsdp).

    Example: bytecache train --run-dir runs/books --set train.steps=2000 --only distilled
    """
    from bytecache.pipeline.commands.train import train as command

    run_stage(given, lambda context: command(context, only))


@app.command()
@takes_settings()
def evaluate(
    given: Given,
    only: OnlyOption = "",
    lm_eval: Annotated[
        str, typer.Option("--lm-eval", metavar="TASKS", help="Also run these lm-eval-harness tasks (commas between).")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", help="Examples of each lm-eval task; 0 = all.")] = 0,
) -> None:
    """Measure the trained students on the held-out documents.

    Reads: targets/ and train/. Writes: report/report.json and report/report.md; prints the table. An existing model
    under another tokenizer is measured before training as well, and as the original that it came from.

    --lm-eval exports the students first and measures the exported checkpoints as any Hugging Face model, into
    report/lm-eval.json and report/lm-eval.md. It needs the package lm-eval; a task is a name or a YAML file.

    Example: bytecache evaluate --run-dir runs/books --lm-eval lambada_openai --limit 200
    """
    from bytecache.pipeline.commands import evaluate as measuring

    def command(context: "Context") -> None:
        measuring.evaluate(context, only)
        say(context.store.read_bytes("report/report.md").decode("utf-8"))
        if lm_eval:
            measuring.measure_exported(context, lm_eval.split(","), limit, only)
            say(context.store.read_bytes("report/lm-eval.md").decode("utf-8"))

    run_stage(given, command)


@app.command()
@takes_settings()
def export(given: Given, only: OnlyOption = "") -> None:
    """Write the distilled student as a plain checkpoint, the byte head gone.

    Reads: train/. Writes: export/distilled-KEY/, which AutoModelForCausalLM.from_pretrained loads; its token logits are
    compared with the trained model's before it is published.

    Example: bytecache export --run-dir runs/books
    """
    from bytecache.pipeline.commands.export import export as command

    run_stage(given, lambda context: command(context, only))


@app.command()
@takes_settings("corpus.source", "teacher.model", "teacher.backend", "teacher.preset")
def run(given: Given) -> None:
    """Every stage in order: plan, teacher, convert, train, evaluate, export; ends with a table.

    Reads: the corpus and the teacher. Writes: everything under the run folder; report/summary.md, report/report.html.

    Safe to repeat: what is whole is skipped, and a second run does nothing and says so.

    Example: bytecache run --run-dir runs/first --set corpus.max_bytes=100000
    """
    from bytecache.pipeline.commands import run as chain

    run_stage(given, chain.run)
