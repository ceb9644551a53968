"""Teacher tokens per second through vLLM with and without the dump, in one run of one engine.

    python benchmarks/teacher_throughput.py --bytes 100000 --out benchmarks/results/teacher_throughput.json

Four passes over the same windows, alternated `--rounds` times: prefill alone (one row wanted), prefill with path
masses and top-k for every row, vLLM's own `prompt_logprobs` with the same k, and branches at the given tau. Reports
the median of each.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from schemas import settings as st
from stages.corpus import CorpusReader
from stages.engines.engine import Prompt
from stages.engines.vllm_worker import Want
from stages.lattice import Lattice
from stages.teacher import open_teacher
from stages.windows import new_window, plan_windows


def vllm_prompt_logprobs(engine: Any, prompts: list[Prompt], k: int) -> None:
    """The peer: the top k of every position as vLLM returns them."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=k, flat_logprobs=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"peer{i}", {"prompt_token_ids": prompt.tokens.tolist()}, params)
    while engine.has_unfinished_requests():
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tau", type=float, default=0.1)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = st.Teacher(model=args.model, tau=args.tau, depth=1)
    teacher = open_teacher(settings)
    texts = [d.text for d in CorpusReader(st.Corpus(max_bytes=args.bytes))]
    plans = [
        plan
        for i, encoded in enumerate(teacher.vocabulary.encode_batch(texts))
        for plan in plan_windows(
            str(i), i, encoded, start_id=teacher.vocabulary.start_id, context=settings.context, overlap=settings.overlap
        )
    ]
    prompts = [plan.prompt for plan in plans]
    tokens = sum(len(p.tokens) for p in prompts)
    times: dict[str, list[float]] = {"prefill": [], "with_dump": [], "prompt_logprobs": [], "branches": []}
    branches = 0
    for _ in range(args.rounds):
        began = time.perf_counter()
        nothing = [Want(p.tokens, len(p.tokens) - 1, p.text, p.starts[-1:], "") for p in prompts]
        list(teacher.engine._run(nothing, reuse_prefix=False))
        times["prefill"].append(time.perf_counter() - began)
        began = time.perf_counter()
        rows = list(teacher.engine.score(prompts))
        times["with_dump"].append(time.perf_counter() - began)
        began = time.perf_counter()
        vllm_prompt_logprobs(teacher.engine._engine, prompts, settings.top_k)
        times["prompt_logprobs"].append(time.perf_counter() - began)
        windows = [new_window(plan, r) for plan, r in zip(plans, rows, strict=True)]
        began = time.perf_counter()
        branches = teacher.branch(plans, windows, lambda: False)
        times["branches"].append(time.perf_counter() - began)
    began = time.perf_counter()
    n_bytes = sum(len(Lattice(w).targets().tail) for w in windows)
    lattice = time.perf_counter() - began
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": args.model,
        "tokens": tokens,
        "text_bytes": n_bytes,
        "prefill_tokens_per_s": tokens / median["prefill"],
        "with_dump_tokens_per_s": tokens / median["with_dump"],
        "vllm_prompt_logprobs_tokens_per_s": tokens / median["prompt_logprobs"],
        "branches": branches,
        "branches_per_s": branches / median["branches"],
        "lattice_text_mb_per_s": n_bytes / lattice / 1e6,
        "entries_per_token": sum(len(w.entry_mass) for w in windows) / tokens,
        "seconds": times,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
