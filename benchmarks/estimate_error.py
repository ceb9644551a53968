"""How far `bytecache estimate` is off: a run of the built-in corpus, predicted from pilots of 2, 3 and 5 of its units.

Dumps and converts every unit once, then draws pilots at random from what was measured: relative error of the totals,
and how often the 90 % interval holds the truth. Times are those of this machine while the run lasted.

    python benchmarks/estimate_error.py [--bytes 60000] [--unit-bytes 5000] [--preset balanced] [--draws 300]
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import units
from pipeline.config import load_settings
from pipeline.context import open_context
from pipeline.estimate import Pilot, convert_pilot, predict, run_pilot

RESULT = Path(__file__).parent / "results" / "estimate_error.json"
PILOTS = (2, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=60_000)
    parser.add_argument("--unit-bytes", type=int, default=5_000)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--draws", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(None, [
            f"run.dir={folder}/run", f"corpus.max_bytes={arguments.bytes}", f"corpus.unit_bytes={arguments.unit_bytes}",
            f"teacher.preset={arguments.preset}", "teacher.backend=hf", "teacher.sample_tokens=0",
        ])  # fmt: skip
        context = open_context(settings)
        planned, _ = units.make_plan(context.store, settings, context.stop)
        whole = run_pilot(context, planned, len(planned.sizes))
        sizes, fixed, seconds = convert_pilot(settings.convert, whole, Path(folder), context.stop)
    truth = predict("", "", settings, planned, replace(whole, startup=0.0), (sizes, fixed, seconds), 0, 0, 1)
    generator = np.random.default_rng(0)
    report: dict[str, object] = {
        "machine": "2 cores, x86-64", "corpus": settings.corpus.source, "text_bytes": planned.n_bytes,
        "units": len(planned.sizes), "preset": arguments.preset, "draws": arguments.draws,
        "truth": {name: getattr(truth, name).value for name in FIGURES}, "pilots": {},
    }  # fmt: skip
    for count in PILOTS:
        errors: dict[str, list[float]] = {name: [] for name in FIGURES}
        held: dict[str, list[bool]] = {name: [] for name in FIGURES}
        for _ in range(arguments.draws):
            at = sorted(generator.choice(len(sizes), count, replace=False).tolist())
            pilot = Pilot(
                at, [whole.sizes[i] for i in at], [whole.dumps[i] for i in at], [whole.files[i] for i in at], 0.0
            )
            drawn = ([sizes[i] for i in at], fixed, [seconds[i] for i in at])
            found = predict("", "", settings, planned, pilot, drawn, 0, 0, 1)
            for name in FIGURES:
                right, guess = getattr(truth, name).value, getattr(found, name)
                errors[name].append(abs(guess.value / right - 1))
                held[name].append(guess.low <= right <= guess.high)
        report["pilots"][str(count)] = {  # type: ignore[index]
            name: {
                "mean_error": round(float(np.mean(errors[name])), 4),
                "p95_error": round(float(np.quantile(errors[name], 0.95)), 4),
                "interval_holds": round(float(np.mean(held[name])), 3),
            }
            for name in FIGURES
        }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


FIGURES = ("tokens", "branch_ratio", "teacher_hours", "convert_hours", "dump_bytes", "shard_bytes")

if __name__ == "__main__":
    main()
