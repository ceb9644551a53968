"""What each column of a token dump costs: compressed bytes per byte of text, from the Parquet footer.

    python -m benchmarks.dump_columns runs/default [--rounding 2] [--out benchmarks/results/dump_columns.json]

Sums over every part of the run. `raw` is before zstd (after Parquet's own encodings), `share` of the whole file.
`--rounding N` writes the first N parts again with entries rounded in several ways, and compares the targets that
come of each with those of the parts as they are: KL in nats per position, tails spread evenly.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bytecache.schemas.dump import parquet as token_dump
from bytecache.schemas.dump.masses import round_masses
from bytecache.schemas.dump.parquet import DumpWriter, read_windows
from bytecache.schemas.dump.window import Window
from bytecache.stages.fidelity.divergence import kl_spread
from bytecache.stages.lattice.lattice import Lattice


def columns_of(part: Path) -> tuple[int, int, dict[str, list[int]]]:
    """(bytes of scored text, bytes of file, {column: [compressed, uncompressed]}) of one part."""
    file = pq.ParquetFile(part)
    table = file.read(columns=["text", "score_start"])
    lengths = [len(value) for value in table["text"].to_pylist()]
    scored = sum(lengths) - sum(table["score_start"].to_pylist())
    sizes: dict[str, list[int]] = {}
    for group in range(file.metadata.num_row_groups):
        for k in range(file.metadata.num_columns):
            chunk = file.metadata.row_group(group).column(k)
            total = sizes.setdefault(chunk.path_in_schema.partition(".")[0], [0, 0])
            total[0] += chunk.total_compressed_size
            total[1] += chunk.total_uncompressed_size
    return scored, part.stat().st_size, sizes


def _flat(bits: int) -> Callable[[Window], np.ndarray]:
    """Every entry with the same bits of mantissa."""
    return lambda window: round_masses(window.entry_mass, bits)


def rounding(parts: list[Path]) -> dict[str, dict[str, float]]:
    """Bytes per byte of text (top-k left out) and KL of several ways to round entries."""
    windows = [w for part in parts for w in read_windows(part, top_k=False) if not w.reference]
    text = sum(len(w.text) - w.score_start for w in windows)
    before = [Lattice(w).targets() for w in windows]
    by_share = token_dump.round_entries
    ways = {"13 bits": _flat(13), "8 bits": _flat(8), "5 bits": _flat(5), "by share, 15 to 5 bits": by_share}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in ways.items():
            path = Path(folder) / "part.parquet"
            token_dump.round_entries = way
            writer = DumpWriter(path, {})
            for window in windows:
                writer.append(window)
            writer.close()
            token_dump.round_entries = by_share
            after = (Lattice(w).targets() for w in read_windows(path, top_k=False))
            kl = np.concatenate(
                [kl_spread(a.probs, a.tail, b.probs, b.tail) for a, b in zip(before, after, strict=True)]
            )
            _, _, columns = columns_of(path)
            found[name] = {
                "bytes_per_text_byte": round(path.stat().st_size / text, 2),
                "entry_mass": round(columns["entry_mass"][0] / text, 2),
                "kl_mean": float(f"{kl.mean():.3g}"),
                "kl_max": float(f"{kl.max():.3g}"),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a folder of parts")
    parser.add_argument("--rounding", type=int, default=0, help="parts to write again, rounded otherwise")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    parts = sorted(args.run.rglob("*.parquet"))
    parts = [part for part in parts if "score_start" in pq.ParquetFile(part).schema_arrow.names]
    if not parts:
        raise SystemExit(f"{args.run}: no parts of a token dump")
    text = size = 0
    sizes: dict[str, list[int]] = {}
    for part in parts:
        scored, file_size, columns = columns_of(part)
        text, size = text + scored, size + file_size
        for name, pair in columns.items():
            total = sizes.setdefault(name, [0, 0])
            total[0] += pair[0]
            total[1] += pair[1]
    results: dict[str, Any] = {
        "parts": len(parts),
        "text": text,
        "bytes_per_text_byte": round(size / text, 3),
        "columns": {},
    }
    print(f"{len(parts)} parts, {text} bytes of text, {size / text:.2f} bytes per byte of text\n")
    print("| column | bytes per text byte | raw | share |\n|---|---:|---:|---:|")
    for name, (packed, raw) in sorted(sizes.items(), key=lambda item: -item[1][0]):
        results["columns"][name] = {"bytes_per_text_byte": round(packed / text, 4), "raw": round(raw / text, 4)}
        print(f"| `{name}` | {packed / text:.3f} | {raw / text:.3f} | {packed / size:.1%} |")
    if args.rounding:
        results["rounding"] = rounding(parts[: args.rounding])
        print(
            "\n| entries | bytes per text byte | of which `entry_mass` | KL mean | KL max |\n|---|---:|---:|---:|---:|"
        )
        for name, row in results["rounding"].items():
            print(f"| {name} | {' | '.join(f'{value:g}' for value in row.values())} |")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
