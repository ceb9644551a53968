"""Tables of `many_students`, from its results alone.

    python -m benchmarks.many_students_tables benchmarks/results/many_students.json

Totals are sums of measured seconds, of the first students in the order in which they were measured. A live teacher that
serves several students side by side is a sum of the same parts that was not run, with the median of what the teacher
took beside each of them: its students have to be known beforehand, and in memory together.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Found = dict[str, Any]


def of_steps(record: Found, way: str, parts: Sequence[str], steps: int) -> float:
    """Seconds of some parts of a student's first steps."""
    return float(sum(one[way].get(part, 0.0) for one in record["steps"][:steps] for part in parts))


def once(found: Found) -> float:
    """Seconds of the cache itself: medians of its captures."""
    return float(sum(median(one[part] for one in found["captures"]) for part in ("teacher", "convert")))


TEACHER, TRAINING = ("engine", "lattice"), ("read", "train")
WAYS: dict[str, Callable[[Found, list[str], int], float]] = {
    "cache": lambda found, names, steps: (
        once(found)
        + sum(found["students"][n]["load"] + of_steps(found["students"][n], "cache", TRAINING, steps) for n in names)
    ),
    "live": lambda found, names, steps: sum(
        of_steps(found["students"][n], "live", (*TEACHER, *TRAINING), steps) for n in names
    ),
    "side by side": lambda found, names, steps: (
        sum(of_steps(found["students"][n], "live", TRAINING, steps) for n in names)
        + median(of_steps(found["students"][n], "live", TEACHER, steps) for n in names)
    ),
}
"""Seconds of the first students in an order, for so many steps of each."""


def totals(found: Found) -> list[Found]:
    """Seconds of every way for one student and more, and for one reading of the text and more."""
    names = list(found["students"])
    return [
        {"students": n, "epochs": epochs}
        | {way: round(total(found, names[:n], epochs * found["passages"]), 1) for way, total in WAYS.items()}
        for epochs in range(1, found["epochs"] + 1)
        for n in range(1, len(names) + 1)
    ]


def tables(found: Found) -> dict[str, str]:
    """Totals, and what they are sums of, as Markdown tables."""
    captures, text = found["captures"], f"{found['text_bytes']:,} bytes of text, once"
    once_lines = [f"| {text} | seconds, median | of {len(captures)} times |", "|---|---:|---:|"]
    for part, title in {"teacher": "the teacher, with its dump", "convert": "conversion"}.items():
        each = [one[part] for one in captures]
        once_lines.append(f"| {title} | {median(each):.2f} | {min(each):.2f} to {max(each):.2f} |")
    once_lines.append(f"| KL of targets, all passages in one shard to each in its own | {found['coding']:.1e} | |")
    parts = [
        "| student's tokenizer | steps | a step from the cache, s | beside a live teacher, s | its teacher, s | "
        "KL of targets | largest difference, bits/byte |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in found["students"].items():
        n = len(one["steps"])
        sums = [("cache", TRAINING), ("live", TRAINING), ("live", TEACHER)]
        cells = " | ".join(f"{of_steps(one, way, of, n) / n:.2f}" for way, of in sums)
        apart = f"{one['distance']['kl_per_byte']:.1e} | {one['distance']['bits']:.5f}"
        parts.append(f"| `{name.replace('-', ':')}` | {n} | {cells} | {apart} |")
    lines = [
        "| readings | students | one cache, s | live, s | to the cache | live, side by side, s | to the cache |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in totals(found):
        cells = [f"{one['cache']:.0f}"]
        for way in ("live", "side by side"):
            cells += [f"{one[way]:.0f}", f"{one[way] / one['cache']:.2f}"]
        lines.append(f"| {one['epochs']} | {one['students']} | " + " | ".join(cells) + " |")
    return {name: "\n".join(rows) for name, rows in (("once", once_lines), ("parts", parts), ("totals", lines))}


def report(out: Path) -> str:
    """The tables; written beside the results."""
    made = tables(json.loads(out.read_text()))
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()) + "\n"
    out.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(report(parser.parse_args().results))


if __name__ == "__main__":
    main()
