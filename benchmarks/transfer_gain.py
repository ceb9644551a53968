"""Tokenizer transfer: a trained model under another tokenizer, taught by its former self through the cache.

    python -m benchmarks.transfer_texts CORPORA TEXTS; bytecache run --set corpus.source=TEXTS/corpus.jsonl ...
    python -m benchmarks.transfer_gain RUN --raw TEXTS/raw.jsonl --work WORK --out benchmarks/results/transfer_gain.json
        --tokenizer GPT2FOLDER [--arms ce marginal ...] [--seeds 0 1 2 3 4] [--rates 1e-3]
    python -m benchmarks.transfer_gain --report --out benchmarks/results/transfer_gain.json

The run is of the texts of `transfer_texts`, whose ids name kind and use. Every arm of a seed starts from the same
weights and reads the training text once, in the same order. Settings are chosen on `validation`, or with `--curve` on
training text before it is learned; figures are reported of `test`. Each run is one line of results: the bits of every
document (its end, which is arbitrary, left out), the token NLL of every step (each reads text that is new to the
student, so this is a curve of held-out figures at no cost) and the seconds that the steps took (on a core of its own,
so processor seconds). Beside the arms with the teacher:

    ce-seconds   cross-entropy for as many steps more as the teacher's term costs in processor time
    ce-raw       cross-entropy on further text of the same sources, for the time that the teacher's reading took
    ngram        the same objective, taught by counts of the training text (`count_targets.py`)
    ...-few      a quarter of the text, read four times

Retention is (arm - before) / (original - before) in bits/byte. Intervals: Student's t over paired seeds, and a
bootstrap over documents of the mean over seeds, both 95 %. A study that is stopped continues.

`transfer_study` measures the same with rates of each arm's own, and takes passages and intervals from here; what this
one measured (two seeds, 11 kB) is withdrawn.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.count_targets import write_counts, write_part, write_silent
from benchmarks.degraded_targets import degrade
from benchmarks.student_gain import ARMS as OBJECTIVES
from benchmarks.student_gain import MARGINAL, T_95
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dump.parquet import read_meta
from bytecache.schemas.errors import Interrupted
from bytecache.stages.evaluate import evaluate
from bytecache.stages.student import student
from bytecache.stages.targets.source import load_shard
from bytecache.stages.teacher.identity import vocabulary_from
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.teacher_tokens import TokenDump
from bytecache.stages.train.objective.objective import Objective
from bytecache.stages.train.train import train

Arm = tuple[str, str, dict[str, Any], float]
"""Targets, label, settings of training, and steps as a multiple of the study's."""
ARMS: dict[str, Arm] = {
    **{name: (*OBJECTIVES[name], 1.0) for name in OBJECTIVES},
    "ce-seconds": (*OBJECTIVES["ce"][:1], "cross-entropy, equal seconds", OBJECTIVES["ce"][2], 1.1),
    "ce-raw": ("raw", "cross-entropy, the teacher's time spent on more text", OBJECTIVES["ce"][2], 2.0),
    "ce-few": ("few", "cross-entropy, a quarter of the text four times", OBJECTIVES["ce"][2], 1.0),
    "marginal-few": ("few", "marginal, a quarter of the text four times", MARGINAL, 1.0),
    "ngram": ("counts", "marginal, taught by a byte 6-gram of the training text", MARGINAL, 1.0),
}
FEW = 4
"""Training documents of each kind that are a quarter of the text."""
SAMPLES = 2000
"""Of the bootstrap."""


def wanted(name: str, uses: list[str], each: int) -> bool:
    """Whether a document, by its id, is one of the first `each` (0: of all) of its kind for one of these uses."""
    _, use, number, _ = name.split(" ", 3)
    return use in uses and (not each or int(number) < each)


def documents(opened: student.Student, targets: Path, uses: list[str], each: int) -> dict[str, dict[str, float]]:
    """Bytes, bits of the student's tokens and KL (nats, of certain choices) of the `wanted` held-out documents."""
    judge = Objective(st.Train(head="marginal", byte_reduction="sum"), opened, 0)
    dataset = read_dataset(targets)
    judge.observe(stream.ShardReader(targets, dataset, "train", opened.vocabulary, opened.end_id))
    reader = stream.ShardReader(targets, dataset, "heldout", opened.vocabulary, opened.end_id)
    found = {}
    for number in range(len(reader.positions)):
        source = reader[number]
        for row, name in enumerate(source.shard.doc_id):
            if not wanted(name, uses, each):
                continue
            first, last = (int(x) for x in np.searchsorted(source.row, [row, row + 1]))
            last -= 1  # where a passage was cut off is not for a student to know
            micro = stream.collate(
                [stream.Row(source, first, last)], with_targets=True, byte_reduction="sum", limit=judge.term.slots
            )
            with torch.inference_mode():
                parts = judge(*opened.forward(micro.input_ids), micro, measure=True)
            found[name] = {
                "bytes": micro.n_bytes, "bits": round(float(parts.token) / math.log(2), 3),
                "kl": round(float(parts.kl), 3),
            }  # fmt: skip
    return found


def refuse_mixed(targets: Path) -> None:
    """Raises SystemExit where training text is, by its id, for something else: the run's split is not the texts'."""
    dataset = read_dataset(targets)
    for entry in dataset.split("train"):
        for name in load_shard(dataset, entry).doc_id:
            if name.split(" ", 3)[1] != "train":
                raise SystemExit(
                    f"{targets}: {name!r} is in the training split; plan the texts with run.seed = 0 and "
                    "corpus.heldout_fraction = 0.5, for which `transfer_texts` chose them"
                )


def teachers_own(targets: Path, uses: list[str], each: int) -> dict[str, dict[str, float]]:
    """The same of the teacher as a byte model."""
    dataset = read_dataset(targets)
    found = {}
    for entry in dataset.split("heldout"):
        shard = load_shard(dataset, entry)
        true = np.asarray(shard.text).astype(np.int64)
        true[np.asarray(shard.doc_start[1:]) - 1] = 256
        triples = shard.triples(0, len(shard))
        row, symbol = (np.asarray(c, np.int64) for c in (triples.row, triples.symbol))
        nats = evaluate.true_nats(row, symbol, triples.prob, np.asarray(shard.tail), true)[0]
        for number, name in enumerate(shard.doc_id):
            if wanted(name, uses, each):
                lo, hi = (int(x) for x in shard.doc_start[number : number + 2])
                bits = float(nats[lo : hi - 1].sum()) / math.log(2)
                found[name] = {"bytes": hi - lo - 1, "bits": round(bits, 3), "kl": 0.0}
    return found


def targets_of(args: argparse.Namespace, kind: str) -> Path:
    """The data set that an arm learns from; made once."""
    exact: Path = args.run / "targets"
    out: Path = exact if kind == "exact" else args.work / f"targets-{kind}"
    if not out.exists():
        if kind == "counts":
            write_counts(exact, out)
        elif kind == "few":
            write_part(exact, out, lambda name: wanted(name, ["train"], FEW))
        elif kind == "raw":
            lines = map(json.loads, args.raw.read_text(encoding="utf-8").splitlines())
            write_silent(exact, {line["id"]: line["text"].encode() for line in lines}, out)
        else:
            degrade(args.run, out, kind)
    return out


def prepared(args: argparse.Namespace) -> Path:
    """The model under its new tokenizer, before training."""
    folder: Path = args.work / f"student-{Path(args.tokenizer).name.replace(':', '-')}"
    if not folder.exists():
        settings = st.Student(model=args.student, tokenizer=args.tokenizer)
        student.prepare(settings, args.run / "targets", folder, seed=0)
    return folder


def run_arm(args: argparse.Namespace, arm: str, seed: int, rate: float) -> dict[str, Any]:
    """Train one arm with one seed and measure it."""
    kind, _, changes, longer = ARMS[arm]
    steps = round(args.steps * longer)
    folder = prepared(args)
    teacher = st.Teacher(model=read_meta(next((args.run / "teacher").glob("*.parquet")))["teacher"]["model"])
    settings = st.Train(
        steps=steps, learning_rate=rate, checkpoint_every=steps, batch=args.batch, window_bytes=args.window,
        warmup=args.warmup, tensorboard=False,
        **{"lora_rank": args.lora, "lora_embeddings": True, **changes},
    )  # fmt: skip
    dump = TokenDump(args.run / "teacher", vocabulary_from(teacher))
    out = args.work / f"{args.curve}-{folder.name}-{arm}-{seed}-{rate:g}"
    result = train(
        settings, folder, targets_of(args, kind), out, name=arm, seed=seed, device="cpu", dump=dump,
        stop=lambda: bool(args.budget) and time.monotonic() > args.until,
    )  # fmt: skip
    if not args.curve and args.budget and time.monotonic() > args.until:
        raise Interrupted("budget")  # trained; another call measures it
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = {"bytes": sum(x["text_bytes"] for x in curve), "bits": sum(x["token_nll"] * x["tokens"] for x in curve)}
    measured = {"training text": {"bytes": seen["bytes"], "bits": round(seen["bits"] / math.log(2), 3), "kl": 0.0}}
    if not args.curve:
        opened = evaluate.load_trained(folder, Path(result["checkpoint"])).student
        measured = documents(opened, args.run / "targets", args.uses, args.documents)
    shutil.rmtree(out)  # a checkpoint is 0.3 GB
    return {
        "tokenizer": Path(args.tokenizer).name, "arm": arm, "seed": seed, "rate": rate,
        "steps": steps, "step_seconds": round(sum(x["seconds"] for x in curve), 1),
        "text_bytes_seen": seen["bytes"],
        "curve_bits_per_byte": [
            round(x["token_nll"] * x["tokens"] / max(x["text_bytes"], 1) / math.log(2), 4) for x in curve
        ],
        "curve_bytes": [x["text_bytes"] for x in curve], "documents": measured,
    }  # fmt: skip


def bits_per_byte(found: dict[str, dict[str, float]], use: str, kind: str = "", key: str = "bits") -> float:
    """Of all documents of a use and kind ('': of every kind)."""
    chosen = [d for name, d in found.items() if name.startswith(kind) and name.split()[1] == use]
    return sum(d[key] for d in chosen) / sum(d["bytes"] for d in chosen)


def paired(
    runs: list[dict[str, Any]], control: list[dict[str, Any]], use: str, kind: str
) -> tuple[float, float, float, float]:
    """Mean difference over the seeds that both have, half of its t-interval, and the bootstrap's two ends."""
    by_seed = [{r["seed"]: r["documents"] for r in side} for side in (runs, control)]
    seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
    names = [name for name in by_seed[0][seeds[0]] if name.startswith(kind) and name.split()[1] == use]
    size = np.array([by_seed[0][seeds[0]][name]["bytes"] for name in names])
    gaps = np.array([[by_seed[0][s][n]["bits"] - by_seed[1][s][n]["bits"] for n in names] for s in seeds])
    each = gaps.sum(1) / size.sum()
    half = T_95[len(seeds)] * each.std(ddof=1) / math.sqrt(len(seeds)) if len(seeds) in T_95 else math.nan
    draws = np.random.default_rng(0).integers(0, len(names), (SAMPLES, len(names)))
    means = gaps.mean(0)[draws].sum(1) / size[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(each.mean()), half, float(low), float(high)


def report(out: Path) -> str:
    """A table for each tokenizer, rate and use; written beside the JSON."""
    found = json.loads(out.read_text())
    kinds = sorted({name.split()[0] for each in found["before"].values() for name in each})
    lines = []
    for tokenizer, rate in dict.fromkeys((r["tokenizer"], r["rate"]) for r in found["runs"]):
        runs = [r for r in found["runs"] if (r["tokenizer"], r["rate"]) == (tokenizer, rate)]
        ends = found["before"][tokenizer], found["original"]
        for use in ("validation", "test"):
            measured = [r for r in runs if any(name.split()[1] == use for name in r["documents"])]
            if measured:
                lines += [f"\n{tokenizer}, rate {rate:g}, {use}\n", *table(measured, ends, use, kinds)]
    text = "\n".join(lines).strip()
    out.with_suffix(".md").write_text(text + "\n")
    return text


def table(runs: list[dict[str, Any]], ends: tuple[Any, Any], use: str, kinds: list[str]) -> list[str]:
    """Lines of one table; ends: documents of the student before training and of the original."""
    before = ends[0]
    start, goal = (bits_per_byte(x, use) for x in ends)
    blank = " |" * (len(kinds) + 1)
    lines = [
        "| arm | seeds | bits/byte | to CE (seeds) [documents] | retention | KL | "
        + " | ".join(f"{kind}, to CE" for kind in kinds) + " | s |",
        "|---|---:|---:|---:|---:|---:|" + "---:|" * (len(kinds) + 1),
        f"| before training | | {start:.4f} | | 0 | {bits_per_byte(before, use, key='kl'):.4f} |" + blank,
    ]  # fmt: skip
    control = [r for r in runs if r["arm"] == "ce"]
    for arm in ARMS:
        mine = [r for r in runs if r["arm"] == arm]
        if not mine:
            continue
        level, kl = (
            float(np.mean([bits_per_byte(r["documents"], use, key=key) for r in mine])) for key in ("bits", "kl")
        )
        gaps = [""] * (len(kinds) + 1)
        if arm != "ce" and {r["seed"] for r in mine} & {r["seed"] for r in control}:
            gaps = [interval(*paired(mine, control, use, kind)) for kind in ["", *kinds]]
        lines.append(
            f"| {ARMS[arm][1]} | {len(mine)} | {level:.4f} | {gaps[0]} | {(level - start) / (goal - start):.2f} "
            f"| {kl:.4f} | " + " | ".join(gaps[1:]) + f" | {np.mean([r['step_seconds'] for r in mine]):.0f} |"
        )
    return [*lines, f"| the original | | {goal:.4f} | | 1 | 0 |" + blank]


def interval(mean: float, half: float, low: float, high: float) -> str:
    """A difference with the interval over seeds, if there is one, and the one over documents."""
    return f"{mean:+.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}") + f" [{low:+.4f}, {high:+.4f}]"


def results(out: Path) -> dict[str, Any]:
    """The file of results so far."""
    empty: dict[str, Any] = {"machine": "2 cores, x86-64, one thread", "before": {}, "original": {}, "runs": []}
    return json.loads(out.read_text()) if out.is_file() else empty


def save(out: Path, found: dict[str, Any]) -> None:
    """Replace the file."""
    out.write_text(json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder with teacher/ and targets/")
    parser.add_argument("--work", type=Path, help="scratch folder for students, checkpoints and other targets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raw", type=Path, help="raw.jsonl of the texts, for ce-raw")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["ce", "marginal"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--curve", action="store_true", help="train only: to choose settings")
    parser.add_argument("--uses", nargs="+", default=["test"], help="documents that are measured: validation, test")
    parser.add_argument("--documents", type=int, default=7, help="that are measured of each kind; 0 = all")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2, help="windows a step")
    parser.add_argument("--window", type=int, default=512, help="bytes a window")
    parser.add_argument("--student", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--tokenizer", default="gpt2", help="see student.tokenizer")
    parser.add_argument("--lora", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0, help="seconds after which to stop; a rerun goes on")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        print(report(args.out))
        return
    args.until = time.monotonic() + args.budget
    args.work.mkdir(parents=True, exist_ok=True)
    found = results(args.out)
    refuse_mixed(args.run / "targets")
    name = Path(args.tokenizer).name
    if not args.curve and name not in found["before"]:
        asked = (args.run / "targets", ["validation", "test"], args.documents)
        found["before"][name] = documents(student.load(prepared(args)), *asked)
        found["original"] = teachers_own(*asked)
        save(args.out, found)
    for seed in args.seeds:
        for rate in args.rates:
            for arm in args.arms:
                if any(
                    (r["tokenizer"], r["arm"], r["seed"], r["rate"]) == (name, arm, seed, rate) for r in found["runs"]
                ):
                    continue
                try:
                    record = run_arm(args, arm, seed, rate)
                except Interrupted:
                    print("stopped by --budget; the same command goes on", flush=True)
                    return
                print(arm, seed, rate, record["step_seconds"], flush=True)
                found = results(args.out)
                found["runs"].append(record)
                save(args.out, found)
    if not args.curve:
        report(args.out)


if __name__ == "__main__":
    main()
