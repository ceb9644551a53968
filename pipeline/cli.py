"""The command line. Parses, resolves the configuration, calls one command module, turns refusals into exit codes.

Stage modules are imported inside the commands, so that `--help` does not load torch. Exit codes: 0 done;
1 other refusal; 2 configuration; 3 input; 4 integrity; 5 engine; 6 storage; 75 stopped by a signal, rerun to
continue. Anything else is a fault of ours and keeps its traceback.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.config import load_settings, render_template
from schemas.errors import BytecacheError, IntegrityError
from schemas.settings import Settings

if TYPE_CHECKING:
    from pipeline.context import Context

app = typer.Typer(
    help=(
        "An offline teacher cache for byte-level distillation: exact next-byte targets from any teacher, for any "
        "student.\n\nStages: plan, teacher, convert, train, evaluate, export; **run** does all of them. Each "
        "reads what the one before left in the run folder, skips what is done, and can be killed at any moment and "
        "rerun.\n\nExit codes: 2 configuration, 3 input, 4 integrity, 5 engine, 6 storage, 75 stopped by a signal "
        "(rerun the same command)."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

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
TauOption = Annotated[str | None, typer.Option("--tau", help="Share above which a deviation is evaluated.")]
DepthOption = Annotated[str | None, typer.Option("--depth", help="Passes of branch evaluation (teacher.depth).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OnlyOption = Annotated[str, typer.Option("--only", help="One run: distilled or control; default: as configured.")]


@contextmanager
def _refusals() -> Iterator[None]:
    """One line and an exit code for whatever the user can act on."""
    from pipeline.store import disk_errors

    try:
        with disk_errors("writing"):
            yield
    except BytecacheError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(error.exit_code) from None


def _settings(config: Path | None, overrides: list[str] | None, **shorthand: str | None) -> Settings:
    """`shorthand`: section__key=value of the convenience options; they win over --set."""
    given = [f"{name.replace('__', '.')}={value}" for name, value in shorthand.items() if value is not None]
    return load_settings(config, [*(overrides or []), *given])


def _stage(settings: Callable[[], Settings], command: Callable[["Context"], Any]) -> None:
    """Run a stage command under the signal handlers."""
    with _refusals():
        from pipeline.context import open_context

        context = open_context(settings(), typer.echo)
        if not sys.stderr.isatty():
            # Other people's bars would break the JSON lines; on a terminal a long download should show.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with context.stop.installed():
            command(context)


@app.command()
def plan(
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    source: SourceOption = None,
) -> None:
    """Cut the corpus into units of work.

    Reads: corpus.source (JSONL, Parquet, text, a folder). Writes: plan/plan.json and plan/slices/ in the run folder.

    The split into train and held-out documents and the slices are fixed here; planning again with the same text and
    settings changes nothing, with others it is refused.

    Example: bytecache plan --source books.jsonl --run-dir runs/books
    """
    from pipeline import commands_data

    _stage(lambda: _settings(config, overrides, run__dir=run_dir, corpus__source=source), commands_data.plan)


@app.command()
def teacher(
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    model: TeacherOption = None,
    backend: BackendOption = None,
    tau: TauOption = None,
    depth: DepthOption = None,
) -> None:
    """Run the teacher over every unit and dump its path masses.

    Reads: plan/. Writes: teacher/, one Parquet part per unit, each with a receipt.

    Units with a valid receipt are skipped; with all of them done the engine is not even started. SIGTERM finishes or
    abandons the unit in flight and exits with code 75; rerun the same command to continue.

    Example: bytecache teacher --run-dir runs/books --teacher HuggingFaceTB/SmolLM2-135M --depth 2 --tau 0.01
    """
    from pipeline import commands_data

    _stage(
        lambda: _settings(
            config,
            overrides,
            run__dir=run_dir,
            teacher__model=model,
            teacher__backend=backend or "hf",
            teacher__tau=tau,
            teacher__depth=depth,
        ),
        commands_data.teacher,
    )


@app.command()
def convert(config: ConfigOption = None, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    """Turn the dump into byte targets, the data set that students train from.

    Reads: plan/ and teacher/ (no model, no GPU). Writes: targets/, Zarr shards with manifest.parquet and
    dataset.json, a folder to share.

    Example: bytecache convert --run-dir runs/books --set convert.prune=1e-4
    """
    from pipeline import commands_data

    _stage(lambda: _settings(config, overrides, run__dir=run_dir), commands_data.convert)


@app.command()
def train(
    config: ConfigOption = None, overrides: SetOption = None, run_dir: RunDirOption = None, only: OnlyOption = ""
) -> None:
    """Train the student, and its control without the teacher's targets (train.control).

    Reads: targets/. Writes: train/distilled-KEY/ and train/control-KEY/ with checkpoints and metrics.jsonl.

    Resumes from the newest whole checkpoint; SIGTERM saves one and exits with code 75.

    Example: bytecache train --run-dir runs/books --set train.steps=2000 --only distilled
    """
    from pipeline import commands_student

    _stage(
        lambda: _settings(config, overrides, run__dir=run_dir), lambda context: commands_student.train(context, only)
    )


@app.command()
def evaluate(
    config: ConfigOption = None, overrides: SetOption = None, run_dir: RunDirOption = None, only: OnlyOption = ""
) -> None:
    """Measure the trained students on the held-out documents.

    Reads: targets/ and train/. Writes: report/report.json and report/report.md; prints the table.

    Example: bytecache evaluate --run-dir runs/books
    """
    from pipeline import commands_student

    def command(context: "Context") -> None:
        commands_student.evaluate(context, only)
        typer.echo((context.store.root / "report/report.md").read_text(encoding="utf-8"))

    _stage(lambda: _settings(config, overrides, run__dir=run_dir), command)


@app.command()
def export(
    config: ConfigOption = None, overrides: SetOption = None, run_dir: RunDirOption = None, only: OnlyOption = ""
) -> None:
    """Write the distilled student as a plain checkpoint, the byte head gone.

    Reads: train/. Writes: export/distilled-KEY/, which AutoModelForCausalLM.from_pretrained loads; its token logits are
    compared with the trained model's before it is published.

    Example: bytecache export --run-dir runs/books
    """
    from pipeline import commands_student

    _stage(
        lambda: _settings(config, overrides, run__dir=run_dir), lambda context: commands_student.export(context, only)
    )


@app.command()
def run(
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    source: SourceOption = None,
    model: TeacherOption = None,
    backend: BackendOption = None,
) -> None:
    """Every stage in order: plan, teacher, convert, train, evaluate, export; ends with a table.

    Reads: the corpus and the teacher. Writes: everything under the run folder, and report/summary.md.

    Safe to repeat: what is whole is skipped, and a second run does nothing and says so.

    Example: bytecache run --run-dir runs/first --set corpus.max_bytes=100000
    """
    from pipeline import chain

    _stage(
        lambda: _settings(
            config,
            overrides,
            run__dir=run_dir,
            corpus__source=source,
            teacher__model=model,
            teacher__backend=backend,
        ),
        chain.run,
    )


@app.command()
def status(
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is done of each stage: units, bytes, and what is damaged.

    Reads: the receipts of the run folder (sizes only; `bytecache verify` recomputes hashes). Writes nothing.

    Example: bytecache status --run-dir runs/books --json
    """
    with _refusals():
        from pipeline import status as module
        from pipeline.context import open_context

        report = module.status(open_context(_settings(config, overrides, run__dir=run_dir)))
        typer.echo(json.dumps(report, indent=2) if as_json else module.status_table(report))


@app.command()
def verify(
    folder: Annotated[
        Path | None, typer.Argument(help="A run folder, or a folder with dataset.json; default: run.dir.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recompute the hash of everything that has a receipt, and of the data set.

    Reads: every byte of the folder once. Writes nothing. Exit code 4 and a list if anything is wrong.

    Example: bytecache verify runs/books; or, for a data set that somebody gave you: bytecache verify downloaded/targets
    """
    with _refusals():
        from pipeline import status as module

        place = folder or Path(_settings(config, overrides, run__dir=run_dir).run.dir).expanduser()
        problems, checked = module.verify_folder(place)
        if as_json:
            typer.echo(json.dumps({"folder": str(place), "files": checked, "problems": problems}, indent=2))
        else:
            for problem in problems:
                typer.echo(problem)
        if problems:
            raise IntegrityError(f"{place}: {len(problems)} problems in {checked} files; rerun the stage to repair")
        if not as_json:
            typer.echo(f"{place}: {checked} files match their hashes")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .parquet of teacher/ or a .zarr.zip of targets/.")],
    document: Annotated[str, typer.Option("--document", "-d", help="Document id; default: the first one.")] = "",
    start: Annotated[int, typer.Option(min=0, help="First position to show (bytes; tokens in a dump).")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Positions to show.")] = 40,
    top: Annotated[int, typer.Option(min=1, max=257, help="Alternatives per position.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Print a dump part or a shard so that a person can read it: text, alternatives, tails.

    Reads: one file. Writes nothing.

    Example: bytecache inspect runs/books/targets/train-00000-0a1b2c3d4e5f.zarr.zip --start 100 --limit 20
    """
    with _refusals():
        from pipeline.inspection import inspect_file, render

        report = inspect_file(file, document, start, limit, top)
        typer.echo(json.dumps(report, indent=2, default=str) if as_json else render(report))


@app.command()
def probe(
    text_file: Annotated[Path, typer.Option("--text-file", help="UTF-8 text to score.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz to write.")],
    config: ConfigOption = None,
    overrides: SetOption = None,
    model: TeacherOption = None,
    backend: BackendOption = None,
    tau: TauOption = None,
    depth: DepthOption = None,
) -> None:
    """Score one text in memory: how to check a setting before paying for a corpus.

    Reads: the text and the teacher. Writes: an .npz with probs float32 [n+1, 257] (256 bytes and END; row i is the
    distribution after i bytes), tail float32 [n+1] and text uint8 [n]. Prints bits/byte and the mean tail.

    Runs on transformers unless --backend says vllm: the same numbers, and a branch costs one token. --tau without
    --depth means three passes.

    Example: bytecache probe --teacher ./SmolLM2 --text-file page.txt --depth 2 --tau 0.01 --out page.npz
    """
    with _refusals():
        from pipeline.probing import probe as command

        if tau is not None and depth is None:
            depth = "3"

        settings = _settings(
            config,
            overrides,
            teacher__model=model,
            teacher__backend=backend or "hf",
            teacher__tau=tau,
            teacher__depth=depth,
        )
        typer.echo(command(settings.teacher, text_file, out))


@app.command()
def config(
    path: ConfigOption = None,
    overrides: SetOption = None,
    defaults: Annotated[bool, typer.Option("--defaults", help="The defaults, whatever ./pipeline.toml says.")] = False,
) -> None:
    """Print the resolved configuration as a complete, commented pipeline.toml.

    Reads: pipeline.toml. Writes nothing.

    Example: bytecache config --set teacher.depth=2 > pipeline.toml
    """
    with _refusals():
        typer.echo(render_template(Settings() if defaults else _settings(path, overrides)), nl=False)


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


if __name__ == "__main__":
    main()
