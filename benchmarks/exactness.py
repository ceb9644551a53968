"""What every preset costs and how far it is from the teacher, by kind of text.

    python -m benchmarks.exactness --share 0.3 --out benchmarks/results/exactness.json
    python -m benchmarks.exactness --model builtin:gemma-3-270m --kinds manual code scripts --out ...
    python -m benchmarks.exactness --texts FOLDER --kinds novel handbooks --out ...

For each kind `--bytes` of text in documents of `--document` bytes, of which stretches of `--stretch` tokens are drawn,
a `--share` of them, each in the context that its document gives. Every stretch is evaluated at every preset and at the
certificate's reference effort, which joins nothing and has no static rows. Given per kind and preset: evaluated rows
and static rows per canonical token, KL, JSD (nats per position) and leak (bits per position) against the reference with
their standard errors (of means over stretches), p99 and greatest of the KL, and the bound that needs no reference
(stages.fidelity.bound). `--deeper TAU` measures against a reference of that tau, and the certificate's beside the
presets. What storing adds is not in it (benchmarks/rate_distortion.py).

Texts come from Python itself, and with `--texts` from a folder of .txt files, a kind each. Rows that one effort asked
for are remembered for the next, so that the presets cost little beside the reference. The JSON is written after every
few stretches; with `--seconds` the study stops in between, and the same command goes on where it stopped.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.texts import clip, kinds_of
from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window
from bytecache.schemas.files import write_text
from bytecache.stages.engines.engine import Branch, Engine, Prompt
from bytecache.stages.engines.rows import RowMasses, concatenate, take
from bytecache.stages.engines.static import StaticJob
from bytecache.stages.fidelity.bound import Bound
from bytecache.stages.fidelity.divergence import divergence
from bytecache.stages.fidelity.measure import Measure
from bytecache.stages.fidelity.measuring import true_symbols
from bytecache.stages.lattice.effort import DROPPED, REFERENCE, RULE
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.teacher.windows import WindowPlan, plan_stretch
from bytecache.stages.tokens.chat import Template, encode_answer
from bytecache.stages.tokens.vocab import Encoded, Misfit


class Remembering(Engine):
    """An engine whose rows are computed once, however many efforts ask for them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: dict[Any, RowMasses] = {}

    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        new = [prompt for prompt in prompts if (prompt.name, "canonical") not in self.rows]
        for prompt, rows in zip(new, self.engine.score(new), strict=True):
            self.rows[prompt.name, "canonical"] = rows
        for prompt in prompts:
            yield self.rows[prompt.name, "canonical"]

    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        keys = [[(prompt.name, branch.anchor, branch.chain) for branch in branches] for prompt, branches in jobs]
        new = [[i for i, key in enumerate(some) if key not in self.rows] for some in keys]
        asked = [number for number, some in enumerate(new) if some]
        rows_of = self.engine.score_branches(
            [(jobs[number][0], [jobs[number][1][i] for i in new[number]]) for number in asked]
        )
        for number, rows in zip(asked, rows_of, strict=True):
            self._keep([keys[number][i] for i in new[number]], rows)
        for some in keys:
            yield concatenate([self.rows[key] for key in some])

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


def stretches_of(documents: list[Encoded], tokens: int, share: float, seed: int) -> list[tuple[int, int]]:
    """(document, byte of its text) of stretches of so many tokens, a `share` of all, in a drawn order."""
    found = [
        (number, int(document.starts[first]) - document.synthetic)
        for number, document in enumerate(documents)
        for first in range(0, len(document.ids), tokens)
    ]
    random.Random(seed).shuffle(found)
    return found[: max(1, round(share * len(found)))]


def windows_at(teacher: Teacher, plans: list[WindowPlan], effort: dict[str, float]) -> list[Window]:
    """Stretches at an effort: tau, depth, static."""
    teacher.settings = teacher.settings.model_copy(update=effort)
    return teacher.evaluate(plans)


class Figures:
    """Of one kind and preset, over its stretches; `state()` is JSON that a later run goes on from."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.measures = {name: Measure() for name in ("kl", "jsd", "leak")}
        self.counts = dict.fromkeys(("positions", "windows", "squared_positions", "rows", "static", "canonical"), 0)
        self.bound = Bound([state["bound"]] if state else [])
        if state:
            self.counts |= state["counts"]
            for name, measure in self.measures.items():
                measure.merge(state["measures"][name])

    def state(self) -> dict[str, Any]:
        """What is known so far."""
        measures = {name: measure.state() for name, measure in self.measures.items()}
        return {"counts": self.counts, "measures": measures, "bound": self.bound.state()}

    def add(self, window: Window, reference: Lattice, *, drop: float = 0.0) -> None:
        """One stretch."""
        lattice = Lattice(window, drop=drop)
        truth, targets = reference.targets(), lattice.targets()
        symbol = true_symbols(window)
        found = divergence(truth.probs, truth.tail, targets.probs, targets.tail, symbol)
        # As in the certificate: a history too light for the reference may be the one that foresaw a rare byte.
        joined = Lattice(reference.window).targets()
        leak = divergence(joined.probs, joined.tail, targets.probs, targets.tail, symbol).leak
        for name, values in (("kl", found.kl), ("jsd", found.jsd), ("leak", leak)):
            self.measures[name].add(values)
        scored = window.row_start >= window.score_start
        for name, which in (
            ("rows", window.row_static == 0), ("static", window.row_static == 1), ("canonical", window.row_depth == 0)
        ):  # fmt: skip
            self.counts[name] += int((scored & which).sum())
        self.counts["positions"] += len(symbol)
        self.counts["windows"] += 1
        self.counts["squared_positions"] += len(symbol) ** 2
        self.bound.add(lattice)

    def summary(self) -> dict[str, Any]:
        """The figures; of means the standard error too."""
        of = self.counts
        kl, jsd, leak = (
            measure.summary(of["positions"], of["windows"], of["squared_positions"])
            for measure in self.measures.values()
        )
        bound = self.bound.summary() or {}
        figures = {
            "rows_per_token": of["rows"] / of["canonical"], "static_per_token": of["static"] / of["canonical"],
            "kl": kl["mean"], "kl_stderr": kl["stderr"], "kl_p99": kl["p99"], "kl_max": kl["max"], "jsd": jsd["mean"],
            "jsd_stderr": jsd["stderr"], "leak_bits": leak["mean"], "leak_stderr": leak["stderr"],
            "bound_nats": bound["nats"]["mean"], "bound_nats_p99": bound["nats"]["p99"], "bound_jsd": bound["jsd"],
            "bound_leak_bits": bound["leak"], "joined": bound["joined"]["mean"], "static": bound["static"]["mean"],
            "nowhere": bound["nowhere"]["mean"], "tail": bound["tail"]["mean"],
        }  # fmt: skip
        return {name: float(f"{value:.5g}") for name, value in figures.items()}


class Study:
    """One kind of text: which stretches are measured, and what they said."""

    def __init__(self, teacher: Teacher, documents: list[Encoded], options: argparse.Namespace, earlier: Any) -> None:
        self.teacher, self.documents = teacher, documents
        self.stretches = stretches_of(documents, options.stretch, options.share, options.seed)
        self.tokens, self.deeper = options.stretch, options.deeper
        earlier = earlier or {"measured": 0, "state": {}, "missed_state": Measure().state(), "reference_rows": 0}
        self.measured = int(earlier["measured"])
        self.everything = options.share == 1
        if "state" not in earlier:
            if self.measured < len(self.stretches):
                raise SystemExit(f"all {self.measured} stretches of other texts were measured; move the result away")
            return
        self.names = [*st.PRESETS, *(["reference"] if self.deeper else [])]
        self.figures = {name: Figures(earlier["state"].get(name)) for name in self.names}
        self.reference_rows = int(earlier["reference_rows"])
        self.missed = Measure()
        self.missed.merge(earlier["missed_state"])

    def step(self, count: int = 1) -> None:
        """Measure the next stretches, `count` together at most: passes of several cost little more than of one."""
        drawn = self.stretches[self.measured : self.measured + count]
        plans = [self._plan(document, position) for document, position in drawn]
        self.teacher.engine.forget()
        effort = {**REFERENCE, "static": 0.0}
        deepest = effort | ({"tau": self.deeper} if self.deeper else {})
        references = [Lattice(window, drop=DROPPED) for window in windows_at(self.teacher, plans, deepest)]
        for preset, asked in st.PRESETS.items():
            for window, reference in zip(windows_at(self.teacher, plans, asked), references, strict=True):
                self.figures[preset].add(window, reference)
        if self.deeper:
            for window, reference in zip(windows_at(self.teacher, plans, effort), references, strict=True):
                self.figures["reference"].add(window, reference, drop=DROPPED)
        for reference in references:
            scored = reference.window.score_start
            self.reference_rows += int((reference.window.row_start >= scored).sum())
            self.missed.add(reference.handed().total[scored:])
        self.measured += len(drawn)

    def _plan(self, document: int, position: int) -> WindowPlan:
        s = self.teacher.settings
        return plan_stretch(
            f"d{document}-{position}", self.documents[document], position, self.tokens,
            start_id=self.teacher.vocabulary.start_id, context=s.context, overlap=s.overlap,
        ).plan  # fmt: skip

    def result(self) -> dict[str, Any]:
        """JSON: the figures, and what a later run goes on from, until every stretch is measured."""
        of = self.figures["exact"].counts
        size = sum(len(document.data) - document.synthetic for document in self.documents)
        figures = {
            "documents": len(self.documents), "bytes": size, "stretches": len(self.stretches),
            "measured": self.measured, "positions": of["positions"], "tokens": of["canonical"],
            "reference_rows_per_token": round(self.reference_rows / of["canonical"], 3),
            "missed": self.missed.summary(of["positions"], of["windows"], of["squared_positions"])["mean"],
            "presets": {name: figures.summary() for name, figures in self.figures.items()},
        }  # fmt: skip
        state = {
            "state": {name: figures.state() for name, figures in self.figures.items()},
            "missed_state": self.missed.state(), "reference_rows": self.reference_rows,
        }  # fmt: skip
        return figures if self.everything and self.measured == len(self.stretches) else figures | state


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


def options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--start", default="auto", help="teacher.start")
    parser.add_argument("--bytes", type=int, default=10_000, help="of each kind")
    parser.add_argument("--document", type=int, default=2_500, help="bytes of a document")
    parser.add_argument("--stretch", type=int, default=64, help="tokens of a stretch")
    parser.add_argument("--together", type=int, default=8, help="stretches that are evaluated together")
    parser.add_argument("--share", type=float, default=1.0, help="of all stretches that are measured")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--deeper", type=float, default=0.0, help="tau of a deeper reference, which judges the other too"
    )
    parser.add_argument("--texts", type=Path, help="a folder of further .txt files")
    parser.add_argument("--kinds", nargs="*", help="measure these alone")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then; the same command goes on later")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure what the result does not hold yet."""
    args = options()
    began = time.monotonic()
    teacher = open_teacher(st.Teacher(model=args.model, backend="hf", floor=1e-6, top_k=0, start=args.start))
    teacher.engine = Remembering(teacher.engine)
    facts: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine().replace('_', '-')}", "model": args.model,
        "start": teacher.vocabulary.start_id, "reference": REFERENCE, "deeper": args.deeper, "presets": st.PRESETS,
        "effort": RULE,
        "document": args.document, "stretch": args.stretch, "seed": args.seed, "kinds": {},
    }  # fmt: skip
    if args.out.is_file():
        earlier = json.loads(args.out.read_text())
        if changed := [name for name in facts if name != "kinds" and earlier.get(name) != facts[name]]:
            raise SystemExit(f"{args.out} holds other {', '.join(changed)}; move it away to measure anew")
        facts["kinds"] = earlier["kinds"]
    texts = kinds_of(args.texts, args.bytes)
    studies = {}
    for kind in args.kinds or [*texts, "chat"]:
        chat = kind == "chat"
        documents = answers_of(teacher, args.bytes) if chat else documents_of(teacher, texts[kind], args.document)
        studies[kind] = Study(teacher, documents, args, facts["kinds"].get(kind))
    # Some stretches of each kind in turn, so that whatever time there is goes to all of them.
    while open_studies := {kind: study for kind, study in studies.items() if study.measured < len(study.stretches)}:
        for kind, study in open_studies.items():
            if time.monotonic() - began >= args.seconds:
                break
            study.step(args.together)
            facts["kinds"][kind] = study.result()
            write_text(args.out, json.dumps(facts, indent=1) + "\n")
        else:
            continue
        break
    for kind, study in studies.items():
        print(f"{kind}: {study.measured} of {len(study.stretches)} stretches")
    print(markdown(facts["kinds"]))


if __name__ == "__main__":
    main()
