"""What a byte of shard buys: file size against divergence, for real targets of real teachers.

    python -m benchmarks.rate_distortion --out benchmarks/results/rate_distortion

Two teachers that packages bring (`--model`, repeatable) read three kinds of text that packages bring too
(`benchmarks.texts`: Python's manual, source code, and Chinese, Japanese, Korean, Spanish and French), `--bytes` of
each. A capture holds the teacher's rows unpruned: tau 0.03, depth 2, next bytes down to 1e-6, float32, transformers
backend. Captures are kept in `--captures` as TEACHER TEXT.npz, each written once; a second run with the same folder
takes them, and what else lies there, from it. For each capture and setting of the writer:

* size: bytes of file per byte of text, text and offsets included, less the size of a shard without documents (8 kB of
  names and metadata, which a capture would pay for and a real shard of 16 MiB does not notice). `prior` is the part
  of the context prior, which is learned and paid once per shard: it too all but vanishes in a real one;
* KL in nats per position of the captured row against the decoded one, both with their tail spread by the shard's prior;
  `pruning` is the same with exact probabilities in place of the codes, `quantisation` is the rest.

The frontier to beat, `baseline`: bytes above a threshold listed by id with 5-bit log-probabilities, implied top, tail
spread over the capture's unigram; its size is the order-0 entropy of every column (text by zstd), no metadata at all.
Writes OUT.json, OUT.md and OUT.png.
"""

import argparse
import contextlib
import json
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np

from benchmarks.texts import builtin_texts, multilingual_text
from bytecache.schemas import settings as st
from bytecache.schemas.shard import prior as priors
from bytecache.schemas.shard.builder import PRECISIONS, Precision, ShardBuilder
from bytecache.schemas.shard.reader import ByteShard, read_shard

THRESHOLDS = (3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2, 4e-2)
SWEEP = {
    **PRECISIONS,
    "": Precision(2e-5, 2, 8),
    " ": Precision(1e-4, 8, 8),
    "  ": Precision(2e-4, 8, 16),
    "   ": Precision(7e-4, 16, 16),
    "    ": Precision(1.5e-3, 16, 16),
    "     ": Precision(6e-3, 32, 32),
    "      ": Precision(1.2e-2, 32, 32),
}
MODELS = ("builtin:smollm2-135m-instruct", "builtin:gemma-3-270m")
TAU, DEPTH = 0.03, 2
"""Effort of the captures: nothing else than the rows of a normal run, but unpruned."""
EQUAL_KL = (0.005, 0.007, 0.01, 0.02, 0.05)


class Capture(NamedTuple):
    """Documents one after another, each with its END position."""

    probs: np.ndarray
    """float32 [n, 257]"""
    tail: np.ndarray
    """float32 [n]"""
    text: np.ndarray
    """uint8 [n]"""
    start: np.ndarray
    """int64 [documents + 1]"""

    @property
    def n_bytes(self) -> int:
        return len(self.text) - len(self.start) + 1


def capture(model: str, context: int, texts: dict[str, str], folder: Path) -> None:
    """Rows of those of the texts that `folder` lacks, from one running teacher."""
    from bytecache.stages.teacher.probe import probe_with
    from bytecache.stages.teacher.teacher import open_teacher

    teacher = None
    for name, text in texts.items():
        path = folder / f"{model.removeprefix('builtin:').replace('/', ' ')} {name}.npz"
        if path.exists():
            continue
        teacher = teacher or open_teacher(
            st.Teacher(model=model, backend="hf", tau=TAU, depth=DEPTH, floor=1e-6, context=context)
        )
        began = time.process_time()
        probs, tail, data = probe_with(teacher, text)
        capture = Capture(probs, tail, np.append(data, np.uint8(0)), np.array([0, len(data) + 1]))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            np.savez_compressed(Path(scratch) / "capture.npz", **capture._asdict())
            (Path(scratch) / "capture.npz").replace(path)
        print(
            f"{path.stem}: {capture.n_bytes} bytes, {time.process_time() - began:.0f} s of processor time", flush=True
        )
    if teacher:
        teacher.close()


def entropy_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1] / max(1, values.size)
    return float(-(counts * np.log2(counts)).sum() * values.size / 8)


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over rows, nats; both normalised."""
    p = reference / reference.sum(1, keepdims=True)
    q = np.maximum(other.astype(np.float64) / other.sum(1, keepdims=True), 1e-300)
    return float((p * np.log(np.maximum(p, 1e-300) / q)).sum(1).mean())


def baseline(c: Capture, threshold: float) -> dict[str, float]:
    """The prototype frontier: see the module's text."""
    n, row = len(c.text), np.arange(len(c.text))
    p = c.probs.astype(np.float64)
    unigram = np.maximum(p.sum(0), 1e-6)
    unigram /= unigram.sum()
    top = p.argmax(1)
    listed = p >= threshold
    listed[row, top] = True
    missing = np.where(listed, 0, p).sum(1) + c.tail
    listed[row, top] = False

    def five_bits(x: np.ndarray) -> np.ndarray:
        return np.clip(np.round((np.log10(np.maximum(x, 1e-12)) + 6) * 31 / 6), 0, 31)

    values = five_bits(p)
    tails = five_bits(missing)
    decoded = np.where(listed, 10 ** (values * 6 / 31 - 6), 0)
    tail = 10 ** (tails * 6 / 31 - 6)
    implied = np.maximum(1 - decoded.sum(1) - tail, 1e-3)
    share = np.where(listed, 0, unigram)
    share[row, top] = 0
    decoded += share * (tail / share.sum(1))[:, None]
    decoded[row, top] = implied
    columns = (top, tails, listed.sum(1), np.nonzero(listed)[1], values[listed])
    size = len(numcodecs.Zstd(3).encode(c.text)) + sum(entropy_bytes(column) for column in columns)
    return {
        "threshold": threshold,
        "entries": float(listed.sum()) / n,
        "kl": kl(p + c.tail[:, None] * unigram, decoded),
        "size": size / c.n_bytes,
    }


def build(c: Capture, precision: Precision) -> ShardBuilder:
    builder = ShardBuilder(precision=precision)
    for k, (lo, hi) in enumerate(zip(c.start[:-1], c.start[1:], strict=True)):
        builder.append(c.text[lo : hi - 1], c.probs[lo:hi], c.tail[lo:hi])
        builder.end_document(str(k))
    return builder


def divergences(c: Capture, shard: ByteShard) -> tuple[float, float]:
    """(total, pruning alone), nats per position."""
    total = pruning = 0.0
    child, weights = shard.prior.child(), shard.prior.weights()
    for lo in range(0, len(shard), 4096):
        hi = min(len(shard), lo + 4096)
        weight = weights[priors.find_nodes(shard.text, shard.doc_start, child, lo, hi)]
        p = c.probs[lo:hi].astype(np.float64)
        reference = p + weight * (c.tail[lo:hi] / weight.sum(1))[:, None]
        total += kl(reference, shard.dense(lo, hi, spread_tail=True)) * (hi - lo)
        listed = shard.dense(lo, hi) > 0
        missing = np.where(listed, 0, p).sum(1) + c.tail[lo:hi]
        share = np.where(listed, 0, weight)
        exact = np.where(listed, p, share * (missing / share.sum(1))[:, None])
        pruning += kl(reference, exact) * (hi - lo)
    return total / len(shard), pruning / len(shard)


def measure(c: Capture, precision: Precision) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.zarr.zip"
        empty = ShardBuilder(precision=precision).write(path, {})["size"]
        statistics = build(c, precision).write(path, {})
        shard = read_shard(path)
        with zipfile.ZipFile(path) as archive:
            columns: dict[str, int] = {}
            for info in archive.infolist():
                name, _, rest = info.filename.partition("/")
                if rest.startswith("c/"):
                    columns[name] = columns.get(name, 0) + info.file_size
    total, pruning = divergences(c, shard)
    return {
        **precision._asdict(),
        "entries": statistics["n_entries"] / statistics["n_positions"],
        "contexts": len(shard.prior.parent),
        "file": statistics["size"] / c.n_bytes,
        "size": (statistics["size"] - empty) / c.n_bytes,
        "prior": sum(v for k, v in columns.items() if k.startswith("prior")) / c.n_bytes,
        "columns": {k: round(v / c.n_bytes, 4) for k, v in columns.items()},
        "kl": total,
        "pruning": pruning,
        "quantisation": total - pruning,
    }


def at_equal_kl(points: list[dict[str, Any]], target: float) -> float:
    """Size at a KL, between the two nearest points, linear in the logarithms; NaN outside the curve."""
    curve = sorted((point["kl"], point["size"]) for point in points)
    x, y = np.log(np.array(curve)).T
    inside = x[0] <= np.log(target) <= x[-1]
    return float(np.exp(np.interp(np.log(target), x, y))) if inside else float("nan")


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| capture | setting | rate, nats/bit | value step | listed per position | bytes per text byte | of it prior | "
        "KL | of it pruning | of it quantisation |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        for p in sorted(result["shards"], key=lambda point: point["rate"]):
            lines.append(
                f"| {name} | {p['preset']} | {p['rate']:g} | {p['value_step']} | {p['entries']:.2f} | "
                f"{p['size']:.2f} | {p['prior']:.2f} | {p['kl']:.4f} | {p['pruning']:.4f} | {p['quantisation']:.4f} |"
            )
    lines += ["", "Bytes per text byte at equal KL, prototype frontier -> this format:", ""]
    lines += ["| capture | " + " | ".join(f"KL {target:g}" for target in EQUAL_KL) + " |"]
    lines += ["|---" * (1 + len(EQUAL_KL)) + "|"]
    for name, result in results.items():
        cells = []
        for target in EQUAL_KL:
            before, after = at_equal_kl(result["baseline"], target), at_equal_kl(result["shards"], target)
            known = np.isfinite(before) and np.isfinite(after)
            cells.append(f"{before:.2f} -> {after:.2f} ({after / before - 1:+.0%})" if known else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for k, (name, result) in enumerate(results.items()):
        for key, style in (("baseline", "--"), ("shards", "-")):
            points = sorted((p["kl"], p["size"]) for p in result[key])
            axes.plot(
                *zip(*points, strict=True), style, color=f"C{k}", marker=".", label=name if key == "shards" else None
            )
        for preset, symbol in zip(PRECISIONS, "svD", strict=True):
            chosen = [(p["kl"], p["size"]) for p in result["shards"] if p["preset"] == preset]
            axes.plot(*zip(*chosen, strict=True), symbol, color=f"C{k}", markersize=6)
    axes.set(xscale="log", yscale="log", xlabel="KL, nats per position", ylabel="bytes per byte of text")
    axes.set_yticks([1, 2, 3, 4, 6, 8, 12, 16], labels=["1", "2", "3", "4", "6", "8", "12", "16"])
    axes.grid(alpha=0.3)
    title = "solid: shards\n■ small ▼ default ◆ precise\ndashed: prototype"
    axes.legend(title=title, fontsize="small", loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="prefix of .json, .md, .png")
    parser.add_argument("--model", action="append", help=f"default: {' and '.join(MODELS)}")
    parser.add_argument("--context", type=int, default=0, help="tokens of a window")
    parser.add_argument("--bytes", type=int, default=12_000, help="of each text")
    parser.add_argument("--captures", type=Path, help="folder that keeps the captures; default: a temporary one")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.captures or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        texts = {name: builtin_texts(args.bytes)[name] for name in ("prose", "code")}
        texts["multilingual"] = multilingual_text(args.bytes)
        for model in args.model or MODELS:
            capture(model, args.context, texts, folder)
        captures = {file.stem: Capture(**np.load(file)) for file in sorted(folder.glob("*.npz"))}
    results: dict[str, Any] = {}
    for name, c in captures.items():
        print(f"{name}: {c.n_bytes} bytes", flush=True)
        results[name] = {
            "n_bytes": c.n_bytes,
            "entropy": float(-(c.probs * np.log(np.maximum(c.probs, 1e-30))).sum(1).mean()),
            "tail": float(c.tail.mean()),
            "baseline": [baseline(c, threshold) for threshold in THRESHOLDS],
            "shards": [{"preset": preset.strip(), **measure(c, precision)} for preset, precision in SWEEP.items()],
        }
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(results))
    plot(results, args.out.with_suffix(".png"))
    print(markdown(results))


if __name__ == "__main__":
    main()
