"""A corpus read in parts by several processes that share nothing, and its slices as if one had read it all.

A part is some files, or a range of the lines of a long one. Its process writes every slice between the first and the
last end that it can be certain of (`pipeline.plan.slices`) and returns the documents before and behind those; the one
process that knows all parts makes slices of them. It reads for itself a part that cannot be judged alone: that in which
`corpus.max_bytes` lies, one with an error, which is raised in its turn, and one whose documents are so alike that no
end is certain. Memory: in each process four units of text, and the ids and digests of a part.
"""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bytecache.pipeline.plan.index import Split
from bytecache.pipeline.plan.parallel import Processes
from bytecache.pipeline.plan.slices import Entry, Slicer
from bytecache.pipeline.plan.writing import Slice, digest_of, identity_bytes, write_slice
from bytecache.pipeline.stores import Store, open_store
from bytecache.schemas.errors import InputError, Interrupted
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus.conversations import opening
from bytecache.stages.corpus.files import File
from bytecache.stages.corpus.reader import CorpusReader, Document, is_past
from bytecache.stages.corpus.tally import Tally

PART_BYTES = 32 * 1024 * 1024
"""Files are read together up to this size, as they lie; longer JSONL is read in ranges of it."""
LONGEST_HEAD = 4 * PART_BYTES
"""Bytes of text after which a process gives up looking for the first end of a slice."""
SPLITS: tuple[Split, Split] = ("train", "heldout")
Part = tuple[int, tuple[File, ...]]
"""Number of a part in the order of the corpus, and its files; none of a built-in corpus."""
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Rule:
    """Which documents are held out: those whose hash, of (seed, text), is under `threshold`."""

    seed: int
    kind: str
    threshold: int

    def hash(self, document: Document, digest: bytes) -> int:
        """A uniform integer below 2^64. Where the text answers something, what it answers decides."""
        decisive = digest if self.kind == "text" else opening(document.context, self.kind).encode("utf-8")
        return int.from_bytes(hashlib.sha256(b"%d\0" % self.seed + decisive).digest()[:8], "big")

    def corrected(self, lowest: int, highest: int) -> "Rule":
        """The rule that leaves neither side empty, given the lowest and the highest hash of all documents.

        Where all hashes are equal nothing is held out: equal texts are on one side.
        """
        if not self.threshold or lowest == highest >= self.threshold:
            return self
        nearest = max(lowest + 1, min(self.threshold, highest))
        return replace(self, threshold=0 if lowest == highest else nearest)


@dataclass
class Cut:
    """What was made of the corpus so far, or of a part: slices, documents on their way into others, and what was read.

    `unused`: slices that were written and are of no plan; `lowest`, `highest`: of the hashes that decide the split;
    `identities`: of the documents, for who hashes them all. `is_full`: `corpus.max_bytes` is reached; `is_cut`: there
    is more behind it; `is_whole`: nothing went wrong, else nothing of it counts.
    """

    slicers: dict[Split, Slicer]
    slices: list[Slice] = field(default_factory=list)
    unused: list[Slice] = field(default_factory=list)
    n_documents: int = 0
    n_bytes: int = 0
    tally: Tally = field(default_factory=Tally)
    lowest: int = 2**64
    highest: int = -1
    identities: bytearray = field(default_factory=bytearray)
    is_full: bool = False
    is_cut: bool = False
    is_whole: bool = True


@dataclass(frozen=True)
class Cutter:
    """Cuts parts of a corpus by a rule; a call is the work of a process that knows one part alone.

    `run_dir`: of the store for the slices; empty = documents are counted only.
    """

    corpus: Corpus
    rule: Rule
    run_dir: str = ""
    scratch: str = ""

    def __call__(self, part: Part, stop: Stop) -> Cut:
        """What of a part can be made without knowing the others."""
        cut, store = self.begin(known=False), open_store(self.run_dir, self.scratch) if self.run_dir else None
        try:
            self.read(cut, part, store, stop, limit=0)
            self.finish(cut, store, end=False)
        except InputError:  # it may lie behind max_bytes: who reads in order will see
            cut.is_whole = False
        return cut

    def begin(self, *, known: bool) -> Cut:
        """Nothing yet; `known`: a slice begins with the first document."""
        return Cut({split: Slicer(self.corpus.unit_bytes, begins=known) for split in SPLITS})

    def read(self, cut: Cut, part: Part, store: Store | None, stop: Stop, limit: int) -> None:
        """Take in a part, up to `limit` bytes of all text. Raises InputError where it cannot be read, Interrupted."""
        reader = CorpusReader(_endless(self.corpus))
        documents = reader.encoded(part[1])
        tally = None
        for index, (document, raw) in enumerate(documents):
            if stop():
                raise Interrupted("plan stopped by a signal before it was whole; rerun the same command")
            cut.is_full = cut.is_cut = is_past(limit, cut.n_documents, cut.n_bytes, len(raw))
            if not cut.is_full:
                self._take(cut, document, raw, (part[0], index), store)
                cut.is_full = 0 < limit <= cut.n_bytes
                if cut.is_full:  # empty documents behind the end are not counted
                    tally = replace(reader.tally, unanswered=Counter(reader.tally.unanswered))
                    cut.is_cut = _goes_on(documents)
            if cut.is_full:
                break
        cut.tally.add(tally or reader.tally)

    def _take(self, cut: Cut, document: Document, raw: bytes, place: tuple[int, int], store: Store | None) -> None:
        digest = digest_of(document, raw)
        value = self.rule.hash(document, digest)
        cut.n_documents += 1
        cut.n_bytes += len(raw)
        cut.lowest, cut.highest = min(cut.lowest, value), max(cut.highest, value)
        cut.identities += identity_bytes(document.doc_id, digest)
        if store is None:
            return
        split = SPLITS[value < self.rule.threshold]
        slicer = cut.slicers[split]
        self._write(cut, store, split, slicer.add(Entry(document.doc_id, raw, document.context, digest, place)))
        if slicer.head is None and slicer.n_bytes > LONGEST_HEAD:
            raise InputError(f"no slice ends for certain within {LONGEST_HEAD} bytes")

    def _write(self, cut: Cut, store: Store | None, split: Split, pieces: Iterable[Sequence[Entry]]) -> None:
        if store is not None:
            cut.slices += [write_slice(store, split, piece, self.corpus.kind) for piece in pieces]

    def join(self, cut: Cut, part: Cut, store: Store | None) -> None:
        """Take in what another process made of the next part."""
        cut.n_documents += part.n_documents
        cut.n_bytes += part.n_bytes
        cut.tally.add(part.tally)
        cut.lowest, cut.highest = min(cut.lowest, part.lowest), max(cut.highest, part.highest)
        cut.identities += part.identities
        cut.slices += part.slices
        for split, slicer in cut.slicers.items():
            head = part.slicers[split].head
            if head is not None:
                slicer.extend(head)
                self._write(cut, store, split, slicer.slices(end=True))
            slicer.extend(part.slicers[split].open)
        self.finish(cut, store, end=False)

    def finish(self, cut: Cut, store: Store | None, *, end: bool) -> None:
        """Write the slices that are certain; `end`: all, as there are no more documents."""
        for split, slicer in cut.slicers.items():
            self._write(cut, store, split, slicer.slices(end=end))


def cut_corpus(
    cutter: Cutter, files: Sequence[File], store: Store | None, processes: Processes[Any, Any]
) -> tuple[Cut, str]:
    """Read a corpus and, where there is a store, write its slices; returns what was made, and the sha256 of the text.

    Raises InputError for text that cannot be read, Interrupted, StorageError.
    """
    cut, identity, limit = cutter.begin(known=True), hashlib.sha256(), cutter.corpus.max_bytes
    parts, written = cut_files(files), list[Slice]()
    last = parts[0]
    wanted = (part for part in parts if not cut.is_full)
    others = processes.map(cutter, wanted) if processes.jobs > 1 else itertools.repeat(None)
    for part, other in zip(parts, others, strict=False):
        written += other.slices if other else []
        if cut.is_full:
            continue
        if other and other.is_whole and not 0 < limit <= cut.n_bytes + other.n_bytes:
            cutter.join(cut, other, store)
        else:
            _read_here(cutter, cut, part, store, processes.stop)
        last = part
        identity.update(cut.identities)
        cut.identities.clear()
    cut.is_cut = cut.is_cut or (cut.is_full and last is not parts[-1])
    cutter.finish(cut, store, end=True)
    if not cut.n_documents:
        raise CorpusReader(cutter.corpus).no_text(cut.tally)
    cut.unused = sorted(set(written).difference(cut.slices))
    return cut, identity.hexdigest()


def _goes_on(documents: Iterator[tuple[Document, bytes]]) -> bool:
    """Whether there is another document, be it one that cannot be read."""
    try:
        return next(documents, None) is not None
    except InputError:
        return True


def _read_here(cutter: Cutter, cut: Cut, part: Part, store: Store | None, stop: Stop) -> None:
    try:
        cutter.read(cut, part, store, stop, cutter.corpus.max_bytes)
    except InputError:
        # What is wrong in a range of lines is looked for again from the file's first line on, to number it.
        ranges = [File(file.path, file.name) for file in part[1] if file.begin]
        for _ in CorpusReader(_endless(cutter.corpus)).encoded(ranges) if ranges else ():
            pass
        raise


def _endless(corpus: Corpus) -> Corpus:
    """The same without an end: where `max_bytes` lies is known to who reads from the beginning."""
    return corpus.model_copy(update={"max_bytes": 0})


def cut_files(files: Sequence[File]) -> list[Part]:
    """A corpus as parts of about `PART_BYTES`: files together, as they lie, and ranges of the lines of long ones."""
    groups: list[list[File]] = []
    room = 0
    for file in files:
        size = Path(file.path).stat().st_size if Path(file.path).is_file() else 0  # whoever reads it will say why
        if file.name.endswith(".jsonl") and size >= 2 * PART_BYTES:
            edges = [*range(0, size - PART_BYTES + 1, PART_BYTES), size]
            groups += [[file._replace(begin=low, end=high)] for low, high in itertools.pairwise(edges)]
            room = 0
        elif not groups or size > room:
            groups.append([file])
            room = PART_BYTES - size
        else:
            groups[-1].append(file)
            room -= size
    return list(enumerate(map(tuple, groups or [[]])))


def processes_for(corpus: Corpus, files: Sequence[File]) -> int:
    """As many as `corpus.jobs`, or cores where that is 0; fewer where there is less to share."""
    jobs = min(corpus.jobs or len(os.sched_getaffinity(0)), len(cut_files(files)))
    return max(min(jobs, corpus.max_bytes // PART_BYTES) if corpus.max_bytes else jobs, 1)
