"""Convert megabytes of text per second and core, from an existing run's dump parts.

    python -m benchmarks.convert_throughput runs/default --out benchmarks/results/convert_throughput.json
    python -m benchmarks.convert_throughput captures --versions --out benchmarks/results/dump_versions.json

A whole `convert_units` from dump parts on disk to a finished shard on disk, with one thread. Processor time, so that
neighbours count as little as they can, the best of `--rounds` with the worst beside it; files are in the page cache,
without the top-k columns, which convert never reads.
Each kind is converted once before, which compiles. The certificate is not in it: reference windows are left out.

The run's windows are written again as parts: as they are (`branches`), without branches and static rows (`spans`), and
spans as one document and cut into documents of 500 bytes. A part holds `--copies` of them, each with the bits of its
bytes flipped by another number, so that neither zstd nor the prior meets a text twice. It is converted 1, 2, and
`--repeat` times over. A shard learns its prior from the first 2^20 positions and encodes those twice; `marginal` is the
rate of what the longest conversion adds to the one before. `stages`: seconds per megabyte of the longest one, profiled.

`--versions` converts `spans` and `branches` from a part of version 2 of the dump and from one of version 3, as
`balanced` writes it, in turn; CAPTURES is a folder that `benchmarks.dump_rate_distortion` kept, or a run.
"""

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dump_rate_distortion import floored, load
from benchmarks.dump_version2 import write_version_2
from bytecache.schemas import settings as st
from bytecache.schemas.dump.parquet import DumpWriter, read_windows
from bytecache.schemas.dump.window import Window, keep_rows
from bytecache.stages.convert.convert import convert_units
from bytecache.stages.lattice.lattice import Lattice

STAGES = {
    "read": ("parquet.py", ("read_windows", "read_meta")),
    "decode": ("unpacking.py", ("window_of",)),
    "lattice": ("lattice.py", ("__init__",)),
    "gather": ("builder.py", ("_append",)),
    "flush": ("builder.py", ("_flush",)),
    "learn": ("builder.py", ("_learn",)),
    "write": ("zarr_zip.py", ("write_zarr_zip",)),
}
"""Functions whose time, with all that they call, is a stage's; _flush runs in _append and in write, _learn in it; what
is read is decoded in it."""


def spans(window: Window) -> Window:
    """Canonical rows alone: what a teacher without branches (depth 0) and static rows evaluates."""
    return keep_rows(window, window.row_depth == 0)


def short_documents(window: Window, length: int) -> Iterator[Window]:
    """A window of canonical rows as documents of about `length` bytes; what a row says beyond its document is cut."""
    text, starts = window.text, window.row_start
    cuts = [int(starts[0])]
    cuts += [int(s) for s in starts if s < len(text)]
    chosen = [cuts[0]]
    for cut in cuts:
        if cut - chosen[-1] >= length:
            chosen.append(cut)
    level_offset = np.append(0, np.cumsum(window.n_levels, dtype=np.int64))
    entry_offset = np.append(0, np.cumsum(window.fanout, dtype=np.int64))
    row_of_stop = np.repeat(np.arange(len(starts)), window.n_stops)
    for a, b in zip(chosen, [*chosen[1:], len(text)], strict=True):
        rows = np.flatnonzero((starts >= a) & (starts <= b))
        n_levels = np.minimum(window.n_levels[rows], b - starts[rows] + 1)
        levels = np.concatenate(
            [np.arange(level_offset[r], level_offset[r] + n) for r, n in zip(rows, n_levels, strict=True)]
        )
        entries = np.concatenate([np.arange(entry_offset[k], entry_offset[k + 1]) for k in levels])
        depth_limit = np.zeros(len(starts), np.int64)
        depth_limit[rows] = n_levels
        stops = np.flatnonzero(window.stop_depth < depth_limit[row_of_stop])
        counts = np.bincount(row_of_stop[stops], minlength=len(starts))[rows]
        per_row = ("row_token", "row_logp", "row_depth", "row_static", "log_norm", "end", "control")
        yield replace(
            window, doc_id=f"{window.doc_id} {a}", text=text[a:b], score_start=0, is_last=True,
            row_start=(starts[rows] - a).astype(np.int32), row_parent=np.arange(-1, len(rows) - 1, dtype=np.int32),
            n_levels=n_levels.astype(np.int32), n_stops=counts.astype(np.int32), fanout=window.fanout[levels],
            entry_byte=window.entry_byte[entries], entry_mass=window.entry_mass[entries],
            stop_depth=window.stop_depth[stops], stop_token=window.stop_token[stops], stop_mass=window.stop_mass[stops],
            **{name: getattr(window, name)[rows] for name in per_row},
        )  # fmt: skip


def flipped(window: Window, bits: int) -> Window:
    """The window in another alphabet: every byte exclusive-or `bits`, entries in order again."""
    byte = window.entry_byte ^ np.uint8(bits)
    order = np.lexsort((byte, np.repeat(np.arange(len(window.fanout)), window.fanout)))
    return replace(
        window, doc_id=f"{window.doc_id} {bits}", text=window.text ^ np.uint8(bits),
        entry_byte=byte[order], entry_mass=window.entry_mass[order],
    )  # fmt: skip


def write_part(path: Path, windows: Iterable[Window]) -> tuple[int, int]:
    """Write a part as `balanced` does; returns (bytes of scored text, documents)."""
    writer = DumpWriter(path, {"teacher": {}}, st.ROUNDING["balanced"])
    size = documents = 0
    for window in windows:
        writer.append(window, Lattice(window).weights())
        size += len(window.text) - window.score_start
        documents += window.is_last
    writer.close()
    return size, documents


def as_one_document(windows: list[Window]) -> list[Window]:
    last = len(windows) - 1
    return [replace(w, doc_id="all", doc_index=0, is_last=i == last) for i, w in enumerate(windows)]


def convert(part: Path, repeat: int, out: Path) -> dict[str, Any]:
    return convert_units([part] * repeat, out, st.Convert(), {}, lambda: False, lambda _: None)


def measure(part: Path, n_bytes: int, repeat: int, out: Path, rounds: int) -> dict[str, float]:
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        counts = convert(part, repeat, out)
        seconds.append(time.process_time() - began)
    size = n_bytes * repeat
    return {
        "text_mb": round(size / 1e6, 3),
        "seconds": round(min(seconds), 3),
        "mb_per_s": round(size / min(seconds) / 1e6, 3),
        "mb_per_s_worst": round(size / max(seconds) / 1e6, 3),
        "shard_bytes_per_text_byte": round(counts["size"] / size, 2),
    }


def stages(part: Path, n_bytes: int, repeat: int, out: Path) -> dict[str, float]:
    """Seconds per megabyte of text in each stage."""
    profile = cProfile.Profile(time.process_time)
    profile.runcall(convert, part, repeat, out)
    spent = dict.fromkeys(STAGES, 0.0)
    total = 0.0
    for (file, _, function), (_, _, own, whole, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        total += own
        for name, (where, functions) in STAGES.items():
            if Path(file).name == where and function in functions:
                spent[name] += whole
    spent["read"] -= spent["decode"]
    flush = spent.pop("flush")
    spent["encode"] = flush - spent["learn"]
    spent["gather"] -= _called_by(profile, "_flush", "_append")
    spent["other"] = total - sum(spent.values())
    return {name: round(seconds / (n_bytes * repeat) * 1e6, 3) for name, seconds in spent.items()}


def _called_by(profile: cProfile.Profile, function: str, caller: str) -> float:
    """Seconds that a function took where one other called it."""
    for (_, _, name), (_, _, _, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if name == function:
            return float(sum(times[3] for (_, _, by), times in callers.items() if by == caller))
    return 0.0


def versions(kinds: dict[str, list[Window]], copies: int, repeat: int, rounds: int) -> dict[str, Any]:
    """Megabytes a second from both versions of the dump, in turn, and the part of it that reading takes.

    The ratio is the median of the rounds': what is beside a round slows both of its conversions.
    """
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "shard.zarr.zip"
        for name, windows in kinds.items():
            copied = [flipped(w, bits) for bits in range(copies) for w in windows]
            n_bytes = sum(len(w.text) - w.score_start for w in copied)
            parts = {"version 2": Path(folder) / "2.parquet", "version 3": Path(folder) / "3.parquet"}
            write_version_2(parts["version 2"], [floored(w, 1e-5) for w in copied], {"teacher": {}})
            write_part(parts["version 3"], copied)
            seconds: dict[str, list[float]] = {version: [] for version in parts}
            for number in range(rounds + 1):  # the first compiles
                for version, part in parts.items():
                    began = time.process_time()
                    convert(part, repeat, out)
                    seconds[version] += [time.process_time() - began] if number else []
            ratios = np.divide(seconds["version 2"], seconds["version 3"])
            found = result[name] = {
                "version 3 over 2": round(float(np.median(ratios)), 3),
                "of every round": sorted(np.round(ratios, 3).tolist()),
                **{
                    version: {
                        "mb_per_s": round(n_bytes * repeat / min(seconds[version]) / 1e6, 3),
                        "stages": stages(part, n_bytes, repeat, out),
                    }
                    for version, part in parts.items()
                },
            }
            print(name, json.dumps(found), flush=True)
    return result


def windows_of(place: Path, n_parts: int) -> list[Window]:
    """Those of a run's dump, or of the captures in a folder."""
    captures = sorted(place.glob("*.npz"))
    if captures:
        return [replace(w, doc_id=path.stem) for path in captures for w in load(path)[0]]
    parts = sorted((place / "teacher").glob("*.parquet"))[: n_parts or None]
    return [w for part in parts for w in read_windows(part, top_k=False) if not w.reference]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", type=int, default=0, help="use the first parts only; 0 = all")
    parser.add_argument("--only", help="one kind")
    parser.add_argument("--versions", action="store_true", help="compare versions 2 and 3 of the dump")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    windows = windows_of(args.run, args.parts)
    bare = [spans(w) for w in windows]
    if args.versions:
        compared = versions({"spans": bare, "branches": windows}, args.copies, args.repeat, args.rounds)
        if args.out:
            args.out.write_text(json.dumps(compared, indent=1) + "\n")
        return
    short = [piece for w in bare for piece in short_documents(w, 500)]
    result: dict[str, Any] = {
        "text_bytes": sum(len(w.text) - w.score_start for w in windows),
        "documents": sum(w.is_last for w in windows),
        "copies": args.copies,
        "rounds": args.rounds,
    }
    kinds = {"spans": bare, "branches": windows, "spans, one document": bare, "spans, documents of 500 bytes": short}
    with tempfile.TemporaryDirectory() as folder:
        out, path = Path(folder) / "shard.zarr.zip", Path(folder) / "part.parquet"
        for name, chosen in kinds.items():
            if args.only not in (None, name):
                continue
            copied = [flipped(w, bits) for bits in range(args.copies) for w in chosen]
            n_bytes, documents = write_part(path, as_one_document(copied) if "one" in name else copied)
            convert(path, 1, out)  # compiles
            lengths = [measure(path, n_bytes, n, out, args.rounds) for n in sorted({1, 2, args.repeat})]
            added = lengths[-1]["text_mb"] - lengths[-2]["text_mb"]
            result[name] = {
                "documents": documents,
                "rows_per_text_byte": round(sum(len(w.row_start) for w in copied) / n_bytes, 3),
                "entries_per_text_byte": round(sum(len(w.entry_byte) for w in copied) / n_bytes, 1),
                "dump_bytes_per_text_byte": round(path.stat().st_size / n_bytes, 1),
                "marginal_mb_per_s": round(added / (lengths[-1]["seconds"] - lengths[-2]["seconds"]), 3),
                "lengths": lengths,
                "stages": stages(path, n_bytes, args.repeat, out),
            }
            print(name, json.dumps(result[name]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
