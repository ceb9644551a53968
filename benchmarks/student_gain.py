"""What a student gains from the cache: held-out bits per byte by objective and by quality of the targets.

    python -m benchmarks.student_gain runs/default --work runs/gain --out benchmarks/results/student_gain.json
        [--arms ce marginal ...] [--seeds 0 1 2] [--steps 250] [--pair NAME] [--teacher FOLDER]
        [--student builtin:smollm2-135m-instruct --tokenizer bpe:8192 --lora 16 --embeddings --rate 5e-4 --batch 2
        --window 512 --steps 40]
    python -m benchmarks.student_gain --report --out benchmarks/results/student_gain.json

Every arm starts from the same weights per seed and takes the same number of steps over the same text, in the same order
where the targets are the exact ones (worse ones are another data set, so another order); seeds change the weights of a
new student or its adapters, and the order. Measured on the held-out split:

    bits/byte   the student's token cross-entropy, END included, per text byte: an ordinary language model's figure
    KL          KL(teacher || student) per text byte, of the student's own tokens seen as bytes, where the teacher alone
                decides them, against the run's exact targets, whatever the arm was trained on

The teacher's own bits/byte there, and a pretrained student's before training, are measured once a pair. The arms
`uld`, `shared_topk` and `marginal-topk` need the run's dump with teacher.top_k = 64; `shared_topk` and `marginal-topk`
its tokenizer as well (--teacher, else the name in the dump).
Results are appended run by run, so a stopped study continues. --report writes the table (.md) and the plot (.png)
beside the JSON: mean over seeds, and the mean paired difference to `ce` with its 95 % t-interval.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.degraded_targets import degrade
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dump.parquet import read_meta
from bytecache.stages.evaluate import evaluate
from bytecache.stages.student import student
from bytecache.stages.targets.order import sequential
from bytecache.stages.targets.source import load_shard
from bytecache.stages.teacher.identity import vocabulary_from
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.teacher_tokens import TokenDump
from bytecache.stages.train.objective.objective import Objective
from bytecache.stages.train.train import train

PAPER = {"head": "parallel", "byte_reduction": "mean", "lambda_byte": 1.0}
AUTO = {**PAPER, "head": "autoregressive", "lambda_kl": 1.0}
PLAIN = {"lambda_byte": 0.0, "lambda_kl": 0.0}
MARGINAL = {"head": "marginal", "byte_reduction": "sum", "lambda_token": 1.0, "lambda_kl": 1.0}
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ce": ("exact", "cross-entropy alone", {"head": "parallel", **PLAIN}),
    "bytes": ("exact", "parallel heads, no teacher", {"head": "parallel", "lambda_byte": 1.0, "lambda_kl": 0.0}),
    "parallel": ("exact", "parallel heads, the paper's weights", {**PAPER, "lambda_kl": 0.1}),
    "parallel-1": ("exact", "parallel heads, KL weight 1", {**PAPER, "lambda_kl": 1.0}),
    "autoregressive": ("exact", "autoregressive head, KL weight 1", AUTO),
    "uld": ("exact", "ULD, its paper's weight 1.5", {"head": "uld", "lambda_kl": 1.5}),
    "uld-0.1": ("exact", "ULD, weight 0.1", {"head": "uld", "lambda_kl": 0.1}),
    "shared_topk": ("exact", "shared-vocabulary top-64", {"head": "shared_topk", "lambda_kl": 1.0}),
    "strict_topk": ("exact", "strict one-to-one, shared top-16", {"head": "strict_topk", "lambda_kl": 1.0}),
    "alm": ("exact", "ALM, chunk likelihoods", {"head": "alm", "lambda_kl": 1.0}),
    "bld": ("exact", "BLD as published", {**PAPER, "lambda_kl": 0.1, "lora_rank": 64, "lora_targets": "q_proj v_proj"}),
    "marginal": ("exact", "marginal", MARGINAL),
    "marginal-fast": ("fast", "marginal, canonical-only targets", MARGINAL),
    "marginal-topk": ("topk", "marginal, top-64 targets", MARGINAL),
    "marginal-half": ("exact", "marginal, weight 0.5", {**MARGINAL, "lambda_kl": 0.5}),
    "marginal-2": ("exact", "marginal, weight 2", {**MARGINAL, "lambda_kl": 2.0}),
    "marginal-4": ("exact", "marginal, weight 4", {**MARGINAL, "lambda_kl": 4.0}),
    "marginal-only": ("exact", "marginal, no cross-entropy", {**MARGINAL, "lambda_token": 0.0}),
    "marginal-t2": ("exact", "marginal, temperature 2", {**MARGINAL, "temperature": 2.0}),
    "marginal-decay": ("exact", "marginal, weight 2 to 0", {**MARGINAL, "lambda_kl": 2.0, "kl_schedule": "decay"}),
    "marginal-rise": ("exact", "marginal, weight 0 to 2", {**MARGINAL, "lambda_kl": 2.0, "kl_schedule": "rise"}),
    "marginal-js": ("exact", "marginal, Jensen-Shannon", {**MARGINAL, "divergence": "js"}),
    "marginal-tail": ("exact", "marginal, tails under 0.1 alone", {**MARGINAL, "max_tail": 0.1}),
}  # fmt: skip
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t for a two-sided 95 % interval, by number of seeds."""


def heldout(opened: student.Student, targets: Path, window_bytes: int, limit: int) -> dict[str, float]:
    """bits/byte and KL of a trained student (module docstring), on about the first `limit` bytes; 0 = all."""
    judge = Objective(st.Train(head="marginal", byte_reduction="sum"), opened, 0)
    dataset = read_dataset(targets)
    judge.observe(stream.ShardReader(targets, dataset, "train", opened.vocabulary, opened.end_id))
    reader = stream.ShardReader(targets, dataset, "heldout", opened.vocabulary, opened.end_id, resident=1)
    token = kl = 0.0
    n_bytes = 0
    for window in sequential(reader.positions, 4 * window_bytes):
        if limit and n_bytes >= limit:
            break
        source = reader[window.shard]
        rows = [
            row
            for lo in range(window.lo, window.hi, window_bytes)
            for row in stream.cut(source, lo, min(lo + window_bytes, window.hi), opened.max_tokens)
        ]
        for members in stream.group(rows):
            micro = stream.collate(members, with_targets=True, byte_reduction="sum", limit=judge.term.slots)
            with torch.inference_mode():
                parts = judge(*opened.forward(micro.input_ids), micro, measure=True)
            token, kl, n_bytes = token + float(parts.token), kl + float(parts.kl), n_bytes + micro.n_bytes
    return {"bits_per_byte": token / n_bytes / math.log(2), "kl_nats_per_byte": kl / n_bytes, "text_bytes": n_bytes}


def anchors(args: argparse.Namespace) -> dict[str, float]:
    """Bits/byte of the teacher on the held-out split, and of a pretrained student before training."""
    dataset = read_dataset(args.run / "targets")
    nats, n_bytes = 0.0, 0
    for entry in dataset.split("heldout"):
        shard = load_shard(dataset, entry)
        true = np.asarray(shard.text).astype(np.int64)
        true[np.asarray(shard.doc_start[1:]) - 1] = 256
        triples = shard.triples(0, len(shard))
        row, symbol = (np.asarray(c, np.int64) for c in (triples.row, triples.symbol))
        nats += float(evaluate.true_nats(row, symbol, triples.prob, np.asarray(shard.tail), true)[0].sum())
        n_bytes += len(true) - len(shard.doc_id)
    found = {"teacher_bits_per_byte": nats / n_bytes / math.log(2)}
    if args.student:
        start = heldout(student.load(prepared(args, args.seeds[0])), args.run / "targets", args.window, args.heldout)
        found |= {"start_bits_per_byte": start["bits_per_byte"], "start_kl": start["kl_nats_per_byte"]}
    return found


def prepared(args: argparse.Namespace, seed: int) -> Path:
    """The student's folder; a pretrained one is the same for every seed."""
    folder: Path = args.work / f"student-{args.pair.replace(' ', '-')}-{0 if args.student else seed}"
    if not folder.exists():
        student.prepare(
            st.Student(model=args.student, tokenizer=args.tokenizer), args.run / "targets", folder, seed=seed
        )
    return folder


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed and measure it."""
    kind, _, changes = ARMS[arm]
    exact = args.run / "targets"
    targets = exact
    if kind != "exact":
        targets = args.work / f"targets-{kind}"
        if not targets.exists():
            degrade(args.run, targets, kind, teacher=args.teacher)
    folder = prepared(args, seed)
    teacher = st.Teacher(
        model=args.teacher or read_meta(next((args.run / "teacher").glob("*.parquet")))["teacher"]["model"]
    )
    settings = st.Train(
        steps=args.steps, learning_rate=args.rate, checkpoint_every=args.steps, batch=args.batch,
        window_bytes=args.window, warmup=min(30, args.steps // 8), tensorboard=False, dtype=args.dtype,
        **{"lora_rank": args.lora, "lora_embeddings": args.embeddings, **changes},
    )  # fmt: skip
    dump = TokenDump(args.run / "teacher", vocabulary_from(teacher))
    began = time.process_time()
    name = f"{args.pair.replace(' ', '-')}-{arm}-{seed}"
    result = train(settings, folder, targets, args.work / name, name=name, seed=seed, device="cpu", dump=dump)
    seconds = time.process_time() - began
    opened = evaluate.load_trained(folder, Path(result["checkpoint"])).student
    return {
        "pair": args.pair, "arm": arm, "seed": seed, "steps": args.steps, "cpu_seconds": round(seconds, 1),
        "text_bytes_seen": result["text_bytes"], **heldout(opened, exact, args.window, args.heldout),
    }  # fmt: skip


def paired(runs: dict[int, dict[str, Any]], control: dict[int, dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean difference to the control over shared seeds, and the half of its 95 % interval (nan for one seed)."""
    gaps = np.array([runs[seed][key] - control[seed][key] for seed in sorted(set(runs) & set(control))])
    half = T_95[len(gaps)] * gaps.std(ddof=1) / math.sqrt(len(gaps)) if len(gaps) in T_95 else float("nan")
    return float(gaps.mean()) if len(gaps) else float("nan"), float(half)


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per pair and arm: means over seeds and the paired differences to `ce`."""
    lines = []
    for pair in dict.fromkeys(r["pair"] for r in records):
        by_arm = {a: {r["seed"]: r for r in records if r["pair"] == pair and r["arm"] == a} for a in ARMS}
        for arm, runs in by_arm.items():
            if not runs:
                continue
            gap, half = paired(runs, by_arm["ce"], "bits_per_byte")
            kl_gap, kl_half = paired(runs, by_arm["ce"], "kl_nats_per_byte")
            lines.append({
                "pair": pair, "arm": arm, "seeds": len(runs),
                "bits_per_byte": float(np.mean([r["bits_per_byte"] for r in runs.values()])),
                "kl": float(np.mean([r["kl_nats_per_byte"] for r in runs.values()])),
                "difference": gap, "half": half, "kl_difference": kl_gap, "kl_half": kl_half,
                "cpu_seconds": float(np.mean([r["cpu_seconds"] for r in runs.values()])),
                "points": [r["bits_per_byte"] for r in runs.values()],
            })  # fmt: skip
    return lines


def _signed(value: float, half: float) -> str:
    return f"{value:+.4f} {'(one seed)' if math.isnan(half) else f'± {half:.4f}'}"


def report(out: Path) -> None:
    """Table and plot beside the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(out.read_text())
    lines = summarise(found["runs"])
    table = [
        "| objective | bits/byte | to CE (95 %) | KL to teacher | to CE (95 %) | seeds | CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for pair in dict.fromkeys(x["pair"] for x in lines):
        anchor = found.get("pairs", {}).get(pair, {})
        steps = sorted({r["steps"] for r in found["runs"] if r["pair"] == pair})
        table.append(f"| **{pair}**, {', '.join(map(str, steps))} steps | | | | | | |")
        if anchor:
            table.append(f"| the teacher itself | {anchor['teacher_bits_per_byte']:.4f} | | | | | |")
        if "start_bits_per_byte" in anchor:
            at = anchor["start_bits_per_byte"], anchor["start_kl"]
            table.append(f"| the student before training | {at[0]:.4f} | | {at[1]:.4f} | | | |")
        for x in (x for x in lines if x["pair"] == pair):
            plain = x["arm"] == "ce"
            gap = "" if plain else _signed(x["difference"], x["half"])
            kl_gap = "" if plain else _signed(x["kl_difference"], x["kl_half"])
            table.append(
                f"| {ARMS[x['arm']][1]} | {x['bits_per_byte']:.4f} | {gap} | {x['kl']:.4f} | {kl_gap} | "
                f"{x['seeds']} | {x['cpu_seconds']:.0f} |"
            )
    out.with_suffix(".md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    pairs = list(dict.fromkeys(x["pair"] for x in lines))
    high = -(-len(pairs) // 2)
    figure, axes = plt.subplots(high, 2, figsize=(13, 3.4 * high), squeeze=False)
    for axis in axes.flat[len(pairs) :]:
        axis.remove()
    for axis, pair in zip(axes.flat, pairs, strict=False):
        mine = [x for x in lines if x["pair"] == pair]
        for y, x in enumerate(mine):
            axis.plot(x["points"], [y] * len(x["points"]), "o", color="#3465a4", alpha=0.7)
            axis.plot([x["bits_per_byte"]] * 2, [y - 0.3, y + 0.3], color="black")
        axis.set_yticks(range(len(mine)), [ARMS[x["arm"]][1] for x in mine])
        axis.invert_yaxis()
        axis.set_xlabel("held-out bits/byte (dots: seeds, bar: mean)")
        axis.set_title(pair)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=110)


def results(out: Path) -> dict[str, Any]:
    """The file of results so far."""
    empty: dict[str, Any] = {"machine": "2 cores, x86-64", "runs": []}
    return json.loads(out.read_text()) if out.is_file() else empty


def save(out: Path, found: dict[str, Any]) -> None:
    out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder with teacher/ and targets/")
    parser.add_argument("--work", type=Path, help="scratch folder for students, checkpoints and worse targets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["ce", "parallel", "marginal"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--window", type=int, default=1024, help="bytes a window")
    parser.add_argument("--heldout", type=int, default=0, help="bytes of held-out text that are read; 0 = all")
    parser.add_argument("--student", default="", help="a checkpoint to start from; default: a new BPE student")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 = train every weight")
    parser.add_argument("--tokenizer", default="", help="another tokenizer for the student, see student.tokenizer")
    parser.add_argument("--embeddings", action="store_true", help="train the token embeddings beside the adapters")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--teacher", default="", help="the teacher's folder, for its tokenizer")
    parser.add_argument("--pair", default="SmolLM2-135M to a new student")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        found = results(args.out)
        if args.pair not in found.setdefault("pairs", {}):
            found["pairs"][args.pair] = anchors(args)
            save(args.out, found)
        for seed in args.seeds:
            for arm in args.arms:
                if any((r["pair"], r["arm"], r["seed"]) == (args.pair, arm, seed) for r in results(args.out)["runs"]):
                    continue
                record = run_arm(args, arm, seed)
                print(json.dumps(record), flush=True)
                found = results(args.out)  # again: another process may have added its runs meanwhile
                found["runs"].append(record)
                save(args.out, found)
    report(args.out)


if __name__ == "__main__":
    main()
