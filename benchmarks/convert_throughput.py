"""Convert megabytes of text per second and core, from an existing run's dump parts.

    python -m benchmarks.convert_throughput runs/default --out benchmarks/results/convert_throughput.json

Processor time of one core, so that neighbours do not count. The run's windows are written again as parts: as they
are (`branches`), without branches and static rows (`spans`), and as a single document (`one document`); each is
converted once to compile, and with the part repeated 1, 4 and `--repeat` times. A shard learns its prior from the first
2^20 positions, so `marginal` is the rate of what the longest conversion adds to the one before.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from schemas import settings as st
from schemas.token_dump import DumpWriter, Window, read_windows
from stages.convert import convert_units
from stages.lattice import Lattice
from stages.windows import keep_rows


def spans(window: Window) -> Window:
    """Canonical rows alone: what a teacher without branches (depth 0) and static rows evaluates."""
    return keep_rows(window, window.row_depth == 0)


def write_part(path: Path, windows: Iterable[Window]) -> Path:
    writer = DumpWriter(path, {"teacher": {}})
    for window in windows:
        writer.append(window)
    writer.close()
    return path


def as_one_document(windows: list[Window]) -> list[Window]:
    last = len(windows) - 1
    return [replace(w, doc_id="all", doc_index=0, is_last=i == last) for i, w in enumerate(windows)]


def measure(part: Path, n_bytes: int, repeat: int, out: Path) -> dict[str, float]:
    began = time.process_time()
    counts = convert_units([part] * repeat, out, st.Convert(), {}, lambda: False, lambda _: None)
    seconds = time.process_time() - began
    size = n_bytes * repeat
    return {
        "text_mb": round(size / 1e6, 3),
        "seconds": round(seconds, 3),
        "mb_per_s": round(size / seconds / 1e6, 3),
        "shard_bytes_per_text_byte": round(counts["size"] / size, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeat", type=int, default=32)
    parser.add_argument("--parts", type=int, default=0, help="use the first parts only; 0 = all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    parts = sorted((args.run / "teacher").glob("*.parquet"))[: args.parts or None]
    windows = [w for part in parts for w in read_windows(part, top_k=False) if not w.reference]
    n_bytes = sum(len(w.text) - w.score_start for w in windows)
    result: dict[str, Any] = {"text_bytes": n_bytes, "documents": sum(w.is_last for w in windows)}
    kinds = {"branches": windows, "spans": [spans(w) for w in windows], "one document": as_one_document(windows)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "shard.zarr.zip"
        for name, chosen in kinds.items():
            part = write_part(Path(folder) / "part.parquet", chosen)
            measure(part, n_bytes, 1, out)  # compiles
            lengths = [measure(part, n_bytes, n, out) for n in sorted({1, 4, args.repeat})]
            added = lengths[-1]["text_mb"] - lengths[-2]["text_mb"]
            began = time.process_time()
            for window in chosen:
                Lattice(window)
            result[name] = {
                "rows_per_text_byte": round(sum(len(w.row_start) for w in chosen) / n_bytes, 3),
                "entries_per_text_byte": round(sum(len(w.entry_byte) for w in chosen) / n_bytes, 1),
                "lattice_mb_per_s": round(n_bytes / (time.process_time() - began) / 1e6, 2),
                "marginal_mb_per_s": round(added / (lengths[-1]["seconds"] - lengths[-2]["seconds"]), 3),
                "lengths": lengths,
            }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
