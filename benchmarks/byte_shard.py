"""Cost of byte targets on natural rows: `python -m tests.bench_byte_shard` (one core, about half a minute).

Text: Python's own documentation (`pydoc_data.topics`). Rows: an interpolated byte n-gram model of the same text,
which gives peaked and flat rows in about the proportion of a small language model.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics

import numpy as np

from schemas.byte_shard import ShardBuilder, read_shard
from schemas.quantise import F32, U8

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


def best(run: Callable[[], object], repeats: int = 5) -> float:
    """Processor seconds of the fastest run (wall time would measure the neighbours)."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    text, pieces = natural_rows()
    n = len(text)
    builder = ShardBuilder()
    seconds, entropy = 0.0, 0.0
    for k, (probs, tail) in enumerate(pieces):
        piece = text[k * PIECE : (k + 1) * PIECE]
        entropy -= float((probs * np.log2(np.maximum(probs, 1e-30))).sum()) / n
        seconds += best(lambda p=piece, q=probs, t=tail: ShardBuilder().append(p, q, t))  # type: ignore[misc]
        builder.append(piece, probs, tail)
    builder.append(text[:0], np.eye(1, 257, 256, dtype=np.float32), np.zeros(1, np.float32))
    builder.end_document("topics")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.zarr.zip"
        statistics = builder.write(path, {})
        print({**statistics, "entropy_bits": round(entropy, 3), "cores": os.cpu_count()})
        print(f"file:    {statistics['size'] / n:.2f} bytes per byte of text")
        print(f"append:  {n / seconds / 1e6:.1f} MB of text/s")
        print(f"write:   {n / best(lambda: builder.write(path, {})) / 1e6:.1f} MB of text/s")
        shard = read_shard(path)
        print(f"read:    {n / best(lambda: read_shard(path)) / 1e6:.1f} MB of text/s")
        window = 1 << 14
        shard.triples(0, window)
        print(f"triples: {window / best(lambda: shard.triples(5, 5 + window), 50) / 1e6:.1f} M positions/s")


if __name__ == "__main__":
    main()
