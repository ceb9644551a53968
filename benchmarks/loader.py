"""Write and load speed and size of byte targets, beside other layouts of the same targets, in one run on one core.

    python -m benchmarks.loader runs/default/targets --out benchmarks/results/loader.json

Size is that of the data set's own train split. Speed needs more text than a small run has, so the rows of its shards
are drawn again in runs of 16 positions (no long repeats for a compressor to find) until `--mb` megabytes, and every
layout stores those. Load means: from files in the page cache to arrays a training step can use, window after window of
1024 positions: flat (row, symbol, probability) triples, or dense rows where the layout is dense. Processor seconds,
median of `--rounds`. `parts` says where a cold load spends its time. `collate` is the trainer's last step, from shard
and tokens to a micro-batch's tensors.

HF datasets and webdataset are compared if they can be imported (PYTHONPATH=... is enough); absent ones are left out.
"""

import argparse
import importlib.util
import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from bytecache.schemas.dataset.index import describe_shard, read_dataset, write_dataset
from bytecache.schemas.files import file_sha256
from bytecache.schemas.settings import Student
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.schemas.shard.codes import COLUMNS
from bytecache.schemas.shard.reader import ByteShard, read_shard
from bytecache.schemas.shard.zarr_zip import read_zarr_zip
from bytecache.stages.student import student
from bytecache.stages.targets.dataset import ByteTargets
from bytecache.stages.targets.order import sequential
from bytecache.stages.targets.source import load_shard
from bytecache.stages.train.batches import stream

WINDOW, RUN, DENSE_MB = 1024, 16, 1.0


class Rows:
    """The rows to store: text uint8 [n], tail float32 [n], flat symbol and prob, and where each row's begin."""

    def __init__(self, shards: list[ByteShard], n: int) -> None:
        rng = np.random.default_rng(0)
        texts = [np.asarray(shard.text) for shard in shards]
        text, tail, first, symbols, probs = [], [], [0], [], []
        made = 0
        while made < n:
            k = int(rng.integers(len(shards)))
            lo = int(rng.integers(0, len(texts[k]) - RUN))
            row, symbol, prob = shards[k].triples(lo, lo + RUN)
            text.append(texts[k][lo : lo + RUN])
            tail.append(shards[k].tail[lo : lo + RUN])
            first += (first[-1] + np.cumsum(np.bincount(row, minlength=RUN))).tolist()
            symbols.append(symbol)
            probs.append(prob)
            made += RUN
        self.text, self.tail = np.concatenate(text), np.concatenate(tail)
        self.first, self.symbol, self.prob = np.array(first), np.concatenate(symbols), np.concatenate(probs)

    def __len__(self) -> int:
        return len(self.text)

    def dense(self, lo: int, hi: int) -> np.ndarray:
        out = np.zeros((hi - lo, 257), np.float32)
        a, b = self.first[lo], self.first[hi]
        row = np.repeat(np.arange(hi - lo), np.diff(self.first[lo : hi + 1]))
        out[row, self.symbol[a:b]] = self.prob[a:b]
        return out

    def windows(self) -> Iterator[tuple[int, int]]:
        for lo in range(0, len(self), WINDOW):
            yield lo, min(lo + WINDOW, len(self))


def ours(folder: Path, rows: Rows) -> None:
    builder = ShardBuilder()
    for lo in range(0, len(rows), 1 << 14):
        hi = min(lo + (1 << 14), len(rows))
        dense = rows.dense(lo, hi)
        last = np.zeros((1, 257), np.float32)
        last[0, 256] = 1
        builder.append(rows.text[lo:hi], np.concatenate([dense, last]), np.append(rows.tail[lo:hi], np.float32(0)))
        builder.end_document(f"d{lo}")
    path = folder / "train-00000-000000000000.zarr.zip"
    statistics = builder.write(path, {})
    write_dataset(folder, [describe_shard(path, "train", "k", statistics)], {})


def ours_load(folder: Path) -> int:
    shard = read_shard(next(folder.glob("*.zarr.zip")))
    return sum(len(shard.triples(lo, min(lo + WINDOW, len(shard))).row) for lo in range(0, len(shard), WINDOW))


def ours_resident(shard: ByteShard) -> int:
    return sum(len(shard.triples(lo, min(lo + WINDOW, len(shard))).row) for lo in range(0, len(shard), WINDOW))


def copies(shard: ByteShard) -> Callable[[ByteShard], int]:
    """What merely writing the triples of every window costs: the bound of any decoder with this output."""
    row, symbol, prob = shard.triples(0, min(WINDOW, len(shard)))
    return lambda shard: sum(len((row.copy(), symbol.copy(), prob.copy())[0]) for _ in range(0, len(shard), WINDOW))


def parts(folder: Path, rounds: int) -> dict[str, float]:
    """Nanoseconds of a position, one step after the other, from a file in the page cache to triples."""
    path = next(folder.glob("*.zarr.zip"))
    shard = read_shard(path)
    spent = {
        "sha256": seconds(lambda: file_sha256(path), rounds),
        "zip, CRC-32, zstd": seconds(lambda: read_zarr_zip(path, COLUMNS), rounds),
        "read and check all": seconds(lambda: read_shard(path), rounds),
        "triples": seconds(lambda: ours_resident(shard), rounds),
        "copies of triples": seconds(lambda: copies(shard)(shard), rounds),
    }
    spent["ranks to rows by symbol"] = spent.pop("read and check all") - spent["zip, CRC-32, zstd"]
    return {name: round(taken / len(shard) * 1e9, 2) for name, taken in spent.items()}


def ours_stream(folder: Path) -> int:
    return sum(len(window.row) for window in ByteTargets(folder, window=WINDOW, epochs=1, depth=0))


def npy(folder: Path, rows: Rows) -> None:
    out = np.lib.format.open_memmap(folder / "p.npy", mode="w+", dtype=np.float16, shape=(len(rows), 257))
    for lo, hi in rows.windows():
        out[lo:hi] = rows.dense(lo, hi)
    out.flush()
    np.save(folder / "text.npy", rows.text)


def npy_load(folder: Path) -> int:
    dense, text = np.load(folder / "p.npy", mmap_mode="r"), np.load(folder / "text.npy")
    return sum(len(np.array(dense[lo : lo + WINDOW])) for lo in range(0, len(text), WINDOW))


def dense_zarr(folder: Path, rows: Rows) -> None:
    array = zarr.create_array(
        folder / "p.zarr", shape=(len(rows), 257), chunks=(4096, 257), dtype="f2", compressors=zarr.codecs.ZstdCodec()
    )
    for lo in range(0, len(rows), 4096):
        hi = min(lo + 4096, len(rows))
        array[lo:hi] = rows.dense(lo, hi).astype(np.float16)
    np.save(folder / "text.npy", rows.text)


def dense_zarr_load(folder: Path) -> int:
    array, n = zarr.open_array(folder / "p.zarr", mode="r"), len(np.load(folder / "text.npy"))
    return sum(len(array[lo : min(lo + 4096, n)]) for lo in range(0, n, 4096))


_PARQUET = pa.schema(
    {
        "text": pa.binary(), "tail": pa.list_(pa.float32()), "count": pa.list_(pa.uint16()),
        "symbol": pa.list_(pa.int16()), "prob": pa.list_(pa.float32()),
    }
)  # fmt: skip


def parquet(folder: Path, rows: Rows) -> None:
    with pq.ParquetWriter(folder / "p.parquet", _PARQUET, compression="zstd") as writer:
        batch: dict[str, list[Any]] = {name: [] for name in _PARQUET.names}
        for lo, hi in rows.windows():
            a, b = rows.first[lo], rows.first[hi]
            batch["text"].append(rows.text[lo:hi].tobytes())
            batch["tail"].append(rows.tail[lo:hi])
            batch["count"].append(np.diff(rows.first[lo : hi + 1]).astype(np.uint16))
            batch["symbol"].append(rows.symbol[a:b])
            batch["prob"].append(rows.prob[a:b])
            if len(batch["text"]) == 256 or hi == len(rows):
                writer.write_table(pa.Table.from_pydict(batch, schema=_PARQUET))
                batch = {name: [] for name in _PARQUET.names}


def parquet_load(folder: Path) -> int:
    total = 0
    with pq.ParquetFile(folder / "p.parquet") as file:
        for group in file.iter_batches(batch_size=256):
            columns = {name: group.column(name) for name in ("tail", "count", "symbol", "prob")}
            for i in range(group.num_rows):
                arrays = {name: column[i].values.to_numpy() for name, column in columns.items()}
                row = np.repeat(np.arange(len(arrays["count"]), dtype=np.int32), arrays["count"])
                total += len(row)
    return total


def webdataset(folder: Path, rows: Rows) -> None:
    with tarfile.open(folder / "p.tar", "w") as tar:
        for number, (lo, hi) in enumerate(rows.windows()):
            a, b = rows.first[lo], rows.first[hi]
            row = np.repeat(np.arange(hi - lo, dtype=np.int32), np.diff(rows.first[lo : hi + 1]))
            parts = {"text": rows.text[lo:hi], "tail": rows.tail[lo:hi], "row": row}
            parts |= {"symbol": rows.symbol[a:b], "prob": rows.prob[a:b]}
            for name, array in parts.items():
                sink = io.BytesIO()
                np.save(sink, array)
                info = tarfile.TarInfo(f"{number:06d}.{name}.npy")
                info.size = sink.tell()
                tar.addfile(info, io.BytesIO(sink.getvalue()))


def webdataset_load(folder: Path) -> int:
    import webdataset as wds

    source = wds.WebDataset(str(folder / "p.tar"), shardshuffle=False).decode()
    return sum(len(sample["row.npy"]) for sample in source)


def hf_streaming_load(folder: Path) -> int:
    import datasets

    source = datasets.load_dataset(
        "parquet", data_files=str(folder / "p.parquet"), split="train", streaming=True, cache_dir=str(folder / "cache")
    ).with_format("numpy")
    total = 0
    for sample in source:
        total += len(np.repeat(np.arange(len(sample["count"]), dtype=np.int32), sample["count"]))
    return total


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median processor time; the first, which compiles and fills caches, is not counted."""
    work()
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def collate_figures(targets: Path, rounds: int) -> dict[str, float]:
    """Speed of tokenising and collating, MB of text per processor second, with a byte-level BPE of 2048."""
    with tempfile.TemporaryDirectory() as scratch:
        student.prepare(Student(hidden_size=8, layers=1, heads=1), targets, Path(scratch) / "student", seed=0)
        opened = student.load(Path(scratch) / "student")
    dataset = read_dataset(targets)
    shard = load_shard(dataset, dataset.split("train")[0])
    source = stream.tokenise(shard, opened.vocabulary, opened.end_id)
    groups = []
    for number in range(0, len(shard), 16 * WINDOW):
        windows = sequential([min(len(shard), number + 16 * WINDOW)], WINDOW)
        rows = [row for w in windows if w.lo >= number for row in stream.cut(source, w.lo, w.hi, opened.max_tokens)]
        groups += stream.group(rows, stream.MICRO_TOKENS["cuda"])
    n = shard.statistics["n_bytes"]
    out = {
        "tokenise": n / seconds(lambda: stream.tokenise(shard, opened.vocabulary, opened.end_id), rounds) / 1e6,
    }
    for name, with_targets in (("collate with targets", True), ("collate without targets", False)):
        out[name] = (
            n / seconds(lambda on=with_targets: [stream.collate(g, with_targets=on) for g in groups], rounds) / 1e6
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", type=Path)
    parser.add_argument("--mb", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    dataset = read_dataset(args.targets)
    entries = dataset.split("train")
    shards = [load_shard(dataset, entry) for entry in entries]
    everything, some = (Rows(shards, int(mb * 1e6)) for mb in (args.mb, min(args.mb, DENSE_MB)))
    result: dict[str, Any] = {
        "text_bytes": sum(e.n_bytes for e in entries),
        "entries_per_position": sum(e.n_entries for e in entries) / sum(e.n_positions for e in entries),
        "real_bytes_per_text_byte": sum(e.size for e in entries) / sum(e.n_bytes for e in entries),
        "layouts": {},
        "collate_mb_per_s": collate_figures(args.targets, args.rounds),
    }
    layouts: dict[str, tuple[Callable[[Path, Rows], None], dict[str, Callable[[Path], int]], Rows]] = {
        "bytecache shard": (ours, {"load to triples": ours_load, "ByteTargets": ours_stream}, everything),
        "dense fp16 .npy": (npy, {"load dense": npy_load}, some),
        "dense fp16 Zarr, zstd": (dense_zarr, {"load dense": dense_zarr_load}, some),
        "Parquet lists, zstd": (parquet, {"load to triples": parquet_load}, everything),
        "WebDataset tar of .npy": (webdataset, {"load to triples": webdataset_load}, everything),
    }
    if importlib.util.find_spec("datasets"):
        layouts["Parquet lists, zstd"][1]["HF datasets streaming"] = hf_streaming_load
    with tempfile.TemporaryDirectory() as scratch:
        for name, (write, loads, rows) in layouts.items():
            folder = Path(scratch) / "layout"
            folder.mkdir()
            took = seconds(lambda w=write, f=folder, r=rows: (shutil.rmtree(f), f.mkdir(), w(f, r)), 1)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            figures: dict[str, Any] = {
                "bytes_per_text_byte": size / len(rows),
                "write_mb_per_s": len(rows) / took / 1e6,
            }
            for label, load in loads.items():
                try:
                    spent = seconds(lambda work=load, f=folder: work(f), args.rounds)
                except ImportError as error:
                    figures[label] = f"not measured: {error}"
                    continue
                figures[f"{label}, MB/s"] = len(rows) / spent / 1e6
            if name == "bytecache shard":
                result["parts_ns_per_position"] = parts(folder, args.rounds)
                shard = read_shard(next(folder.glob("*.zarr.zip")))
                for label, work in (("triples of a resident shard", ours_resident), ("copies of them", copies(shard))):
                    figures[f"{label}, MB/s"] = len(rows) / seconds(lambda w=work, s=shard: w(s), args.rounds) / 1e6
            result["layouts"][name] = figures
            shutil.rmtree(folder)
            print(name, json.dumps(figures), flush=True)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
