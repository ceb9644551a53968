"""What commands say to a terminal or a pipe, and what is said when nobody foresaw the error.

Everything passes `schemas.messages.shown`: a stranger's text gets no control over the terminal, nobody's password is
printed. A fault of ours becomes one line, with the traceback in a log file: `crash_line`.
"""

import logging
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from bytecache.schemas.files import cache_folder, write_text
from bytecache.schemas.messages import masked, one_line, shown

STOPPED, PIPE_CLOSED = 130, 141
"""Exit codes of a Ctrl-C, and of a reader of our output that left (`| head -1`), as shells have them."""
KEPT_LOGS = 20
"""Logs of faults that are kept; older ones go when a new one is written."""


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """One or several lines for the user: results to stdout, `err` to stderr."""
    typer.echo(shown(text), err=err, nl=nl)


def say_error(text: str) -> None:
    """A refusal, as one line on stderr."""
    say(f"error: {one_line(text)}", err=True)


class _Lines(logging.Handler):
    """Warnings of library code as lines on stderr, wherever that leads when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say one record."""
        say(f"{record.levelname.lower()}: {one_line(record.getMessage())}", err=True)


_LINES = _Lines()
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


_MARGIN = "  | "
"""Before every line but the first of what a library says: a line of a stranger's cannot pass for one of ours."""


def _shown_lines(text: str) -> str:
    """What a library says, as a terminal may have it: no colours, no control, every further line behind a margin."""
    return shown(_COLOURS.sub("", text)).replace("\n", f"\n{_MARGIN}")


class _ShownRecord(logging.LogRecord):
    """What a library logs: it repeats what strangers wrote, the name of a weight or of a token for one."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[0] is not None:
            # A formatter takes this text where there is one, instead of making it.
            self.exc_text = _MARGIN + _shown_lines("".join(traceback.format_exception(*self.exc_info)).rstrip())

    def getMessage(self) -> str:  # noqa: N802 - the name in `logging`
        """The message as a terminal may have it."""
        return _shown_lines(super().getMessage())


def _warning_lines(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What `warnings` prints, of whichever library: where, and the message."""
    return _shown_lines(f"{category.__name__}: {message} ({filename}:{lineno})") + "\n"


def show_warnings() -> None:
    """Let the logger `bytecache` speak on stderr, and every other as text alone; asking again changes nothing."""
    logging.getLogger("bytecache").addHandler(_LINES)
    logging.setLogRecordFactory(_ShownRecord)
    warnings.formatwarning = _warning_lines


def open_standard_streams() -> None:
    """Give descriptors 0, 1 and 2 to /dev/null where the caller closed them (`>&-`).

    Else the next file that is opened gets the number, and what a library prints ends up in a shard.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, mode)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False))
        else:
            # A terminal of another encoding shows what it can, instead of ending the command.
            getattr(sys, name).reconfigure(errors="backslashreplace")


def crash_line(error: BaseException) -> str:
    """Writes the traceback to a log and returns the line that says what happened, where it is, and where to report it.

    The log lies in `logs` of the cache folder, or of the folder for temporary files where that cannot be written.
    """
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    place = _write_log(error)
    where = f"the traceback is in {place}" if place else "its traceback could not be written anywhere"
    if library := _missing_gpu_library(error):
        return (
            f"{library} is not on this machine, which an installed package was built for: a CUDA build of torch, most "
            f"likely. On a machine without a GPU install the CPU build of torch (README, Two commands); {where}"
        )
    return f"{one_line(what, 300)} (a fault of bytecache: {where}; please report it with that file, {_bugs()})"


def _missing_gpu_library(error: BaseException) -> str:
    """Name of the library of CUDA for want of which a package could not be imported, or nothing."""
    library = re.match(r"(lib(?:cu|nv|nccl)[\w.-]*): cannot open shared object file", str(error))
    return library[1] if isinstance(error, ImportError) and library else ""


def _write_log(error: BaseException) -> Path | None:
    lines = [
        f"bytecache {_version()}, Python {sys.version.split()[0]}, {sys.platform}",
        "arguments: " + " ".join(sys.argv[1:]),
        "",
        *traceback.format_exception(error),
    ]
    text = masked("\n".join(lines)) + "\n"
    name = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    for folder in (cache_folder() / "logs", Path(tempfile.gettempdir()) / f"bytecache-logs-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_text(folder / name, text)
            for old in sorted(folder.glob("*.log"))[:-KEPT_LOGS]:
                old.unlink(missing_ok=True)
            return folder / name
        except Exception:  # a full disk, a read-only home: the line alone must do
            continue
    return None


def _version() -> str:
    try:
        return metadata.version("bytecache")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _bugs() -> str:
    """Where the package says that bugs are reported."""
    try:
        urls = metadata.metadata("bytecache").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    named = {name.strip().lower(): url.strip() for name, _, url in (entry.partition(",") for entry in urls)}
    return next(
        (named[name] for name in ("issues", "bug tracker", "bugs", "tracker") if name in named), "see CONTRIBUTING.md"
    )
