"""What the engine pays for keeping what it says: nothing kept, a dump part written, or converted beside it.

    OMP_NUM_THREADS=1 python -m benchmarks.targets_only --bytes 3000 --out benchmarks/results/targets_only.json

One running teacher evaluates the same slice again and again, rounds alternating: its windows are dropped (`nothing`),
coded and written as a dump part (`dump`), or handed to a process that weighs, codes and converts them (`targets`,
`teacher.keep`). Seconds of the engine's process: processor time, which neighbours change little, and wall time, in
which `targets` waits for its shard at the end (`waited`): what the next shard would not. Static rows are known before.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.texts import builtin_texts
from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window
from bytecache.stages.convert.beside import ConversionBeside
from bytecache.stages.teacher.start import with_start
from bytecache.stages.teacher.teacher import Teacher, open_teacher


class Nothing:
    """Takes windows and forgets them."""

    def append(self, window: Window) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing to end."""


def go_on() -> bool:
    return False


def ways(teacher: Teacher, piece: Path, folder: Path, beside: ConversionBeside) -> dict[str, Callable[[], float]]:
    """What each way does with a slice; returns the seconds that it waited at the end."""

    def evaluate(open_sink: Callable[[dict[str, Any]], Any]) -> None:
        teacher.evaluate_unit(piece, "key", open_sink, go_on, lambda _: None)

    def nothing() -> float:
        evaluate(lambda meta: Nothing())
        return 0.0

    def dump() -> float:
        teacher.dump_unit(piece, folder / "part.parquet", "key", go_on, lambda _: None)
        return 0.0

    def targets() -> float:
        beside.begin(folder / "shard.zarr.zip", {})
        evaluate(lambda meta: beside.part("unit", meta, teacher.settings.rounding))
        began = time.monotonic()
        beside.finish(go_on)
        return time.monotonic() - began

    return {"nothing": nothing, "dump": dump, "targets": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--bytes", type=int, default=3_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    asked = st.Teacher(model=args.model, backend="hf", preset=args.preset, sample_tokens=0)
    teacher = open_teacher(with_start(asked)[0])
    beside = ConversionBeside(st.Convert())
    spent: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = builtin_texts(args.bytes)["prose"]
        pq.write_table(pa.table({"doc_id": ["prose"], "text": [text]}), folder / "slice.parquet")
        chosen = ways(teacher, folder / "slice.parquet", folder, beside)
        for number in range(args.rounds + 1):  # the first compiles, and learns the static rows
            for way, work in chosen.items():
                wall, processor = time.monotonic(), time.process_time()
                waited = work()
                seconds = {
                    "processor_s": time.process_time() - processor,
                    "wall_s": time.monotonic() - wall,
                    "waited_s": waited,
                }
                for what, value in seconds.items() if number else ():
                    spent.setdefault(way, {}).setdefault(what, []).append(value)
    beside.close()
    teacher.close()
    result: dict[str, Any] = {
        "text_bytes": len(text.encode()),
        "preset": args.preset,
        "rounds": args.rounds,
        "ways": {},
    }
    for way, figures in spent.items():
        result["ways"][way] = {what: round(statistics.median(values), 3) for what, values in figures.items()}
    base = result["ways"]["nothing"]["processor_s"]
    for figures in result["ways"].values():
        figures["engine_speed"] = round(base / figures["processor_s"], 4)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
