"""Planning: the corpus cut once into immutable slices, the units of all later work.

Two streaming passes. The first hashes every document and finds the held-out threshold; it is all that a
repeated `plan` costs. The second writes slices: documents in corpus order, each split apart, a slice closed
before it would exceed `corpus.unit_bytes` (a longer document is a slice alone). A document is held out if
sha256(seed, text) falls under `corpus.heldout_fraction`, so equal texts never straddle the splits.
What is written, and in which order: `pipeline.plan`. Memory: two open slices, a page of units and a number a unit.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import (
    PAGE,
    PLAN_KEY,
    Index,
    Plan,
    Split,
    Unit,
    corpus_identity,
    index_bytes,
    make_index,
    page_bytes,
    page_key,
    read_plan,
    refuse_changes,
    shape_of,
)
from pipeline.receipts import (
    FileRecord,
    Receipt,
    canonical_json,
    read_receipt,
    record_file,
    software_versions,
    write_receipt,
)
from pipeline.stores import Store, disk_errors, sha256_file
from schemas.errors import InputError, IntegrityError, Interrupted
from schemas.settings import Settings
from stages.conversations import KIND_KEY, opening
from stages.corpus import CorpusReader, Document

SLICE_SCHEMA = pa.schema([("doc_id", pa.string()), ("text", pa.string()), ("context", pa.string())])


class TextHash:
    """Identity of a corpus: sha256 over the length-prefixed id, text and context of every document, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> None:
        """Take in the next document."""
        for part in document if document.context else document[:2]:
            raw = part.encode("utf-8")
            self._hash.update(len(raw).to_bytes(8, "little"))
            self._hash.update(raw)

    def hexdigest(self) -> str:
        """Hex sha256 of the documents so far."""
        return self._hash.hexdigest()


class _Survey:
    """First pass: identity of the text, and the hash below which a document is held out."""

    def __init__(self, settings: Settings, stop: Callable[[], bool]) -> None:
        reader = CorpusReader(settings.corpus)
        digest = TextHash()
        threshold = int(settings.corpus.heldout_fraction * 2**64)
        below = 0
        lowest, highest = (2**64, -1), (-1, -1)
        for index, document in enumerate(reader):
            _check(stop)
            digest.add(document)
            value = split_hash(settings.run.seed, _split_by(document, settings.corpus.kind))
            below += value < threshold
            lowest = min(lowest, (value, index))
            highest = max(highest, (value, index))
        self.threshold = threshold
        self.forced_train: tuple[int, int] = (-1, -1)
        # A small corpus can miss either side by chance: give it its nearest document, if a split was asked for.
        if settings.corpus.heldout_fraction > 0 and reader.n_documents >= 2:
            if below == 0:
                self.threshold = lowest[0] + 1
                below = reader.n_documents if lowest[0] == highest[0] else 1
            if below == reader.n_documents:
                # All turns of a conversation, unless there is nothing else.
                self.forced_train = (highest[0] if lowest[0] != highest[0] else -1, highest[1])
        self.corpus = {
            "sha256": digest.hexdigest(),
            "n_documents": reader.n_documents,
            "n_bytes": reader.n_bytes,
            "n_empty_skipped": reader.n_empty,
            "n_ids_renamed": reader.n_renamed,
            "n_files_ignored": reader.n_ignored_files,
            "source": Path(settings.corpus.source).name,
        }

    def split(self, index: int, seed: int, text: str) -> Split:
        value = split_hash(seed, text)
        forced = value == self.forced_train[0] or index == self.forced_train[1]
        return "train" if forced or value >= self.threshold else "heldout"


def _split_by(document: Document, kind: str) -> str:
    """What decides a document's split: its text; where it answers something, what it answers."""
    return document.text if kind == "text" else opening(document.context, kind)


def split_hash(seed: int, text: str) -> int:
    """A uniform integer below 2^64 from (seed, text): compared with heldout_fraction * 2^64."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0".encode() + text.encode("utf-8")).digest()[:8], "big")


def make_plan(store: Store, settings: Settings, stop: Callable[[], bool] = lambda: False) -> tuple[Plan, bool]:
    """Plan the run; returns the plan and whether it is new.

    Raises InputError (corpus), ConfigError (a plan of another corpus or other settings is already there),
    Interrupted (`stop()` became true; rerun).
    """
    survey = _Survey(settings, stop)
    old = read_plan(store)
    if old is not None:
        refuse_changes(old, settings, survey.corpus)
        if _is_whole(old):
            _write_receipts(old)
            return old, False
    index = _write_slices(store, settings, survey, stop)
    if old is not None and old.hash != index.hash:
        raise IntegrityError(f"{store.name}: damaged slices cannot be rewritten alike; plan again in a new run.dir")
    plan = Plan(index, store)
    if not store.put_if_absent(PLAN_KEY, store.write_temp(PLAN_KEY, index_bytes(index))):
        plan = read_plan(store) or plan
        refuse_changes(plan, settings, survey.corpus)
    _write_receipts(plan)
    return plan, old is None


def _is_whole(plan: Plan) -> bool:
    try:
        return all(slice_is_whole(plan.store, unit) for unit in plan.units)
    except IntegrityError:  # a page
        return False


def _write_receipts(plan: Plan) -> None:
    """One for every page and its slices, one for the index."""
    store = plan.store
    for number, (key, sha256) in enumerate(zip(plan.page_keys, plan.index.pages, strict=True)):
        if read_receipt(store, "plan", sha256) is None:
            page = plan.units.page(number)
            files = tuple(record_file(store, name) for name in (key, *(unit.slice for unit in page)))
            counts = {"units": len(page), "bytes": sum(unit.n_bytes for unit in page)}
            write_receipt(store, _receipt(sha256, f"page {number}", files, {"plan": plan.hash}, counts))
    if read_receipt(store, "plan", plan.hash) is None:
        inputs = {"corpus": corpus_identity(plan.corpus), "settings": plan.settings}
        counts = {**plan.corpus, "units": len(plan.sizes)}
        write_receipt(store, _receipt(plan.hash, "plan", (record_file(store, PLAN_KEY),), inputs, counts))


def _receipt(
    key: str, name: str, files: tuple[FileRecord, ...], inputs: dict[str, Any], counts: dict[str, Any]
) -> Receipt:
    return Receipt(
        stage="plan", key=key, name=name, files=files, inputs=inputs, counts=counts, versions=software_versions()
    )


def slice_is_whole(store: Store, unit: Unit) -> bool:
    """Whether the unit's slice file is there and hashes to the plan's sha256."""
    return store.exists(unit.slice) and store.sha256(unit.slice) == unit.sha256


def _write_slices(store: Store, settings: Settings, survey: _Survey, stop: Callable[[], bool]) -> Index:
    sizes: list[int] = []
    heldout: list[int] = []
    pages: list[str] = []
    page: list[Unit] = []
    open_docs: dict[Split, list[Document]] = {"train": [], "heldout": []}
    open_bytes: dict[Split, int] = {"train": 0, "heldout": 0}

    def close_page() -> None:
        raw = page_bytes(page)
        sha256 = hashlib.sha256(raw).hexdigest()
        key = page_key(len(pages), sha256)
        _commit(store, key, store.write_temp(key, raw), sha256)
        pages.append(sha256)
        page.clear()

    def close(split: Split) -> None:
        if not open_docs[split]:
            return
        kind = settings.corpus.kind
        page.append(_write_slice(store, len(sizes), split, open_docs[split], open_bytes[split], kind))
        heldout.extend([len(sizes)] if split == "heldout" else [])
        sizes.append(open_bytes[split])
        open_docs[split], open_bytes[split] = [], 0
        if len(page) == PAGE:
            close_page()

    digest = TextHash()
    for index, document in enumerate(CorpusReader(settings.corpus)):
        _check(stop)
        digest.add(document)
        split = survey.split(index, settings.run.seed, _split_by(document, settings.corpus.kind))
        size = len(document.text.encode("utf-8"))
        if open_bytes[split] + size > settings.corpus.unit_bytes:
            close(split)
        open_docs[split].append(document)
        open_bytes[split] += size
    close("train")
    close("heldout")
    if page:
        close_page()
    if digest.hexdigest() != survey.corpus["sha256"]:
        raise InputError(f"corpus {settings.corpus.source} changed while it was being read; rerun when it is at rest")
    return make_index(survey.corpus, shape_of(settings), sizes, heldout, pages, PAGE)


def _commit(store: Store, key: str, temporary: Path, sha256: str) -> None:
    """Publish a file that nothing vouches for yet; one that is there already and differs is damaged."""
    if store.exists(key) and store.sha256(key) != sha256:
        store.replace(key, temporary)
    else:
        store.put_if_absent(key, temporary)


def _write_slice(store: Store, index: int, split: Split, docs: list[Document], n_bytes: int, kind: str) -> Unit:
    # The name holds the content, so a half-written plan of other settings can never lend a slice to this one.
    content = hashlib.sha256(canonical_json([kind, *docs])).hexdigest()
    key = f"plan/slices/{index:05d}-{split}-{content[:12]}.parquet"
    temporary = store.temp_path(key)
    with disk_errors(f"writing {temporary}"):
        try:
            columns = [pa.array(column, pa.string()) for column in zip(*docs, strict=True)]
            table = pa.Table.from_arrays(columns, schema=SLICE_SCHEMA.with_metadata({KIND_KEY: kind}))
            pq.write_table(table, temporary, compression="zstd", compression_level=3, row_group_size=1024)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sha256 = sha256_file(temporary)
    _commit(store, key, temporary, sha256)
    return Unit(index=index, split=split, slice=key, sha256=sha256, n_docs=len(docs), n_bytes=n_bytes)


def _check(stop: Callable[[], bool]) -> None:
    if stop():
        raise Interrupted("plan stopped by a signal before it was whole; rerun the same command")
