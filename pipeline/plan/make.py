"""Planning: the corpus cut into immutable slices, the units of all later work.

One pass over the corpus, by `corpus.jobs` processes (`pipeline.plan.parts`). Documents stay in the order of the corpus,
each split apart; where a slice ends is for the documents to say (`pipeline.plan.slices`). A document is held out if a
hash of (seed, text) falls under `corpus.heldout_fraction`, so equal texts never straddle the splits; where that leaves
a side empty, the threshold is moved to the nearest document and the corpus read once more. The plan does not depend on
how many processes there were. What is written, and in which order: `pipeline.plan.index`. Price: see
`benchmarks/planning.py`; a repeated plan only counts the corpus and hashes the slices.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from bytecache.pipeline.plan.index import (
    PAGE,
    PLAN_KEY,
    Index,
    Plan,
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
from bytecache.pipeline.plan.parallel import Processes
from bytecache.pipeline.plan.parts import Cut, Cutter, Rule, cut_corpus, processes_for
from bytecache.pipeline.plan.writing import Slice, delete_slices
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units.receipts import (
    FileRecord,
    OtherVersion,
    Receipt,
    read_receipt,
    record_file,
    replace_receipt,
    software_versions,
)
from bytecache.pipeline.units.runner import commit_file
from bytecache.schemas.errors import InputError, IntegrityError
from bytecache.schemas.settings import Settings
from bytecache.stages.corpus.files import File, corpus_files, source_name


def make_plan(store: Store, settings: Settings, stop: Callable[[], bool] = lambda: False) -> tuple[Plan, bool]:
    """Plan the run; returns the plan and whether it is new.

    Raises InputError (corpus), ConfigError (a plan of another corpus or other settings is already there),
    Interrupted (`stop()` became true; rerun).
    """
    corpus = settings.corpus
    old = read_plan(store)
    if old is not None:
        refuse_changes(old, settings, None)
    files, ignored = corpus_files(corpus)
    stamp = _stamp(files)
    rule = Rule(settings.run.seed, corpus.kind, int(corpus.heldout_fraction * 2**64))
    with Processes[Any, Any](processes_for(corpus, files), stop) as processes:
        if old is not None:
            refuse_changes(old, settings, _identity(*cut_corpus(Cutter(corpus, rule), files, None, processes)))
            if _is_whole(old):
                _write_receipts(old)
                return old, False
        cut, sha256 = cut_corpus(Cutter(corpus, rule, store.name, settings.run.scratch), files, store, processes)
        corrected = rule.corrected(cut.lowest, cut.highest)
        if corrected != rule:
            uneven = cut.slices
            cutter = Cutter(corpus, corrected, store.name, settings.run.scratch)
            cut, sha256 = cut_corpus(cutter, files, store, processes)
            delete_slices(store, uneven, but=cut.slices)
    if _stamp(files) != stamp:
        raise InputError(f"corpus {corpus.source} changed while it was being read; rerun when it is at rest")
    text = _identity(cut, sha256) | {
        "n_empty_skipped": cut.tally.empty,
        "n_ids_renamed": sum(one.n_renamed for one in cut.slices),
        "n_files_ignored": len(ignored),
        "passed_over": cut.tally.as_json(),
        "is_cut": cut.is_cut,
        "source": source_name(corpus.source),
    }
    index = _write_pages(store, settings, text, sorted(cut.slices))
    if old is not None and old.hash != index.hash:
        raise IntegrityError(f"{store.name}: damaged slices cannot be rewritten alike; plan again in a new run.dir")
    plan = Plan(index, store)
    if not store.put_if_absent(PLAN_KEY, store.write_temp(PLAN_KEY, index_bytes(index))):
        plan = read_plan(store) or plan
        refuse_changes(plan, settings, text)
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
        if not _has_receipt(store, sha256):
            page = plan.units.page(number)
            files = tuple(record_file(store, name) for name in (key, *(unit.slice for unit in page)))
            counts = {"units": len(page), "bytes": sum(unit.n_bytes for unit in page)}
            replace_receipt(store, _receipt(sha256, f"page {number}", files, {"plan": plan.hash}, counts))
    if not _has_receipt(store, plan.hash):
        inputs = {"corpus": corpus_identity(plan.corpus), "settings": plan.settings}
        counts = {**plan.corpus, "units": len(plan.sizes)}
        replace_receipt(store, _receipt(plan.hash, "plan", (record_file(store, PLAN_KEY),), inputs, counts))


def _has_receipt(store: Store, key: str) -> bool:
    """Whether there is one that checks; what does not is written anew from files that were just found whole."""
    try:
        return read_receipt(store, "plan", key) is not None
    except OtherVersion:
        raise
    except IntegrityError:
        return False


def _receipt(
    key: str, name: str, files: tuple[FileRecord, ...], inputs: dict[str, Any], counts: dict[str, Any]
) -> Receipt:
    return Receipt(
        stage="plan", key=key, name=name, files=files, inputs=inputs, counts=counts, versions=software_versions()
    )


def slice_is_whole(store: Store, unit: Unit) -> bool:
    """Whether the unit's slice file is there and hashes to the plan's sha256."""
    return store.exists(unit.slice) and store.sha256(unit.slice) == unit.sha256


def _stamp(files: Sequence[File]) -> str:
    """What tells files that were written to from files at rest: a hash of their sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        with suppress(OSError):  # whoever reads it will say why
            stat = os.stat(file.path)
            digest.update(b"%d %d\n" % (stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def _identity(cut: Cut, sha256: str) -> dict[str, Any]:
    return {"sha256": sha256, "n_documents": cut.n_documents, "n_bytes": cut.n_bytes}


def _write_pages(store: Store, settings: Settings, corpus: dict[str, Any], slices: Sequence[Slice]) -> Index:
    """The pages of these slices as units; returns the index, which is not yet written."""
    units = [
        Unit(index=at, split=one.split, slice=one.key, sha256=one.sha256, n_docs=one.n_docs, n_bytes=one.n_bytes)
        for at, one in enumerate(slices)
    ]
    pages: list[str] = []
    for first in range(0, len(units), PAGE):
        raw = page_bytes(units[first : first + PAGE])
        pages.append(hashlib.sha256(raw).hexdigest())
        key = page_key(len(pages) - 1, pages[-1])
        commit_file(store, key, store.write_temp(key, raw))
    heldout = [unit.index for unit in units if unit.split == "heldout"]
    return make_index(corpus, shape_of(settings), [unit.n_bytes for unit in units], heldout, pages, PAGE)
