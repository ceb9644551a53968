"""Kill workers at random moments of every stage until enough have died, and compare with an undisturbed run.

    python -m tests.torture FOLDER --config pipeline.toml --kills 200

Reads: the corpus and the teacher of the configuration (choose a corpus of seconds: it is run many times over). Writes:
runs under FOLDER, which must be new and is removed again if all is well; prints a JSON report. Exit code 4 if any hash
differs, a unit is lost or a file is left over.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from bytecache.pipeline.config import load_settings
from bytecache.schemas.errors import BytecacheError
from tests.torture.harness import torture


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists; name a new folder")
    try:
        report = torture(
            load_settings(args.config), args.folder, kills=args.kills, workers=args.workers, seed=args.seed
        )
    except BytecacheError as refusal:
        sys.exit(f"torture: {refusal}")
    shutil.rmtree(args.folder)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
