"""Planning: the corpus cut once into immutable slices, the units of all later work.

Two passes, each by `corpus.jobs` processes over the files of the corpus. The first (`survey`) hashes every
document and finds where slices begin; it is all that a repeated `plan` costs. The second (`slices`) writes
them: documents in corpus order, each split apart, a slice closed before it would exceed `corpus.unit_bytes` (a longer
document is a slice alone). A document is held out if sha256(seed, text) falls under `corpus.heldout_fraction`, so equal
texts never straddle the splits. The plan does not depend on how many processes there were. What is written, and in
which order: `pipeline.plan.index`. Price: see `benchmarks/planning.py`.
"""

import hashlib
from collections.abc import Callable
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
from bytecache.pipeline.plan.slices import commit, write_slices
from bytecache.pipeline.plan.survey import Survey, processes_for
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units.receipts import (
    FileRecord,
    Receipt,
    read_receipt,
    record_file,
    software_versions,
    write_receipt,
)
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.settings import Settings


def make_plan(store: Store, settings: Settings, stop: Callable[[], bool] = lambda: False) -> tuple[Plan, bool]:
    """Plan the run; returns the plan and whether it is new.

    Raises InputError (corpus), ConfigError (a plan of another corpus or other settings is already there),
    Interrupted (`stop()` became true; rerun).
    """
    with Processes[Any, Any](processes_for(settings.corpus), stop) as processes:
        survey = Survey(settings, processes)
        old = read_plan(store)
        if old is not None:
            refuse_changes(old, settings, survey.corpus)
            if _is_whole(old):
                _write_receipts(old)
                return old, False
        index = _write_units(store, settings, survey, processes)
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


def _write_units(store: Store, settings: Settings, survey: Survey, processes: Processes[Any, Any]) -> Index:
    """Slices and pages; returns the index, which is not yet written."""
    sizes: list[int] = []
    heldout: list[int] = []
    pages: list[str] = []
    page: list[Unit] = []

    def close_page() -> None:
        raw = page_bytes(page)
        sha256 = hashlib.sha256(raw).hexdigest()
        key = page_key(len(pages), sha256)
        commit(store, key, store.write_temp(key, raw), sha256)
        pages.append(sha256)
        page.clear()

    for unit in write_slices(store, settings, survey, processes):
        page.append(unit)
        sizes.append(unit.n_bytes)
        heldout.extend([unit.index] if unit.split == "heldout" else [])
        if len(page) == PAGE:
            close_page()
    if page:
        close_page()
    return make_index(survey.corpus, shape_of(settings), sizes, heldout, pages, PAGE)
