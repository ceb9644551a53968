"""What every preset costs and how far it is from the teacher, by kind of text.

    python -m benchmarks.exactness --out benchmarks/results/exactness.json
    python -m benchmarks.exactness --model builtin:gemma-3-270m --kinds manual code scripts --out ...
    python -m benchmarks.exactness --texts FOLDER --kinds novel udhr --out ...

For each kind `--bytes` of text in documents of `--document` bytes, evaluated at every preset and at the certificate's
reference effort, which joins nothing and has no static rows. Given per kind and preset: evaluated rows and static rows
per canonical token, KL, JSD (nats per position) and leak (bits per position) against the reference, p99 and greatest of
the KL, and the bound that needs no reference (stages.fidelity.bound). What storing adds is not in it
(benchmarks/rate_distortion.py).

Texts come from Python itself, and with `--texts` from a folder of .txt files, a kind each. Rows that one effort asked
for are remembered for the next, so that the presets cost little beside the reference. The JSON is written after every
kind; a kind that it holds already is not measured again.
"""

import argparse
import ast
import inspect
import json
import os
import platform
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.texts import builtin_texts, clip, encyclopedia_leads, folder_texts, multilingual_text
from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window
from bytecache.stages.engines.engine import Branch, Engine, Prompt
from bytecache.stages.engines.paths import RowMasses, concatenate, take
from bytecache.stages.engines.static import StaticJob
from bytecache.stages.fidelity.bound import Bound
from bytecache.stages.fidelity.certificate import true_symbols
from bytecache.stages.fidelity.divergence import divergence
from bytecache.stages.lattice.effort import DROPPED, REFERENCE
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.tokens.chat import Template, encode_answer
from bytecache.stages.tokens.vocab import Encoded, Misfit


class Remembering(Engine):
    """An engine whose rows are computed once, however many efforts ask for them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: dict[Any, RowMasses] = {}

    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        for prompt in prompts:
            key = (prompt.name, "canonical")
            if key not in self.rows:
                (self.rows[key],) = self.engine.score([prompt])
            yield self.rows[key]

    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        for prompt, branches in jobs:
            keys = [(prompt.name, branch.anchor, branch.chain) for branch in branches]
            new = [i for i, key in enumerate(keys) if key not in self.rows]
            if new:
                (rows,) = self.engine.score_branches([(prompt, [branches[i] for i in new])])
                self._keep([keys[i] for i in new], rows)
            yield concatenate([self.rows[key] for key in keys])

    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        for job in jobs:
            keys = [(job.name, "static", *end) for end in zip(job.token.tolist(), job.start.tolist(), strict=True)]
            new = [i for i, key in enumerate(keys) if key not in self.rows]
            if new:
                (rows,) = self.engine.score_static([job._replace(token=job.token[new], start=job.start[new])])
                self._keep([keys[i] for i in new], rows)
            yield concatenate([self.rows[key] for key in keys])

    def load_static(self, folder: Path) -> None:
        self.engine.load_static(folder)

    def save_static(self, folder: Path) -> None:
        self.engine.save_static(folder)

    def forget(self) -> None:
        self.rows = {}
        self.engine.forget()

    def _keep(self, keys: list[Any], rows: RowMasses) -> None:
        for i, key in enumerate(keys):
            self.rows[key] = take(rows, np.array([i]))


def tables(limit: int) -> str:
    """Records as indented JSON and as Markdown tables, in turn."""
    draw = random.Random(14)
    words = ["north", "river", "copper", "station", "lamp", "garden", "winter", "signal", "harbour", "paper", "valley"]
    pieces: list[str] = []
    while sum(map(len, pieces)) < limit:
        records: list[dict[str, Any]] = [
            {
                "id": draw.randrange(10_000), "name": f"{draw.choice(words)}-{draw.choice(words)}",
                "active": draw.random() < 0.5, "tags": draw.sample(words, 2),
                "size": {"width": draw.randrange(1, 400), "height": round(draw.random() * 90, 2)},
            }
            for _ in range(4)
        ]  # fmt: skip
        pieces.append(json.dumps(records, indent=2) + "\n\n")
        rows = [
            f"| {r['id']} | {r['name']} | {'yes' if r['active'] else 'no'} | {' '.join(r['tags'])} |" for r in records
        ]
        pieces.append("\n".join(["| id | name | active | tags |", "|---:|---|---|---|", *rows]) + "\n\n")
    return "".join(pieces)


def numbers(limit: int) -> str:
    """A ledger: dates, times, amounts, long numbers, phone numbers, contractions between them."""
    draw = random.Random(41)
    lines: list[str] = []
    while sum(map(len, lines)) < limit:
        day, amount = draw.randrange(1, 29), draw.randrange(1, 10_000_000)
        lines += [
            f"{2000 + draw.randrange(30)}-{draw.randrange(1, 13):02d}-{day:02d} {draw.randrange(24):02d}:"
            f"{draw.randrange(60):02d}  {amount:>12,}  {amount / 7:.2f} EUR\n",
            f"On {day} March {1900 + draw.randrange(120)} it wasn't {amount}; that's {draw.randrange(1, 100)}% of "
            f"{amount * 13}, or {draw.random() * 1e-3:.3e}.\n",
            f"Tel. +44 {draw.randrange(1000, 9999)} {draw.randrange(100_000, 999_999)}, ext. {draw.randrange(100)}\n\n",
        ]
    return "".join(lines)


def deep_code(limit: int) -> str:
    """Source with deep indentation: classes and methods of the standard library."""
    return clip(
        "\n\n".join(inspect.getsource(module)[20_000 : 20_000 + limit // 2] for module in (tarfile, ast)), limit
    )


def kinds_of(folder: Path | None, limit: int) -> dict[str, str]:
    """Kind -> text of about `limit` bytes."""
    builtin = builtin_texts(limit)
    texts = {"manual": builtin["prose"], "code": deep_code(limit), "tables": tables(limit), "numbers": numbers(limit)}
    texts["scripts"] = multilingual_text(limit)
    if leads := encyclopedia_leads("en-us"):
        texts["encyclopedia"] = clip("\n\n".join(leads[700:1100:10]), limit)
    if folder:
        texts |= folder_texts(folder, limit)
    return {kind: clip(text, limit) for kind, text in texts.items() if text}


def documents_of(teacher: Teacher, text: str, size: int) -> list[Encoded]:
    """The text in documents of about `size` bytes that end at a line break."""
    pieces, rest = [], text
    while rest:
        piece = clip(rest, size)
        cut = piece.rfind("\n") + 1
        piece = piece[:cut] if cut > 0 and len(piece) < len(rest) else piece
        pieces.append(piece)
        rest = rest[len(piece) :]
    encoded = teacher.vocabulary.encode_batch([piece for piece in pieces if piece.strip()])
    return [document for document in encoded if not isinstance(document, Misfit)]


def answers_of(teacher: Teacher, limit: int) -> list[Encoded]:
    """Answers in the teacher's chat template: what Python's manual says of its topics, one topic an answer."""
    from pydoc_data.topics import topics

    template = Template.open(resolve_model(teacher.settings), teacher.vocabulary, setting="teacher.model")
    found, size = [], 0
    for name in sorted(topics):
        paragraphs = topics[name].partition("\n\n")[2].strip()
        answer = clip(paragraphs, 900).rpartition("\n")[0].strip() or paragraphs[:300]
        question = [{"role": "user", "content": f"What should I know about {name!r} in Python?"}]
        encoded = encode_answer(teacher.vocabulary, template, json.dumps(question), answer)
        if isinstance(encoded, Misfit):
            continue
        found.append(encoded)
        size += len(answer)
        if size >= limit:
            break
    return found


def windows_at(teacher: Teacher, document: Encoded, name: str, effort: dict[str, float]) -> list[Window]:
    """The windows of one document at an effort: tau, depth, static."""
    teacher.settings = teacher.settings.model_copy(update=effort)
    return [window for group in teacher.windows([(name, 0, document)]) for window in group]


class Figures:
    """Of one kind and preset, over its documents."""

    def __init__(self) -> None:
        self.divergence: dict[str, list[np.ndarray]] = {"kl": [], "jsd": [], "leak": []}
        self.rows = self.static = self.canonical = 0
        self.bound = Bound()

    def add(self, window: Window, reference: Lattice) -> None:
        lattice = Lattice(window)
        truth, targets = reference.targets(), lattice.targets()
        symbol = true_symbols(window)
        found = divergence(truth.probs, truth.tail, targets.probs, targets.tail, symbol)
        # As in the certificate: a history too light for the reference may be the one that foresaw a rare byte.
        joined = Lattice(reference.window).targets()
        leak = divergence(joined.probs, joined.tail, targets.probs, targets.tail, symbol).leak
        for name, values in self.divergence.items():
            values.append(leak if name == "leak" else getattr(found, name))
        self.rows += int((window.row_static == 0).sum())
        self.static += int(window.row_static.sum())
        self.canonical += int((window.row_depth == 0).sum())
        self.bound.add(lattice)

    def summary(self) -> dict[str, Any]:
        kl, jsd, leak = (np.concatenate(values) for values in self.divergence.values())
        bound = self.bound.summary() or {}
        figures = {
            "rows_per_token": self.rows / self.canonical, "static_per_token": self.static / self.canonical,
            "kl": kl.mean(), "kl_p99": np.quantile(kl, 0.99), "kl_max": kl.max(), "jsd": jsd.mean(),
            "leak_bits": leak.mean(), "bound_nats": bound["nats"]["mean"], "bound_nats_p99": bound["nats"]["p99"],
            "bound_jsd": bound["jsd"], "bound_leak_bits": bound["leak"], "joined": bound["joined"]["mean"],
            "static": bound["static"]["mean"], "nowhere": bound["nowhere"]["mean"], "tail": bound["tail"]["mean"],
        }  # fmt: skip
        return {name: float(f"{value:.5g}") for name, value in figures.items()}


def measure(teacher: Teacher, documents: list[Encoded]) -> dict[str, Any]:
    """All presets on one kind of text."""
    figures = {preset: Figures() for preset in st.PRESETS}
    positions = tokens = rows = 0
    missed: list[np.ndarray] = []
    for number, document in enumerate(documents):
        name = f"d{number}"
        teacher.engine.forget()
        deep = [Lattice(w, drop=DROPPED) for w in windows_at(teacher, document, name, {**REFERENCE, "static": 0.0})]
        for preset, effort in st.PRESETS.items():
            for window, reference in zip(windows_at(teacher, document, name, effort), deep, strict=True):
                figures[preset].add(window, reference)
        for reference in deep:
            positions += len(true_symbols(reference.window))
            tokens += int((reference.window.row_depth == 0).sum())
            rows += len(reference.window.row_start)
            missed.append(reference.handed().total)
    return {
        "documents": len(documents), "positions": positions, "tokens": tokens,
        "reference_rows_per_token": round(rows / tokens, 3), "missed": float(f"{np.concatenate(missed).mean():.3g}"),
        "presets": {preset: found.summary() for preset, found in figures.items()},
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """One row per preset and kind."""
    lines = [
        "| preset | text | rows per token | static rows | KL | KL p99 | JSD | leak, bits/byte | bound: JSD | leak |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for preset in st.PRESETS:
        for kind, result in results.items():
            f = result["presets"][preset]
            lines.append(
                f"| `{preset}` | {kind} | {f['rows_per_token']:.2f} | {f['static_per_token']:.2f} | {f['kl']:.5f} | "
                f"{f['kl_p99']:.4f} | {f['jsd']:.6f} | {f['leak_bits']:+.4f} | {f['bound_jsd']:.4f} | "
                f"{f['bound_leak_bits']:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--start", default="auto", help="teacher.start")
    parser.add_argument("--bytes", type=int, default=10_000, help="of each kind")
    parser.add_argument("--document", type=int, default=2_500, help="bytes of a document")
    parser.add_argument("--texts", type=Path, help="a folder of further .txt files")
    parser.add_argument("--kinds", nargs="*", help="measure these alone")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    teacher = open_teacher(st.Teacher(model=args.model, backend="hf", floor=1e-6, top_k=0, start=args.start))
    teacher.engine = Remembering(teacher.engine)
    facts: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine().replace('_', '-')}", "model": args.model,
        "start": teacher.vocabulary.start_id, "reference": REFERENCE, "presets": st.PRESETS, "kinds": {},
    }  # fmt: skip
    if args.out.is_file():
        earlier = json.loads(args.out.read_text())
        if all(earlier.get(name) == facts[name] for name in facts if name != "kinds"):
            facts["kinds"] = earlier["kinds"]
    texts = kinds_of(args.texts, args.bytes)
    for kind in args.kinds or [*texts, "chat"]:
        if kind in facts["kinds"]:
            continue
        chat = kind == "chat"
        documents = answers_of(teacher, args.bytes) if chat else documents_of(teacher, texts[kind], args.document)
        facts["kinds"][kind] = measure(teacher, documents)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{kind}: done", flush=True)
    print(markdown(facts["kinds"]))


if __name__ == "__main__":
    main()
