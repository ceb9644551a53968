"""How far byte targets of one text lie apart, and what a student makes of the difference: the price of a preset.

    python -m benchmarks.target_fidelity RUN RESULTS --targets NAME=FOLDER ...

RUN holds the best targets there are (`teacher.preset = "exact"`, `convert.precision = "precise"`); the others are of
the same text. RESULTS are those of `transfer_study`, with the same `--targets`: every set becomes a line of
`fidelity` there, from which and from the runs `transfer_tables` makes a table. JSD is the Jensen-Shannon divergence to
the best targets in nats, the mean over positions of the training text, what either leaves unlisted spread as its shards
say. Leaks are positions where the text's own byte has at least a hundred times the odds that it has in the best
targets: there a student learns the label again, not what the teacher thinks of it.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.files import write_text
from bytecache.schemas.shard.reader import ByteShard, read_shard

LEAK = 100.0
BLOCK = 4096


def shards(folder: Path) -> list[ByteShard]:
    """The training split."""
    dataset = read_dataset(folder)
    return [read_shard(dataset.path(entry)) for entry in dataset.split("train")]


def fidelity(best: Path, other: Path) -> dict[str, float]:
    """JSD in nats, the share of positions whose label leaks, and stored bytes per byte of text.

    Raises:
        SystemExit: the two hold different text.
    """
    nats = leaks = positions = size = 0.0
    for one, two in zip(shards(best), shards(other), strict=True):
        if not np.array_equal(one.text, two.text):
            raise SystemExit(f"{two.path}: another text than {one.path}; plan both runs alike")
        size += Path(two.path).stat().st_size
        positions += len(one)
        for lo in range(0, len(one), BLOCK):
            hi = min(lo + BLOCK, len(one))
            p, q = (np.asarray(side.dense(lo, hi, spread_tail=True), np.float64) for side in (one, two))
            middle = (p + q) / 2
            nats += sum((side * np.log(side.clip(1e-30) / middle.clip(1e-30))).sum() / 2 for side in (p, q))
            true = np.arange(hi - lo), one.symbols(lo, hi)
            leaks += (odds(q[true]) > LEAK * odds(p[true])).sum()
    return {"jsd": nats / positions, "leaks": leaks / positions, "bytes_per_byte": size / positions}


def odds(p: np.ndarray) -> np.ndarray:
    """Of probabilities, with room for those that are 0 or 1."""
    return p.clip(1e-9, 1 - 1e-9) / (1 - p).clip(1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with the best targets")
    parser.add_argument("results", type=Path, help="of `transfer_study`; changed in place")
    parser.add_argument("--targets", nargs="+", required=True, metavar="NAME=FOLDER")
    args = parser.parse_args()
    found = json.loads(args.results.read_text())
    best = args.run / "targets"
    found["fidelity"] = {"ours": fidelity(best, best)}
    for given in args.targets:
        name, _, folder = given.partition("=")
        found["fidelity"][name] = fidelity(best, Path(folder))
        print(name, {key: float(f"{value:.3g}") for key, value in found["fidelity"][name].items()}, flush=True)
    write_text(args.results, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
