"""Whether two teachers know more of a text than the better one: bits per byte of each, and of their mixtures.

    python -m benchmarks.two_teachers CORPORA FOLDER [--kilobytes 10] [--kinds prose encyclopedia code]

Teachers are SmolLM2-135M-Instruct (49k tokens, byte-level) and Gemma-3-270m (262k, SentencePiece), both as dequantised
4-bit weights. Texts are the test passages of benchmarks.transfer_texts, of about a kilobyte each: novels, leads of
articles, definitions of a library. Each teacher reads them once (canonical tokens and static rows: a mixture needs no
more to be judged by), then `bytecache mix` pools the two data sets in every way. No weight is fitted to the text. What
targets say of the text is what a student can learn from them; a student is not trained here.

Controls, each of which may look at the text afterwards, as no pool may:

- the better single teacher of all passages of a kind, with which every difference is taken;
- the same at the temperature that suits the text best: what it would gain by being less, or more, sure of itself;
- the better teacher of each passage, which no pool of fixed weights sees;
- what each teacher itself says of the text, in its own canonical tokens.

An interval is a bootstrap over passages, 95 %: the better teacher is chosen anew in each draw.

Every step is resumed where it was, so the program can be killed and started again; of more kilobytes only what is new
is read. RESULT is written at the end, and has every passage's bits.
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
TEMPERATURES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3)
DRAWS = 10_000
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


def bits_of_passages(place: Path, temperatures: tuple[float, ...] = (1.0,)) -> dict[str, tuple[Any, int]]:
    """Passage -> bits that the targets give it, its tail shared out by the prior, float64 [temperatures]; its bytes."""
    dataset = open_dataset(str(place))
    found = {}
    for entry in dataset.entries:
        shard = read_shard(dataset.path(entry))
        for number, name in enumerate(shard.doc_id):
            lo, hi = (int(edge) for edge in shard.doc_start[number : number + 2])
            true = shard.text[lo : hi - 1].astype(int)  # without END, as `mix` counts
            rows = np.maximum(shard.dense(lo, hi - 1, spread_tail=True).astype(np.float64), 1e-30)
            bits = []
            for temperature in temperatures:
                log2 = np.log2(rows) / temperature
                all_of_it = log2.max(1) + np.log2(np.exp2(log2 - log2.max(1, keepdims=True)).sum(1))
                bits.append(float((all_of_it - log2[np.arange(len(true)), true]).sum()))
            found[str(name)] = np.array(bits), hi - lo - 1
    return found


def interval(bits: Any, teachers: Any, sizes: Any) -> list[float]:
    """[low, high] of a pool's bits per byte less the better teacher's, 95 % of `DRAWS` draws of passages.

    bits, sizes float [P]; teachers float [2, P], of which each draw has its own better one.
    """
    picked = np.random.default_rng(0).integers(0, len(sizes), (DRAWS, len(sizes)))
    better = teachers[:, picked].sum(2).min(0)
    differences = (bits[picked].sum(1) - better) / sizes[picked].sum(1)
    return [round(float(edge), 4) for edge in np.quantile(differences, (0.025, 0.975))]


def summary(passages: dict[str, Any]) -> dict[str, Any]:
    """Figures of some passages: `bytes`, and bits of each teacher and each mixture, by name."""
    sizes = np.array([one["bytes"] for one in passages.values()], float)

    def column(name: str) -> Any:
        return np.array([one["bits"][name] for one in passages.values()])

    teachers = np.stack([column(name) for name in TEACHERS])
    alone = (teachers.sum(1) / sizes.sum()).tolist()
    better = float(teachers.sum(1).min())
    mixtures = {}
    for name in MIXTURES:
        bits = column(name)
        mixtures[name] = {
            "bits_per_byte": round(float(bits.sum() / sizes.sum()), 4),
            "to_the_better": round(float((bits.sum() - better) / sizes.sum()), 4),
            "interval": interval(bits, teachers, sizes),
            "passages_gained": int((bits < teachers.min(0)).sum()),
        }
    return {
        "passages": len(sizes), "bytes": int(sizes.sum()),
        "teachers": {name: round(one, 4) for name, one in zip(TEACHERS, alone, strict=True)},
        "oracle": round(float(teachers.min(0).sum() / sizes.sum()), 4),
        "gemma_better": int((teachers[1] < teachers[0]).sum()),
        "mixtures": mixtures,
    }  # fmt: skip


def tempered(place: Path) -> dict[str, float]:
    """The temperature of one teacher's bytes that suits the text best, and its bits per byte there."""
    bits = bits_of_passages(place, TEMPERATURES)
    total = sum(one for one, _ in bits.values()) / sum(size for _, size in bits.values())
    best = int(np.argmin(total))
    return {"temperature": TEMPERATURES[best], "bits_per_byte": round(float(total[best]), 4)}


def read_by(folder: Path, corpus: Path, model: str) -> dict[str, float]:
    """Let a teacher read the texts; returns bits per byte of the text in its own tokens, `canonical`."""
    context = open_context(settings_of(folder, corpus, model))
    plan(context)
    teacher(context)
    shards = [receipt.counts for receipt in convert(context).receipts]
    nats, size = (sum(counts[name] for counts in shards) for name in ("canonical_nll", "n_bytes"))
    return {"canonical": round(float(nats / np.log(2) / size), 4)}


def study(folder: Path, corpus: Path, kilobytes: int) -> dict[str, Any]:
    """One kind of text: each teacher, each mixture, and the controls."""
    own = {name: read_by(folder / name, corpus, model) for name, model in TEACHERS.items()}
    places = {name: folder / name / "targets" for name in TEACHERS}
    sources = [str(place) for place in places.values()]
    told: dict[str, Any] = {}
    weights = {}
    for number, (name, mixing) in enumerate(MIXTURES.items()):
        place = folder / f"mix-{kilobytes}kB-{number}"
        mix(open_context(settings_of(place, corpus, "none")), sources, mixing, partial=True)
        places[name] = place / "targets"
        told = read_dataset(places[name]).info["mix"]
        weights[name] = told["weight_mean"]
    bits = {name: bits_of_passages(place) for name, place in places.items()}
    common = sorted(set.intersection(*(set(one) for one in bits.values())))
    passages = {
        name: {
            "bytes": bits["gemma"][name][1],
            "bits": {who: round(float(one[name][0][0]), 2) for who, one in bits.items()},
        }
        for name in common
    }
    figures = summary(passages)
    for name in MIXTURES:
        figures["mixtures"][name]["weight_mean"] = weights[name]
    return {
        **figures, "jsd": told["jsd_mean"], "own": own,
        "tempered": {name: tempered(places[name]) for name in TEACHERS}, "by_passage": passages,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kilobytes", type=int, default=10, help="of each kind of text")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    kinds: dict[str, Any] = {}
    for kind in arguments.kinds:
        corpus = arguments.folder / kind / "corpus.jsonl"
        write_texts(arguments.corpora, kind, arguments.kilobytes, corpus)
        kinds[kind] = study(arguments.folder / kind, corpus, arguments.kilobytes)
    every = {f"{kind} {name}": one for kind, each in kinds.items() for name, one in each["by_passage"].items()}
    machine = f"{os.cpu_count()} cores, {platform.machine().replace('_', '-')}"
    report = {"machine": machine, "models": TEACHERS, "all": summary(every), "kinds": kinds}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["all"], indent=1))


if __name__ == "__main__":
    main()
