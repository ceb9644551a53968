"""How far targets lie apart, against distributions written down by hand, and the table made of it."""

import numpy as np
import pytest

from benchmarks import transfer_tables
from benchmarks.degraded_targets import write_shard
from benchmarks.target_fidelity import fidelity
from benchmarks.transfer_arms import Job
from bytecache.schemas.dataset.index import write_dataset
from bytecache.schemas.shard.builder import ShardBuilder

TEXT = np.frombuffer(b"ab", np.uint8)
A, B, END = 97, 98, 256


def write(folder, rows, text=TEXT):
    """One document whose positions have the two-valued distributions `rows`: {symbol: probability}."""
    probs = np.zeros((len(rows), 257), np.float32)
    for at, row in enumerate(rows):
        for symbol, p in row.items():
            probs[at, symbol] = p
    folder.mkdir()
    builder = ShardBuilder()
    builder.append(text, probs, np.zeros(len(rows), np.float32))
    builder.end_document("d")
    write_dataset(folder, [write_shard(builder, folder, "train", "test")], {})
    return folder


def test_divergence_leaks_and_sizes(tmp_path):
    best = write(tmp_path / "best", [{A: 0.5, B: 0.5}, {A: 0.5, B: 0.5}, {A: 0.5, END: 0.5}])
    other = write(tmp_path / "other", [{A: 0.5, B: 0.5}, {A: 0.001, B: 0.999}, {A: 0.999, END: 0.001}])
    same = fidelity(best, best)
    assert same["jsd"] == 0 and same["leaks"] == 0
    assert same["bytes_per_byte"] == pytest.approx((best / "train-00000-000000000000.zarr.zip").stat().st_size / 3)
    far = fidelity(best, other)
    p, q = np.array([0.5, 0.5]), np.array([0.001, 0.999])
    middle = (p + q) / 2
    apart = ((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2
    assert far["jsd"] == pytest.approx(2 * apart / 3, rel=0.05), "two of three positions are apart"
    assert far["leaks"] == pytest.approx(1 / 3), "the text's own byte is likelier at one of them alone"
    elsewhere = write(tmp_path / "elsewhere", [{A: 0.5, B: 0.5}] * 3, np.frombuffer(b"ba", np.uint8))
    with pytest.raises(SystemExit, match="another text than"):
        fidelity(best, elsewhere)


def test_the_table_pairs_students_of_targets_with_those_of_the_best(monkeypatch):
    def run(arm, seed, bits):
        documents = {f"prose test {d} x": {"bytes": 100, "bits": bits + d} for d in range(2)}
        return {**Job(arm, seed, steps=4).key(), "use": "test", "documents": documents}

    runs = [run("ce", 0, 160), run("ce", 1, 170), run("ours-alone", 0, 150), run("ours-alone", 1, 158)]
    runs += [run("fast-alone", 0, 151), run("fast-alone", 1, 161)]
    sizes = {"jsd": 0.002, "leaks": 0.25, "bytes_per_byte": 3.0}
    found = {
        "runs": runs,
        "targets": ["fast"],
        "fidelity": {"ours": {**sizes, "jsd": 0.0}, "fast": sizes, "top20": sizes},
    }
    monkeypatch.setattr(transfer_tables, "ARMS", {**transfer_tables.ARMS, **transfer_tables.arms_of(["fast=."])})
    lines = transfer_tables.fidelity(found, 4).splitlines()
    assert len(lines) == 4, "no line of targets that nobody learned from"
    half = 12.71 * 0.02 / 2  # of two gaps, 0.01 and 0.03
    assert lines[3].startswith("| `fast`, `precise` | 0.00200 | 25.0% | 3.00 | 2 | 1.5650 | ")
    assert f"+0.0200 ± {half:.4f} [+0.0200, +0.0200]" in lines[3] and "-0.0900 ±" in lines[3]
    assert transfer_tables.fidelity({"runs": runs}, 4) == ""
