"""Units set aside after repeated failure, and how to let them back in.

An entry is written after `fleet.max_failures` attempts that failed, or `fleet.max_losses` workers that died at the unit
without a word (a unit that kills its worker is told from bad luck by the count alone, so that limit is the higher
one: at one loss in twenty, eight in a row at one of a million units have a chance of 4e-5). `retry` adds a mark that
forgives all attempts so far; what happened stays on record.
"""

from dataclasses import dataclass
from typing import Any

from bytecache.pipeline.fleet.ledger import (
    BLOCK,
    FAILED,
    FORGIVEN,
    LOST,
    Layout,
    UnitState,
    n_blocks,
    read_json,
    read_names,
)
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.runner import Job
from bytecache.schemas.errors import InputError


@dataclass(frozen=True)
class Entry:
    """A unit of the job that is set aside: how often it was tried, and why each attempt ended."""

    unit: int
    attempts: int
    reasons: tuple[str, ...]


def quarantined(store: Store, layout: Layout) -> list[Entry]:
    """Units that are set aside now, with their reasons; one listing and some small reads per unit."""
    entries = []
    for unit in sorted(_entries(store, layout)):
        state = _state(store, layout, unit)
        if state.done or state.held or not (state.failures or state.losses):
            continue
        reasons = []
        for epoch in range(state.forgiven + 1, state.epoch + 1):
            if (state.failed | state.lost) >> epoch & 1:
                kind = FAILED if state.failed >> epoch & 1 else LOST
                facts = read_json(store, layout.mark(unit, kind, epoch)) or {}
                reasons.append(str(facts.get("reason") or f"worker {facts.get('worker', '?')} died at it"))
        entries.append(Entry(unit, state.failures + state.losses, tuple(reasons)))
    return entries


def retry(store: Store, layout: Layout) -> list[int]:
    """Forgive every unit that is set aside; returns them. Workers that run meet them again in time."""
    forgiven = []
    for entry in quarantined(store, layout):
        _forgive(store, layout, entry.unit)
        forgiven.append(entry.unit)
    return forgiven


def requeue_lost(store: Store, job: Job) -> list[int]:
    """Open again what the ledger calls done but has no receipt (any more); returns those units.

    For use when no worker runs: the marks of done blocks are removed. Price: a listing of the ledger, and of the
    stage's receipts.
    """
    layout = Layout(job.stage, job.edition)
    present = {key for _, key in receipts.list_receipts(store, job.stage)}
    opened = []
    for block in range(n_blocks(len(job.measures))):
        for slot, state in sorted(read_names(store.list(layout.units(block))).items()):
            unit = block * BLOCK + slot
            if state.done and job.task(unit).key not in present:
                _forgive(store, layout, unit, state)
                store.delete(layout.block(block))
                opened.append(unit)
    return opened


def forget_job(store: Store, layout: Layout) -> int:
    """Delete a job's ledger, so that a job with other settings or software can begin; returns how many objects went.

    What is made stays. Raises InputError if there is no ledger.
    """
    keys = list(store.list(layout.root))
    if not keys:
        raise InputError(f"{store.name} holds no {layout.stage} job of workers; nothing to give up")
    # The job's record first: a worker that is still there finds others' settings, or begins anew, never half of each.
    for key in sorted(keys, key=lambda key: key != layout.job):
        store.delete(key)
    return len(keys)


def facts_of(entry: Entry) -> dict[str, Any]:
    """For JSON."""
    return {"unit": entry.unit, "attempts": entry.attempts, "reasons": list(entry.reasons)}


def _entries(store: Store, layout: Layout) -> set[int]:
    names = (key.rpartition("/")[2].partition(".")[0] for key in store.list(layout.quarantine))
    return {int(name) for name in names if name.isdigit()}


def _state(store: Store, layout: Layout, unit: int) -> UnitState:
    return read_names(store.list(layout.units(unit // BLOCK))).get(unit % BLOCK, UnitState())


def _forgive(store: Store, layout: Layout, unit: int, state: UnitState | None = None) -> None:
    epoch = (state or _state(store, layout, unit)).epoch
    store.put_json_if_absent(layout.mark(unit, FORGIVEN, epoch), {})
