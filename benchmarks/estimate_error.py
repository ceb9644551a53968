"""How far `bytecache estimate` is off: a run of the built-in corpus, predicted from pilots of 2, 3 and 5 of its units.

Dumps and converts every unit once, then draws pilots at random from what was measured: relative error of the totals,
and how often the 90 % interval holds the truth. Times are those of this machine while the run lasted. What every unit
took is part of the result, so `--again` draws from it anew, without a teacher.

    python -m benchmarks.estimate_error [--bytes 60000] [--unit-bytes 5000] [--preset fast] [--draws 1000] [--again]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.pipeline.commands.estimate.estimate import convert_pilot, run_pilot
from bytecache.pipeline.commands.estimate.prediction import ratio_total
from bytecache.pipeline.config import load_settings
from bytecache.pipeline.context import open_context
from bytecache.pipeline.plan import make as planning

RESULT = Path(__file__).parent / "results" / "estimate_error.json"
PILOTS = (2, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=60_000)
    parser.add_argument("--unit-bytes", type=int, default=5_000)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    report = json.loads(RESULT.read_text()) if arguments.again else measure(arguments)
    report |= {"draws": arguments.draws, "pilots": {str(n): draw(report, n, arguments.draws) for n in PILOTS}}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: report[name] for name in ("truth", "pilots")}, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every unit took, and the totals."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(None, [
            f"run.dir={folder}/run", f"corpus.max_bytes={arguments.bytes}", f"corpus.unit_bytes={arguments.unit_bytes}",
            f"teacher.preset={arguments.preset}", "teacher.backend=hf", "teacher.sample_tokens=0",
        ])  # fmt: skip
        context = open_context(settings)
        planned, _ = planning.make_plan(context.store, settings, context.stop)
        whole = run_pilot(context, planned, len(planned.sizes))
        shards, fixed, seconds = convert_pilot(settings.convert, whole, Path(folder), context.stop)
    of_units = {
        "text_bytes": whole.sizes,
        "tokens": [receipt.counts["tokens"] for receipt in whole.dumps],
        "rows": [receipt.counts["tokens"] + receipt.counts["branches"] for receipt in whole.dumps],
        "teacher_hours": [receipt.timings["seconds"] / 3600 for receipt in whole.dumps],
        "convert_hours": [one / 3600 for one in seconds],
        "dump_bytes": [receipt.files[0].size for receipt in whole.dumps],
        "shard_bytes": [size - fixed for size in shards],
    }
    return {
        "machine": "2 cores, x86-64", "corpus": settings.corpus.source, "text_bytes": planned.n_bytes,
        "units": len(planned.sizes), "preset": arguments.preset,
        "truth": {name: sum(of_units[name]) for name in FIGURES}, "of_units": of_units,
    }  # fmt: skip


def draw(report: dict[str, Any], count: int, draws: int) -> dict[str, Any]:
    """Predict from `count` units drawn at random, `draws` times."""
    of_units = {name: np.asarray(values, float) for name, values in report["of_units"].items()}
    sizes, generator = of_units["text_bytes"], np.random.default_rng(0)
    chosen = [generator.choice(len(sizes), count, replace=False) for _ in range(draws)]
    estimates = {}
    for name in FIGURES:
        values = of_units[name]
        guesses = [ratio_total(sizes[at], values[at], sizes) for at in chosen]
        right = values.sum()
        errors = [abs(guess.value / right - 1) for guess in guesses]
        estimates[name] = {
            "mean_error": round(float(np.mean(errors)), 4),
            "p95_error": round(float(np.quantile(errors, 0.95)), 4),
            "interval_holds": round(float(np.mean([guess.low <= right <= guess.high for guess in guesses])), 3),
            "median_width": round(float(np.median([(guess.high - guess.low) / right for guess in guesses])), 3),
        }
    return estimates


FIGURES = ("tokens", "rows", "teacher_hours", "convert_hours", "dump_bytes", "shard_bytes")

if __name__ == "__main__":
    main()
