"""Options that commands share, and how a command resolves them, refuses and leaves."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.config import load_settings
from schemas.errors import BytecacheError
from schemas.settings import Settings

if TYPE_CHECKING:
    from pipeline.context import Context

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A TOML file; default: ./pipeline.toml where there is one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override any key, e.g. teacher.top_k=8; repeatable."),
]
RunDirOption = Annotated[str | None, typer.Option("--run-dir", "-r", help="The run folder (run.dir).")]
SourceOption = Annotated[str | None, typer.Option("--source", help="The corpus (corpus.source).")]
TeacherOption = Annotated[str | None, typer.Option("--teacher", "-t", help="Folder or hub id (teacher.model).")]
BackendOption = Annotated[str | None, typer.Option("--backend", help="vllm or hf (teacher.backend).")]
PresetOption = Annotated[str | None, typer.Option("--preset", help="fast, balanced or exact (teacher.preset).")]
TauOption = Annotated[str | None, typer.Option("--tau", help="Share above which a deviation is evaluated.")]
DepthOption = Annotated[str | None, typer.Option("--depth", help="Passes of branch evaluation (teacher.depth).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WorkerOption = Annotated[
    bool, typer.Option("--worker", help="Share the units with any number of other workers on this run folder.")
]
OnlyOption = Annotated[str, typer.Option("--only", help="One run: distilled or control; default: as configured.")]


@contextmanager
def refusals() -> Iterator[None]:
    """One line and an exit code for whatever the user can act on."""
    from pipeline.stores import disk_errors

    try:
        with disk_errors("writing"):
            yield
    except BytecacheError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(error.exit_code) from None


def resolve(config: Path | None, overrides: list[str] | None, **shorthand: str | None) -> Settings:
    """`shorthand`: section__key=value of the convenience options; they win over --set."""
    given = [f"{name.replace('__', '.')}={value}" for name, value in shorthand.items() if value is not None]
    return load_settings(config, [*(overrides or []), *given])


def run_stage(settings: Callable[[], Settings], command: Callable[["Context"], Any]) -> None:
    """Run a stage command under the signal handlers."""
    with refusals():
        from pipeline.context import open_context

        context = open_context(settings(), typer.echo)
        if not sys.stderr.isatty():
            # Other people's bars would break the JSON lines; on a terminal a long download should show.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with context.stop.installed():
            command(context)
