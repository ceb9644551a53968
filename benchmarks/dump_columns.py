"""What each column of a token dump costs: compressed bytes per byte of text, from the Parquet footer.

    python -m benchmarks.dump_columns runs/default [--out benchmarks/results/dump_columns.json]

Sums over every part of the run. `raw` is before zstd (after Parquet's own encodings), `share` of the whole file. What
coarser and finer codes cost and spare: `benchmarks.dump_rate_distortion`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a folder of parts")
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
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
