"""What the presets cost beside plain prefill, in one run of one engine, and where the engine's thread spends its time.

    OMP_NUM_THREADS=1 python -m benchmarks.teacher_presets --bytes 4000 --out benchmarks/results/teacher_presets.json

Passes over the same windows: prefill alone (one row wanted of each window), prefill with all rows (the head and the
sums, no branches), then every preset as the teacher stage runs it: canonical rows, branches, static rows, rounds
alternating. Static states are kept per teacher: those that are not known are made while all clocks stand. Seconds are
the process's CPU time, so that a busy machine does not change them much; the engine runs in this process, on one
thread where OMP_NUM_THREADS=1. `per row` counts a preset's rows (windows, branches; static rows aside) as if each
were one token of prefill; of a model whose head is a fifth of its work no preset can reach 1, and
`of_all_rows_per_row` compares with prefill that gives every row. The host's part is what is left of the engine's
thread when the model's layers, its head and the sums over the vocabulary are taken away: vLLM's scheduler, this
project's own Python; and the lattice, where no thread beside takes it (`--threads 0`).
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.spans import DEVICE_PARTS, Spans, attach
from bytecache.schemas import settings as st
from bytecache.stages.corpus.reader import CorpusReader
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.teacher.windows import WindowPlan, plan_windows
from bytecache.stages.tokens.vocab import Encoded


class Clocks:
    """Wall, process and engine thread, seconds; and what of them went aside."""

    def __init__(self, teacher: Teacher, spans: Spans) -> None:
        """Static states of `teacher` are made aside from now on."""
        self.spans, self.aside = spans, np.zeros(3)
        name = "_ask_states" if hasattr(teacher.engine, "_ask_states") else "_states"
        original = getattr(teacher.engine, name)

        def made_aside(*args: Any) -> Any:
            began, seconds, calls = self._now(), dict(spans.seconds), dict(spans.calls)
            states = original(*args)
            self.aside += self._now() - began
            spans.seconds, spans.calls = seconds, calls
            return states

        setattr(teacher.engine, name, made_aside)

    def _now(self) -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time(), time.thread_time()])

    def read(self) -> np.ndarray:
        """What they show."""
        return self._now() - self.aside


@contextmanager
def measured(clocks: Clocks) -> Iterator[dict[str, Any]]:
    """CPU seconds of a block, and how they divide."""
    spans = clocks.spans
    spans.forget()
    spent: dict[str, Any] = {}
    began, aside = clocks.read(), clocks.aside.copy()
    yield spent
    took = (clocks.read() - began).tolist()
    spent["wall"], spent["seconds"], spent["engine_thread"] = took
    spent["static_states"] = float((clocks.aside - aside)[1])
    parts = {name: spans.seconds.get(name, 0.0) for name in DEVICE_PARTS}
    spent |= parts
    spent["head_products"] = spans.calls.get("head", 0)
    spent["host"] = spent["engine_thread"] - sum(parts.values())
    beside = {name: seconds for name, seconds in sorted(spans.seconds.items()) if name not in DEVICE_PARTS}
    spent["host_parts"] = beside | {"else": spent["host"] - sum(beside.values())}


class Effort(NamedTuple):
    """See `[teacher]`; -1: the preset's."""

    tau: float = -1
    depth: int = -1
    static: float = -1


AS_PRESET = Effort()


def prefill(teacher: Teacher, plans: list[WindowPlan], *, all_rows: bool) -> None:
    """All rows of each window, or the last one alone."""
    teacher.engine.forget()
    prompts = [plan.prompt for plan in plans]
    last = [p._replace(first_row=len(p.tokens) - 1, starts=p.starts[-1:]) for p in prompts]
    for _ in teacher.engine.score(prompts if all_rows else last):
        pass


def whole(teacher: Teacher, plans: list[WindowPlan], preset: str, effort: Effort = AS_PRESET) -> dict[str, float]:
    """The windows as the stage makes them; returns what was evaluated. `effort`: in the place of the preset's."""
    engine: Any = teacher.engine
    computed = getattr(engine, "branch_tokens", 0)  # transformers' engine does not count them
    settings = teacher.settings.model_copy(update={"preset": preset, **effort._asdict()})
    teacher.settings = settings.resolved()
    teacher.engine.forget()
    windows = teacher.evaluate(plans)
    static = sum(int(window.row_static.sum()) for window in windows)
    canonical = sum(int((window.row_depth == 0).sum()) for window in windows)
    rows = sum(len(window.row_depth) for window in windows)
    branches = rows - canonical - static
    each = (getattr(engine, "branch_tokens", 0) - computed) / max(1, branches)
    return {"rows": canonical, "branches": branches, "static_rows": static, "tokens_per_branch": each}


def deepened(model: str, times: int, work: Path) -> str:
    """A checkpoint in `work` of the same distributions whose layers are `times` as many.

    What is added computes and adds nothing: its output projections are zero. So a small model's text is measured with
    a large model's proportion of layers to head.
    """
    folder = resolve_model(st.Teacher(model=model))
    work.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in (".json", ".txt", ".model"):
            (work / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    count = config["num_hidden_layers"]
    weights = load_file(folder / "model.safetensors")
    for name, tensor in list(weights.items()):
        if match := re.match(r"model\.layers\.(\d+)\.(.*)", name):
            for copy in range(1, times):
                adds = match[2] in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
                number = int(match[1]) + copy * count
                weights[f"model.layers.{number}.{match[2]}"] = torch.zeros_like(tensor) if adds else tensor.clone()
    save_file(weights, work / "model.safetensors", {"format": "pt"})
    (work / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count * times}))
    return str(work)


@contextmanager
def branches_as_requests(teacher: Teacher) -> Iterator[None]:
    """As it was before branches ran over the blocks of their windows, and is where a model does not let them."""
    engine: Any = teacher.engine
    blocks, engine._blocks = engine._blocks, None
    yield
    engine._blocks = blocks


def some_text(most: int) -> list[str]:
    """Documents of the default corpus, the last one cut at `most` bytes in all."""
    texts: list[str] = []
    for document in CorpusReader(st.Corpus(max_bytes=most)):
        texts.append(document.text.encode()[:most].decode(errors="ignore"))
        most -= len(texts[-1].encode())
        if most <= 0:
            break
    return texts


def _median(rounds: list[Any]) -> Any:
    """Of numbers, or of each part of some dictionaries."""
    if not isinstance(rounds[0], dict):
        return statistics.median(rounds)
    parts = {part for one in rounds for part in one}
    return {part: statistics.median(one.get(part, 0.0) for one in rounds) for part in sorted(parts)}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--backend", choices=["vllm", "hf"], default="vllm")
    parser.add_argument(
        "--requests", choices=list(st.PRESETS), help="measure a preset with a request for each branch too"
    )
    parser.add_argument(
        "--effort", nargs=3, type=float, metavar=("TAU", "DEPTH", "STATIC"), help="measure one more, of an older preset"
    )
    parser.add_argument("--presets", default=",".join(st.PRESETS))
    parser.add_argument(
        "--states", choices=["only", "known"], help="only make the static states; or no untimed pass before the others"
    )
    parser.add_argument(
        "--deepen", nargs=2, metavar=("TIMES", "FOLDER"), help="so many times the layers, which add nothing"
    )
    parser.add_argument("--threads", type=int, default=1, help="for lattices, beside the engine's")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def window_plans(teacher: Teacher, texts: list[str]) -> list[WindowPlan]:
    """The windows of some documents."""
    settings, start_id = teacher.settings, teacher.vocabulary.start_id
    return [
        plan
        for i, encoded in enumerate(teacher.vocabulary.encode_batch(texts))
        if isinstance(encoded, Encoded)
        for plan in plan_windows(
            str(i), i, encoded, start_id=start_id, context=settings.context, overlap=settings.overlap
        )
    ]


def passes(
    teacher: Teacher, plans: list[WindowPlan], clocks: Clocks, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pass once: its name, and what it spent."""
    for name in ("prefill", "all_rows"):
        with measured(clocks) as spent:
            prefill(teacher, plans, all_rows=name == "all_rows")
        yield name, spent
    for preset in args.presets.split(","):
        with measured(clocks) as spent:
            counts = whole(teacher, plans, preset)
        yield preset, spent | counts
    if args.effort:
        with measured(clocks) as spent:
            counts = whole(teacher, plans, "balanced", Effort(args.effort[0], int(args.effort[1]), args.effort[2]))
        yield "given effort", spent | counts
    if args.requests:
        teacher.engine.forget()
        with branches_as_requests(teacher), measured(clocks) as spent:
            counts = whole(teacher, plans, args.requests)
        yield f"{args.requests}, branches as requests", spent | counts


def with_rates(one: dict[str, Any], speeds: tuple[float, float], tokens: int, text_bytes: int) -> dict[str, Any]:
    """A pass and its speed, beside those of prefill with the last row and with all of them, tokens/s."""
    speed, with_rows = speeds
    rows, seconds = one.get("rows", tokens) + one.get("branches", 0), one["seconds"]
    rates = {
        "tokens_per_s": tokens / seconds, "of_prefill": tokens / seconds / speed,
        "of_prefill_per_row": rows / seconds / speed, "of_all_rows_per_row": rows / seconds / with_rows,
        "text_bytes_per_s": text_bytes / seconds, "host_us_per_row": one["host"] / rows * 1e6,
    }  # fmt: skip
    parts = one["host_parts"].items()
    parts_per_row = {part: round(of_part / rows * 1e6, 2) for part, of_part in parts}
    kept = {name: value for name, value in one.items() if name != "host_parts"}
    return kept | rates | {"host_parts_us_per_row": parts_per_row}


def main() -> None:
    """Measure and print."""
    args = parsed()
    model = deepened(args.model, int(args.deepen[0]), Path(args.deepen[1])) if args.deepen else args.model
    teacher = open_teacher(st.Teacher(model=model, preset="exact", backend=args.backend))
    teacher.pool = ThreadPoolExecutor(args.threads) if args.threads else None
    spans = Spans()
    attach(teacher, spans)
    clocks = Clocks(teacher, spans)
    plans = window_plans(teacher, some_text(args.bytes))
    tokens = sum(len(plan.prompt.tokens) for plan in plans)
    text_bytes = sum(len(plan.prompt.text) - plan.score_start for plan in plans)
    presets = args.presets.split(",")
    for preset in presets[:1] if args.states == "known" else presets:
        whole(teacher, plans[:1] if args.states == "known" else plans, preset)  # all loops are compiled
        teacher.save_static()
    if args.states == "only":
        return
    rounds_of: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for name, spent in passes(teacher, plans, clocks, args):
            rounds_of.setdefault(name, []).append(spent)
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}; {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "model": args.model, "windows": len(plans), "tokens": tokens, "text_bytes": text_bytes,
        "threads_beside": args.threads, "layers_times": int(args.deepen[0]) if args.deepen else 1,
    }  # fmt: skip
    medians = {
        name: {key: _median([spent[key] for spent in rounds]) for key in rounds[0]}
        for name, rounds in rounds_of.items()
    }
    speeds = tokens / medians["prefill"]["seconds"], tokens / medians["all_rows"]["seconds"]
    result |= {name: with_rates(one, speeds, tokens, text_bytes) for name, one in medians.items()}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
