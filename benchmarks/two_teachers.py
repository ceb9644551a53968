"""Whether two teachers know more of a text than the better one: bits per byte of each, and of their mixtures.

    python -m benchmarks.two_teachers CORPORA FOLDER [--kilobytes 4]

Teachers are SmolLM2-135M-Instruct (49k tokens, byte-level) and Gemma-3-270m (262k, SentencePiece), both as dequantised
4-bit weights. Texts are the test passages of benchmarks.transfer_texts, of about a kilobyte each: novels, leads of
articles, definitions of a library. Each teacher reads them once (canonical tokens and static rows: a mixture needs no
more to be judged by), then `bytecache mix` pools the two data sets in every way. No weight is fitted to the text. What
targets say of the text is what a student can learn from them; a student is not trained here. "Which is better" is known
only afterwards: `oracle` says what the better teacher of each passage would give, which no pool of fixed weights sees.

Every step is resumed where it was, so the program can be killed and started again.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.transfer_texts import chosen, code, encyclopedia, prose
from bytecache.pipeline.commands.convert import convert
from bytecache.pipeline.commands.mix import mix
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.teacher import teacher
from bytecache.pipeline.context import open_context
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.settings import Settings
from bytecache.schemas.shard.reader import read_shard
from bytecache.stages.mix.mix import Mixing
from bytecache.stages.targets.source import open_dataset

RESULT = Path(__file__).parent / "results" / "two_teachers.json"
TEACHERS = {"smollm2": "builtin:smollm2-135m-instruct", "gemma": "builtin:gemma-3-270m"}
MIXTURES = {
    "linear 0.5, 0.5": Mixing("linear", (0.5, 0.5)),
    "linear 0.2, 0.8": Mixing("linear", (0.2, 0.8)),
    "linear 0.8, 0.2": Mixing("linear", (0.8, 0.2)),
    "log-pool 0.5, 0.5": Mixing("log", (0.5, 0.5)),
    "posterior 0.5, 0.5": Mixing("posterior", (0.5, 0.5)),
}
KINDS = {"prose": prose, "encyclopedia": encyclopedia, "code": code}


def settings_of(folder: Path, corpus: Path, model: str) -> Settings:
    """A run of one teacher: the cheapest effort that still has a tail for what it leaves out."""
    return Settings.model_validate({
        "run": {"dir": str(folder)},
        "corpus": {"source": str(corpus), "unit_bytes": 2000, "max_bytes": 0},
        "teacher": {
            "model": model, "backend": "hf", "context": 512, "depth": 0, "static": 0.002, "sample_tokens": 0,
            "top_k": 0,
        },
        "convert": {"precision": "precise"},
    })  # fmt: skip


def write_texts(corpora: Path, kind: str, kilobytes: int, out: Path) -> None:
    """Test passages of one kind as JSONL."""
    found = [passage for use, passage in KINDS[kind](corpora) if use == "test"]
    picked = chosen(found, kilobytes, lambda text: True)
    lines = [json.dumps({"id": f"{number} {name}", "text": text}) for number, (_, name, text) in enumerate(picked)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def bits_of_passages(place: Path) -> dict[str, tuple[float, int]]:
    """Passage -> bits that the targets give it, its tail shared out by the prior, and its bytes."""
    dataset = open_dataset(str(place))
    found = {}
    for entry in dataset.entries:
        shard = read_shard(dataset.path(entry))
        for number, name in enumerate(shard.doc_id):
            lo, hi = (int(edge) for edge in shard.doc_start[number : number + 2])
            true = shard.text[lo : hi - 1].astype(int)  # without END, as `mix` counts
            likely = shard.dense(lo, hi - 1, spread_tail=True)[np.arange(len(true)), true]
            found[str(name)] = float(-np.log2(np.maximum(likely, 1e-300)).sum()), hi - lo - 1
    return found


def study(folder: Path, corpus: Path) -> dict[str, Any]:
    """One kind of text: each teacher, each mixture, and the better teacher of every passage."""
    for name, model in TEACHERS.items():
        context = open_context(settings_of(folder / name, corpus, model))
        plan(context)
        teacher(context)
        convert(context)
    places = [folder / name / "targets" for name in TEACHERS]
    mixtures: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for number, (name, mixing) in enumerate(MIXTURES.items()):
        context = open_context(settings_of(folder / f"mix-{number}", corpus, "none"))
        mix(context, [str(place) for place in places], mixing, partial=True)
        told = read_dataset(folder / f"mix-{number}" / "targets").info["mix"]
        mixtures[name] = {key: told[key] for key in ("bits_per_byte_mixed", "weight_mean")}
    one, other = (bits_of_passages(place) for place in places)
    common = sorted(one.keys() & other.keys())
    size = sum(one[name][1] for name in common)
    return {
        "passages": len(common), "bytes": size,
        "teachers": dict(zip(TEACHERS, told["bits_per_byte"], strict=True)), "jsd": told["jsd_mean"],
        "oracle": round(sum(min(one[name][0], other[name][0]) for name in common) / size, 4),
        "gemma_better": sum(other[name][0] < one[name][0] for name in common),
        "mixtures": mixtures,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kilobytes", type=int, default=4, help="of each kind of text")
    arguments = parser.parse_args()
    kinds = {}
    for kind in KINDS:
        corpus = arguments.folder / kind / "corpus.jsonl"
        write_texts(arguments.corpora, kind, arguments.kilobytes, corpus)
        kinds[kind] = study(arguments.folder / kind, corpus)
        machine = f"{os.cpu_count()} cores, {platform.machine().replace('_', '-')}"
        report = {"machine": machine, "models": TEACHERS, "kinds": kinds}
        RESULT.write_text(json.dumps(report, indent=1) + "\n")  # each kind stands for itself
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
