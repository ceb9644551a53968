"""Planning: the corpus cut into immutable slices, the units of all later work.

One pass over the corpus, by `corpus.jobs` processes (`pipeline.plan.parts`). Documents stay in the order of the corpus,
each split apart; where a slice ends is for the documents to say (`pipeline.plan.slices`). A document is held out if a
hash of (seed, text) falls under `corpus.heldout_fraction`, so equal texts never straddle the splits; where that leaves
a side empty, the threshold is moved to the nearest document and the corpus read once more. A new edition begins from
the threshold of the one before, so that what is held out stays so. The plan does not depend on how many processes there
were. What is written, and in which order: `pipeline.plan.index`. Price: see
`benchmarks/planning.py`; a repeated plan only counts the corpus and hashes the slices.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from bytecache.pipeline.plan.editions import edition_key, known_plans, newest_plan, succeed
from bytecache.pipeline.plan.index import (
    PAGE,
    PLAN_KEY,
    Index,
    Lineage,
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
from bytecache.schemas.errors import InputError, IntegrityError, StorageError
from bytecache.schemas.settings import Settings
from bytecache.stages.corpus.files import File, corpus_files, source_name


def make_plan(
    store: Store, settings: Settings, stop: Callable[[], bool] = lambda: False, *, grow: bool = False
) -> tuple[Plan, bool]:
    """Plan the run; returns the plan and whether it is new.

    `grow`: a corpus that changed since makes a new edition of the plan (`pipeline.plan.editions`).

    Raises InputError (corpus), ConfigError (a plan of other settings is already there, or of another corpus and not
    `grow`), Interrupted (`stop()` became true; rerun).
    """
    corpus = settings.corpus
    old = newest_plan(store)
    if old is not None:
        refuse_changes(old, settings, None)
    files, ignored = corpus_files(corpus)
    stamp = _stamp(files)
    rule = Rule(settings.run.seed, corpus.kind, int(corpus.heldout_fraction * 2**64))
    lineage = Lineage()
    with Processes[Any, Any](processes_for(corpus, files), stop) as processes:
        if old is not None:
            now = _identity(*cut_corpus(Cutter(corpus, rule), files, None, processes))
            if not grow:
                refuse_changes(old, settings, now)
            same = old.corpus["sha256"] == now["sha256"]
            if same and _is_whole(old):
                _write_receipts(old)
                return old, False
            rule = replace(rule, threshold=int(old.index.threshold, 16) or rule.threshold)
            lineage = Lineage(old.edition, old.index.parent) if same else Lineage(old.edition + 1, old.hash)
        cut, sha256 = cut_corpus(Cutter(corpus, rule, store.name, settings.run.scratch), files, store, processes)
        unused = cut.unused
        corrected = rule.corrected(cut.lowest, cut.highest)
        if corrected != rule:
            unused += cut.slices
            rule = corrected
            cutter = Cutter(corpus, rule, store.name, settings.run.scratch)
            cut, sha256 = cut_corpus(cutter, files, store, processes)
            unused += cut.unused
        delete_slices(store, unused, but=(*(one.key for one in cut.slices), *_slices_of_older(old)))
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
    lineage = replace(lineage, threshold=rule.threshold)
    plan = _commit(old, Plan(_write_pages(store, settings, text, sorted(cut.slices), lineage), store))
    refuse_changes(plan, settings, text)
    _write_receipts(plan)
    return plan, old is None or old.hash != plan.hash


def _commit(old: Plan | None, plan: Plan) -> Plan:
    """Publish a plan whose pages are written; returns what the run has now, another planner's if that was faster."""
    store = plan.store
    if old is None:
        first = store.put_if_absent(PLAN_KEY, store.write_temp(PLAN_KEY, index_bytes(plan.index)))
        return plan if first else read_plan(store) or plan
    if plan.edition > old.edition:
        return succeed(old, plan.index)
    if old.hash != plan.hash:
        raise IntegrityError(f"{store.name}: damaged slices cannot be rewritten alike; plan again in a new run.dir")
    return old


def _slices_of_older(old: Plan | None) -> Iterator[str]:
    """Keys of what belongs to editions that are there already."""
    for plan in known_plans(old.store) if old else ():
        with suppress(IntegrityError):  # a page that is lost names nothing
            yield from (unit.slice for unit in plan.units)


def _is_whole(plan: Plan) -> bool:
    try:
        return all(slice_is_whole(plan.store, unit) for unit in plan.units)
    except IntegrityError:  # a page
        return False


def _write_receipts(plan: Plan) -> None:
    """One for every page and its slices, one for the index, of this edition and of those before it."""
    for older in known_plans(plan.store):
        if older.hash != plan.hash:
            with suppress(IntegrityError, StorageError):  # what of it is damaged is for `verify` to say
                _write_page_receipts(older)
                # Its receipt named plan.json, which is another edition's now.
                receipt = _index_receipt(older, edition_key(older.edition))
                if not _has_receipt(plan.store, older.hash, receipt.files):
                    replace_receipt(plan.store, receipt)
    _write_page_receipts(plan)
    if not _has_receipt(plan.store, plan.hash):
        replace_receipt(plan.store, _index_receipt(plan, PLAN_KEY))


def _write_page_receipts(plan: Plan) -> None:
    store = plan.store
    for number, (key, sha256) in enumerate(zip(plan.page_keys, plan.index.pages, strict=True)):
        if not _has_receipt(store, sha256):
            page = plan.units.page(number)
            files = tuple(record_file(store, name) for name in (key, *(unit.slice for unit in page)))
            counts = {"units": len(page), "bytes": sum(unit.n_bytes for unit in page)}
            replace_receipt(store, _receipt(sha256, f"page {number}", files, {"plan": plan.hash}, counts))


def _index_receipt(plan: Plan, place: str) -> Receipt:
    keys = (place, edition_key(plan.edition)) if place == PLAN_KEY and plan.edition > 1 else (place,)
    inputs = {"corpus": corpus_identity(plan.corpus), "settings": plan.settings}
    counts = {**plan.corpus, "units": len(plan.sizes), "edition": plan.edition}
    name = "plan" if plan.edition == 1 else f"plan, edition {plan.edition}"
    return _receipt(plan.hash, name, tuple(record_file(plan.store, key) for key in keys), inputs, counts)


def _has_receipt(store: Store, key: str, files: tuple[FileRecord, ...] = ()) -> bool:
    """Whether there is one that checks; what does not is written anew from files that were just found whole.

    `files`: that it has to name.
    """
    try:
        receipt = read_receipt(store, "plan", key)
        return receipt is not None and (not files or receipt.files == files)
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


def _write_pages(
    store: Store, settings: Settings, corpus: dict[str, Any], slices: Sequence[Slice], lineage: Lineage
) -> Index:
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
    return make_index(corpus, shape_of(settings), units, pages, lineage, PAGE)
