"""Options that commands share, and how a command resolves them, refuses and leaves.

A command that takes the configuration says so once: `@takes_settings("corpus.source")` replaces its parameter `given`
by the options --config, --set, --run-dir and the named shorthands, and passes what they say.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytecache.pipeline.cli.terminal import PIPE_CLOSED, say, say_error, show_warnings
from bytecache.pipeline.config import MAX_FILE, RESOLVED_FILE, load_run_settings, load_settings
from bytecache.schemas.errors import BytecacheError, ConfigError, missing_package
from bytecache.schemas.files import local_path, read_regular
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
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Do not begin from the settings that the run folder was used with last.")
]
SHORTHANDS: dict[str, tuple[str, Any]] = {
    "corpus.source": ("source", typer.Option("--source", help="The corpus (corpus.source).")),
    "corpus.jobs": ("jobs", typer.Option("--jobs", metavar="N", help="Processes that read the corpus (corpus.jobs).")),
    "teacher.model": ("model", typer.Option("--teacher", "-t", help="Folder or hub id (teacher.model).")),
    "teacher.backend": (
        "backend",
        typer.Option("--backend", help="vllm, hf, server or vllm-server (teacher.backend)."),
    ),
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
        self,
        config: Path | None,
        overrides: list[str] | None,
        run_dir: str | None = None,
        fresh: bool = False,
        **shorthand: str | None,
    ) -> None:
        self.config, self.overrides, self.fresh = config, list(overrides or []), fresh
        keys = {name: key for key, (name, _) in SHORTHANDS.items()}
        self.chosen = {"run.dir": run_dir} | {keys[name]: value for name, value in shorthand.items()}

    def settings(
        self, more: Mapping[str, str | None] | None = None, *, of_run: bool = True, remote: bool = True
    ) -> Settings:
        """The configuration. Shorthands win over --set; `more` (section.key to value) over both, unless None.

        `of_run`: on top of the one that the run folder was used with last, which is said where it matters; not
        `remote`: only if that folder is on this machine.
        Raises ConfigError.
        """
        chosen = self.chosen | {key: value for key, value in (more or {}).items() if value is not None}
        overrides = [*self.overrides, *(f"{key}={value}" for key, value in chosen.items() if value is not None)]
        if not of_run or self.fresh:
            return load_settings(self.config, overrides)
        settings, values = load_run_settings(
            self.config, overrides, lambda plain: _saved_configuration(plain, remote=remote)
        )
        if values and sys.stderr.isatty():
            more_values = f" and {len(values) - 5} more" if len(values) > 5 else ""
            say(
                f"settings of this run, as {RESOLVED_FILE} there has them: {', '.join(values[:5])}{more_values}",
                err=True,
            )
        elif values:
            say(json.dumps({"stage": "settings", "from": RESOLVED_FILE, "values": values}), err=True)
        return settings


def _saved_configuration(settings: Settings, *, remote: bool) -> tuple[str, bytes] | None:
    """Name and content of the configuration in the run folder. Raises ConfigError where it cannot be read."""
    place = settings.run.dir
    name = f"{place}/{RESOLVED_FILE}"
    if "://" in place and not remote:
        return None
    from bytecache.pipeline.context import configuration_fault, own_configuration
    from bytecache.pipeline.stores import open_store

    store = open_store(place, settings.run.scratch)
    if fault := configuration_fault(store):
        raise ConfigError(f"configuration {name} {fault}")
    if not store.exists(RESOLVED_FILE) and (copy := own_configuration(store)) is not None:
        say(f"warning: {name} is missing; the settings are those of {copy}", err=True)
        return str(copy), copy.read_bytes()
    if "://" in place:
        return (name, store.read_bytes(RESOLVED_FILE)) if store.exists(RESOLVED_FILE) else None
    try:
        return name, read_regular(local_path(place) / RESOLVED_FILE, MAX_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration {name} cannot be read: {error}; delete it or name another run.dir") from None


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
        options["fresh"] = (FreshOption, False)
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


def run_stage(
    given: Given,
    command: Callable[["Context"], Any],
    more: Mapping[str, str | None] | None = None,
    *,
    of_run: bool = True,
) -> None:
    """Run a stage command under the signal handlers; `more` and `of_run`: see `Given.settings`."""
    with refusals():
        from bytecache.pipeline.context import open_context

        context = open_context(given.settings(more, of_run=of_run), say)
        if not sys.stderr.isatty():
            # Other people's bars would break the JSON lines; on a terminal a long download should show.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with context.stop.installed():
            command(context)
