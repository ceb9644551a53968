"""Convert megabytes of text per second and core, from an existing run's dump parts.

    python benchmarks/convert_throughput.py runs/default --out benchmarks/results/convert_throughput.json

Runs the whole conversion once to compile, then `--rounds` times on one core, and the lattice alone beside it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from schemas import settings as st
from schemas.token_dump import read_windows
from stages.convert import convert_units
from stages.lattice import Lattice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    parts = sorted((args.run / "teacher").glob("*.parquet"))
    windows = [w for part in parts for w in read_windows(part)]
    n_bytes = sum(len(w.text) - w.score_start for w in windows)
    whole, lattice = [], []
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds + 1):
            out = Path(folder) / "shard.zarr.zip"
            began = time.perf_counter()
            convert_units(parts, out, st.Convert(), {}, lambda: False, lambda _: None)
            whole.append(time.perf_counter() - began)
            began = time.perf_counter()
            for window in windows:
                Lattice(window)
            lattice.append(time.perf_counter() - began)
            size = out.stat().st_size
    result = {
        "text_bytes": n_bytes,
        "rows_per_text_byte": sum(len(w.row_start) for w in windows) / n_bytes,
        "convert_mb_per_s": n_bytes / statistics.median(whole[1:]) / 1e6,
        "lattice_mb_per_s": n_bytes / statistics.median(lattice[1:]) / 1e6,
        "dump_bytes_per_text_byte": sum(p.stat().st_size for p in parts) / n_bytes,
        "shard_bytes_per_text_byte": size / n_bytes,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
