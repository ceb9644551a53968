"""Options that commands share, and how a command resolves them, refuses and leaves.

A command that takes the configuration says so once: `@takes_settings("corpus.source")` replaces its parameter `given`
by the options --config, --set, --run-dir and the named shorthands, and passes what they say.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytecache.pipeline.cli.terminal import PIPE_CLOSED, say, say_error, show_warnings
from bytecache.pipeline.config import load_settings
from bytecache.schemas.errors import BytecacheError, missing_package
from bytecache.schemas.settings import Settings

if TYPE_CHECKING:
    from bytecache.pipeline.context import Context

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A TOML file; default: ./pipeline.toml where there is one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override any key, e.g. teacher.top_k=8; repeatable."),
]
RunDirOption = Annotated[str | None, typer.Option("--run-dir", "-r", help="The run folder (run.dir).")]
SHORTHANDS: dict[str, tuple[str, Any]] = {
    "corpus.source": ("source", typer.Option("--source", help="The corpus (corpus.source).")),
    "corpus.jobs": ("jobs", typer.Option("--jobs", metavar="N", help="Processes that read the corpus (corpus.jobs).")),
    "teacher.model": ("model", typer.Option("--teacher", "-t", help="Folder or hub id (teacher.model).")),
    "teacher.backend": ("backend", typer.Option("--backend", help="vllm or hf (teacher.backend).")),
    "teacher.preset": ("preset", typer.Option("--preset", help="fast, balanced or exact (teacher.preset).")),
    "teacher.tau": (
        "tau",
        typer.Option("--tau", metavar="SHARE", help="Share above which a deviation is evaluated (teacher.tau)."),
    ),
    "teacher.depth": (
        "depth",
        typer.Option("--depth", metavar="N", help="Passes of branch evaluation (teacher.depth)."),
    ),
}
"""Keys of the configuration that have an option of their own: its name as a parameter, and the option."""
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WorkerOption = Annotated[
    bool, typer.Option("--worker", help="Share the units with any number of other workers on this run folder.")
]
OnlyOption = Annotated[str, typer.Option("--only", help="One run: distilled or control; default: as configured.")]


class Given:
    """What a command line says of the configuration. Resolved when asked for, where a refusal becomes one line."""

    def __init__(
        self, config: Path | None, overrides: list[str] | None, run_dir: str | None = None, **shorthand: str | None
    ) -> None:
        self.config, self.overrides = config, list(overrides or [])
        keys = {name: key for key, (name, _) in SHORTHANDS.items()}
        self.chosen = {"run.dir": run_dir} | {keys[name]: value for name, value in shorthand.items()}

    def settings(self, config: Path | None = None, /, **more: str | None) -> Settings:
        """The configuration. Shorthands win over --set; `more` (section__key=value) over both, unless None.

        `config`: the file to read where the user named none. Raises ConfigError.
        """
        chosen = self.chosen | {name.replace("__", "."): value for name, value in more.items() if value is not None}
        given = [f"{key}={value}" for key, value in chosen.items() if value is not None]
        return load_settings(self.config or config, [*self.overrides, *given])


def injected(name: str, options: Mapping[str, Any], build: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that replaces a command's parameter `name` by `options` (parameter: (annotation, default)).

    The command is called with `build(**options)` in its place.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def parameter(key: str, annotation: Any, default: Any) -> inspect.Parameter:
            return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)

        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(function).parameters.values():
            if own.name == name:
                parameters += [parameter(key, annotation, default) for key, (annotation, default) in options.items()]
            else:
                parameters.append(parameter(own.name, own.annotation, own.default))

        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(**{name: build(**{key: values.pop(key) for key in options})}, **values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def takes_settings(*keys: str, run_dir: bool = True) -> Callable[..., Any]:
    """The command's parameter `given` (a `Given`) comes from --config, --set, --run-dir and shorthands for `keys`."""
    options: dict[str, Any] = {"config": (ConfigOption, None), "overrides": (SetOption, None)}
    if run_dir:
        options["run_dir"] = (RunDirOption, None)
    for key in keys:
        name, option = SHORTHANDS[key]
        options[name] = (Annotated[str | None, option], None)
    return injected("given", options, Given)


@contextmanager
def refusals() -> Iterator[None]:
    """One line and an exit code for whatever the user can act on."""
    from bytecache.pipeline.stores import disk_errors

    show_warnings()
    try:
        try:
            with disk_errors("writing"):
                yield
        except ModuleNotFoundError as error:
            refusal = missing_package(error)
            if refusal is None:
                raise
            raise refusal from error
    except BytecacheError as error:
        say_error(str(error))
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        raise typer.Exit(PIPE_CLOSED) from None


def run_stage(given: Given, command: Callable[["Context"], Any], **more: str | None) -> None:
    """Run a stage command under the signal handlers; `more`: see `Given.settings`."""
    with refusals():
        from bytecache.pipeline.context import open_context

        context = open_context(given.settings(**more), say)
        if not sys.stderr.isatty():
            # Other people's bars would break the JSON lines; on a terminal a long download should show.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with context.stop.installed():
            command(context)
