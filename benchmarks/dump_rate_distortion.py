"""What a byte of dump buys: size against the divergence that its codes add to the targets, beside other layouts.

    python -m benchmarks.dump_rate_distortion --out benchmarks/results/dump_rate_distortion

Teachers that packages bring (`--model`, repeatable) read texts that packages bring too (`benchmarks.texts`), `--bytes`
of each, at the `--preset`s. A capture holds the windows as the engine gives them, next bytes down to 1e-9, float32,
transformers backend, top 128; captures are kept in `--captures`, each written once; what the result says of captures
that this folder lacks stays in it. All layouts hold the same rows:

    version 3        written at several divergences, those of the presets among them; with the top 16 and without
    version 2        as the release before wrote it
    DistillKit       k log-probabilities of every canonical token as its documentation packs them: 16 exact (bfloat16),
                     the others by a polynomial of six terms (float32), ids of ceil(log2 vocabulary) bits, zstd
    Megatron-LM      k ids as uint16 and what is above, bfloat16 log-probabilities, zstd; all, or those of the top
                     p = 0.95

Size: bytes per byte of text, less the size of a part without windows. Divergence, nats per position (byte or END):

    targets   KL of the targets of the capture against those of the layout; tails spread as the shard of the capture
              would spread them (its prior). Top-k caches become targets as `bytecache import` makes them, without
              branches: KL against targets that have them.
    added     what KL of a shard against the capture grows by where it is converted from the layout, at
              `convert.precision` = "default" (whose divergence `teacher.rounding` means) and "precise"

Writes OUT.json and OUT.png; `docs/fill_tables.py` makes the table.
"""

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pyarrow.parquet as pq

from benchmarks.dump_version2 import write_version_2
from benchmarks.rate_distortion import Capture, build, divergences, kl
from benchmarks.texts import builtin_texts
from bytecache.schemas import settings as st
from bytecache.schemas.dump.parquet import DumpWriter, read_windows
from bytecache.schemas.dump.window import Window
from bytecache.schemas.shard import prior as priors
from bytecache.schemas.shard.builder import PRECISIONS
from bytecache.schemas.shard.reader import ByteShard, read_shard
from bytecache.stages.lattice.lattice import Lattice

MODELS = ("builtin:smollm2-135m-instruct", "builtin:gemma-3-270m")
SWEEP = (1e-3, 3e-4, 1e-4, 5e-5, 2e-5, 1e-6)
ADDED = ("default", "precise")
TOP_K, CAPTURED = 16, 128


def capture(model: str, preset: str, texts: dict[str, str], folder: Path) -> None:
    """Windows of those of the texts that `folder` lacks, from one running teacher."""
    from bytecache.stages.teacher.start import with_start
    from bytecache.stages.teacher.teacher import open_teacher

    teacher = None
    for name, text in texts.items():
        path = folder / f"{model.removeprefix('builtin:').replace('/', ' ')} {preset} {name}.npz"
        if path.exists():
            continue
        if teacher is None:
            asked = st.Teacher(model=model, backend="hf", preset=preset, floor=1e-9, top_k=CAPTURED)
            teacher = open_teacher(with_start(asked)[0])
        began = time.process_time()
        encoded = teacher.vocabulary.encode(text)
        windows = [window for group in teacher.windows([(name, 0, encoded)]) for window in group]
        members: dict[str, Any] = {
            f"{i}/{field.name}": np.asarray(getattr(window, field.name))
            for i, window in enumerate(windows)
            for field in fields(Window)
        }
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            np.savez_compressed(Path(scratch) / "capture.npz", **members, size=np.int64(teacher.vocabulary.size))
            (Path(scratch) / "capture.npz").replace(path)
        print(
            f"{path.stem}: {len(text.encode())} bytes, {time.process_time() - began:.0f} s of processor time",
            flush=True,
        )
    if teacher:
        teacher.close()


def load(path: Path) -> tuple[list[Window], int]:
    """Windows of a capture, and how many tokens its vocabulary has."""
    members = np.load(path)
    count = 1 + max(int(name.split("/")[0]) for name in members.files if "/" in name)
    windows = []
    for i in range(count):
        values = {field.name: members[f"{i}/{field.name}"] for field in fields(Window)}
        windows.append(Window(**{name: v.item() if v.ndim == 0 else v for name, v in values.items()}))
    return windows, int(members["size"])


class Yardstick:
    """A capture's targets, and the shard that they make."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.text = np.concatenate([w.text[w.score_start :] for w in windows])
        self.rows = self.targets(windows)
        self.kl = {precision: self._shard(self.rows, precision)[1] for precision in ADDED}
        self.shard, _ = self._shard(self.rows, "precise")
        child, weights = self.shard.prior.child(), self.shard.prior.weights()
        nodes = priors.find_nodes(self.shard.text, self.shard.doc_start, child, 0, len(self.shard))
        self._weight = weights[nodes]

    def targets(self, windows: Sequence[Window]) -> Capture:
        found = [Lattice(window).targets() for window in windows]
        start = np.array([0, len(self.text) + 1])
        return Capture(
            np.concatenate([t.probs for t in found]), np.concatenate([t.tail for t in found]),
            np.append(self.text, np.uint8(0)), start,
        )  # fmt: skip

    def _shard(self, rows: Capture, precision: str) -> tuple[ByteShard, float]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "s.zarr.zip"
            build(rows, PRECISIONS[precision]).write(path, {})
            shard = read_shard(path)
        return shard, divergences(getattr(self, "rows", rows), shard)[0]

    def _spread(self, rows: Capture, listed: np.ndarray) -> np.ndarray:
        share = np.where(listed, 0, self._weight)
        share[share.sum(1) <= 0] = 1.0
        spread: np.ndarray = rows.probs.astype(np.float64) + share * (rows.tail / share.sum(1))[:, None]
        return spread

    def measure(self, windows: Sequence[Window]) -> dict[str, float]:
        """The divergences of what a layout makes of the capture."""
        rows = self.targets(windows)
        listed = rows.probs > 0
        return {
            "targets": kl(self._spread(self.rows, listed), self._spread(rows, listed)),
            **{f"added {name}": self._shard(rows, name)[1] - self.kl[name] for name in ADDED},
        }


def with_top_k(window: Window, k: int) -> Window:
    """The window with the first k of its top k."""
    rows = len(window.row_start)
    cut = {name: getattr(window, name).reshape(rows, -1)[:, :k].reshape(-1) for name in ("topk_id", "topk_logp")}
    return replace(window, **cut)


def columns_of(path: Path) -> dict[str, int]:
    """Compressed bytes of every column of a part."""
    meta = pq.ParquetFile(path).metadata
    sizes: dict[str, int] = {}
    for group in range(meta.num_row_groups):
        for at in range(meta.num_columns):
            chunk = meta.row_group(group).column(at)
            name = chunk.path_in_schema.partition(".")[0]
            sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
    return sizes


def version_3(windows: Sequence[Window], yardstick: Yardstick, divergence: float) -> dict[str, Any]:
    """Size, its parts and the divergence of a part of version 3."""
    weights = [Lattice(window).weights() for window in windows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        DumpWriter(path, {}, divergence).close()
        empty = path.stat().st_size
        writer = DumpWriter(path, {}, divergence)
        for window, weight in zip(windows, weights, strict=True):
            writer.append(with_top_k(window, TOP_K), weight)
        writer.close()
        columns = {name: size / len(yardstick.text) for name, size in columns_of(path).items()}
        stored = list(read_windows(path))
        size = (path.stat().st_size - empty) / len(yardstick.text)
    top = sum(size for name, size in columns.items() if name.startswith("topk"))
    return {
        "divergence": divergence, "size": size, "without_top_k": size - top, "columns": columns,
        "entries": sum(len(w.entry_byte) for w in stored) / len(yardstick.text), **yardstick.measure(stored),
    }  # fmt: skip


def version_2(windows: Sequence[Window], yardstick: Yardstick) -> dict[str, Any]:
    """The same of version 2, whose floor is 1e-5 of a prefix."""
    windows = [with_top_k(floored(window, 1e-5), TOP_K) for window in windows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        write_version_2(path, windows, {})
        columns = {name: size / len(yardstick.text) for name, size in columns_of(path).items()}
        stored = list(read_windows(path))
    top = sum(size for name, size in columns.items() if name.startswith("topk"))
    size = sum(columns.values())
    return {
        "size": size, "without_top_k": size - top, "columns": columns,
        "entries": sum(len(w.entry_byte) for w in stored) / len(yardstick.text), **yardstick.measure(stored),
    }  # fmt: skip


def floored(window: Window, floor: float) -> Window:
    """The window without next bytes below `floor` of their prefix, but for the text's own."""
    level = np.repeat(np.arange(len(window.fanout)), window.fanout)
    row = np.repeat(np.arange(len(window.row_start)), window.n_levels)
    first = np.cumsum(np.append(0, window.n_levels))[:-1]
    at = window.row_start[row] + np.arange(len(window.fanout)) - first[row]
    text = np.append(window.text.astype(np.int64), -1)
    own = window.entry_byte == text[at][level]
    prefix = np.ones(len(window.fanout))
    inner = np.flatnonzero(own & np.append(np.diff(row) == 0, False)[level])
    prefix[level[inner] + 1] = window.entry_mass[inner]
    kept = own | (window.entry_mass >= floor * prefix[level])
    return replace(
        window, fanout=np.bincount(level[kept], minlength=len(window.fanout)).astype(np.uint16),
        entry_byte=window.entry_byte[kept], entry_mass=window.entry_mass[kept],
    )  # fmt: skip


def top_k_of(windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities) [canonical rows, 128] of the capture."""
    ids, logps = [], []
    for w in windows:
        # A window inside a document repeats the context before it.
        rows = np.flatnonzero((w.row_depth == 0) & (w.row_start >= w.score_start))
        ids.append(w.topk_id.reshape(len(w.row_start), -1)[rows])
        logps.append(w.topk_logp.reshape(len(w.row_start), -1)[rows])
    return np.concatenate(ids), np.concatenate(logps)


def zstd(raw: bytes) -> int:
    return len(numcodecs.Zstd(3).encode(raw))


def bits_packed(values: np.ndarray, bits: int) -> bytes:
    """Integers [P, N], row by row from the most significant bit."""
    every = (values[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(every.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def distillkit(ids: np.ndarray, logps: np.ndarray, vocabulary: int, k: int) -> dict[str, float]:
    """Bytes of DistillKit's packed columns, and the KL of what they say of the listed tokens."""
    exact = bfloat16(logps[:, :16])
    rank = np.arange(k - 16, dtype=np.float64)
    basis = np.stack([*(rank**power for power in range(5)), np.sqrt(rank)], axis=1)
    fit = np.linalg.lstsq(basis, logps[:, 16:k].T.astype(np.float64), rcond=None)[0].T.astype(np.float32)
    decoded = np.concatenate([exact, fit.astype(np.float64) @ basis.T], axis=1)
    raw = (exact.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes() + fit.tobytes()
    size = zstd(raw) + zstd(bits_packed(ids[:, :k], math.ceil(math.log2(vocabulary))))
    return {"size": float(size), "tokens": listed_kl(logps[:, :k], decoded)}


def megatron(ids: np.ndarray, logps: np.ndarray, k: int, top_p: float) -> dict[str, float]:
    """Bytes of Megatron-LM's saved log-probabilities, and the KL of what they say of the k."""
    mass = np.exp(logps[:, :k].astype(np.float64))
    kept = np.cumsum(mass, axis=1) - mass < top_p
    values = bfloat16(logps[:, :k])
    chosen = ids[:, :k][kept]
    size = zstd((values[kept].astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    size += zstd((chosen & 65535).astype(np.uint16).tobytes()) + zstd((chosen >> 16).astype(np.uint8).tobytes())
    size += zstd(kept.sum(axis=1).astype(np.int32).tobytes()) if top_p < 1.0 else 0
    return {"size": float(size), "tokens": listed_kl(logps[:, :k], np.where(kept, values, -30.0))}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the upper half of its bits, to nearest."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def listed_kl(exact: np.ndarray, stored: np.ndarray) -> float:
    """KL over the listed tokens and one for all others, nats per token; rows [P, k] of log-probabilities."""
    p, q = (np.exp(np.minimum(x.astype(np.float64), 0.0)) for x in (exact, stored))
    p, q = (np.column_stack([x, np.maximum(1.0 - x.sum(1), 1e-9)]) for x in (p, q))
    return kl(p, np.maximum(q, 1e-13))


def measure(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Every layout of one capture."""
    windows, vocabulary = load(path)
    yardstick = Yardstick(windows)
    n = len(yardstick.text)
    ids, logps = top_k_of(windows)
    result: dict[str, Any] = {
        "n_bytes": n, "tokens": len(ids), "rows": sum(len(w.row_start) for w in windows), "kl": yardstick.kl,
        "version 2": version_2(windows, yardstick), "version 3": [],
    }  # fmt: skip
    for divergence in sorted({*SWEEP, *st.ROUNDING.values()}, reverse=True):
        point = version_3(windows, yardstick, divergence)
        result["version 3"].append(point)
        say(
            f"{path.stem} at {divergence:g}: {point['size']:.2f}, {point['without_top_k']:.2f} without top k; "
            f"targets {point['targets']:.2e}, added {point['added default']:.2e} and {point['added precise']:.2e}"
        )
    others = {
        "DistillKit, k = 128": distillkit(ids, logps, vocabulary, 128),
        "DistillKit, k = 32": distillkit(ids, logps, vocabulary, 32),
        "Megatron-LM, k = 128": megatron(ids, logps, 128, 1.1),
        "Megatron-LM, top p = 0.95": megatron(ids, logps, 128, 0.95),
    }
    result["others"] = {name: {**found, "size": found["size"] / n} for name, found in others.items()}
    return result


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for k, (name, result) in enumerate(results.items()):
        points = sorted((p["targets"], p["size"], p["without_top_k"]) for p in result["version 3"])
        divergence, size, without = zip(*points, strict=True)
        axes.plot(divergence, size, "-", color=f"C{k}", marker=".", label=name)
        axes.plot(divergence, without, ":", color=f"C{k}", marker=".")
        old = result["version 2"]
        axes.plot(old["targets"], old["size"], "s", color=f"C{k}")
    axes.set(
        xscale="log", yscale="log", xlabel="KL added to the targets, nats per byte", ylabel="bytes per byte of text"
    )
    axes.grid(alpha=0.3)
    axes.legend(title="solid: with top 16, dotted: without\nsquares: version 2", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="prefix of .json and .png")
    parser.add_argument("--model", action="append", help=f"default: {' and '.join(MODELS)}")
    parser.add_argument("--preset", action="append", help="default: balanced and exact")
    parser.add_argument("--text", action="append", help="default: prose, code and cjk")
    parser.add_argument("--bytes", type=int, default=4_000, help="of each text")
    parser.add_argument("--captures", type=Path, help="folder that keeps the captures; default: a temporary one")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.captures or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        texts = {name: builtin_texts(args.bytes)[name] for name in args.text or ("prose", "code", "cjk")}
        for model in args.model or MODELS:
            for preset in args.preset or ("balanced", "exact"):
                capture(model, preset, texts, folder)
        result_path = args.out.with_suffix(".json")
        results = json.loads(result_path.read_text()) if result_path.exists() else {}
        for path in sorted(folder.glob("*.npz")):
            results[path.stem] = measure(path, lambda line: print(line, flush=True))
    results = dict(sorted(results.items()))
    result_path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
