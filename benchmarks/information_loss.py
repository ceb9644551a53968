"""What is lost between a token model and its bytes: entropies, beam width, tau and depth.

    python -m benchmarks.information_loss --bytes 1000 --out benchmarks/results/information_loss.json
    python -m benchmarks.information_loss --passages 6 --bytes 500 --out benchmarks/results/prose_passages.json

Writes the figures as JSON, a plot beside it (.png) and prints them as Markdown. Three questions, per text:

    entropy   of the teacher's token distributions and of its byte distributions, along the text, nats per byte of text
              (a token's entropy is spread over the bytes of the token that came), and beside them the surprise of the
              text: canonical tokens alone, and bytes summed over all covers
    beam      JSD against the number of histories that a byte-by-byte walk keeps (the K heaviest, renormalised; the
              figure of arXiv 2604.07466): how many covers a byte distribution needs. It cannot fall below what lies in
              histories that the reference did not evaluate either and joined to the others
    effort    KL, JSD and leak of this project's own settings, and the histories they cost per canonical token
              (static rows, which are kept from run to run, not counted)

With --passages N only the last is measured, of the presets, on N passages of each of two kinds of prose: mean over
passages, standard deviation between them, least and greatest. How well the cheap presets do depends on the text, so
that one passage says little of them.

Reference: tau = 2e-4, depth 5, float32, transformers; stages.fidelity.divergence has the formulas. What storing
loses is measured by benchmarks/rate_distortion.py.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.texts import builtin_texts, folder_texts, prose_passages
from bytecache.schemas import settings as st
from bytecache.schemas.arrays import END
from bytecache.schemas.dump.window import Window
from bytecache.stages.fidelity.divergence import divergence, even_weights, spread_tail
from bytecache.stages.fidelity.measuring import true_symbols
from bytecache.stages.lattice.effort import REFERENCE
from bytecache.stages.lattice.lattice import Lattice, Targets
from bytecache.stages.teacher.teacher import Teacher, open_teacher

EFFORTS: dict[str, dict[str, float]] = {
    "spans": {"tau": 1.0, "depth": 0, "static": 0.0},
    "0.1, 1": {"tau": 0.1, "depth": 1, "static": 0.005},
    "0.01, 2": {"tau": 0.01, "depth": 2, "static": 0.005},
    **st.PRESETS,
}
WIDTHS = [1, 2, 3, 4, 6, 8, 12, 16, 32]


def evaluate(teacher: Teacher, text: str, effort: dict[str, float]) -> tuple[Window, Targets]:
    """The window of a text that fits one, and its targets; `effort`: tau, depth and static."""
    teacher.settings = teacher.settings.model_copy(update=effort)
    windows = [w for group in teacher.windows([("text", 0, teacher.vocabulary.encode(text))]) for w in group]
    if len(windows) > 1:
        raise SystemExit("a text is longer than one window of the teacher: lower --bytes")
    return windows[0], Lattice(windows[0]).targets()


def entropy(rows: np.ndarray) -> np.ndarray:
    """Nats; rows float64 [m, symbols]."""
    return -(rows * np.log(np.maximum(rows, 1e-300))).sum(axis=1)


def token_entropies(teacher: Teacher, text: str) -> np.ndarray:
    """Entropy of p(. | canonical tokens) before each token of the text, nats."""
    ids = teacher.vocabulary.encode(text).ids
    tokens = torch.from_numpy(np.concatenate([[teacher.vocabulary.start_id], ids]).astype(np.int64))[None]
    with torch.inference_mode():
        logp = torch.log_softmax(teacher.engine.model(tokens).logits[0, :-1].double(), -1)  # type: ignore[attr-defined]
    return (-(logp.exp() * logp).sum(-1)).numpy()


def beam(window: Window, width: int) -> tuple[np.ndarray, int]:
    """Byte distributions float64 [n, 257] of a walk that keeps the `width` heaviest cells, and how often none was left.

    A cell is a history (a row of the window) with its probability, and the share of it whose next token goes on with
    the text so far. Where no kept cell can follow the text, the walk starts again from the canonical tokens, as a
    healing beam does.
    """
    level = np.cumsum([0, *window.n_levels], dtype=np.int64)
    entry = np.cumsum([0, *window.fanout], dtype=np.int64)
    stop = np.cumsum([0, *window.n_stops], dtype=np.int64)
    child = {(int(p), int(t)): r for r, (p, t) in enumerate(zip(window.row_parent, window.row_token, strict=True))}
    text, canonical = window.text, np.flatnonzero(window.row_depth == 0)
    out = np.zeros((len(text), END + 1))
    cells, lost = {0: (1.0, 1.0)}, 0
    for i in range(len(text)):
        kept = sorted(cells.items(), key=lambda cell: -cell[1][0] * cell[1][1])[:width]
        cells = {}
        for row, (weight, _) in kept:
            depth = i - int(window.row_start[row])
            at = int(level[row]) + depth
            symbols, masses = window.entry_byte[entry[at] : entry[at + 1]], window.entry_mass[entry[at] : entry[at + 1]]
            out[i, symbols] += weight * masses
            out[i, END] += weight * float(window.end[row]) * (depth == 0)
            if at + 1 >= level[row + 1]:
                continue
            goes_on = float(masses[symbols == text[i]].sum())
            for s in range(int(stop[row]), int(stop[row + 1])):
                if window.stop_depth[s] == depth + 1:
                    mass = float(window.stop_mass[s])
                    goes_on -= mass
                    ended = child.get((row, int(window.stop_token[s])))
                    if ended is not None:
                        cells[ended] = (weight * mass, 1.0)
            if goes_on > 0:
                cells[row] = (weight, goes_on)
        out[i] /= max(out[i].sum(), 1e-300)
        if not cells:
            lost += 1
            row = int(canonical[np.searchsorted(window.row_start[canonical], i + 1, side="right") - 1])
            cells = {row: (1.0, 1.0)}
        scale = sum(weight * goes_on for weight, goes_on in cells.values())
        cells = {row: (weight / scale, goes_on) for row, (weight, goes_on) in cells.items()}
    return out, lost


def loss(asked: Window, targets: Targets, reference: Targets, symbol: np.ndarray) -> dict[str, float]:
    """Divergence from the reference in nats (leak in bits) per byte, and what was evaluated."""
    distances = divergence(reference.probs, reference.tail, targets.probs, targets.tail, symbol)
    return {
        "rows_per_token": int((asked.row_static == 0).sum()) / int((asked.row_depth == 0).sum()),
        "kl": float(distances.kl.mean()), "jsd": float(distances.jsd.mean()), "leak_bits": float(distances.leak.mean()),
    }  # fmt: skip


def study(teacher: Teacher, text: str) -> dict[str, Any]:
    """All figures of one text."""
    window, reference = evaluate(teacher, text, {**REFERENCE, "static": 0.0})
    symbol, n = true_symbols(window), len(text.encode())
    at = np.arange(n)
    bytewise = spread_tail(reference.probs, reference.tail, even_weights(reference.probs > 0))
    tokenwise = token_entropies(teacher, text)
    out: dict[str, Any] = {
        "bytes": n,
        "tokens": len(tokenwise),
        "entropy": {"tokens": float(tokenwise.sum() / n), "bytes": float(entropy(bytewise[:n]).sum() / n)},
        "surprise": {"tokens": window.canonical_nll / n, "bytes": float(-np.log(bytewise[at, symbol[:n]]).sum() / n)},
        "beam": [], "effort": [],
    }  # fmt: skip
    for width in WIDTHS:
        rows, lost = beam(window, width)
        nothing = np.zeros(n)
        distances = divergence(reference.probs[:n], reference.tail[:n], rows, nothing, symbol[:n])
        figures = {
            "kl": float(distances.kl.mean()),
            "jsd": float(distances.jsd.mean()),
            "leak_bits": float(distances.leak.mean()),
        }
        out["beam"].append({"width": width, "restarts": lost, **figures})
    for name, effort in EFFORTS.items():
        asked, targets = evaluate(teacher, text, effort)
        out["effort"].append({"name": name, **effort, **loss(asked, targets, reference, symbol)})
    return out


def passages(teacher: Teacher, count: int, limit: int) -> list[dict[str, Any]]:
    """Every preset on every passage of prose: one row each."""
    rows = []
    for kind, texts in prose_passages(count, limit).items():
        for number, text in enumerate(texts):
            window, reference = evaluate(teacher, text, {**REFERENCE, "static": 0.0})
            symbol = true_symbols(window)
            for name, effort in st.PRESETS.items():
                figures = loss(*evaluate(teacher, text, effort), reference, symbol)
                rows.append({"kind": kind, "passage": number, "begins": text[:30], "preset": name, **figures})
            print(f"{kind} {number}: done", flush=True)
    return rows


def spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the passages of each kind, and of all: mean, standard deviation between passages, least and greatest."""
    out = []
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        for preset in st.PRESETS:
            some = [row for row in rows if row["preset"] == preset and kind in (row["kind"], "all")]
            summary: dict[str, Any] = {"kind": kind, "preset": preset, "passages": len(some)}
            for name in ("rows_per_token", "kl", "jsd", "leak_bits"):
                values = np.array([row[name] for row in some])
                summary[name] = {
                    "mean": float(values.mean()), "std": float(values.std(ddof=min(1, len(values) - 1))),
                    "least": float(values.min()), "greatest": float(values.max()),
                }  # fmt: skip
            out.append(summary)
    return out


def spread_markdown(summaries: list[dict[str, Any]]) -> str:
    """The figures of `spread` as a table."""
    lines = [
        "| prose | preset | passages | rows per token | KL, mean ± std | KL, greatest | JSD | leak, bits/byte |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for s in summaries:
        kl = s["kl"]
        lines.append(
            f"| {s['kind']} | {s['preset']} | {s['passages']} | {s['rows_per_token']['mean']:.3f} | "
            f"{kl['mean']:.5f} ± {kl['std']:.5f} | {kl['greatest']:.5f} | {s['jsd']['mean']:.6f} | "
            f"{s['leak_bits']['mean']:+.4f} |"
        )
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The figures as tables."""
    lines = [
        "| text | bytes per token | entropy of tokens | of bytes | surprise, canonical tokens | bytes, all covers |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, r in results.items():
        e, s = r["entropy"], r["surprise"]
        lines.append(
            f"| {name} | {r['bytes'] / r['tokens']:.2f} | {e['tokens']:.4f} | {e['bytes']:.4f} | {s['tokens']:.4f} | "
            f"{s['bytes']:.4f} |"
        )
    lines += ["", "| text | histories kept | KL | JSD | leak, bits/byte | restarts |", "|---|---:|---:|---:|---:|---:|"]
    for name, r in results.items():
        lines += [
            f"| {name} | {b['width']} | {b['kl']:.5f} | {b['jsd']:.6f} | {b['leak_bits']:+.4f} | {b['restarts']} |"
            for b in r["beam"]
        ]
    lines += [
        "",
        "| text | effort | tau | depth | static | rows per token | KL | JSD | leak, bits/byte |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, r in results.items():
        lines += [
            f"| {name} | {t['name']} | {t['tau']:g} | {t['depth']:g} | {t['static']:g} | {t['rows_per_token']:.2f} | "
            f"{t['kl']:.5f} | {t['jsd']:.6f} | {t['leak_bits']:+.4f} |"
            for t in r["effort"]
        ]
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Three panels, one per question."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    names = list(results)
    at = np.arange(len(names))
    for shift, (what, side) in enumerate(
        (what, side) for what in ("entropy", "surprise") for side in ("tokens", "bytes")
    ):
        heights = [results[name][what][side] for name in names]
        panels[0].bar(at + (shift - 1.5) * 0.2, heights, 0.19, label=f"{what}, {side}")
    panels[0].set_xticks(at, names)
    panels[0].set_ylabel("nats per byte of text")
    panels[0].set_title("token and byte distributions")
    for name in names:
        r = results[name]
        by_cost = sorted(r["effort"], key=lambda t: t["rows_per_token"])
        panels[1].plot([b["width"] for b in r["beam"]], [b["jsd"] for b in r["beam"]], marker="o", label=name)
        panels[2].plot([t["rows_per_token"] for t in by_cost], [t["jsd"] for t in by_cost], marker="o", label=name)
    panels[1].set(xscale="log", yscale="log", xlabel="histories kept", ylabel="JSD, nats per byte", title="beam width")
    panels[2].set(yscale="log", xlabel="histories per canonical token", ylabel="JSD, nats per byte", title="effort")
    for panel in panels:
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--bytes", type=int, default=1500, help="of each text")
    parser.add_argument("--texts", type=Path, help="a folder of further .txt files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--passages", type=int, default=0, help="passages of each kind of prose, instead of the texts")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    facts: dict[str, Any] = {"machine": machine, "model": args.model, "reference": REFERENCE}
    if args.passages:
        facts["presets"] = st.PRESETS
        teacher = open_teacher(st.Teacher(model=args.model, backend="hf", floor=1e-6, top_k=0))
        rows = passages(teacher, args.passages, args.bytes)
        print(spread_markdown(spread(rows)))
        if args.out:
            args.out.write_text(json.dumps(facts | {"summary": spread(rows), "passages": rows}, indent=1) + "\n")
        return
    texts = builtin_texts(args.bytes) | (folder_texts(args.texts, args.bytes) if args.texts else {})
    teacher = open_teacher(st.Teacher(model=args.model, backend="hf", floor=1e-6, top_k=0))
    results: dict[str, Any] = {}
    for name, text in texts.items():
        results[name] = study(teacher, text)
        print(f"{name}: done", flush=True)
    print(markdown(results))
    if args.out:
        args.out.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
        plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
