"""Commands for runs that many workers share."""

from typing import TYPE_CHECKING, Annotated

import typer

from bytecache.pipeline.cli.options import Given, run_stage, takes_settings
from bytecache.pipeline.cli.terminal import say

if TYPE_CHECKING:
    from bytecache.pipeline.context import Context

app = typer.Typer()


@app.command()
@takes_settings()
def retry(
    stage: Annotated[str, typer.Argument(help="teacher or convert.")],
    given: Given,
    lost: Annotated[
        bool, typer.Option("--lost", help="Also open units again whose receipt is gone; when no worker runs.")
    ] = False,
    new_job: Annotated[
        bool,
        typer.Option("--new-job", help="Give the workers' job up, so that one with other settings can begin."),
    ] = False,
) -> None:
    """Let units that workers set aside be tried again.

    Reads: fleet/ in the run folder (and receipts/ with --lost). Writes: a mark per unit, which forgives its failed
    attempts; what happened stays on record. Nothing that is made is touched.

    Example: bytecache retry teacher --run-dir runs/books
    """
    from bytecache.pipeline.commands import workers as commands

    run_stage(given, lambda context: commands.retry_stage(context, stage, new_job, lost))


@app.command()
@takes_settings()
def merge(
    sources: Annotated[list[str], typer.Argument(help="Run folders or addresses with parts of the same plan.")],
    given: Given,
) -> None:
    """Bring partial runs of one plan, made in different places, into one run folder.

    Reads: receipts and files of every source, each hash recomputed. Writes: plan/, teacher/, targets/ (shards only)
    and receipts/ in the run folder. Refused before anything is written: another plan, another teacher, two different
    outputs of one unit.

    Example: bytecache merge here/run there/run --run-dir runs/whole
    """
    from bytecache.pipeline.commands.merge import merge as merge_runs
    from bytecache.pipeline.fleet.ledger import STAGES
    from bytecache.pipeline.stores import open_store

    def command(context: "Context") -> None:
        result = merge_runs(context.store, [open_store(source) for source in sources])
        for line in result.skipped:
            say(f"skipped: {line}")
        counts = (
            f"{result.copied[stage]} units of {stage} copied, {result.present[stage]} were there" for stage in STAGES
        )
        say(f"merge: {'; '.join(counts)}; {len(result.skipped)} skipped")

    run_stage(given, command)
