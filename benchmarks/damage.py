"""What one damaged file of a finished run costs its owner: the table of files x damages.

Every file of a run (a tiny teacher, a student and its control) is flipped, cut short, removed and swapped with its
neighbour, one at a time (`--strangers`: replaced by a folder and by a pipe instead). `verify` has to find it, the
command that reads the file to name it, and whoever follows the commands he is told has to end with a whole run of the
same outputs (`tests/support/damage.py`).

    python benchmarks/damage.py [--every] [--strangers] [--only REGEX] [--folder FOLDER] > damage.json

By default every file is looked for, and one of each kind is followed to the end; `--every` follows all. The table goes
to stderr. The run takes two minutes, a case that is followed 1.5 s, one that is only looked for 0.2 s. With `--folder`
the finished run and what became of each case stay there, and the same command goes on where it was ended.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.damage import DAMAGES, STRANGERS, Verdict, cases, examine, files, kind, make_finished_run, table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="follow every file to the end, not one of each kind")
    parser.add_argument("--strangers", action="store_true", help="folders and pipes in a file's place instead")
    parser.add_argument("--only", default="", help="keys that match this regular expression")
    parser.add_argument("--folder", type=Path, help="keep the run and the cases here, and go on with what is here")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        damages = STRANGERS if chosen.strangers else DAMAGES
        verdicts = examined(folder.absolute(), chosen.only, damages, every=chosen.every)
    finally:
        if not chosen.folder:
            shutil.rmtree(folder)
    print(table(verdicts), file=sys.stderr)
    print(json.dumps(report(verdicts), indent=1, sort_keys=True))


def examined(folder: Path, only: str, damages: tuple[str, ...], *, every: bool) -> list[Verdict]:
    """What became of every case, of those that `folder` remembers as well."""
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / "finished"
    if not finished.exists():
        make_finished_run(folder)
    journal = folder / "cases.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    known = {(case["key"], case["damage"]): case["verdict"] for case in map(json.loads, lines)}
    os.chdir(folder)
    verdicts: list[Verdict] = []
    for key, damage, follow in cases(files(finished), every=every, damages=damages):
        if not re.search(only, key):
            continue
        if (key, damage) in known:
            verdict = Verdict(**known[key, damage]) if known[key, damage] else None
        else:
            verdict = examine(finished, folder / "run", key, damage, follow=follow)
            with journal.open("a") as file:
                file.write(json.dumps({"key": key, "damage": damage, "verdict": verdict and vars(verdict)}) + "\n")
        verdicts += [verdict] if verdict else []
        if verdict and not verdict.good:
            print(verdict, file=sys.stderr, flush=True)
    return verdicts


def report(verdicts: list[Verdict]) -> dict[str, Any]:
    """The figures by kind of file and by damage, how each damage ended, and what was not good, case by case."""
    kinds = sorted({kind(verdict.key) for verdict in verdicts})
    groups = {name: [verdict for verdict in verdicts if kind(verdict.key) == name] for name in kinds}
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        **figures(verdicts),
        "commands": {
            damage: Counter(v.ends for v in verdicts if v.damage == damage)
            for damage in sorted({v.damage for v in verdicts}, key=(*DAMAGES, *STRANGERS).index)
        },
        "kinds": {
            name: figures(group)
            | {"damages": {d: figures([v for v in group if v.damage == d]) for d in sorted({v.damage for v in group})}}
            for name, group in groups.items()
        },
        "bad": [vars(verdict) for verdict in verdicts if not verdict.good],
    }


def figures(verdicts: list[Verdict]) -> dict[str, int]:
    """Cases, and of how many each can be said; those that nobody asked for ("-") count nowhere."""
    read = [verdict for verdict in verdicts if verdict.named != "-"]
    followed = [verdict for verdict in verdicts if verdict.ends != "-"]
    return {
        "cases": len(verdicts),
        "found": sum(verdict.found for verdict in verdicts),
        "followed": len(followed),
        "whole_again": sum(not verdict.ends.startswith("!") for verdict in followed),
        "by_one_command": sum(verdict.ends == "repaired" for verdict in followed),
        "read_by_a_stage": len(read),
        "named": sum(verdict.named == "yes" for verdict in read),
        "whole_by_the_readers_word": sum(not verdict.direct.startswith("!") for verdict in read),
    }


if __name__ == "__main__":
    main()
