"""What each objective adds to the training step of the same student, in one run.

    python -m benchmarks.objective_cost runs/default --work runs/cost --out benchmarks/results/objective_cost.json
        [--sizes small medium smollm2 smollm2-gemma] [--heads parallel autoregressive marginal] [--bytes 4096]
        [--rounds 5]                                                    (sizes measured before stay in the result)

A step here is forward, loss and backward of the same micro-batches; the optimiser is left out, which makes the shares
larger than they are. Steps with and without the teacher alternate; the median of the paired ratios is reported, in CPU
time. What needs no student (`Objective.prepare`: which byte choices there are and what the teacher says of them) is
made in the loader's thread, as in training, and listed apart. FLOPs count matrix products only, so `marginal`, which is
sums over the vocabulary, has none. Memory is the most that the process held during a step, above what it held before
it, with and without the teacher (Linux only). Students: a new Llama with a BPE of the run's text, of two sizes, and
SmolLM2-135M with its own tokenizer of 49k and with Gemma's of 262k (lock/gemma.txt).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.stages.student import student
from bytecache.stages.targets.order import sequential
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import MicroBatch, Step
from bytecache.stages.train.objective.objective import Objective

SIZES = {
    "small": st.Student(),
    "medium": st.Student(hidden_size=512, layers=8, heads=8),
    "smollm2": st.Student(model="builtin:smollm2-135m-instruct"),
    "smollm2-gemma": st.Student(model="builtin:smollm2-135m-instruct", tokenizer="builtin:gemma-3-270m"),
}
HEADS = ("parallel", "autoregressive", "marginal")


def step(opened: student.Student, objective: Objective, micros: list[MicroBatch]) -> float:
    """CPU seconds of one forward and backward over the micro-batches."""
    began = time.process_time()
    for micro in micros:
        parts = objective(*opened.forward(micro.input_ids), micro)
        objective.total(parts, micro.n_tokens, micro.n_byte_tokens).backward()
    seconds = time.process_time() - began
    opened.model.zero_grad(set_to_none=True)
    objective.zero_grad(set_to_none=True)
    return seconds


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, what the process holds, or VmHWM, the most since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def peak(opened: student.Student, objective: Objective, micros: list[MicroBatch]) -> int:
    """Bytes that a step takes at most, above what is held before it; 0 where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
        before = resident("VmRSS")
    except OSError:
        return 0
    step(opened, objective, micros)
    return resident("VmHWM") - before


def measure(
    opened: student.Student, reader: stream.ShardReader, heads: list[str], rounds: int, size: int
) -> list[dict[str, Any]]:
    """One line per head: overhead of its step over cross-entropy alone."""
    window = next(iter(sequential(reader.positions, size)))
    rows = stream.cut(reader[window.shard], window.lo, window.hi, opened.max_tokens)
    groups = stream.group(rows)
    micros = [stream.collate(members, with_targets=True) for members in groups]
    tokens = sum(m.input_ids.numel() for m in micros)
    slots = sum(len(m.slot_token) for m in micros)
    weights = sum(p.numel() for p in opened.model.parameters() if p.ndim > 1)
    plain = Objective(st.Train(head="parallel", lambda_byte=0.0, lambda_kl=0.0), opened, 0)
    lines = []
    for head in heads:
        objective = Objective(st.Train(head=head), opened, 0)
        objective.observe(reader)
        begun = Step(0, [stream.collate(g, with_targets=True, limit=objective.term.slots) for g in groups], {})
        step(opened, objective, objective.prepare(begun).micro)
        pairs, ahead = [], []
        for _ in range(rounds):
            began = time.process_time()
            ready = objective.prepare(begun).micro
            ahead.append(time.process_time() - began)
            pairs.append((step(opened, plain, micros), step(opened, objective, ready)))
        memory = peak(opened, plain, micros), peak(opened, objective, objective.prepare(begun).micro)
        flops = objective.flops(tokens, slots)
        lines.append({
            "head": head, "overhead": float(np.median([b / a for a, b in pairs])) - 1,
            "loader": float(np.median([x / a for x, (a, _) in zip(ahead, pairs, strict=True)])),
            "ce_seconds": float(np.median([a for a, _ in pairs])), "parameters": objective.n_parameters,
            "flops_overhead": flops / (6 * weights * tokens), "tokens": tokens, "bytes": slots,
            "peak_bytes": memory[1], "ce_peak_bytes": memory[0],
        })  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with targets/")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder for the students")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=4096, help="text of a step")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    targets = args.run / "targets"
    dataset = read_dataset(targets)
    report: dict[str, Any] = {"machine": "2 cores, x86-64, one thread, other programs beside", "students": []}
    if args.out and args.out.is_file():
        report = json.loads(args.out.read_text())  # other sizes stay
    torch.set_num_threads(1)
    for size in args.sizes:
        folder = args.work / f"student-{size}"
        if not folder.exists():
            student.prepare(SIZES[size], targets, folder, seed=0)
        opened = student.load(folder)
        opened.model.train()
        reader = stream.ShardReader(targets, dataset, "train", opened.vocabulary, opened.end_id)
        parameters = sum(p.numel() for p in opened.model.parameters())
        lines = measure(opened, reader, args.heads, args.rounds, args.bytes)
        others = [one for one in report["students"] if one["size"] != size]
        mine = {
            "size": size, "parameters": parameters, "vocabulary": len(opened.tokenizer), "text_bytes": args.bytes,
            "objectives": lines,
        }  # fmt: skip
        report["students"] = sorted([*others, mine], key=lambda one: int(one["parameters"]))
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{size} student, {parameters:,} parameters, {lines[0]['ce_seconds']:.2f} s a step with CE alone\n")
        print(
            "| objective | step over CE | loader's thread | matrix FLOPs | own parameters | peak, CE's peak |\n"
            "|---|---:|---:|---:|---:|---:|"
        )
        for x in lines:
            print(
                f"| {x['head']} | {x['overhead']:+.1%} | {x['loader']:+.1%} | {x['flops_overhead']:+.1%} | "
                f"{x['parameters']:,} | {x['peak_bytes'] / 2**20:.0f}, {x['ce_peak_bytes'] / 2**20:.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
