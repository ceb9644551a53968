"""Commands that look at a run, a file or a setting."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytecache.pipeline.cli.options import Given, JsonOption, refusals, run_stage, takes_settings
from bytecache.pipeline.cli.terminal import say
from bytecache.pipeline.config_text import render_template
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError
from bytecache.schemas.files import local_path, refuse_output, write_text
from bytecache.schemas.settings import Settings

if TYPE_CHECKING:
    from bytecache.pipeline.context import Context

app = typer.Typer()


@app.command()
@takes_settings()
def status(given: Given, as_json: JsonOption = False) -> None:
    """Show what is done of each stage: units, bytes, and what is damaged.

    Reads: the receipts of the run folder (sizes only; `bytecache verify` recomputes hashes). Writes nothing.

    Example: bytecache status --run-dir runs/books --json
    """
    with refusals():
        from bytecache.pipeline.commands import status as module
        from bytecache.pipeline.context import open_context

        report = module.status(open_context(given.settings()))
        say(json.dumps(report, indent=2) if as_json else module.status_table(report))


@app.command()
@takes_settings()
def verify(
    given: Given,
    folder: Annotated[
        str, typer.Argument(help="A run folder, or a folder with dataset.json, or its URL; default: run.dir.")
    ] = "",
    as_json: JsonOption = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every shard too, and compare it with its manifest.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set aside what is damaged and make or fetch just that again.")
    ] = False,
    source: Annotated[
        str, typer.Option("--from", metavar="PLACE", help="With --repair: folder or URL the data set came from.")
    ] = "",
) -> None:
    """Recompute the hash of everything that has a receipt, and of the data set.

    Reads: every byte of the folder once. Writes nothing without --repair. Exit code 4 and a list if anything is wrong.

    --repair in a run folder puts back what lies in another's place, sets aside damaged outputs with their receipts (in
    set-aside/), makes slices, shards and the index again, and names the commands that make the rest; it uses the run's
    own configuration. In a data set on its own it fetches bad files again --from where it came.

    Example: bytecache verify runs/books --repair; or: bytecache verify downloaded --repair --from hf://datasets/me/books
    """
    with refusals():
        from bytecache.pipeline.commands import verify as module

        settings = given.settings(of_run=False)
        run, redirects = settings.run, settings.dataset.private_redirects
        place = str(folder) if folder else run.dir
        done = _repair(given, place, source, deep, quiet=as_json) if repair else []
        if source and not repair:
            raise ConfigError(f"--from {source}: only --repair fetches; add it")
        problems, checked = module.verify_place(place, run.scratch, deep=deep, private_redirects=redirects)
        left = sum(line.startswith("left: ") for line in done)
        if as_json:
            report = {"folder": place, "files": checked, "problems": problems}
            say(json.dumps(report | ({"repaired": done} if repair else {}), indent=2))
        else:
            for line in [*done, *problems]:
                say(line)
        if problems or left:
            remedy = "rerun the stage, or `bytecache verify --repair`, which repairs or names the command that does"
            remedy = "run what is named above" if repair else remedy
            raise IntegrityError(f"{place}: {len(problems) or left} problems in {checked} files; {remedy}")
        if not as_json:
            say(f"{place}: {checked} files match their hashes")


def _repair(given: Given, place: str, source: str, deep: bool, *, quiet: bool) -> list[str]:
    """Repair a run folder, or a data set on its own from its source; returns what was done."""
    from bytecache.pipeline.commands.verify import is_dataset

    local = local_path(place)
    if source or is_dataset(local):
        from bytecache.pipeline.commands.repair_dataset import repair_dataset
        from bytecache.stages.targets.source import Access

        if not source:
            raise ConfigError(f"{place} is a data set on its own; name where it came from: --from PLACE")
        if not local.is_dir():
            raise InputError(f"{place} is not a folder; --from repairs a local copy of a data set")
        return repair_dataset(local, source, Access(given.settings(of_run=False).dataset.private_redirects))
    from bytecache.pipeline.commands.repair import repair_run
    from bytecache.pipeline.context import open_context, own_configuration
    from bytecache.pipeline.stores import open_store

    # A damaged config.toml is one of the things to repair: what the run was made with is read from a whole one.
    own = own_configuration(open_store(place, given.settings(of_run=False).run.scratch))
    given.config, given.fresh = given.config or own, True
    settings = given.settings({"run.dir": place})
    return repair_run(open_context(settings, lambda line: None if quiet else say(line)), deep=deep)


@app.command()
@takes_settings()
def prune(
    given: Given,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Newest editions that stay.")] = 1,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is listed; without it nothing is.")] = False,
) -> None:
    """List, and with --remove free, what older editions of a corpus that grew alone still name.

    Reads: plans, indices and receipts. Writes nothing without --remove; with it slices, dump parts, shards and indices
    of older editions go for good. The newest editions and the published one stay whole. Refused while workers live.

    Example: bytecache prune --run-dir runs/books --keep 2 --remove
    """
    from bytecache.pipeline.commands.prune import prune as command

    run_stage(given, lambda context: command(context, keep, remove=remove))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .parquet of teacher/ or a .zarr.zip of targets/.")],
    document: Annotated[str, typer.Option("--document", "-d", help="Document id; default: the first one.")] = "",
    start: Annotated[int, typer.Option(min=0, help="First position to show (bytes; tokens in a dump).")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Positions to show; default: 40, in a page 65536 over documents.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, max=257, help="Alternatives per position.")] = None,
    as_json: JsonOption = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page for a browser (shards only).")] = None,
) -> None:
    """Show a dump part or a shard to a person: text in heat colours of entropy, alternatives, tails.

    Reads: one file. Writes nothing; with --html one self-contained page that works offline.

    Example: bytecache inspect runs/books/targets/train-00000-0a1b2c3d4e5f.zarr.zip --html page.html
    """
    with refusals():
        from bytecache.pipeline.commands.inspect.text import inspect_file, paint

        if html is not None:
            from bytecache.pipeline.commands.inspect.page import POSITIONS, shard_page

            refuse_output(html, "--html", file)
            write_text(html, shard_page(file, document, start, limit or POSITIONS, top or 8))
            say(f"{html}: open it in a browser")
            return
        report = inspect_file(file, document, start, limit or 40, top or 4)
        if as_json:
            report.pop("heat", None)
            say(json.dumps(report, indent=2, default=str))
        else:
            from rich.console import Console

            # Wide enough where nothing limits it, so that a pipe gets whole rows.
            Console(width=None if sys.stdout.isatty() else 240, highlight=False, soft_wrap=False).print(paint(report))


@app.command()
@takes_settings("teacher.model", "teacher.backend")
def fidelity(
    given: Given,
    folder: Annotated[
        Path | None, typer.Argument(help="A run folder, or a folder with dataset.json; default: run.dir.")
    ] = None,
    sample: Annotated[int, typer.Option("--sample", "-n", min=1, help="Stretches of text to evaluate.")] = 16,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens in a stretch.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which positions are drawn.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON report to write.")] = Path("fidelity.json"),
    any_teacher: Annotated[
        bool, typer.Option("--any-teacher", help="Measure even if the teacher is not the one that made the data.")
    ] = False,
) -> None:
    """Rerun a data set's fidelity certificate: stored targets against the teacher itself, far closer to exact.

    Reads: dataset.json, the shards that hold the sampled positions, the teacher. Writes: a JSON report. Prints KL and
    JSD in nats per byte, the leak in bits per byte and the tail, beside the certificate's. Exit code 4 if the mean KL
    is more than half above the certificate's and three standard errors besides.

    The teacher must be the one that made the data set (weights and vocabulary are compared). Runs on transformers
    unless --backend says vllm.

    Example: bytecache fidelity downloaded/targets --teacher ./SmolLM2 --sample 32 --seed 7
    """
    from bytecache.pipeline.commands import fidelity as module

    def command(context: "Context") -> None:
        place = folder or local_path(context.settings.run.dir)
        wanted = module.Sample(sample, tokens, seed)
        module.fidelity(context, place, given.chosen["teacher.model"], wanted, out, any_teacher=any_teacher)

    # A data set elsewhere has nothing to do with the run folder of the settings.
    run_stage(given, command, {"teacher.backend": given.chosen["teacher.backend"] or "hf"}, of_run=folder is None)


@app.command()
@takes_settings("teacher.model", "teacher.backend", "teacher.preset", "teacher.tau", "teacher.depth", run_dir=False)
def probe(
    given: Given,
    text_file: Annotated[Path, typer.Option("--text-file", help="UTF-8 text to score.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz to write.")],
) -> None:
    """Score one text in memory: how to check a setting before paying for a corpus.

    Reads: the text and the teacher. Writes: an .npz with probs float32 [n+1, 257] (256 bytes and END; row i is the
    distribution after i bytes), tail float32 [n+1] and text uint8 [n]. Prints bits/byte and the mean tail.

    Runs on transformers unless --backend says vllm: the same numbers, and a branch costs one token. --tau without
    --depth means three passes.

    Example: bytecache probe --teacher ./SmolLM2 --text-file page.txt --preset exact --out page.npz
    """
    with refusals():
        from bytecache.pipeline.commands.probe import probe as command

        chosen = given.chosen
        depth = "3" if chosen["teacher.tau"] is not None and chosen["teacher.depth"] is None else None
        more = {"teacher.backend": chosen["teacher.backend"] or "hf", "teacher.depth": depth}
        settings = given.settings(more, of_run=False)
        say(command(settings.teacher, text_file, out))


@app.command()
@takes_settings("corpus.source", "teacher.model", "teacher.backend")
def check(given: Given) -> None:
    """Look at corpus, teacher and student for whatever would stop a run, before any work.

    Reads: the beginning of the corpus; configuration and tokenizers of the models, none of their weights. Writes
    nothing. `run` looks first too; this says all that is wrong at once.

    Example: bytecache check --source chats.jsonl --set corpus.kind=chat --set student.model=./small
    """
    from bytecache.pipeline.commands.check import check as command

    run_stage(given, command)


@app.command()
@takes_settings(run_dir=False)
def config(
    given: Given,
    defaults: Annotated[bool, typer.Option("--defaults", help="The defaults, whatever ./pipeline.toml says.")] = False,
) -> None:
    """Print the resolved configuration as a complete, commented pipeline.toml.

    Reads: pipeline.toml. Writes nothing.

    Example: bytecache config --set teacher.depth=2 > pipeline.toml
    """
    with refusals():
        say(render_template(Settings() if defaults else given.settings(of_run=False)), nl=False)
