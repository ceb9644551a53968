"""Kill workers of all stages at random, 1,000 of them, and compare every round with the undisturbed run.

    python -m benchmarks.torture --kills 1000 --out benchmarks/results/torture.json

`python -m tests.torture` does the same with any configuration; this one brings a corpus and a tiny random teacher.
Also measures what a restart costs: a worker's start (fork, so without imports) to its first unit, and a fresh process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bytecache.pipeline.config_text import render_template
from tests.support.small_run import small_settings
from tests.torture.harness import torture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        settings = small_settings(folder)
        before = os.times()
        report = torture(settings, folder / "torture", kills=args.kills, workers=args.workers, seed=args.seed)
        after = os.times()
        report["processor_s"] = round(sum(after[:4]) - sum(before[:4]), 1)
        report["machine"] = "2 cores, x86-64"
        report["restart_s"] = restart_costs(folder, render_template(settings))
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def restart_costs(folder: Path, config: str) -> dict[str, float]:
    """Wall-clock seconds of a fresh worker process: all of it with one unit to do, and with none."""
    file = folder / "pipeline.toml"
    file.write_text(config)

    def run(*arguments: str) -> float:
        began = time.monotonic()
        command = [sys.executable, "-m", "bytecache", *arguments, "--config", str(file)]
        subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True)
        return round(time.monotonic() - began, 2)

    run("plan")
    everything = run("teacher", "--worker")
    return {"all_units": everything, "nothing_left": run("teacher", "--worker")}


if __name__ == "__main__":
    main()
