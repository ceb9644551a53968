"""Speed of this tree beside another commit's: what a change of the code's form may cost, measured in one run.

    git worktree add ../before COMMIT
    python -m benchmarks.speed_guard runs/default --before ../before --out benchmarks/results/speed_guard.json

`convert_throughput`, `loader`, `objective_cost` and, where `--only` names it (it takes minutes, and reads no run),
`teacher_presets` run in both trees in turns, `--rounds` times each, every program with its tree first on the path and
with one thread; of each figure the best of its rounds counts, since other work on the machine only ever slows. All
figures are rates, and the ratio is now / before: above 1 is faster. The run must be
one that both commits can read. Small sizes, so figures of a few milliseconds are within a tenth of each other at best.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent


def commands(run: Path, work: Path) -> dict[str, list[str]]:
    """The programs at small sizes; each takes `--out` besides."""
    return {
        "convert_throughput": [str(run), "--only", "branches", "--parts", "1", "--copies", "2", "--repeat", "2"],
        "loader": [str(run / "targets"), "--mb", "0.5", "--rounds", "3"],
        "objective_cost": [str(run), "--work", str(work), "--sizes", "small", "--bytes", "2048", "--rounds", "3"],
        "teacher_presets": ["--bytes", "4000", "--rounds", "1", "--presets", "fast,balanced"],
    }


def rates(program: str, result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures of a result as rates: higher is faster."""
    if program == "convert_throughput":
        for kind, figures in result.items():
            if isinstance(figures, dict):
                yield f"convert, {kind}, MB/s", max(one["mb_per_s"] for one in figures["lengths"])
    elif program == "loader":
        ours = result["layouts"]["bytecache shard"]
        yield "write, MB/s", ours["write_mb_per_s"]
        yield from ((f"{name}", value) for name, value in ours.items() if name.endswith("MB/s"))
        yield from ((f"{name}, MB/s", value) for name, value in result["collate_mb_per_s"].items())
    elif program == "teacher_presets":
        yield from (
            (f"teacher, {name}, bytes of text per CPU second", figures["text_bytes_per_s"])
            for name, figures in result.items()
            if isinstance(figures, dict)
        )
    else:
        for line in result["students"][0]["objectives"]:
            seconds = line["ce_seconds"]
            yield f"step with {line['head']}, 1/s", 1 / (seconds * (1 + line["overhead"]))
            if line["loader"] > 0:
                yield f"{line['head']} prepared, 1/s", 1 / (seconds * line["loader"])


def measure(tree: Path, program: str, arguments: list[str]) -> dict[str, float]:
    """Run one program in a tree."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{program}", *arguments, "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        return dict(rates(program, json.loads(out.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--before", type=Path, required=True, help="a worktree of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=list(commands(Path(), Path())), help="one program")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    trees = {"before": args.before.resolve(), "now": HERE}
    best: dict[str, dict[str, float]] = {name: {} for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        for program, arguments in commands(args.run.resolve(), Path(folder)).items():
            if program != args.only and (args.only or program == "teacher_presets"):
                continue
            for _ in range(args.rounds):
                for name, tree in trees.items():
                    measured = measure(tree, program, arguments)
                    print(name, json.dumps({figure: round(rate, 4) for figure, rate in measured.items()}), flush=True)
                    for figure, rate in measured.items():
                        best[name][figure] = max(best[name].get(figure, 0.0), rate)
    figures = {
        name: {"before": rate, "now": best["now"][name], "ratio": round(best["now"][name] / rate, 3)}
        for name, rate in best["before"].items()
        if name in best["now"]
    }
    slowest = min(figures, key=lambda name: figures[name]["ratio"])
    result = {"rounds": args.rounds, "slowest": [slowest, figures[slowest]["ratio"]], "figures": figures}
    print("| figure | before | now | now / before |\n|---|---:|---:|---:|")
    for name, figure in figures.items():
        print(f"| {name} | {figure['before']:.3g} | {figure['now']:.3g} | {figure['ratio']:.2f} |")
    print(f"\nslowest: {slowest}, {figures[slowest]['ratio']:.2f}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
