"""Teacher tokens per second through vLLM with and without the dump, in one run of one engine.

    python -m benchmarks.teacher_throughput --bytes 4000 --out benchmarks/results/teacher_throughput.json

Passes over the same windows, alternated `--rounds` times: prefill alone (one row wanted), prefill with path masses and
top-k for every row, vLLM's own `prompt_logprobs` with the same k, branches of the preset, and its static rows (states
known from the first round on: they are kept per teacher). Reports the median of each, how many branches and static
rows there are, and how many tokens vLLM computes for a branch: its own, and those since the last full block of the
prefix cache. For the whole teacher stage follows `teacher_bytes_per_s`: rows with masses, branches, static rows.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.teacher_presets import window_plans
from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window
from bytecache.stages.corpus.reader import CorpusReader
from bytecache.stages.engines.engine import Prompt
from bytecache.stages.lattice.lattice import STATIC_PASSES, Lattice
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.teacher.windows import WindowPlan, new_window


def vllm_prompt_logprobs(engine: Any, prompts: list[Prompt], k: int) -> None:
    """The peer: the top k of every position as vLLM returns them."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=k, flat_logprobs=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"peer{i}", {"prompt_token_ids": prompt.tokens.tolist()}, params)
    while engine.has_unfinished_requests():
        engine.step()


@contextmanager
def computed_tokens(engine: Any) -> Iterator[list[int]]:
    """Tokens computed for each request that finishes meanwhile: those of its prompt that no cached block holds."""
    seen: list[int] = []
    step = engine.step

    def counting() -> Any:
        outputs = step()
        seen.extend(len(o.prompt_token_ids) - (o.num_cached_tokens or 0) for o in outputs if o.finished)
        return outputs

    engine.step = counting
    try:
        yield seen
    finally:
        engine.step = step


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Adds how long the block takes."""
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


def passes(teacher: Teacher, plans: list[WindowPlan], times: dict[str, list[float]]) -> tuple[list[Window], int]:
    """Every pass once, its seconds to `times`; returns the windows, and the tokens computed for their branches."""
    settings, engine = teacher.settings, teacher.engine
    prompts = [plan.prompt for plan in plans]
    with timed(times["prefill"]):
        list(engine.score([p._replace(first_row=len(p.tokens) - 1, starts=p.starts[-1:]) for p in prompts]))
    with timed(times["with_dump"]):
        rows = list(engine.score(prompts))
    with timed(times["prompt_logprobs"]):
        vllm_prompt_logprobs(engine._engine, prompts, settings.top_k)  # type: ignore[attr-defined]
    windows = [new_window(plan, r) for plan, r in zip(plans, rows, strict=True)]
    with timed(times["branches"]), computed_tokens(engine._engine) as computed:  # type: ignore[attr-defined]
        teacher.branch(plans, windows, lambda: False, tau=settings.tau, depth=settings.depth)
    with timed(times["static"]):
        for _ in range(STATIC_PASSES):
            teacher.add_static(windows, lambda: False)
    return windows, sum(computed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", choices=list(st.PRESETS), default="balanced")
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    teacher = open_teacher(st.Teacher(model=args.model, preset=args.preset))
    plans = window_plans(teacher, [d.text for d in CorpusReader(st.Corpus(max_bytes=args.bytes))])
    tokens = sum(len(plan.prompt.tokens) for plan in plans)
    times: dict[str, list[float]] = {
        name: [] for name in ("prefill", "with_dump", "prompt_logprobs", "branches", "static")
    }
    for _ in range(args.rounds):
        windows, computed = passes(teacher, plans, times)
    branches = sum(int(((w.row_depth > 0) & (w.row_static == 0)).sum()) for w in windows)
    static = sum(int(w.row_static.sum()) for w in windows)
    began = time.perf_counter()
    n_bytes = sum(len(Lattice(w).targets().tail) for w in windows)
    lattice = time.perf_counter() - began
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "model": args.model,
        "tokens": tokens,
        "text_bytes": n_bytes,
        "prefill_tokens_per_s": tokens / median["prefill"],
        "with_dump_tokens_per_s": tokens / median["with_dump"],
        "vllm_prompt_logprobs_tokens_per_s": tokens / median["prompt_logprobs"],
        "preset": args.preset,
        "branches": branches,
        "branches_per_s": branches / median["branches"],
        "tokens_computed_per_branch": computed / max(1, branches),
        "static_rows": static,
        "static_rows_per_s": static / median["static"],
        "teacher_bytes_per_s": n_bytes / (median["with_dump"] + median["branches"] + median["static"]),
        "lattice_text_mb_per_s": n_bytes / lattice / 1e6,
        "entries_per_token": sum(len(w.entry_mass) for w in windows) / tokens,
        "seconds": times,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
