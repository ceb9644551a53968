"""What a data set goes without: units that the teacher's workers set aside, and what to say of them.

By default nothing is missing: conversion refuses while a unit is in quarantine. With `convert.allow_quarantined` the
rest is converted. Shards are cut as if all units were there, so those that miss nothing are the same files; the set of
missing units identifies the data set (another set is another data set), and `dataset.json` lists each with its
documents and the reason.
"""

from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq

from bytecache.pipeline.context import Context
from bytecache.pipeline.fleet.ledger import Layout
from bytecache.pipeline.fleet.quarantine import Entry, quarantined
from bytecache.pipeline.plan.index import Plan
from bytecache.pipeline.units.progress import human_bytes
from bytecache.schemas.errors import InputError
from bytecache.schemas.files import arrow_path

_SHOWN = 3


def units_aside(context: Context, planned: Plan, has_dump: Callable[[int], bool]) -> list[Entry]:
    """Units that the teacher's workers set aside and that nobody dumped since, if the settings allow to go without.

    Raises InputError if they do not and there are any.
    """
    missing = [
        entry for entry in quarantined(context.store, Layout("teacher", planned.edition)) if not has_dump(entry.unit)
    ]
    if missing and not context.settings.convert.allow_quarantined:
        shown = "; ".join(f"unit {entry.unit} ({_reason(entry)})" for entry in missing[:_SHOWN])
        raise InputError(
            f"{context.store.name}: {len(missing)} units have no dump, since workers set them aside after repeated "
            f"failure: {shown}; mend the cause and run `bytecache retry teacher`, then a worker, or convert the rest "
            "with `--set convert.allow_quarantined=true` (the data set then lists what is missing)"
        )
    return missing


def describe(context: Context, planned: Plan, aside: list[Entry]) -> list[dict[str, Any]]:
    """For `dataset.json`: each missing unit, its split, documents and bytes, and why it is missing."""
    entries = []
    for entry in aside:
        unit = planned.units[entry.unit]
        piece = arrow_path(context.store.get_path(unit.slice))
        documents = pq.read_table(piece, columns=["doc_id"]).column("doc_id").to_pylist()
        context.store.release(unit.slice)
        entries.append({
            "unit": entry.unit, "split": unit.split, "n_documents": unit.n_docs, "n_bytes": unit.n_bytes,
            "documents": documents, "attempts": entry.attempts, "reason": _reason(entry),
        })  # fmt: skip
    return entries


def summary(missing: list[dict[str, Any]]) -> str:
    """One line for people; empty where nothing is missing."""
    if not missing:
        return ""
    units = ", ".join(str(unit["unit"]) for unit in missing[:10]) + (", ..." if len(missing) > 10 else "")
    return (
        f"{len(missing)} units ({units}) with {sum(unit['n_documents'] for unit in missing)} documents, "
        f"{human_bytes(sum(unit['n_bytes'] for unit in missing))} of text, are missing: set aside by the teacher's "
        f"workers, the first for this reason: {missing[0]['reason']}"
    )


def _reason(entry: Entry) -> str:
    return entry.reasons[-1] if entry.reasons else "no reason on record"
