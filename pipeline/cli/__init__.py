"""The command line. Parses, resolves the configuration, calls one command module, turns refusals into exit codes.

Stage modules are imported inside the commands, so that `--help` does not load torch. Exit codes: 0 done;
1 other refusal; 2 configuration; 3 input; 4 integrity; 5 engine; 6 storage; 75 stopped by a signal, rerun to
continue; 130 and 141 as shells have them for a Ctrl-C and a reader that left. Anything else is a fault of ours: 1,
one line, and a traceback in a log file.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import typer

from bytecache.pipeline.cli import estimate, fleet, foreign, jobs, mix, share, stages, tools
from bytecache.pipeline.cli.terminal import PIPE_CLOSED, STOPPED, crash_line, open_standard_streams, say, say_error
from bytecache.schemas.errors import StorageError

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
app.add_typer(mix.app)
app.add_typer(share.app)


def main() -> None:
    """The console script: run the command and leave at once.

    Thread pools of the libraries we use now and then abort the interpreter's teardown, when all work is already on
    disk; a scheduler would read that as a failure.
    """
    # Read by torch's C++ side when it loads; its notes about NUMA would break the lines of JSON.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    open_standard_streams()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # `bytecache.__main__`, while modules were loading
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = _flushed(_status(app))
    os._exit(status)


def _status(command: Callable[[], None]) -> int:
    """The exit code of a command; the last one to answer for any exception."""
    try:
        command()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BrokenPipeError:
        return PIPE_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        say("stopped by a signal; rerun the same command", err=True)
        return STOPPED
    except MemoryError:
        say_error("out of memory; what is whole is kept: rerun on a larger machine, or with smaller settings")
        return 1
    except BaseException as error:
        with suppress(BrokenPipeError):
            say_error(crash_line(error))
        return 1
    return 0


def _flushed(status: int) -> int:
    """`status`, or what it becomes when the last words do not reach their reader."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            status = status or PIPE_CLOSED
        except OSError as error:
            status = status or StorageError.exit_code
            with suppress(OSError):
                say_error(f"writing the output: {error.strerror}; what was said may be incomplete")
    return status
