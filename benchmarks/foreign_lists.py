"""What a cache of the k likeliest tokens costs against path masses, by k and kind of text.

    python -m benchmarks.foreign_lists --bytes 900 --document 900 --out benchmarks/results/foreign_lists.json

One teacher reads each text once, listing its 128 likeliest tokens beside the path masses. For each k its list becomes
byte targets by the path of `bytecache import` (`stages.foreign`) and is compared with the same teacher's reference,
which evaluates nearly every cut: KL, JSD (nats per position), leak (bits per position given to the text's own byte
beyond the reference) and tail. Three lists: `top`, the k likeliest; `marked`, those and the true token where it is not
among them, as engines return prompt log-probabilities, which the import recognises and takes off, so that the targets
are those of `top` (asserted); `told`, the same list taken at its word. Beside them the presets `fast` and `balanced`
of the teacher's own path masses. The JSON is written after every kind; a kind that it holds is not measured again.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.exactness import Remembering, documents_of, kinds_of, windows_at
from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.fidelity.divergence import divergence
from bytecache.stages.fidelity.measuring import true_symbols
from bytecache.stages.foreign.cache import Document, ForeignTeacher, Reading
from bytecache.stages.foreign.records import Record
from bytecache.stages.lattice.effort import DROPPED, REFERENCE
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import Teacher, open_teacher

KS = (8, 20, 64, 128)


class Lists:
    """The records of one text as a cache, for `ForeignTeacher`."""

    place = "lists"

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Record:
        return self.records[number]


def record_of(rows: RowMasses, tokens: np.ndarray, k: int, *, told: bool) -> Record:
    """The k likeliest tokens before every token and after the last; `told`: and the true one where it is not there."""
    counts, ids, logps = [], [], []
    for row in range(len(tokens) + 1):
        listed, logp = rows.topk_id[row, :k].astype(np.int64), rows.topk_logp[row, :k].astype(np.float64)
        if told and row < len(tokens) and tokens[row] not in listed:
            listed, logp = np.append(listed, tokens[row]), np.append(logp, float(rows.next_logp[row]))
        counts.append(len(listed))
        ids.append(listed)
        logps.append(logp)
    return Record(tokens.astype(np.int64), np.array(counts, np.int64), np.concatenate(ids), np.concatenate(logps))


def foreign_windows(teacher: Teacher, records: list[Record], k: int, always_true: bool) -> list[Window]:
    """The records as an import makes windows of them."""
    reading = Reading("of", k, always_true, 1.0, 1.0)
    foreign = ForeignTeacher(Lists(records), teacher.vocabulary, reading)  # type: ignore[arg-type]
    return [
        foreign.window(f"d{number}", number, record, Document(record.tokens, np.arange(len(record.tokens) + 1)))
        for number, record in enumerate(records)
    ]


class Figures:
    """Divergences of one list or preset from the reference, over the documents of a kind."""

    def __init__(self) -> None:
        self.values: dict[str, list[np.ndarray]] = {"kl": [], "jsd": [], "leak_bits": [], "tail": []}

    def add(self, window: Window, reference: Lattice) -> None:
        truth, targets = reference.targets(), Lattice(window).targets()
        symbol = true_symbols(reference.window)
        distances = divergence(truth.probs, truth.tail, targets.probs, targets.tail, symbol)
        joined = Lattice(reference.window).targets()
        leak = divergence(joined.probs, joined.tail, targets.probs, targets.tail, symbol).leak
        for name, value in (("kl", distances.kl), ("jsd", distances.jsd), ("leak_bits", leak), ("tail", targets.tail)):
            self.values[name].append(np.asarray(value, np.float64))

    def summary(self) -> dict[str, float]:
        return {name: float(f"{np.concatenate(values).mean():.4g}") for name, values in self.values.items()}


def measure(teacher: Teacher, text: str, size: int) -> dict[str, Any]:
    """All lists and two presets on one kind of text."""
    engine = teacher.engine
    assert isinstance(engine, Remembering)
    documents = documents_of(teacher, text, size)
    deep: list[Lattice] = []
    canonical: list[tuple[RowMasses, np.ndarray]] = []
    presets = {preset: Figures() for preset in ("fast", "balanced")}
    for number, document in enumerate(documents):
        engine.forget()
        (window,) = windows_at(teacher, document, f"d{number}", {**REFERENCE, "static": 0.0})
        deep.append(Lattice(window, drop=DROPPED))
        (rows,) = (rows for key, rows in engine.rows.items() if key[1] == "canonical")
        canonical.append((rows, np.asarray(document.ids)))
        for preset, figures in presets.items():
            (own,) = windows_at(teacher, document, f"d{number}", st.PRESETS[preset])
            figures.add(own, deep[-1])
    lists: dict[str, Any] = {preset: figures.summary() for preset, figures in presets.items()}
    listed = {k: np.mean([np.exp(rows.topk_logp[:, :k]).sum(1).mean() for rows, _ in canonical]) for k in KS}
    hits = {k: np.mean([(rows.topk_id[:-1, :k] == ids[:, None]).any(1).mean() for rows, ids in canonical]) for k in KS}
    for k in KS:
        top = [record_of(rows, ids, k, told=False) for rows, ids in canonical]
        told = [record_of(rows, ids, k, told=True) for rows, ids in canonical]
        windows = {
            "top": foreign_windows(teacher, top, k, False),
            "marked": foreign_windows(teacher, told, k, False),
            "told": foreign_windows(teacher, told, k + 1, False),
        }
        summaries = {}
        for name, those in windows.items():
            figures = Figures()
            for window, reference in zip(those, deep, strict=True):
                figures.add(window, reference)
            summaries[name] = figures.summary()
        assert summaries["marked"] == summaries["top"]
        lists[f"k{k}"] = {**summaries, "listed": float(f"{listed[k]:.4g}"), "true_listed": float(f"{hits[k]:.4g}")}
    positions = sum(len(true_symbols(reference.window)) for reference in deep)
    return {"documents": len(documents), "positions": positions, "lists": lists}


def markdown(kinds: dict[str, Any]) -> str:
    """A row per kind and list."""
    lines = [
        "| text | list | mass listed | KL | JSD | leak, bits/byte | tail | leak if the true token stays |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, result in kinds.items():
        for k in KS:
            one = result["lists"][f"k{k}"]
            top = one["top"]
            lines.append(
                f"| {kind} | top {k} | {one['listed']:.4f} | {top['kl']:.3f} | {top['jsd']:.4f} | "
                f"{top['leak_bits']:+.4f} | {top['tail']:.4f} | {one['told']['leak_bits']:+.4f} |"
            )
        for preset in ("fast", "balanced"):
            own = result["lists"][preset]
            lines.append(
                f"| {kind} | masses, `{preset}` | | {own['kl']:.3f} | {own['jsd']:.4f} | {own['leak_bits']:+.4f} | "
                f"{own['tail']:.4f} | |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--bytes", type=int, default=900, help="of each kind")
    parser.add_argument("--document", type=int, default=900, help="bytes of a document")
    parser.add_argument("--texts", type=Path, help="a folder of further .txt files")
    parser.add_argument("--kinds", nargs="*", default=["manual", "code", "scripts"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = st.Teacher(model=args.model, backend="hf", floor=1e-6, top_k=max(KS))
    teacher = open_teacher(settings)
    teacher.engine = Remembering(teacher.engine)
    facts: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine().replace('_', '-')}", "model": args.model,
        "reference": REFERENCE, "bytes": args.bytes, "kinds": {},
    }  # fmt: skip
    if args.out.is_file():
        earlier = json.loads(args.out.read_text())
        if all(earlier.get(name) == facts[name] for name in facts if name != "kinds"):
            facts["kinds"] = earlier["kinds"]
    texts = kinds_of(args.texts, args.bytes)
    for kind in args.kinds:
        if kind not in facts["kinds"]:
            facts["kinds"][kind] = measure(teacher, texts[kind], args.document)
            args.out.write_text(json.dumps(facts, indent=1) + "\n")
            print(f"{kind}: done", flush=True)
    print(markdown(facts["kinds"]))


if __name__ == "__main__":
    main()
