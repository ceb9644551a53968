"""A run: what it printed, and what becomes of its files when they are damaged."""

import re

from result_tables.results import ROOT, result, table

TRANSCRIPT = ROOT / "docs" / "default-run.txt"


def transcript() -> list[str]:
    """Lines of the committed run; the first one, after `# `, says what was run on what machine."""
    return TRANSCRIPT.read_text(encoding="utf-8").strip().splitlines()


def run_output() -> str:
    """What the run printed, up to its table."""
    lines = transcript()[1:]
    return "\n".join(["```text", *(line for line in lines if not line.startswith("|")), "```"]).replace(
        "\n\n```", "\n```"
    )


def run_table() -> str:
    """The table that the run ended with."""
    return "\n".join(line for line in transcript() if line.startswith("|"))


HELD_OUT = re.compile(r"\| held out, (?:student )?(.+): tokens \| ([\d.]+) bits/byte(?:, retention (.+?))? \|")
"""A line of the run's table: whose figure, bits per byte, retention."""


def run_short() -> str:
    """Bits per byte and retention of every student that the run measured, and the teacher's."""
    held_out = [match.groups() for line in transcript() if (match := HELD_OUT.fullmatch(line))]
    titles = {"control": "control: cross-entropy alone", "distilled": "distilled from the cache"}
    rows = [[titles.get(name, name), bits, kept or ""] for name, bits, kept in held_out]
    teacher = next(line for line in transcript() if line.startswith("| held out, teacher |")).split("|")[2]
    rows.append(["the teacher, which reads each document from its start", teacher.strip().partition(" ")[0], ""])
    return table("held out | >bits/byte | >retention", rows)


def run_machine() -> str:
    """What was run on what machine."""
    return transcript()[0].removeprefix("# ")


DAMAGED = {
    "plan": r"plan/(?!config)", "dump": r"teacher/(?!config)", "data set": r"targets/(?!config)",
    "prepared student": "train/student/", "last checkpoint": r"train/RUN/step-0*4",
    "earlier checkpoints, logs": r"train/RUN/(?!step-0*4|config)", "report": r"report/(?!config)",
    "export": r"export/RUN/", "receipts": "receipts/", "config.toml, of a run and of its folders": r".*config\.toml$",
}  # fmt: skip
"""Parts of a run, by the kinds of files that benchmarks/damage.py tells apart."""


def damage() -> str:
    """What became of every damaged file, by part of the run and by damage: found / named / whole again, of how many."""
    left, rows = dict(result("damage.json")["kinds"]), []
    for name, kind in result("damage_strangers.json")["kinds"].items():
        known = left.get(name, {"cases": 0, "damages": {}})
        left[name] = {"cases": known["cases"] + kind["cases"], "damages": known["damages"] | kind["damages"]}
    named = dict.fromkeys(damage for kind in left.values() for damage in kind["damages"])
    damages = sorted(named, key=lambda damage: damage in ("folder", "pipe"))
    for part, pattern in DAMAGED.items():
        kinds = [left.pop(name) for name in list(left) if re.match(pattern, name)]
        cells = [_fate([kind["damages"][damage] for kind in kinds if damage in kind["damages"]]) for damage in damages]
        rows.append([part, str(sum(kind["cases"] for kind in kinds)), *cells])
    assert not left, left
    return table(" | ".join(["files of", ">cases", *(f">{damage}" for damage in damages)]), rows)


def _fate(groups: list[dict[str, int]]) -> str:
    """Found / named / whole again of n; nobody names what no stage reads."""
    f = {name: sum(group[name] for group in groups) for name in ("cases", "found", "named", "read_by_a_stage")}
    whole, followed = (sum(group[name] for group in groups) for name in ("whole_again", "followed"))
    named = f"{f['named']} of {f['read_by_a_stage']}" if f["read_by_a_stage"] else "-"
    return f"{f['found']} of {f['cases']} / {named} / {whole} of {followed}"
