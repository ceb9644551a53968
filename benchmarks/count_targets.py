"""Targets for controls: of a byte n-gram counted on the training text itself, of nobody, or of a part of the text.

A student that gains as much from counts as from a teacher has learned nothing that only the teacher knew. The counts
are interpolated by Witten and Bell's rule (IEEE Trans. Inf. Theory 37(4), 1991); every training position is predicted
without its own occurrence (leave-one-out), for with it the row would name the answer.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.degraded_targets import write_shard
from bytecache.schemas.arrays import END, SYMBOLS
from bytecache.schemas.dataset.index import read_dataset, write_dataset
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.stages.targets.source import load_shard

ORDER = 6
"""Bytes that a count spans: the predicted one and five before it."""


class Counts:
    """Counts of every symbol after the up to `ORDER` - 1 bytes before it."""

    def __init__(self, documents: Sequence[bytes]) -> None:
        self.after: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
        for document in documents:
            for at, symbol in enumerate([*document, END]):
                for length in range(min(at, ORDER - 1) + 1):
                    self.after[document[at - length : at]][symbol] += 1

    def rows(self, document: bytes, *, seen: bool) -> np.ndarray:
        """float32 [len(document) + 1, 257]; `seen`: the document was counted, and each place is left out of its own."""
        rows = np.empty((len(document) + 1, SYMBOLS), np.float32)
        for at, symbol in enumerate([*document, END]):
            row = np.full(SYMBOLS, 1 / SYMBOLS)
            for length in range(min(at, ORDER - 1) + 1):
                counts = self.after.get(document[at - length : at])
                if counts is None:
                    break
                here = {s: n - (seen and s == symbol) for s, n in counts.items()}
                here = {s: n for s, n in here.items() if n}
                kinds, total = len(here), sum(here.values())
                if not total:
                    break
                row *= kinds / (total + kinds)
                row[list(here)] += np.array(list(here.values())) / (total + kinds)
            rows[at] = row / row.sum()
        return rows


def documents_of(targets: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """(id, text) of a split."""
    dataset = read_dataset(targets)
    for entry in dataset.split(split):
        shard = load_shard(dataset, entry)
        text = np.asarray(shard.text)
        for number, name in enumerate(shard.doc_id):
            yield name, text[int(shard.doc_start[number]) : int(shard.doc_start[number + 1]) - 1].tobytes()


def write_counts(targets: Path, out: Path) -> None:
    """The data set `out`: the documents and splits of `targets`, and what the counts say of them."""
    train = dict(documents_of(targets, "train"))
    counts = Counts(list(train.values()))
    held_out = dict(documents_of(targets, "heldout"))
    _write(
        out, "6-gram of the training text",
        {
            "train": {name: counts.rows(text, seen=True) for name, text in train.items()},
            "heldout": {name: counts.rows(text, seen=False) for name, text in held_out.items()},
        },
        {"train": train, "heldout": held_out},
    )  # fmt: skip


def write_silent(targets: Path, more: dict[str, bytes], out: Path) -> None:
    """The data set `out`: the same held-out documents, and for training `more` as well; nobody says anything."""
    write_texts(
        {
            "train": {**dict(documents_of(targets, "train")), **more},
            "heldout": dict(documents_of(targets, "heldout")),
        },
        out,
    )


def write_texts(texts: dict[str, dict[str, bytes]], out: Path) -> None:
    """The data set `out`: documents by split and id, of which nobody says anything."""
    rows = {
        split: {name: np.zeros((len(text) + 1, SYMBOLS), np.float32) for name, text in found.items()}
        for split, found in texts.items()
    }
    _write(out, "none", rows, texts)


def write_part(targets: Path, out: Path, wanted: Callable[[str], bool]) -> None:
    """The data set `out`: training documents of `targets` whose id is wanted, as they are, and all held-out ones."""
    dataset = read_dataset(targets)
    rows: dict[str, dict[str, np.ndarray]] = {"train": {}, "heldout": {}}
    for entry in dataset.entries:
        shard = load_shard(dataset, entry)
        triples = shard.triples(0, len(shard))
        known = np.zeros((len(shard), SYMBOLS), np.float32)
        known[triples.row, triples.symbol] = triples.prob
        for number, name in enumerate(shard.doc_id):
            if entry.split != "train" or wanted(name):
                rows[entry.split][name] = known[int(shard.doc_start[number]) : int(shard.doc_start[number + 1])]
    texts = {split: {n: t for n, t in documents_of(targets, split) if n in rows[split]} for split in rows}
    _write(out, "the same, of fewer documents", rows, texts)


def _write(out: Path, teacher: str, rows: dict[str, dict[str, np.ndarray]], texts: dict[str, dict[str, bytes]]) -> None:
    out.mkdir(parents=True)
    info: dict[str, Any] = {"teacher": {"degraded": teacher}}
    entries = []
    for split, documents in texts.items():
        builder = ShardBuilder(precision="precise")
        for name, text in documents.items():
            known = rows[split][name]
            tail = (1 - known.sum(1)).clip(0, 1)
            builder.append(np.frombuffer(text, np.uint8), known, tail)
            builder.end_document(name)
        entries.append(write_shard(builder, out, split, teacher))
    write_dataset(out, entries, info)
    read_dataset(out)
