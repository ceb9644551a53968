"""The first pass of a plan: what the corpus is, and where in it every slice begins.

The corpus is read in parts of whole files, each by one process. Of a document it takes its id, its size, its hash and
the hash that decides its split; this process goes through them in corpus order, so that nothing depends on how many
processes there are: it makes ids unique, stops at `corpus.max_bytes`, closes slices where they would exceed
`corpus.unit_bytes`, and notes for each part what it begins with.

Price: 200 MB of text a processor second on JSONL; 1.3 us a document in this one process. Memory: 8 bytes a document,
and 150 for those of the parts under way.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytecache.pipeline.plan.index import Split
from bytecache.pipeline.plan.parallel import Processes
from bytecache.schemas.arrays import I64, U64
from bytecache.schemas.errors import InputError, Interrupted
from bytecache.schemas.settings import Corpus, Settings
from bytecache.stages.corpus.conversations import opening
from bytecache.stages.corpus.document_ids import DocumentIds, hash_ids
from bytecache.stages.corpus.reader import CorpusReader, Document, File, corpus_files, is_past

PART_BYTES = 32 * 1024 * 1024
"""Files are read together up to this size, as they lie; a larger one is a part alone."""
IDENTITY = 8 + 32
"""Bytes of a document's identity beside its id."""
SPLITS: tuple[Split, Split] = ("train", "heldout")


@dataclass(frozen=True)
class Rule:
    """Which documents are held out: those whose hash of (seed, text) is under `threshold`.

    A small corpus can miss either side by chance. It is then given its nearest document, by another threshold or by a
    document that stays in training whatever its hash: by `train_hash` all of that hash, by `train_index` one alone.
    """

    seed: int
    kind: str
    threshold: int
    train_hash: int = -1
    train_index: int = -1

    def hash(self, document: Document, raw: bytes) -> int:
        """A uniform integer below 2^64 from the seed and the text; where that answers something, what it answers."""
        text = raw if self.kind == "text" else opening(document.context, self.kind).encode("utf-8")
        return int.from_bytes(hashlib.sha256(b"%d\0" % self.seed + text).digest()[:8], "big")

    def split(self, value: int, index: int) -> Split:
        """The split of the document of this hash and place in the corpus."""
        forced = value == self.train_hash or index == self.train_index
        return "train" if forced or value >= self.threshold else "heldout"

    def below(self, hashes: U64) -> NDArray[np.bool_]:
        """Which hashes are under the threshold; that may be 2^64, which no array holds."""
        return hashes <= np.uint64(self.threshold - 1) if self.threshold else np.zeros(len(hashes), bool)

    def heldout(self, hashes: U64, first: int) -> NDArray[np.bool_]:
        """`split` of consecutive documents from place `first` on: which are held out."""
        found = self.below(hashes)
        if self.train_hash >= 0:
            found &= hashes != np.uint64(self.train_hash)
        if first <= self.train_index < first + len(hashes):
            found[self.train_index - first] = False
        return found


@dataclass
class Packing:
    """Slices as they fill, in corpus order: `unit`, the index of the next one to close; bytes in the open ones."""

    unit_bytes: int
    unit: int = 0
    open: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def closes(self, split: Split, size: int) -> bool:
        """Whether the open slice of this split closes before a document of `size` bytes."""
        return self.open[split] > 0 and self.open[split] + size > self.unit_bytes

    def close(self, split: Split) -> None:
        self.unit += 1
        self.open[split] = 0

    def add(self, split: Split, size: int) -> None:
        self.open[split] += size

    def add_all(self, split: Split, sizes: I64) -> None:
        """As `closes`, `close` and `add` of one document after the other, a slice at a time."""
        ends = np.cumsum(sizes)
        at = 0
        while at < len(sizes):
            before = int(ends[at - 1]) if at else 0
            fitting = int(np.searchsorted(ends, before + self.unit_bytes - self.open[split], "right"))
            if fitting <= at:  # not even one
                if self.open[split]:
                    self.close(split)
                    continue
                fitting = at + 1
            self.open[split] += int(ends[fitting - 1]) - before
            at = fitting


@dataclass(frozen=True)
class Part:
    """Files that one process reads, and what it finds when it comes to the first of their documents.

    `index`: of that document; `unit`, `open`: as in `Packing`; `count`: its documents; `renamed`: new ids by place;
    `digest`: of all its documents, so that a corpus which changes between the passes is noticed.
    """

    files: tuple[File, ...]
    index: int
    unit: int
    open: dict[Split, int]
    count: int
    renamed: dict[int, str]
    digest: str


@dataclass(frozen=True)
class Documents:
    """What the survey takes of some files. `identities`: see `identity_bytes`; `id_hashes`: see `document_ids`.

    `empty`: how many documents came before each empty one; `error`: why it ends there.
    """

    ids: list[str]
    id_hashes: U64
    identities: bytes
    sizes: I64
    hashes: U64
    empty: I64
    error: InputError | None


class Survey:
    """`corpus`: identity and counts of the text; `parts` and `rule`: for the second pass."""

    def __init__(self, settings: Settings, processes: Processes[Any, Any]) -> None:
        self._settings, self._processes = settings, processes
        files, n_ignored = corpus_files(settings.corpus)
        self._groups = grouped(files)
        fraction = settings.corpus.heldout_fraction
        self.rule = Rule(settings.run.seed, settings.corpus.kind, int(fraction * 2**64))
        self._read()
        below, (lowest, _), (highest, last) = self._below, self._lowest, self._highest
        if fraction > 0 and self._n_documents >= 2 and below in (0, self._n_documents):
            threshold = self.rule.threshold if below else lowest + 1
            if below or lowest == highest:  # all turns of a conversation stay, unless there is nothing else
                self.rule = Rule(self.rule.seed, self.rule.kind, threshold, highest if lowest != highest else -1, last)
            else:
                self.rule = Rule(self.rule.seed, self.rule.kind, threshold)
            self._read()
        self.corpus = {
            "sha256": self._identity,
            "n_documents": self._n_documents,
            "n_bytes": self._n_bytes,
            "n_empty_skipped": self._n_empty,
            "n_ids_renamed": self._n_renamed,
            "n_files_ignored": n_ignored,
            "source": Path(settings.corpus.source).name,
        }

    def _read(self) -> None:
        """Go through the corpus by `rule`."""
        corpus = self._settings.corpus
        names, identity, packing = DocumentIds(), hashlib.sha256(), Packing(corpus.unit_bytes)
        self.parts: list[Part] = []
        self._n_documents = self._n_bytes = self._n_empty = self._below = 0
        self._lowest, self._highest = (2**64, -1), (-1, -1)

        def tasks() -> Iterator[tuple[tuple[File, ...], Corpus, Rule, int]]:
            for group in self._groups:
                yield group, corpus, self.rule, corpus.max_bytes - self._n_bytes

        for group, found in zip(self._groups, self._processes.map(survey_files, tasks()), strict=False):
            begun = (self._n_documents, packing.unit, dict(packing.open))
            count, full = self._within_limit(found.sizes)
            self._take(found.sizes[:count], found.hashes[:count], packing)
            identities = found.identities
            if count < len(found.ids):
                identities = identities[: sum(IDENTITY + len(one.encode("utf-8")) for one in found.ids[:count])]
            identity.update(identities)
            renamed = names.add(found.ids[:count], found.id_hashes[:count])
            self.parts.append(Part(group, *begun, count, renamed, hashlib.sha256(identities).hexdigest()))
            self._n_empty += int(np.count_nonzero(found.empty <= count)) if full else len(found.empty)
            if full:
                break
            if found.error is not None:
                raise found.error
        if not self._n_documents:
            raise CorpusReader(corpus).no_text(self._n_empty)
        self._identity, self._n_renamed = identity.hexdigest(), names.n_renamed

    def _within_limit(self, sizes: I64) -> tuple[int, bool]:
        """How many of the next documents come before max_bytes, and whether that is reached."""
        limit = self._settings.corpus.max_bytes
        documents, n_bytes = self._n_documents, self._n_bytes
        for count, size in enumerate(sizes.tolist() if limit else ()):
            if is_past(limit, documents, n_bytes, size):
                return count, True
            documents, n_bytes = documents + 1, n_bytes + size
        return len(sizes), bool(limit) and n_bytes >= limit

    def _take(self, sizes: I64, hashes: U64, packing: Packing) -> None:
        """Count documents in."""
        if not len(sizes):
            return
        first = self._n_documents
        least, most = int(np.argmin(hashes)), len(hashes) - 1 - int(np.argmax(hashes[::-1]))
        self._below += int(np.count_nonzero(self.rule.below(hashes)))
        self._lowest = min(self._lowest, (int(hashes[least]), first + least))
        self._highest = max(self._highest, (int(hashes[most]), first + most))
        heldout = self.rule.heldout(hashes, first)
        for split, mask in zip(SPLITS, (~heldout, heldout), strict=True):
            packing.add_all(split, sizes[mask])
        self._n_documents += len(sizes)
        self._n_bytes += int(sizes.sum())


def grouped(files: Sequence[File]) -> list[tuple[File, ...]]:
    """Consecutive files together, about `PART_BYTES` of them; one group without files for a built-in corpus."""
    groups: list[tuple[File, ...]] = []
    group: list[File] = []
    size = 0
    for file in files:
        try:
            own = os.stat(file[0]).st_size
        except OSError:
            own = 0  # whoever reads it will say why
        if group and size + own > PART_BYTES:
            groups.append(tuple(group))
            group, size = [], 0
        group.append(file)
        size += own
    return [*groups, tuple(group)]


def whole(corpus: Corpus) -> Corpus:
    """The same without an end: where that lies is for the survey to say."""
    return corpus.model_copy(update={"max_bytes": 0})


def processes_for(corpus: Corpus) -> int:
    """As many as `corpus.jobs`, or cores where that is 0; fewer where there is less to share."""
    jobs = min(corpus.jobs or len(os.sched_getaffinity(0)), len(grouped(corpus_files(corpus)[0])))
    return max(min(jobs, corpus.max_bytes // PART_BYTES) if corpus.max_bytes else jobs, 1)


def document_digest(document: Document, raw: bytes) -> bytes:
    """sha256 over the length-prefixed text and, where there is one, context."""
    digest = hashlib.sha256(len(raw).to_bytes(8, "little"))
    digest.update(raw)
    if document.context:
        digest.update(document.context.encode("utf-8"))
    return digest.digest()


def identity_bytes(doc_id: str, digest: bytes) -> bytes:
    """What identifies a document in its corpus: its length-prefixed id and its digest."""
    raw = doc_id.encode("utf-8")
    return len(raw).to_bytes(8, "little") + raw + digest


def survey_files(task: tuple[tuple[File, ...], Corpus, Rule, int], stop: Callable[[], bool]) -> Documents:
    """Read some files, to their end or until `left` bytes are there; in a process of its own, perhaps."""
    files, corpus, rule, left = task
    reader = CorpusReader(whole(corpus))
    ids: list[str] = []
    identities = bytearray()
    sizes: list[int] = []
    hashes: list[int] = []
    empty: list[int] = []
    error = None
    try:
        for document, raw in reader.encoded(files):
            check(stop)
            empty += [len(ids)] * (reader.n_empty - len(empty))
            ids.append(document.doc_id)
            identities += identity_bytes(document.doc_id, document_digest(document, raw))
            sizes.append(len(raw))
            hashes.append(rule.hash(document, raw))
            if corpus.max_bytes and reader.n_bytes >= left:
                break
    except InputError as found:  # it may lie behind max_bytes, which only the whole corpus knows
        error = found
    empty += [len(ids)] * (reader.n_empty - len(empty))
    return Documents(
        ids, hash_ids(ids), bytes(identities), np.array(sizes, np.int64), np.array(hashes, np.uint64),
        np.array(empty, np.int64), error,
    )  # fmt: skip


def check(stop: Callable[[], bool]) -> None:
    """Raise Interrupted where `stop()`."""
    if stop():
        raise Interrupted("plan stopped by a signal before it was whole; rerun the same command")
