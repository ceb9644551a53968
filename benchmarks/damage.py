"""What one damaged file of a finished run costs its owner: the table of files x damages.

Every file of a run (a tiny teacher, a student and its control) is flipped, cut short, removed and swapped with its
neighbour, one at a time. `verify` has to find it, the command that reads the file to name it, and whoever follows the
commands he is told has to end with a whole run of the same outputs (`tests/support/damage.py`).

    python benchmarks/damage.py [--every] [--only REGEX] > benchmarks/results/damage.json

By default every file is looked for, and one of each kind is followed to the end; `--every` follows all. The table goes
to stderr. About 4 s a case that is followed, 0.5 s for one that is only looked for.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.damage import Verdict, cases, examine, files, kind, make_finished_run, table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="follow every file to the end, not one of each kind")
    parser.add_argument("--only", default="", help="keys that match this regular expression")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        finished = make_finished_run(folder)
        os.chdir(folder)
        verdicts: list[Verdict] = []
        for key, damage, follow in cases(files(finished), every=chosen.every):
            if re.search(chosen.only, key):
                verdict = examine(finished, folder / "run", key, damage, follow=follow)
                verdicts += [verdict] if verdict else []
                if verdict and not verdict.good:
                    print(verdict, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    print(table(verdicts), file=sys.stderr)
    print(json.dumps(report(verdicts), indent=1, sort_keys=True))


def report(verdicts: list[Verdict]) -> dict[str, object]:
    """The figures, by kind of file and damage, and what was not good, case by case."""
    followed = [verdict for verdict in verdicts if verdict.ends != "-"]
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "cases": len(verdicts),
        "found": sum(verdict.found for verdict in verdicts),
        "followed": len(followed),
        "whole_again": sum(not verdict.ends.startswith("!") for verdict in followed),
        "read_by_a_stage": sum(verdict.named != "-" for verdict in followed),
        "named": sum(verdict.named == "yes" for verdict in followed),
        "whole_by_the_readers_word": sum(
            verdict.direct not in "-" and verdict.direct[0] != "!" for verdict in followed
        ),
        "commands": Counter(verdict.ends for verdict in followed),
        "table": [
            {
                "file": kind(v.key),
                "damage": v.damage,
                "found": v.found,
                "named": v.named,
                "ends": v.ends,
                "by": v.direct,
            }
            for v in followed
        ],
        "bad": [vars(verdict) for verdict in verdicts if not verdict.good],
    }


if __name__ == "__main__":
    main()
