"""The second pass of a plan: every part of the corpus written as slices, by as many processes as the survey had.

A part knows from the survey which units it begins in, so its process writes all slices that lie within it. Of a slice
that goes on from the part before or into the next one it returns the documents; this process joins and writes those,
and collects the units in order. A slice is committed under a name that holds its content, before the page that
names it. Memory: in each process two open slices and the borders of a part or two.

Price: 100 MB of text a processor second on JSONL. A third of it is zstd, at level 1: level 3 would be 7 % smaller and
take 2.2 times as long.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.pipeline.plan.index import Split, Unit
from bytecache.pipeline.plan.parallel import Processes
from bytecache.pipeline.plan.survey import (
    SPLITS,
    Packing,
    Part,
    Rule,
    Survey,
    check,
    document_digest,
    identity_bytes,
    whole,
)  # fmt: skip
from bytecache.pipeline.stores import Store, disk_errors, open_store
from bytecache.schemas.errors import InputError
from bytecache.schemas.files import file_sha256
from bytecache.schemas.settings import Corpus, Settings
from bytecache.stages.corpus.conversations import KIND_KEY
from bytecache.stages.corpus.reader import CorpusReader

SLICE_SCHEMA = pa.schema([("doc_id", pa.string()), ("text", pa.string()), ("context", pa.string())])


@dataclass
class Pile:
    """Documents of one slice: their columns, and digests for its name."""

    ids: list[str] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def add(self, doc_id: str, raw: bytes, context: str, digest: bytes) -> None:
        self.ids.append(doc_id)
        self.texts.append(raw)
        self.contexts.append(context)
        self.digests.append(digest)

    def identities(self) -> bytes:
        """`identity_bytes` of all."""
        return b"".join(map(identity_bytes, self.ids, self.digests))

    def extend(self, other: "Pile") -> None:
        """Put the documents of another one behind."""
        self.ids += other.ids
        self.texts += other.texts
        self.contexts += other.contexts
        self.digests += other.digests


@dataclass(frozen=True)
class Closed:
    """A slice that began in an earlier part and ends in this one, as unit `index`."""

    index: int
    split: Split


@dataclass(frozen=True)
class Written:
    """What became of a part: units in order; documents of slices that began before it, and of those it leaves open."""

    units: list[Unit | Closed]
    before: dict[Split, Pile]
    after: dict[Split, Pile]
    digest: str


@dataclass(frozen=True)
class Writing:
    """A part to write, and where to."""

    part: Part
    rule: Rule
    corpus: Corpus
    run_dir: str
    scratch: str


def write_slices(store: Store, settings: Settings, survey: Survey, processes: Processes[Any, Any]) -> Iterator[Unit]:
    """Write every slice; the units in order. Raises InputError if the corpus is not what was surveyed."""
    carried = {split: Pile() for split in SPLITS}
    kind, count = settings.corpus.kind, 0
    here = store if processes.jobs == 1 else None
    tasks = [Writing(part, survey.rule, settings.corpus, store.name, settings.run.scratch) for part in survey.parts]
    for part, found in zip(survey.parts, processes.map(PartWriter(here), tasks), strict=True):
        if found.digest != part.digest:
            raise InputError(
                f"corpus {settings.corpus.source} changed while it was being read; rerun when it is at rest"
            )
        for made in found.units:
            if isinstance(made, Closed):
                carried[made.split].extend(found.before[made.split])
                unit = write_slice(store, made.index, made.split, carried[made.split], kind)
                carried[made.split], found.before[made.split] = Pile(), Pile()
            else:
                unit = made
            count += 1
            yield unit
        for split in SPLITS:
            carried[split].extend(found.before[split])
            carried[split].extend(found.after[split])
    for split in SPLITS:
        if carried[split].ids:
            yield write_slice(store, count, split, carried[split], kind)
            count += 1


@dataclass(frozen=True)
class PartWriter:
    """Writes parts; in other processes each opens the store anew."""

    store: Store | None

    def __call__(self, task: Writing, stop: Callable[[], bool]) -> Written:
        part, rule, kind = task.part, task.rule, task.corpus.kind
        store = self.store or open_store(task.run_dir, task.scratch)
        packing = Packing(task.corpus.unit_bytes, part.unit, dict(part.open))
        inherited = {split: part.open[split] > 0 for split in SPLITS}
        piles = {split: Pile() for split in SPLITS}
        before = {split: Pile() for split in SPLITS}
        made: list[Unit | Closed] = []
        identities = hashlib.sha256()
        documents = islice(CorpusReader(whole(task.corpus)).encoded(part.files), part.count)
        for at, (document, raw) in enumerate(documents):
            check(stop)
            digest = document_digest(document, raw)
            identities.update(identity_bytes(document.doc_id, digest))
            split = rule.split(rule.hash(document, raw), part.index + at)
            if packing.closes(split, len(raw)):
                if inherited[split]:
                    before[split], inherited[split] = piles[split], False
                    made.append(Closed(packing.unit, split))
                else:
                    made.append(write_slice(store, packing.unit, split, piles[split], kind))
                piles[split] = Pile()
                packing.close(split)
            packing.add(split, len(raw))
            piles[split].add(part.renamed.get(at, document.doc_id), raw, document.context, digest)
        for split in SPLITS:
            if inherited[split]:
                before[split], piles[split] = piles[split], Pile()
        return Written(made, before, piles, identities.hexdigest())


def write_slice(store: Store, index: int, split: Split, pile: Pile, kind: str) -> Unit:
    """Commit the slice of one unit."""
    # The name holds the content, so a half-written plan of other settings can never lend a slice to this one.
    content = hashlib.sha256(kind.encode() + b"\0" + pile.identities()).hexdigest()
    key = f"plan/slices/{index:05d}-{split}-{content[:12]}.parquet"
    temporary = store.temp_path(key)
    with disk_errors(f"writing {temporary}"):
        try:
            columns = [pa.array(pile.ids, pa.string()), _texts(pile.texts), pa.array(pile.contexts, pa.string())]
            table = pa.Table.from_arrays(columns, schema=SLICE_SCHEMA.with_metadata({KIND_KEY: kind}))
            pq.write_table(
                table, temporary, compression="zstd", compression_level=1, use_dictionary=False, row_group_size=1024
            )
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sha256 = file_sha256(temporary)
    commit(store, key, temporary, sha256)
    size = sum(map(len, pile.texts))
    return Unit(index=index, split=split, slice=key, sha256=sha256, n_docs=len(pile.ids), n_bytes=size)


def _texts(texts: Sequence[bytes]) -> Any:
    """Strings that are UTF-8 already, put together without a look at each."""
    edges = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=edges[1:])
    if edges[-1] >= 2**31:
        return pa.array([text.decode("utf-8") for text in texts], pa.string())
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(edges.astype(np.int32)), pa.py_buffer(b"".join(texts)))


def commit(store: Store, key: str, temporary: Any, sha256: str) -> None:
    """Publish a file that nothing vouches for yet; one that is there already and differs is damaged."""
    if store.exists(key) and store.sha256(key) != sha256:
        store.replace(key, temporary)
    else:
        store.put_if_absent(key, temporary)
