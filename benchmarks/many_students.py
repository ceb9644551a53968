"""One cache for many students, or a teacher in every step: processor seconds of both ways to the same training.

    python -m benchmarks.transfer_texts CORPORA TEXTS
    OMP_NUM_THREADS=1 python -m benchmarks.many_students --texts TEXTS/corpus.jsonl --gpt2 GPT2FOLDER --work WORK
        --out benchmarks/results/many_students.json [--each 2] [--epochs 2]
    python -m benchmarks.many_students_tables benchmarks/results/many_students.json

SmolLM2-135M-Instruct gets GPT-2's tokenizer, a BPE of 2,048 and bytes, and is taught by its former self. A step is one
whole training passage of `transfer_texts`, of about a kilobyte, read from its start in both ways; the first `--each` of
every kind are read `--epochs` times.

    cache   the teacher reads the passages once, as one unit (`teacher`: a dump part); `convert` makes the shard; each
            student's steps read that
    live    in each step the same engine at the same preset evaluates the step's passage, and the lattice makes its
            targets, which go to a copy of the student; no dump is written

Both copies take their steps in turns, so that what else the machine does slows both. The live way too writes and reads
a shard, since the loader knows nothing else: these seconds (`codec`) are listed and not counted. The unit is captured
before every student and once more at the end, and the median counts. A reading before all others compiles what is
compiled and learns the teacher's static rows, which both ways then have. A run that is stopped goes on.

`distance` compares the targets of both ways as students read them. A shard of one passage lists other symbols than one
of them all, so `coding` is the same distance between two shards of one dump, all passages in one and each in its own.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.count_targets import write_texts
from benchmarks.many_students_tables import report
from benchmarks.student_gain import MARGINAL
from benchmarks.transfer_study import keep_as_cast, learn
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import ShardEntry, read_dataset, write_dataset
from bytecache.schemas.dump.parquet import read_meta, read_windows
from bytecache.schemas.files import file_sha256, write_text
from bytecache.schemas.shard.reader import ByteShard, read_shard
from bytecache.stages.convert.convert import Conversion, convert_units
from bytecache.stages.student import student
from bytecache.stages.teacher.start import with_start
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.train.batches import packing, stream
from bytecache.stages.train.batches.token_shard import TokenShard, tokenise
from bytecache.stages.train.batches.types import Step
from bytecache.stages.train.run import Run, start_run

Found = dict[str, Any]
TOKENIZER_TEXTS = 30
"""Passages of each kind that the BPE is trained on."""
CONVERT = st.Convert(precision="precise")


def go_on() -> bool:
    return False


class Clock:
    """Processor seconds of this process by part, all of its threads together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.process_time() - began, 3)


@dataclass
class Texts:
    """Passages of the unit, name and text, and further ones for a tokenizer to be trained on."""

    unit: list[tuple[str, str]]
    further: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, each: int) -> "Texts":
        """The first `each` training passages of every kind, and `TOKENIZER_TEXTS`."""
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found = {line["id"]: line["text"] for line in lines if line["id"].split()[1] == "train"}
        names = sorted(found, key=lambda name: (int(name.split()[2]), name.split()[0]))

        def first(most: int) -> list[tuple[str, str]]:
            return [(name, found[name]) for name in names if int(name.split()[2]) < most]

        return cls(first(each), first(TOKENIZER_TEXTS))

    @property
    def n_bytes(self) -> int:
        return sum(len(text.encode()) for _, text in self.unit)


# --- the cache ---


def capture(teacher: Teacher, texts: Texts, folder: Path) -> tuple[Path, Found]:
    """The unit as a data set in `folder`, made anew; what it took, and the sizes of what it wrote."""
    clock = Clock()
    folder.mkdir(parents=True, exist_ok=True)
    names, bodies = zip(*texts.unit, strict=True)
    pq.write_table(pa.table({"doc_id": names, "text": bodies}), folder / "slice.parquet")
    part, shard = folder / "part.parquet", folder / f"train-00000-{'0' * 12}.zarr.zip"
    part.unlink(missing_ok=True)
    shard.unlink(missing_ok=True)
    with clock.part("teacher"):
        teacher.dump_unit(folder / "slice.parquet", part, "unit", go_on, lambda _: None)
    with clock.part("convert"):
        counts = convert_units([part], shard, CONVERT, {}, go_on, lambda _: None)
    known = {name: count for name, count in counts.items() if name in ShardEntry.model_fields}
    identity = {"file": shard.name, "split": "train", "sha256": file_sha256(shard), "size": shard.stat().st_size}
    write_dataset(folder, [ShardEntry(**{**known, **identity, "key": "00" * 32})], {})
    sizes = {"dump_bytes": part.stat().st_size, "shard_bytes": identity["size"]}
    return shard, {**clock.seconds, **sizes}


# --- the teacher in the step ---


def evaluate(teacher: Teacher, name: str, text: str, path: Path, clock: Clock) -> ByteShard:
    """One passage's targets, by an engine that goes on from the step before; `path`: of a shard, made anew."""
    with clock.part("engine"):
        documents = [(name, 0, teacher.vocabulary.encode(text))]
        windows = [window for group in teacher.windows(documents, go_on) for window in group]
    with clock.part("lattice"):
        conversion = Conversion(CONVERT, go_on, lambda _: None)
        conversion.begin_part("live", {"teacher": teacher.identity(), "kind": "text", "ends": True})
        for window in windows:
            conversion.add(window)
        conversion.end_part()
    with clock.part("codec"):
        path.unlink(missing_ok=True)
        conversion.write(path, {})
        shard = read_shard(path)
    return shard


def distance(live: ByteShard, cache: ByteShard, at: int) -> Found:
    """KL(cache || live) in nats, summed over positions, and the largest difference of a probability.

    at: where the passage begins in the cache's shard. What either leaves unlisted is spread over all symbols.
    """
    size = len(live)
    one, other = (
        np.asarray(shard.dense(lo, lo + size, spread_tail=True), np.float64) for shard, lo in ((live, 0), (cache, at))
    )
    nats = np.where(other > 0, other * (np.log(other.clip(1e-30)) - np.log(one.clip(1e-30))), 0).sum()
    return {"positions": size, "kl": float(nats), "largest": float(np.abs(one - other).max())}


def coding_distance(folder: Path) -> float:
    """KL per position between a captured unit's shard and shards of each passage alone, of the same dump."""
    meta, windows = read_meta(folder / "part.parquet"), list(read_windows(folder / "part.parquet", top_k=False))
    whole, path = read_shard(next(folder.glob("train-*.zarr.zip"))), folder / "live.zarr.zip"
    nats = 0.0
    for name, lo in zip(whole.doc_id, whole.doc_start[:-1], strict=True):
        conversion = Conversion(CONVERT, go_on, lambda _: None)
        conversion.begin_part("unit", meta)
        for window in windows:
            if window.doc_id == name:
                conversion.add(window)
        path.unlink(missing_ok=True)
        conversion.write(path, {})
        nats += distance(read_shard(path), whole, int(lo))["kl"]
    return nats / len(whole)


# --- the students ---


def settings_of(steps: int, dtype: str, lora: int) -> st.Train:
    """The `[train]` section of both ways."""
    return st.Train(
        steps=steps, learning_rate=2e-3, embedding_rate=0.15, warmup=2, dtype=dtype, tensorboard=False,
        lora_rank=lora, lora_embeddings=True, **MARGINAL,
    )  # fmt: skip


def prepared(args: argparse.Namespace, texts: Texts, tokenizer: str) -> Path:
    """The model under a tokenizer, before training."""
    plain: Path = args.work / "plain"
    if not plain.exists():
        write_texts({"train": {name: text.encode() for name, text in texts.further}}, plain)
    folder: Path = args.work / f"student-{label(tokenizer)}"
    if not folder.exists():
        student.prepare(st.Student(model=args.student, tokenizer=tokenizer), plain, folder, seed=0)
    return folder


def label(tokenizer: str) -> str:
    """Of a tokenizer, for folders and results."""
    return Path(tokenizer).name.replace(":", "-")


def begin(before: student.Student, settings: st.Train, targets: Path) -> Run:
    """A copy of the student at its first step."""
    opened = replace(before, model=copy.deepcopy(before.model))
    reader = stream.ShardReader(targets, read_dataset(targets), "train", opened.vocabulary, opened.end_id)
    run = start_run(opened, settings, 0, torch.device("cpu"), reader=reader)
    if settings.dtype == "bfloat16":
        keep_as_cast(opened.model)
    return run


def step_of(run: Run, source: TokenShard, number: int, lo: int, hi: int) -> Step:
    """The step that reads positions [lo, hi) of a shard."""
    opened, objective = run.student, run.objective
    micro = [
        packing.pack(stream.collate(rows, with_targets=True, byte_reduction="sum", limit=objective.term.slots))
        for rows in stream.group(stream.cut(source, lo, hi, opened.max_tokens))
    ]
    return Step(number, micro, {})


def measure_student(
    teacher: Teacher, texts: Texts, shard_path: Path, before: student.Student, settings: st.Train, epochs: int
) -> Found:
    """The seconds of every step of both ways, in turns, and how alike they are."""
    targets = shard_path.parent
    runs = {way: begin(before, settings, targets) for way in ("cache", "live")}
    clock = Clock()
    with clock.part("read"):
        shard = read_shard(shard_path)
        source = tokenise(shard, before.vocabulary, before.end_id)
    steps: list[Found] = []
    apart: list[Found] = []
    starts = {name: int(lo) for name, lo in zip(shard.doc_id, shard.doc_start[:-1], strict=True)}
    for number in range(epochs * len(texts.unit)):
        name, text = texts.unit[number % len(texts.unit)]
        size = len(text.encode()) + 1
        lo = starts[name]
        record: Found = {}
        for way in ("cache", "live") if number % 2 else ("live", "cache"):
            clock_of_step = Clock()
            if way == "live":
                evaluated = evaluate(teacher, name, text, targets / "live.zarr.zip", clock_of_step)
                apart += [distance(evaluated, shard, lo)] if number < len(texts.unit) else []
                with clock_of_step.part("read"):
                    tokens = tokenise(evaluated, before.vocabulary, before.end_id)
                    step = step_of(runs[way], tokens, number, 0, size)
            else:
                with clock_of_step.part("read"):
                    step = step_of(runs[way], source, number, lo, lo + size)
            with clock_of_step.part("train"):
                learned = learn(runs[way], step, number, settings, 0)
            record[way] = {**clock_of_step.seconds, "bits": round(learned["bits"], 5), "bytes": learned["bytes"]}
        steps.append(record)
        print(json.dumps({"step": number + 1, **record}), flush=True)
    positions = sum(one["positions"] for one in apart)
    return {
        "load": clock.seconds["read"], "steps": steps,
        "distance": {
            "kl_per_byte": sum(one["kl"] for one in apart) / positions,
            "largest": max(one["largest"] for one in apart),
            "bits": max(abs(one["cache"]["bits"] - one["live"]["bits"]) for one in steps),
        },
    }  # fmt: skip


def results(args: argparse.Namespace, texts: Texts) -> Found:
    """The file of results so far. Raises SystemExit where it is of another study."""
    settings = {key: getattr(args, key) for key in ("student", "preset", "dtype", "epochs", "lora")}
    begun: Found = {
        "machine": "2 cores, x86-64 with AMX, one thread, other programs beside it", **settings,
        "passages": len(texts.unit), "text_bytes": texts.n_bytes, "captures": [], "students": {},
    }  # fmt: skip
    found: Found = json.loads(args.out.read_text()) if args.out.is_file() else begun
    other = [key for key in (*settings, "passages", "text_bytes") if found[key] != begun[key]]
    if other:
        raise SystemExit(f"{args.out}: of another {', '.join(other)}; name another --out")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="corpus.jsonl of `transfer_texts`")
    parser.add_argument("--gpt2", required=True, help="folder of GPT-2's tokenizer")
    parser.add_argument("--tokenizers", nargs="+", help="in the place of the three")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=2, help="passages of each kind")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--student", default="builtin:smollm2-135m-instruct", help="and teacher")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--lora", type=int, default=16)
    args = parser.parse_args()
    texts = Texts.read(args.texts, args.each)
    found = results(args, texts)
    asked = st.Teacher(
        model=args.student, backend="hf", preset=args.preset, dtype=args.dtype, top_k=64, sample_tokens=0
    )
    teacher = open_teacher(with_start(asked)[0])
    capture(teacher, texts, args.work / "warm")
    for tokenizer in args.tokenizers or [args.gpt2, "bpe:2048", "bytes"]:
        if label(tokenizer) in found["students"]:
            continue
        before = student.load(prepared(args, texts, tokenizer))
        packing.check(before)
        shard, taken = capture(teacher, texts, args.work / "unit")
        settings = settings_of(args.epochs * len(texts.unit), args.dtype, args.lora)
        found["students"][label(tokenizer)] = measure_student(teacher, texts, shard, before, settings, args.epochs)
        found["captures"].append(taken)
        write_text(args.out, json.dumps(found) + "\n")
    found["captures"].append(capture(teacher, texts, args.work / "unit")[1])
    teacher.close()
    found["coding"] = coding_distance(args.work / "unit")
    write_text(args.out, json.dumps(found) + "\n")
    print(report(args.out))


if __name__ == "__main__":
    main()
