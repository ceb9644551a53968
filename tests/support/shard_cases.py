"""Shards that several tests share: the golden files and how they are written, random rows, small shards.

`python tests/shard_cases.py` writes the golden files and their expected values anew (only for a new version).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas.arrays import END, F32, U8
from bytecache.schemas.shard import prior as priors
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.schemas.shard.reader import ByteShard, read_shard
from tests.support.places import GOLDEN_FILES

GOLDEN = GOLDEN_FILES / "golden-shard.zarr.zip"
GOLDEN_CONTEXTS = GOLDEN_FILES / "golden-contexts.zarr.zip"


def rows(*given_rows: dict[Any, float]) -> F32:
    """Dense rows from {"a": p, 65: p, END: p}."""
    out = np.zeros((len(given_rows), 257), np.float32)
    for row, values in zip(out, given_rows, strict=True):
        for symbol, p in values.items():
            row[ord(symbol) if isinstance(symbol, str) else symbol] = p
    return out


def golden_builder() -> ShardBuilder:
    builder = ShardBuilder()

    def add(text: bytes, probs: F32, tail: list[float], mask: list[int] | None = None) -> None:
        supervised = None if mask is None else np.array(mask, np.uint8)
        builder.append(np.frombuffer(text, np.uint8), probs, np.array(tail, np.float32), supervised)

    hi = rows(
        {"h": 0.7, "H": 0.2, END: 0.0004}, {"i": 0.9, "e": 0.08, "o": 0.0195, "y": 0.0005}, {END: 0.75, "!": 0.25}
    )
    add(b"hi", hi, [0.0996, 0.0, 0.0])
    builder.end_document("greeting")
    add(b"", rows({END: 1.0}), [0.0])
    builder.end_document("vide/∅")
    add(b"\xc3", rows({0xC3: 0.5, "e": 0.5}), [0.0], [0])
    add(b"\xa9", rows({0xA9: 1.0}, {END: 0.4, ".": 0.4, " ": 0.1999}), [1e-9, 1e-4], [1, 1])
    builder.end_document("é")
    add(b"?", rows({}, {END: 0.999, "\n": 0.001}), [1.0, 0.0])
    builder.end_document("nothing known")
    return builder


def golden_columns(shard: ByteShard) -> dict[str, U8]:
    """Rows by symbol as the golden files record them, whatever form the reader keeps them in.

    top: the implied byte, 0 where END is implied; end: code of P(END), 255 where END is implied; count: listed bytes;
    byte, value: those bytes, ascending, and their codes.
    """
    code = shard.codes
    row = np.repeat(np.arange(len(shard)), code["count"])
    byte, value = (code["key"] >> 8).astype(np.uint8), code["key"].astype(np.uint8)
    is_end = np.zeros(len(row), bool)
    is_end[(np.cumsum(code["count"].astype(np.int64)) - 1)[code["place"] > 127]] = True
    first = np.cumsum(code["count"].astype(np.int64)) - code["count"]
    is_implied = value == 0
    assert (np.flatnonzero(is_implied) == (first + (code["place"] & 127))[code["count"] > 0]).all()
    top, end = np.zeros(len(shard), np.uint8), np.zeros(len(shard), np.uint8)
    top[row[is_implied & ~is_end]] = byte[is_implied & ~is_end]
    end[row[is_end]] = np.where(is_implied, 255, value)[is_end]
    listed = ~is_end & ~is_implied
    count = np.bincount(row[listed], minlength=len(shard)).astype(np.uint8)
    return {
        "top": top, "tail": code["tail"], "end": end, "count": count, "byte": byte[listed], "value": value[listed],
    }  # fmt: skip


def golden_values(shard: ByteShard) -> dict[str, Any]:
    t = shard.triples(0, len(shard))
    return {
        "attrs": shard.attrs,
        "statistics": shard.statistics,
        "doc_id": shard.doc_id,
        "doc_start": shard.doc_start.tolist(),
        "text": shard.text.tolist(),
        "mask": shard.mask.tolist(),
        **{name: column.tolist() for name, column in golden_columns(shard).items()},
        "spread_end": [float(f"{p:.5g}") for p in shard.dense(0, len(shard), spread_tail=True)[:, END]],
        "tail_mass": [float(f"{p:.6g}") for p in shard.tail],
        "triples": [
            [int(r), int(s), float(f"{p:.6g}")] for r, s, p in zip(t.row, t.symbol, t.prob.tolist(), strict=True)
        ],
    }


def golden_digest(shard: ByteShard) -> dict[str, Any]:
    """The larger golden file, with contexts of every depth and every overflow column: hashes instead of values."""
    spread = shard.dense(0, len(shard), spread_tail=True).astype(np.float64)
    return {
        "statistics": shard.statistics,
        "contexts": len(shard.prior.parent),
        "depths": [int(count) for count in np.bincount([len(context) for context in contexts(shard)])],
        **{name: hashlib.sha256(column.tobytes()).hexdigest() for name, column in golden_columns(shard).items()},
        "weights": hashlib.sha256(shard.prior.code.tobytes()).hexdigest(),
        "spread": [float(f"{p:.5g}") for p in spread.sum(0)[::16]],
    }


def contexts(shard: ByteShard) -> list[bytes]:
    out = [b""]
    for parent, byte in zip(shard.prior.parent[1:].tolist(), shard.prior.byte[1:].tolist(), strict=True):
        out.append(bytes([byte]) + out[parent])
    return out


def random_rows(seed: int, n: int, sharpness: float, tail_exponent: float, zeros: bool) -> tuple[F32, F32]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (n, 257)) * sharpness
    logits[:, END] += rng.choice([-8.0, 0.0, 8.0], n) * (sharpness > 0)
    p = np.exp(logits - logits.max(1, keepdims=True))
    if zeros:
        p[:, 1:] *= rng.random((n, 256)) < 0.1
        p[:, 0] += 1e-3
    p /= p.sum(1, keepdims=True)
    tail = np.where(rng.random(n) < 0.3, 0.0, 10 ** (rng.random(n) * tail_exponent))
    return (p * (1 - tail[:, None])).astype(np.float32), tail.astype(np.float32)


def make(path: Path, seed: int = 0, n: int = 300) -> tuple[Path, dict[str, Any]]:
    """Three documents; texts repeat few bytes, so the prior has contexts."""
    builder = ShardBuilder()
    for k in range(3):
        probs, tail = random_rows(seed + k, n + 1, 3.0, -5.0, False)
        builder.append(np.random.default_rng(k).integers(97, 101, n).astype(np.uint8), probs, tail)
        builder.end_document(f"doc {k}")
    return path, builder.write(path, {"seed": seed})


def natural_rows(n: int) -> tuple[np.ndarray, F32, F32]:
    """Text of two alternating habits, and rows that an order-1 context mostly explains."""
    rng = np.random.default_rng(5)
    tables = rng.dirichlet(np.full(257, 0.05), 256)
    text = np.zeros(n, np.uint8)
    probs = np.zeros((n + 1, 257))
    for i in range(n + 1):
        row = tables[text[i - 1] if i else 0] * rng.lognormal(0, 0.7, 257)
        probs[i] = row / row.sum()
        if i < n:
            text[i] = rng.choice(8) + 97
    return text, probs.astype(np.float32), np.zeros(n + 1, np.float32)


if __name__ == "__main__":
    GOLDEN_FILES.mkdir(exist_ok=True)
    golden_builder().write(GOLDEN, {"teacher": {"name": "none, written by hand"}, "license": "CC0-1.0"})
    text = json.dumps(golden_values(read_shard(GOLDEN)), indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match.group().split()), text)  # flat lists on one line
    GOLDEN.with_name("golden-shard.json").write_text(text.replace("[ ", "[").replace(" ]", "]") + "\n")
    priors.MINIMUM = (0, 8, 8, 3)  # type: ignore[assignment]
    larger = ShardBuilder(precision="precise")
    larger.append(*natural_rows(700))
    larger.end_document("contexts")
    larger.append(*natural_rows(40))
    larger.end_document("again")
    larger.write(GOLDEN_CONTEXTS, {"teacher": {"name": "none, random numbers"}, "license": "CC0-1.0"})
    text = json.dumps(golden_digest(read_shard(GOLDEN_CONTEXTS)), indent=1)
    GOLDEN_CONTEXTS.with_name("golden-contexts.json").write_text(text + "\n")
