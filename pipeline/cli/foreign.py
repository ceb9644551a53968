"""The command that takes in what other tools cached."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytecache.pipeline.cli.options import Given, refusals, run_stage, takes_settings
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.files import local_path

if TYPE_CHECKING:
    from bytecache.pipeline.context import Context

app = typer.Typer()


@app.command("import")
@takes_settings("teacher.model")
def import_(
    given: Given,
    place: Annotated[Path, typer.Argument(help="The cache: a Parquet or JSONL file, or a folder of them.")],
    layout: Annotated[str, typer.Option("--from", help="plain, distillkit, axolotl or trl.")],
    ids_column: Annotated[str, typer.Option(help="Column of the listed ids (plain).")] = "",
    logprobs_column: Annotated[str, typer.Option(help="Column of their log-probabilities (plain).")] = "",
    tokens_column: Annotated[str, typer.Option(help="Column of the sequences (plain).")] = "",
    alignment: Annotated[
        str, typer.Option(help="What an entry is about: of, after, of-right, after-right; default: read off.")
    ] = "",
    renormalised: Annotated[
        bool, typer.Option("--renormalised", help="Take lists that add up to 1 as they are.")
    ] = False,
) -> None:
    """Take in a cache of top-k log-probabilities: its text becomes the corpus, its lists the token dump.

    Reads: the cache, and the tokenizer of the teacher that made it (--teacher: a folder; its weights are not needed).
    Writes: import/, plan/ and teacher/ of the run folder. What is not listed becomes the targets' tail; a list is less
    than a teacher's path masses, and has no certificate until `fidelity --teacher` makes one.

    Example: bytecache import logprobs/ --from distillkit --teacher Qwen3-8B --run-dir runs/foreign
    """
    with refusals():
        from bytecache.pipeline.commands.foreign import CORPUS, Source, import_cache
        from bytecache.stages.foreign.cache import ALIGNMENTS
        from bytecache.stages.foreign.records import COLUMNS, Columns

        if alignment and alignment not in ALIGNMENTS:
            raise ConfigError(f"--alignment {alignment}: one of {', '.join(ALIGNMENTS)}")
        named = (tokens_column, ids_column, logprobs_column)
        usual = COLUMNS.get(layout)
        columns = None
        if any(named) and usual is not None:
            columns = Columns(*(given_name or name for given_name, name in zip(named, usual, strict=True)))
        source = Source(local_path(place), layout, columns, alignment, renormalised)
        corpus = str(Path(given.settings().run.dir) / CORPUS)

    def command(context: "Context") -> None:
        import_cache(context, source)

    run_stage(given, command, {"corpus.source": corpus, "corpus.kind": "text", "corpus.max_bytes": "0"})
