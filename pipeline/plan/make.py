"""Planning: the corpus cut into immutable slices, the units of all later work.

One pass over the corpus, by `corpus.jobs` processes (`pipeline.plan.parts`). Documents stay in the order of the corpus,
each split apart; where a slice ends is for the documents to say (`pipeline.plan.slices`). A document is held out if a
hash of (seed, text) falls under `corpus.heldout_fraction`, so equal texts never straddle the splits; where that leaves
a side empty, the threshold is moved to the nearest document and the corpus read once more. A new edition begins from
the threshold of the one before, so that what is held out stays so. The plan does not depend on how many processes there
were. What is written, and in which order: `pipeline.plan.index`. Price: see `benchmarks/planning.py`; a repeated plan
only counts the corpus and hashes the slices.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from bytecache.pipeline.plan.editions import edition_key, keep, known_plans, newest_plan, succeed
from bytecache.pipeline.plan.index import (
    PAGE,
    PLAN_KEY,
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
from bytecache.pipeline.plan.parts import Cutter, cut_corpus
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units.receipts import (
    Receipt,
    record_file,
    replace_receipt,
    software_versions,
    sound_receipt,
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
    cutter = Cutter(corpus, settings.run.seed, int(corpus.heldout_fraction * 2**64))
    edition, parent = 1, ""
    if old is not None:
        _, text = cut_corpus(cutter, files, stop)
        if not grow:
            refuse_changes(old, settings, text)
        same = old.corpus["sha256"] == text["sha256"]
        if same and _is_whole(old):
            _write_receipts(old)
            return old, False
        cutter = replace(cutter, threshold=int(old.index.threshold, 16) or cutter.threshold)
        edition, parent = (old.edition, old.index.parent) if same else (old.edition + 1, old.hash)
    cutter = replace(cutter, run_dir=store.name, scratch=settings.run.scratch)
    cut, text = cut_corpus(cutter, files, stop)
    if (corrected := cutter.corrected(cut)) != cutter:
        unused, cutter = {one.key for one in cut.slices}, corrected
        cut, text = cut_corpus(cutter, files, stop)
        for key in unused.difference((one.key for one in cut.slices), _slices_of_older(old)):
            store.delete(key)
    if _stamp(files) != stamp:
        raise InputError(f"corpus {corpus.source} changed while it was being read; rerun when it is at rest")
    text |= {
        "n_empty_skipped": cut.tally.empty,
        "n_ids_renamed": sum(one.n_renamed for one in cut.slices),
        "n_files_ignored": len(ignored),
        "passed_over": cut.tally.as_json(),
        "is_cut": cut.tally.is_cut,
        "source": source_name(corpus.source),
    }
    units = [
        Unit(index=at, split=one.split, slice=one.key, sha256=one.sha256, n_docs=one.n_docs, n_bytes=one.n_bytes)
        for at, one in enumerate(sorted(cut.slices))
    ]
    index = make_index(
        text, shape_of(settings), units, _write_pages(store, units),
        threshold=cutter.threshold, edition=edition, parent=parent, page=PAGE,
    )  # fmt: skip
    plan = _commit(old, Plan(index, store))
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
        # The receipt of the older one names plan.json, which becomes another's.
        kept = keep(old)
        with suppress(IntegrityError, StorageError):  # what of it is damaged is for `verify` to say
            _write_receipts_of(old, (kept,))
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
    for each in known_plans(plan.store):
        if each.hash == plan.hash:
            keys = (PLAN_KEY, edition_key(plan.edition)) if plan.edition > 1 else (PLAN_KEY,)
            _write_receipts_of(plan, keys)
        else:
            with suppress(IntegrityError, StorageError):  # what of it is damaged is for `verify` to say
                # Its receipt may name plan.json, which is another edition's now.
                _write_receipts_of(each, (edition_key(each.edition),))


def _write_receipts_of(plan: Plan, places: Sequence[str]) -> None:
    """`places`: where its index lies."""
    for number, (key, sha256) in enumerate(zip(plan.page_keys, plan.index.pages, strict=True)):
        if sound_receipt(plan.store, "plan", sha256) is None:
            page = plan.units.page(number)
            counts = {"units": len(page), "bytes": sum(unit.n_bytes for unit in page)}
            files = [key, *(unit.slice for unit in page)]
            _write_receipt(plan.store, sha256, f"page {number}", files, {"plan": plan.hash}, counts)
    receipt = sound_receipt(plan.store, "plan", plan.hash)
    if receipt is None or {file.path for file in receipt.files} != set(places):
        name = "plan" if plan.edition == 1 else f"plan, edition {plan.edition}"
        inputs = {"corpus": corpus_identity(plan.corpus), "settings": plan.settings}
        counts = {**plan.corpus, "units": len(plan.sizes), "edition": plan.edition}
        _write_receipt(plan.store, plan.hash, name, places, inputs, counts)


def _write_receipt(
    store: Store, key: str, name: str, places: Sequence[str], inputs: dict[str, Any], counts: dict[str, Any]
) -> None:
    files = tuple(record_file(store, place) for place in places)
    receipt = Receipt(
        stage="plan", key=key, name=name, files=files, inputs=inputs, counts=counts, versions=software_versions()
    )
    replace_receipt(store, receipt)


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


def _write_pages(store: Store, units: Sequence[Unit]) -> list[str]:
    """Commit the pages of these units; returns their sha256."""
    pages: list[str] = []
    for first in range(0, len(units), PAGE):
        raw = page_bytes(units[first : first + PAGE])
        pages.append(hashlib.sha256(raw).hexdigest())
        key = page_key(len(pages) - 1, pages[-1])
        commit_file(store, key, store.write_temp(key, raw))
    return pages
