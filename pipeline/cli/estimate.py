"""`bytecache estimate`: what a run will take, before it is paid for."""

import math
from typing import TYPE_CHECKING, Annotated

import typer

from bytecache.pipeline.cli.options import Given, JsonOption, run_stage, takes_settings
from bytecache.pipeline.cli.terminal import say, say_error

if TYPE_CHECKING:
    from bytecache.pipeline.context import Context

app = typer.Typer()


@app.command()
@takes_settings("corpus.source", "teacher.model", "teacher.backend")
def estimate(
    given: Given,
    units: Annotated[int, typer.Option("--units", min=1, help="Units to pilot; more give narrower intervals.")] = 3,
    all_presets: Annotated[
        bool, typer.Option("--presets/--configured", help="Pilot every preset, or the configuration alone.")
    ] = False,
    price: Annotated[float, typer.Option("--price", min=0, help="Dollars an hour of the teacher's machine.")] = 0.0,
    core_price: Annotated[
        float, typer.Option("--core-price", min=0, help="Dollars an hour of a core that converts.")
    ] = 0.0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Workers; each pays for its engine's start.")] = 1,
    max_ratio: Annotated[
        float, typer.Option("--max-ratio", min=0, help="Budget: bytes of shards per byte of text; implies --presets.")
    ] = math.inf,
    max_dollars: Annotated[float, typer.Option("--max-dollars", min=0, help="Budget; implies --presets.")] = math.inf,
    max_gb: Annotated[
        float, typer.Option("--max-gb", min=0, help="Budget: GB (1e9) of shards and of the dump, if it is kept.")
    ] = math.inf,
    gb_price: Annotated[
        float, typer.Option("--gb-price", min=0, help="Dollars a GB of these: storage while they are kept, egress.")
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Predict tokens, hours, bytes and cost of the whole corpus from a pilot of a few units, with intervals.

    Reads: the corpus, the teacher, and dumps that are already there. Writes: plan/, and the pilot's units of the
    configured settings in teacher/, which the run then need not make again; other presets leave nothing.

    With a budget the most precise presets that keep it are named, and the most of the dump's top k (teacher.top_k)
    where its bytes are limited (--max-gb) or priced (--gb-price). Run it on the kind of machine that will do the work.

    Example: bytecache estimate --source books.jsonl --run-dir runs/books --units 5 --price 2.5 --max-dollars 40
    """
    from bytecache.pipeline.commands.estimate import estimate as module
    from bytecache.pipeline.commands.estimate.budget import Budget, Costs
    from bytecache.schemas.settings import Convert, Teacher

    costs, budget = Costs(price, core_price, workers), Budget(max_ratio, max_dollars, max_gb, gb_price)

    def command(context: "Context") -> None:
        if as_json:  # stdout is the report's alone
            context.say = say_error
        every = all_presets or budget.limits
        variants = module.estimate(
            context,
            count=units,
            teacher_presets=module.presets(Teacher) if every else [""],
            convert_presets=module.presets(Convert) if every else [""],
            costs=costs,
            budget=budget,
        )
        report = module.report(context, variants, budget)
        dollars = max(price, core_price, gb_price) > 0
        keep = context.settings.teacher.keep
        say(module.report_json(report) if as_json else module.report_text(report, dollars, keep))

    run_stage(given, command)
