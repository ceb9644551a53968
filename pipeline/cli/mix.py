"""The command that makes one data set of several teachers'."""

from typing import TYPE_CHECKING, Annotated

import typer

from bytecache.pipeline.cli.options import Given, refusals, run_stage, takes_settings
from bytecache.schemas.errors import ConfigError

if TYPE_CHECKING:
    from bytecache.pipeline.context import Context

app = typer.Typer()


@app.command()
@takes_settings()
def mix(
    given: Given,
    places: Annotated[list[str], typer.Argument(help="Data sets of the same text: folders or URLs with dataset.json.")],
    weights: Annotated[str, typer.Option(help="One weight a data set, e.g. 0.7,0.3; default: equal ones.")] = "",
    log_pool: Annotated[bool, typer.Option("--log-pool", help="Multiply (geometric mean) instead of adding.")] = False,
    posterior: Annotated[
        bool, typer.Option("--posterior", help="Weigh each teacher by how well it read the document so far.")
    ] = False,
    route: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=WEIGHTS", help="Other weights for documents of such names, e.g. 'code/*=1,0'; repeatable."
        ),
    ] = None,
    common: Annotated[bool, typer.Option("--common", help="Leave out documents that not all have.")] = False,
) -> None:
    """Make one data set of several teachers' data sets of the same text, position by position.

    Reads: the data sets, every shard of them. Writes: targets/ of the run folder, an ordinary data set, and beside each
    shard the divergence between the teachers at every position. What differs between their texts is refused. A document
    without an id of its own is named after its file, so --route tells sources apart.

    Example: bytecache mix runs/a/targets runs/b/targets --weights 0.7,0.3 --run-dir runs/both
    """
    with refusals():
        from bytecache.stages.mix.mix import Mixing

        if len(places) < 2:
            raise ConfigError(f"{places[0]}: one data set is no mixture; name two or more")
        if log_pool and posterior:
            raise ConfigError("--log-pool and --posterior are two ways to mix; choose one")
        pool = "log" if log_pool else "posterior" if posterior else "linear"
        equal = tuple(1 / len(places) for _ in places)
        routes = tuple(_route(text) for text in route or ())
        common_weights = _weights(weights) if weights else equal
        if len(common_weights) != len(places):
            raise ConfigError(f"--weights {weights}: {len(common_weights)} weights for {len(places)} data sets")
        mixing = Mixing(pool, common_weights, routes)

    def command(context: "Context") -> None:
        from bytecache.pipeline.commands.mix import mix as mix_sets

        mix_sets(context, places, mixing, partial=common)

    run_stage(given, command)


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(f"weights {text!r} are no numbers; give them like 0.7,0.3") from None


def _route(text: str) -> tuple[str, tuple[float, ...]]:
    pattern, separator, weights = text.rpartition("=")
    if not separator or not pattern:
        raise ConfigError(f"--route {text}: give a pattern of document names and weights, e.g. 'code/*=1,0'")
    return pattern, _weights(weights)
