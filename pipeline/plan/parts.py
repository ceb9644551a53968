"""A corpus read in parts by several processes that share nothing, and its slices as if one had read it all.

A part is some files, or a range of the lines of a long one. Its process writes every slice between the first and the
last end that it can be certain of (`pipeline.plan.slices`) and returns the documents before and behind those; who takes
the parts in, in order, makes slices of them. He reads for himself a part whose documents are so alike that no end is
certain, and the last one where `corpus.max_bytes` may lie in it. Memory: in each process four units of text, and the
ids and digests of a part.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bytecache.pipeline.plan.index import Split
from bytecache.pipeline.plan.parallel import in_order
from bytecache.pipeline.plan.slices import AllAlikeError, Entry, Slicer
from bytecache.pipeline.plan.writing import Slice, digest_of, identity_bytes, write_slice
from bytecache.pipeline.stores import Store, open_store
from bytecache.schemas.errors import Interrupted
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus.conversations import opening
from bytecache.stages.corpus.files import File
from bytecache.stages.corpus.reader import MAX_DOCUMENT, CorpusReader, Document
from bytecache.stages.corpus.tally import Tally

PART_BYTES = 32 * 1024 * 1024
"""Files are read together up to this size, as they lie; longer JSONL is read in ranges of it."""
SPLITS: tuple[Split, Split] = ("train", "heldout")
Part = tuple[int, tuple[File, ...]]
"""Number of a part in the order of the corpus, and its files; none of a built-in corpus."""
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Cutter:
    """How a corpus is cut. A call is the work of a process that knows one part alone.

    `threshold`: documents whose hash, of (seed, text), is under it are held out. `run_dir`: of the store for the
    slices; empty = documents are counted only.
    """

    corpus: Corpus
    seed: int
    threshold: int = 0
    run_dir: str = ""
    scratch: str = ""

    def hash(self, document: Document, digest: bytes) -> int:
        """A uniform integer below 2^64. Where the text answers something, what it answers decides."""
        kind = self.corpus.kind
        decisive = digest if kind == "text" else opening(document.context, kind).encode("utf-8")
        return int.from_bytes(hashlib.sha256(b"%d\0" % self.seed + decisive).digest()[:8], "big")

    def begin(self, *, known: bool) -> "Cut":
        """Nothing yet; `known`: a slice begins with the first document."""
        store = open_store(self.run_dir, self.scratch) if self.run_dir else None
        slicers = {split: Slicer(self.corpus.unit_bytes, begins=known) for split in SPLITS}
        return Cut(self, store, slicers)

    def __call__(self, part: Part, stop: Stop) -> "Cut | None":
        """What of a part can be made without knowing the others; None where for long no end of a slice is certain."""
        cut = self.begin(known=False)
        try:
            cut.read(part, stop)
        except AllAlikeError:
            return None
        cut.finish(end=False)
        return replace(cut, store=None)

    def corrected(self, cut: "Cut") -> "Cutter":
        """That which leaves neither side empty, given what this one made of all documents.

        Where all hashes are equal nothing is held out: equal texts are on one side.
        """
        if not self.threshold or cut.lowest == cut.highest >= self.threshold:
            return self
        nearest = max(cut.lowest + 1, min(self.threshold, cut.highest))
        return replace(self, threshold=0 if cut.lowest == cut.highest else nearest)


@dataclass
class Cut:
    """What was made of consecutive documents: slices, documents on their way into others, and counts.

    `store`: for the slices; None = documents are counted only. `lowest`, `highest`: of the hashes that decide the
    split; `identities`: of the documents, for who hashes them all.
    """

    cutter: Cutter
    store: Store | None
    slicers: dict[Split, Slicer]
    slices: list[Slice] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    lowest: int = 2**64
    highest: int = -1
    identities: bytearray = field(default_factory=bytearray)

    def read(self, part: Part, stop: Stop) -> None:
        """Take in a part. Raises InputError where it cannot be read, Interrupted, StorageError."""
        number, files = part
        for index, (document, raw) in enumerate(CorpusReader(self.cutter.corpus, self.tally).encoded(files)):
            if stop():
                raise Interrupted("plan stopped by a signal before it was whole; rerun the same command")
            digest = digest_of(document, raw)
            value = self.cutter.hash(document, digest)
            self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
            self.identities += identity_bytes(document.doc_id, digest)
            if self.store is not None:
                split = SPLITS[value < self.cutter.threshold]
                entry = Entry(document.doc_id, raw, document.context, digest, (number, index))
                self._write(split, self.slicers[split].add(entry))

    def join(self, part: "Cut") -> None:
        """Take in what another process made of the next part."""
        self.tally.add(part.tally)
        self.lowest, self.highest = min(self.lowest, part.lowest), max(self.highest, part.highest)
        self.identities += part.identities
        self.slices += part.slices
        for split, slicer in self.slicers.items():
            self._write(split, slicer.join(part.slicers[split]))

    def finish(self, *, end: bool) -> None:
        """Write the slices that are certain; `end`: all, as there are no more documents."""
        for split, slicer in self.slicers.items():
            self._write(split, slicer.slices(end=end))

    def _write(self, split: Split, pieces: Sequence[Sequence[Entry]]) -> None:
        if self.store is not None:
            self.slices += [write_slice(self.store, split, piece, self.cutter.corpus.kind) for piece in pieces]


def cut_corpus(cutter: Cutter, files: Sequence[File], stop: Stop) -> tuple[Cut, dict[str, Any]]:
    """Read a corpus and write its slices; returns what was made, and the identity of the text.

    Raises InputError for text that cannot be read, Interrupted, StorageError.
    """
    corpus = cutter.corpus
    cut, identity = cutter.begin(known=True), hashlib.sha256()
    apart, rest = cut_files(files, corpus.max_bytes)
    jobs = min(corpus.jobs or len(os.sched_getaffinity(0)), len(apart))
    with closing(in_order(cutter, apart if jobs > 1 else [], jobs, stop)) as others:
        for part, other in itertools.zip_longest([*apart, *rest], others):
            if other is not None:
                cut.join(other)
            else:
                cut.read(part, stop)
            identity.update(cut.identities)
            cut.identities.clear()
    cut.finish(end=True)
    CorpusReader(corpus, cut.tally).refuse_nothing()
    return cut, {"sha256": identity.hexdigest(), "n_documents": cut.tally.n_documents, "n_bytes": cut.tally.n_bytes}


def cut_files(files: Sequence[File], max_bytes: int) -> tuple[list[Part], list[Part]]:
    """A corpus as parts of about `PART_BYTES`: files together, as they lie, and ranges of the lines of long ones.

    Returns those that can be read apart, and in a list of one or none the rest, in which `max_bytes` may lie: text is
    shorter than its file where that is not compressed, and the last line of a range ends behind it.
    """
    pieces = [piece for file in files for piece in _ranges(file)]
    n_within = 0
    end = 0
    for file, size in pieces:
        end += size
        reach = end if file.end is None else end + MAX_DOCUMENT
        if max_bytes and not (reach < max_bytes and file.name.endswith((".jsonl", ".txt"))):
            break
        n_within += 1
    groups: list[list[File]] = []
    room = 0
    for file, size in pieces[:n_within]:
        if not groups or size > room:
            groups.append([])
            room = PART_BYTES
        groups[-1].append(file)
        room -= size if file.end is None else PART_BYTES
    rest = tuple(file for file, _ in pieces[n_within:])
    return list(enumerate(map(tuple, groups))), [(len(groups), rest)] if rest or not files else []


def _ranges(file: File) -> list[tuple[File, int]]:
    """A file, or ranges of its lines if it is long, each with its size in bytes."""
    size = Path(file.path).stat().st_size if Path(file.path).is_file() else 0  # whoever reads it will say why
    if not file.name.endswith(".jsonl") or size < 2 * PART_BYTES:
        return [(file, size)]
    edges = [*range(0, size - PART_BYTES + 1, PART_BYTES), size]
    return [(file._replace(begin=low, end=high), high - low) for low, high in itertools.pairwise(edges)]
