"""Tables of `transfer_study`, from its results alone.

    python -m benchmarks.transfer_tables benchmarks/results/transfer_study.json

Each table is a part of the Markdown file beside the results, under its own name; `docs/fill_tables.py` takes it from
there. Leads are mean differences to cross-entropy over paired seeds: ± Student's t interval over seeds, in brackets a
bootstrap over passages of the mean over seeds, both 95 %. Retention is (arm - before) / (original - before).
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.transfer_arms import ARMS, Found, arms_of, validation
from benchmarks.transfer_gain import interval, paired

TARGETS = {
    "ours": "`exact`, shards `precise`",
    "balanced": "`balanced`, `precise`",
    "fast": "`fast`, `precise`",
    "default": "`exact`, shards `default`",
    "small": "`exact`, shards `small`",
    "canonical": "canonical tokens alone",
    "top64": "top 64 of the canonical tokens",
    "top20": "top 20 of the canonical tokens, as an API gives",
}
"""Titles of targets that `target_fidelity` compares."""


def costs(found: Found) -> str:
    """Processor seconds of a step, by arm, of arms that took turns on the same text."""
    lines = ["| arm | steps | seconds a step | to cross-entropy, each step |", "|---|---:|---:|---:|"]
    for by_arm in found.get("costs", {}).values():
        for arm, seconds in by_arm.items():
            ratios = [f"{mine / ce - 1:+.0%}" for mine, ce in zip(seconds, by_arm["ce"], strict=False)]
            to_ce = "" if arm == "ce" else ", ".join(ratios)
            lines.append(f"| {ARMS[arm][1]} | {len(seconds)} | {np.mean(seconds):.2f} | {to_ce} |")
    return "\n".join(lines)


def sweep(found: Found) -> str:
    """Bits/byte of the validation passages, by setting."""
    lines = [
        "| arm | steps | adapters' rate | embeddings' rate | weight | bits/byte |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    runs = [r for r in found["runs"] if r["use"] == "validation"]
    lowest = {arm: min(validation(r) for r in runs if r["arm"] == arm) for arm in {r["arm"] for r in runs}}
    for r in sorted(runs, key=lambda r: (list(ARMS).index(r["arm"]), r["weight"], -r["share"], r["rate"])):
        bits = f"{validation(r):.4f}"
        lines.append(
            f"| {ARMS[r['arm']][1]} | {r['steps']} | {r['rate']:g} | {r['rate'] * r['share']:g} | "
            f"{'' if r['arm'] == 'ce' else format(r['weight'], 'g')} | "
            f"{'**' + bits + '**' if validation(r) == lowest[r['arm']] else bits} |"
        )
    return "\n".join(lines)


def settings_of(run: Found) -> tuple[Any, ...]:
    """Whose runs belong into one row beside the arm."""
    return run["rate"], run["share"], run["weight"]


def tests(found: Found, steps: int) -> str:
    """Bits/byte of the test passages, of the runs that pair with cross-entropy of so many steps."""
    kinds = sorted({name.split()[0] for name in found["original"]})
    start, goal = (level(found[name]) for name in ("before", "original"))
    runs = [r for r in found["runs"] if r["use"] == "test"]
    control = [r for r in runs if r["arm"] == "ce" and r["steps"] == steps]
    lines = [
        "| arm | steps | seeds | bits/byte | to cross-entropy | " + " | ".join(kinds) + " | retention | processor s |",
        "|---|---:|---:|---:|---:|" + "---:|" * (len(kinds) + 2),
        f"| before training | | | {start:.4f} | |" + " |" * len(kinds) + " 0 | |",
    ]
    for arm in ARMS:
        free = arm in ("ce-seconds", "ce-half", "ce-raw")
        mine = [r for r in runs if r["arm"] == arm and (free or r["steps"] == steps)]
        for setting in dict.fromkeys(map(settings_of, mine)):
            lines += row(arm, [r for r in mine if settings_of(r) == setting], control, (start, goal), kinds)
    longer, ours = ([r for r in runs if r["arm"] == arm] for arm in ("ce-seconds", "ours"))
    ours = [r for r in ours if r["steps"] == steps]
    if {r["seed"] for r in longer} & {r["seed"] for r in ours}:
        gaps = [interval(*paired(ours, longer, "test", kind)) for kind in ["", *kinds]]
        lines.append(f"| ours, to {ARMS['ce-seconds'][1]} | | | | " + " | ".join(gaps) + " | | |")
    return "\n".join([*lines, f"| the original | | | {goal:.4f} | |" + " |" * len(kinds) + " 1 | |"])


def row(arm: str, mine: list[Found], control: list[Found], ends: tuple[float, float], kinds: list[str]) -> list[str]:
    """The line of one arm and setting."""
    start, goal = ends
    bits = float(np.mean([level(r["documents"]) for r in mine]))
    gaps = [""] * (len(kinds) + 1)
    if arm != "ce" and {r["seed"] for r in mine} & {r["seed"] for r in control}:
        gaps = [interval(*paired(mine, control, "test", kind)) for kind in ["", *kinds]]
    # A level is of all passages; a run that was measured on some of them has differences alone.
    whole = all(len(r["documents"]) == len(control[0]["documents"]) for r in mine) if control else True
    # A student that keeps its tokenizer begins as its original and has lost nothing that it could retain.
    retained = f"{(bits - start) / (goal - start):.2f}" if whole and abs(goal - start) > 0.01 else ""
    cells = [
        ARMS[arm][1], "/".join(sorted({str(r["steps"]) for r in mine})), str(len(mine)),
        f"{bits:.4f}" if whole else "", *gaps, retained, f"{np.mean([r['seconds'] for r in mine]):.0f}",
    ]  # fmt: skip
    return ["| " + " | ".join(cells) + " |"]


def level(documents: Found) -> float:
    """Bits/byte of passages."""
    return float(sum(d["bits"] for d in documents.values()) / sum(d["bytes"] for d in documents.values()))


def choices(found: Found, steps: int) -> str:
    """Of the runs that were measured by choices: bits/byte and divergence by what the teacher leaves open."""
    runs = [r for r in found["runs"] if "choices" in r and r["steps"] == steps]
    names = list(runs[0]["choices"]) if runs else []
    lines = [
        "| arm | bits/byte | "
        + " | ".join(names)
        + " | KL | "
        + " | ".join(f"KL, {name}" for name in names[:-1])
        + " |",
        "|---|---:|" + "---:|" * (2 * len(names)),
    ]
    for r in runs:
        groups = [r["choices"][name] for name in names]
        bits = [sum(g["ce"] for g in groups), *(g["ce"] for g in groups)]
        apart = [sum(g["kl"] for g in groups), *(g["kl"] for g in groups[:-1])]
        lines.append(f"| {ARMS[r['arm']][1]} | " + " | ".join(f"{x:.3f}" for x in (*bits, *apart)) + " |")
    return "\n".join(lines)


def curves(found: Found, steps: int, parts: int = 4) -> str:
    """Bits/byte of training text before it is learned, a part of the run at a time; leads over paired seeds."""
    runs = [r for r in found["runs"] if r["use"] == "test" and r["steps"] == steps]
    edges = [steps * part // parts for part in range(parts + 1)]
    lines = [
        "| arm | seeds | " + " | ".join(f"steps {lo + 1} to {hi}" for lo, hi in pairwise(edges)) + " |",
        "|---|---:|" + "---:|" * parts,
    ]
    control = {r["seed"]: r for r in runs if r["arm"] == "ce"}
    for arm in ARMS:
        mine = {r["seed"]: r for r in runs if r["arm"] == arm and r["seed"] in control}
        if not mine:
            continue
        cells = []
        for lo, hi in pairwise(edges):
            each = [part_of(r, lo, hi) - (arm != "ce") * part_of(control[seed], lo, hi) for seed, r in mine.items()]
            cells.append(f"{np.mean(each):.4f}" if arm == "ce" else f"{np.mean(each):+.4f}")
        lines.append(f"| {ARMS[arm][1]} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def way(found: Found, steps: int) -> str:
    """Bits/byte of some test passages at steps of one run, and processor seconds of training until then."""
    runs = [r for r in found["runs"] if r["use"] == "test" and r["steps"] == steps and "on_the_way" in r]
    asked = [*runs[0]["on_the_way"], str(steps)] if runs else []
    lines = [
        "| arm | seed | " + " | ".join(f"step {step}" for step in asked) + " |",
        "|---|---:|" + "---:|" * len(asked),
    ]
    for r in sorted(runs, key=lambda r: (r["seed"], list(ARMS).index(r["arm"]))):
        some = next(iter(r["on_the_way"].values()))
        points = {**r["on_the_way"], str(steps): {name: r["documents"][name] for name in some}}
        cells = [f"{level(points[step]):.4f} ({sum(r['curve_seconds'][: int(step)]):.0f} s)" for step in asked]
        lines.append(f"| {ARMS[r['arm']][1]} | {r['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def probed(found: Found, steps: int) -> str:
    """What the students of a number of steps, and both ends of the way, make of the probes; one seed's."""
    from benchmarks.probes import table  # loads torch, which no other table needs

    runs = [r for r in found["runs"] if r["use"] == "test" and r["steps"] == steps and "probes" in r]
    first = min((r["seed"] for r in runs), default=0)
    students = {ARMS[r["arm"]][1]: [r["probes"]] for r in runs if r["seed"] == first}
    if not students:
        return ""
    ends = [found["before probes"]], [found["original probes"]]
    return table({"before training": ends[0], **students, "the original": ends[1]})


def fidelity(found: Found, steps: int) -> str:
    """What `target_fidelity` says of targets, and the students that learned from them alone, to those of the best."""
    runs = [r for r in found["runs"] if r["use"] == "test" and r["steps"] == steps]
    by_arm = {arm: [r for r in runs if r["arm"] == arm] for arm in ARMS}
    if not by_arm.get("ours-alone") or "fidelity" not in found:
        return ""
    lines = [
        "| targets | JSD, nats | labels leak | bytes a byte | seeds | bits/byte | to the first | to cross-entropy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, of in found["fidelity"].items():
        mine = by_arm.get(f"{name}-alone", [])
        if not mine:
            continue
        first = "" if name == "ours" else interval(*paired(mine, by_arm["ours-alone"], "test", ""))
        bits = float(np.mean([level(r["documents"]) for r in mine]))
        lines.append(
            f"| {TARGETS.get(name, name)} | {of['jsd']:.5f} | {of['leaks']:.1%} | {of['bytes_per_byte']:.2f} | "
            f"{len(mine)} | {bits:.4f} | {first} | {interval(*paired(mine, by_arm['ce'], 'test', ''))} |"
        )
    return "\n".join(lines)


def part_of(run: Found, lo: int, hi: int) -> float:
    """Bits/byte of steps [lo, hi) of a run's curve."""
    bits, size = np.array(run["curve_bits"][lo:hi]), np.array(run["curve_bytes"][lo:hi])
    return float((bits * size).sum() / size.sum())


def tables(found: Found) -> dict[str, str]:
    """Every table that the results have runs for, by its name."""
    ARMS.update(arms_of(found.get("targets", [])))
    made = {"costs": costs(found), "sweep": sweep(found)}
    for steps in sorted({r["steps"] for r in found["runs"] if r["use"] == "test" and r["arm"] == "ce"}):
        made[f"test-{steps}"] = tests(found, steps)
        made[f"curves-{steps}"] = curves(found, steps)
        made[f"choices-{steps}"] = choices(found, steps)
        made[f"way-{steps}"] = way(found, steps)
        made[f"fidelity-{steps}"] = fidelity(found, steps)
        made[f"probes-{steps}"] = probed(found, steps)
    return {name: table for name, table in made.items() if table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    made = tables(json.loads(args.results.read_text()))
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()) + "\n"
    args.results.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
