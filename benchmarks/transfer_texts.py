"""Three kinds of text for the study of tokenizer transfer, held out by source: prose, encyclopedia, code.

    python -m benchmarks.transfer_texts CORPORA OUT [--train 16 --validation 6 --test 12 --raw 48]

CORPORA holds `english_prose/*.txt` (novels), `wiki_vital_en.txt` ("= Title =" and an article's lead) and
`code_python_stdlib.txt` ("# ===== Lib/NAME =====" and a module). Sizes are kB of text of each kind. A passage is a run
of whole paragraphs, an article or a run of whole top-level definitions, of about a kilobyte, and names in its id what
it is for: `train`, `validation` (settings are chosen on it) or `test` (figures are reported of it). No book and no
module lends to two of them; articles are divided by a hash of their title. OUT/corpus.jsonl holds all three,
OUT/raw.jsonl further training text of the same sources that no teacher reads.

A run's split is decided by a hash of the text (`Cutter.hash`), so of each kind passages are taken whose hash agrees:
with `run.seed = 0` and `corpus.heldout_fraction = 0.5`, `train` is the training split and the other two are held out.
OUT/read.jsonl has of the held-out passages only the first `--read` of each kind and use: bits per byte need no teacher,
who is slow. OUT/corpus.json says sizes, sources and the share of held-out windows of 50 bytes that occur in the
training text.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bytecache.pipeline.plan.parts import Cutter
from bytecache.pipeline.plan.writing import digest_of
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus.reader import Document

ABOUT = 1000
"""Bytes of a passage."""
NEAR = 50
"""Bytes of a window that counts as a repetition."""
SPLIT = Cutter(Corpus(), seed=0, threshold=1 << 63)
USES = ("train", "validation", "test")
BOOKS = {
    "train": ("dickens", "tolstoy", "eliot", "hugo", "darwin"),
    "validation": ("dostoevsky",),
    "test": ("doyle", "melville", "austen"),
}
Passage = tuple[str, str, str]
"""Kind, source and text."""


def runs(parts: list[str], joint: str) -> Iterator[str]:
    """Whole parts, joined up to about `ABOUT` bytes; parts that are longer alone are left out."""
    run: list[str] = []
    for part in parts:
        run.append(part)
        size = len(joint.join(run).encode())
        if size > 1.2 * ABOUT:
            run = []
        elif size >= 0.8 * ABOUT:
            yield joint.join(run) + "\n"
            run = []


def share_of(name: str) -> str:
    """The use that a title or module is for."""
    at = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return "train" if at < 6 else "validation" if at < 7 else "test"


def prose(corpora: Path) -> Iterator[tuple[str, Passage]]:
    """(use, passage) of the novels."""
    for path in sorted((corpora / "english_prose").glob("*.txt")):
        use = next(use for use, names in BOOKS.items() if any(name in path.stem for name in names))
        paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        yield from ((use, ("prose", path.stem, run)) for run in runs(paragraphs, "\n\n"))


def encyclopedia(corpora: Path) -> Iterator[tuple[str, Passage]]:
    """(use, passage) of the articles' leads."""
    text = (corpora / "wiki_vital_en.txt").read_text(encoding="utf-8")
    for article in re.split(r"(?m)^(?== .+ =$)", text)[1:]:
        title, _, lead = article.partition("\n")
        if 0.8 * ABOUT <= len(lead.strip().encode()) <= 1.2 * ABOUT:
            yield share_of(title), ("encyclopedia", title.strip("= "), lead.strip() + "\n")


def code(corpora: Path) -> Iterator[tuple[str, Passage]]:
    """(use, passage) of the modules."""
    text = (corpora / "code_python_stdlib.txt").read_text(encoding="utf-8")
    for module in re.split(r"(?m)^# ===== (?=Lib/)", text)[1:]:
        name, _, body = module.partition(" =====\n")
        definitions = re.split(r"\n\n\n+(?=\S)", body)
        yield from ((share_of(name), ("code", name, run)) for run in runs(definitions, "\n\n\n"))


def chosen(found: list[Passage], kilobytes: int, agrees: Callable[[str], bool]) -> list[Passage]:
    """Passages of that many kB that agree, at even distances, as few of one source as can be."""
    by_source: dict[str, list[Passage]] = {}
    for passage in found:
        if agrees(passage[2]):
            by_source.setdefault(passage[1], []).append(passage)
    sources = sorted(by_source.values(), key=lambda one: hashlib.sha256(one[0][1].encode()).digest())
    taken: list[Passage] = []
    size = turn = 0
    while size < 1000 * kilobytes:
        if turn >= max(map(len, sources)):
            raise SystemExit(f"{found[0][0]}: {size} bytes of text are left, {kilobytes} kB were asked for")
        for one in sources:
            if turn < len(one) and size < 1000 * kilobytes:
                # Golden-section steps are spread over a book however many are taken.
                passage = one[int(len(one) * ((turn + 1) * 0.6180339887 % 1))]
                if passage not in taken:
                    taken.append(passage)
                    size += len(passage[2].encode())
        turn += 1
    return taken


def held_out(text: str) -> bool:
    """Whether a run holds this text out."""
    document = Document("", text)
    return SPLIT.hash(document, digest_of(document, text.encode())) < SPLIT.threshold


def repeated(texts: list[str], training: list[str]) -> float:
    """Share of windows of `NEAR` bytes, every tenth, that occur in the training text."""
    joined = b"\0".join(text.encode() for text in training)
    windows = [w for t in texts for b in [t.encode()] for i in range(0, len(b) - NEAR, 10) for w in [b[i : i + NEAR]]]
    return sum(window in joined for window in windows) / max(len(windows), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=16, help="kB of each kind, as the others")
    parser.add_argument("--validation", type=int, default=6)
    parser.add_argument("--test", type=int, default=12)
    parser.add_argument("--raw", type=int, default=48)
    parser.add_argument("--read", type=int, default=2, help="held-out passages of a kind and use in read.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"corpus": [], "read": [], "raw": []}
    summary = {}
    for source in (prose, encyclopedia, code):
        by_use: dict[str, list[Passage]] = {use: [] for use in USES}
        for use, passage in source(args.corpora):
            by_use[use].append(passage)
        texts: dict[str, list[str]] = {}
        for use in USES:
            picked = chosen(by_use[use], getattr(args, use), lambda text, use=use: held_out(text) != (use == "train"))
            texts[use] = [text for _, _, text in picked]
            summary[f"{picked[0][0]} {use}"] = {
                "passages": len(picked), "bytes": sum(len(text.encode()) for text in texts[use]),
                "sources": len({name for _, name, _ in picked}),
                **({} if use == "train" else {"repeated_windows": repeated(texts[use], texts["train"])}),
            }  # fmt: skip
            for number, (kind, name, text) in enumerate(picked):
                line = json.dumps({"id": f"{kind} {use} {number} {name}", "text": text})
                lines["corpus"].append(line)
                if use == "train" or number < args.read:
                    lines["read"].append(line)
        # What the run holds out by its hash is free for training without a teacher.
        for number, (kind, name, text) in enumerate(chosen(by_use["train"], args.raw, held_out)):
            lines["raw"].append(json.dumps({"id": f"{kind} raw {number} {name}", "text": text}))
    # Kinds take turns, so that every unit of the run has all three.
    for name in ("corpus", "read"):
        lines[name].sort(key=lambda line: hashlib.sha256(line.encode()).digest())
    for name, found in lines.items():
        (args.out / f"{name}.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")
    (args.out / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
