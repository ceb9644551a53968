"""Cost of byte targets on natural rows: `python -m benchmarks.byte_shard` (one core, about a minute).

Text: Python's own documentation (`pydoc_data.topics`). Rows: an interpolated byte n-gram model of the same text,
which gives peaked and flat rows in about the proportion of a small language model (for sizes of real ones see
`benchmarks/rate_distortion.py`). Speeds in processor time: wall time would measure the neighbours.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics

import numpy as np

from bytecache.schemas.arrays import F32, U8
from bytecache.schemas.shard.builder import PRECISIONS, ShardBuilder
from bytecache.schemas.shard.reader import read_shard

ORDERS = {1: 0.005, 2: 0.015, 3: 0.08, 4: 0.2, 5: 0.7}
PIECE = 1 << 15


def natural_rows() -> tuple[U8, Iterator[tuple[F32, F32]]]:
    """(text uint8 [n], pieces of rows: probs float32 [<= PIECE, 257] and tail), one row per byte."""
    text = np.frombuffer("".join(topics.topics.values()).encode(), np.uint8)
    wide = text.astype(np.int64)
    tables = []
    for order, weight in ORDERS.items():
        context = sum(np.roll(wide, k + 1) * 256**k for k in range(order))
        _, which = np.unique(context, return_inverse=True)
        counts = np.zeros((which.max() + 1, 257), np.float32)
        np.add.at(counts, (which, wide), 1)
        tables.append((which, counts * (np.float32(weight * (1 - 1e-4)) / counts.sum(1, keepdims=True))))
    rng = np.random.default_rng(0)

    def pieces() -> Iterator[tuple[F32, F32]]:
        for lo in range(0, len(text), PIECE):
            probs = np.float32(1e-4 / 257) + sum(table[which[lo : lo + PIECE]] for which, table in tables)
            tail = (10 ** rng.uniform(-6, -2, len(probs))).astype(np.float32)
            yield probs * (1 - tail[:, None]), tail

    return text, pieces()


def best(run: Callable[[], object], repeats: int = 3) -> float:
    """Processor seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(precision: str, repeats: int) -> dict[str, float]:
    """Sizes, and MB of text per second of one core."""
    text, pieces = natural_rows()
    n = len(text)
    builder = ShardBuilder(precision=precision)
    append = 0.0
    for k, (probs, tail) in enumerate(pieces):
        piece = text[k * PIECE : (k + 1) * PIECE]
        append += best(lambda p=piece, q=probs, t=tail: ShardBuilder(precision=precision).append(p, q, t), repeats)  # type: ignore[misc]
        builder.append(piece, probs, tail)
    builder.append(text[:0], np.eye(1, 257, 256, dtype=np.float32), np.zeros(1, np.float32))
    builder.end_document("topics")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.zarr.zip"
        start = time.process_time()
        statistics = builder.write(path, {})  # learns the prior and encodes, then writes
        first = time.process_time() - start
        write = best(lambda: builder.write(path, {}), repeats)
        shard = read_shard(path)
        read = best(lambda: read_shard(path), repeats)
        window = 1 << 14
        triples = shard.triples(5, 5 + window)
        decode = best(lambda: shard.triples(5, 5 + window), 50)
    return {
        "bytes_per_text_byte": round(statistics["size"] / n, 3),
        "entries_per_position": round(statistics["n_entries"] / n, 3),
        "contexts": len(shard.prior.parent),
        "kl_mean": statistics["kl_mean"],
        "append_mb_s": round(n / append / 1e6, 2),
        "learn_and_encode_mb_s": round(n / max(1e-9, first - write) / 1e6, 2),
        "write_mb_s": round(n / write / 1e6, 2),
        "read_mb_s": round(n / read / 1e6, 2),
        "triples_m_positions_s": round(window / decode / 1e6, 1),
        "triples_m_triples_s": round(len(triples.row) / decode / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    results = {"cores": os.cpu_count(), "presets": {name: measure(name, args.repeats) for name in PRECISIONS}}
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
