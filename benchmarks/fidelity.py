"""How far the settings of the teacher stage are from the exact byte distribution, and what they cost.

    python benchmarks/fidelity.py --out benchmarks/results/fidelity.json [--text-file FILE ...]

Reference: the same teacher with tau = 2e-4 and depth 5. KL and JSD in nats per byte between the reference and a
setting whose tail is spread evenly over the 257 symbols; leak: bits that the setting gives to the true byte beyond
the reference; cost: rows evaluated per canonical token. All in float32 through the transformers backend, one run.
Default texts: prose and source code that Python itself carries.
"""

import argparse
import inspect
import json
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from schemas import settings as st
from stages.lattice import Lattice
from stages.teacher import Teacher, open_teacher

SETTINGS = [(0.0, 0), (0.1, 1), (0.01, 2), (0.001, 3)]


def score(teacher: Teacher, text: str, tau: float, depth: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Distributions with the tail spread, tail, rows per canonical token."""
    teacher.settings = teacher.settings.model_copy(update={"tau": tau, "depth": depth})
    windows = [w for group in teacher.windows([("text", 0, teacher.vocabulary.encode(text))]) for w in group]
    targets = [Lattice(window).targets() for window in windows]
    probs = np.concatenate([t.probs for t in targets]).astype(np.float64)
    tail = np.concatenate([t.tail for t in targets]).astype(np.float64)
    rows = sum(len(w.row_depth) for w in windows) / sum(int((w.row_depth == 0).sum()) for w in windows)
    return np.maximum(probs + tail[:, None] / 257, 1e-30), tail, rows


def compare(reference: np.ndarray, other: np.ndarray, text: np.ndarray) -> dict[str, float]:
    middle = (reference + other) / 2
    kl = (reference * np.log(reference / other)).sum(1)
    jsd = ((reference * np.log(reference / middle)).sum(1) + (other * np.log(other / middle)).sum(1)) / 2
    at = np.arange(len(text))
    leak = np.log2(other[at, text] / reference[at, text]).mean()
    return {"kl": kl.mean(), "kl_p99": float(np.quantile(kl, 0.99)), "jsd": jsd.mean(), "leak_bits": leak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--bytes", type=int, default=1500)
    parser.add_argument("--text-file", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    texts = {"manual": topics["with"], "code": inspect.getsource(textwrap)}
    texts |= {path.name: path.read_text() for path in args.text_file}
    teacher = open_teacher(st.Teacher(model=args.model, backend="hf", floor=1e-6))
    results = []
    print("| text | tau | depth | rows per token | KL | KL p99 | JSD | leak, bits/byte | mean tail |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, text in texts.items():
        piece = text.encode()[: args.bytes].decode(errors="ignore")
        data = np.frombuffer(piece.encode(), np.uint8)
        reference, _, _ = score(teacher, piece, 2e-4, 5)
        for tau, depth in SETTINGS:
            probs, tail, rows = score(teacher, piece, tau, depth)
            result = {k: float(v) for k, v in compare(reference, probs, data).items()}
            results.append(
                {"text": name, "tau": tau, "depth": depth, "rows": rows, "tail": float(tail.mean()), **result}
            )
            print(
                f"| {name} | {tau:g} | {depth} | {rows:.2f} | {result['kl']:.5f} | {result['kl_p99']:.3f} | "
                f"{result['jsd']:.6f} | {result['leak_bits']:+.4f} | {tail.mean():.5f} |",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps({"model": args.model, "bytes": args.bytes, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
