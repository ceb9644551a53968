"""The command line. Parses, resolves the configuration, calls one command module, turns refusals into exit codes.

Stage modules are imported inside the commands, so that `--help` does not load torch. Exit codes: 0 done;
1 other refusal; 2 configuration; 3 input; 4 integrity; 5 engine; 6 storage; 75 stopped by a signal, rerun to
continue. Anything else is a fault of ours and keeps its traceback.
"""

import os
import sys

import typer

from bytecache.pipeline.cli import estimate, fleet, foreign, jobs, share, stages, tools

app = typer.Typer(
    help=(
        "An offline teacher cache for byte-level distillation: exact next-byte targets from any teacher, for any "
        "student.\n\nStages: plan, teacher, convert, train, evaluate, export; **run** does all of them. Each "
        "reads what the one before left in the run folder, skips what is done, and can be killed at any moment and "
        "rerun.\n\nExit codes: 0 done, 1 other refusals, 2 configuration, 3 input, 4 integrity, 5 engine, 6 "
        "storage, 75 stopped by a signal (rerun the same command)."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(stages.app)
app.add_typer(tools.app)
app.add_typer(estimate.app)
app.add_typer(jobs.app)
app.add_typer(fleet.app)
app.add_typer(foreign.app)
app.add_typer(share.app)


def main() -> None:
    """The console script: run the command and leave at once.

    Thread pools of the libraries we use now and then abort the interpreter's teardown, when all work is already on
    disk; a scheduler would read that as a failure.
    """
    # Read by torch's C++ side when it loads; its notes about NUMA would break the lines of JSON.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    status: int | str | None = 0
    try:
        app()
    except SystemExit as leaving:
        status = leaving.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
