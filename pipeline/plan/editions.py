"""Editions: the plans of one run whose corpus gained, lost or changed documents, each with the one before as parent.

    plan/editions/NUMBER.json   the index of edition NUMBER, as it lies or lay in plan/plan.json

What of the text is unchanged keeps its slices, since ends depend on content alone (`pipeline.plan.slices`), and with
them its dumps and shards, since their keys do. Of an older edition nothing is deleted: its index, its pages and its
slices stay, and so does all that was made of them.

A new edition is committed as a unit is: the older index is copied to its number, the new one is put under the next
number only if that is free (of two planners one wins), and last `plan.json` is replaced. A kill leaves the older
edition or one that the next `bytecache plan` puts in place.
"""

from dataclasses import dataclass

from bytecache.pipeline.plan.index import PLAN_KEY, Index, Plan, index_bytes, read_plan
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units.progress import human_bytes
from bytecache.schemas.errors import IntegrityError

FOLDER = "plan/editions"


def edition_key(number: int) -> str:
    """Where the index of an edition is kept once there is a second one."""
    return f"{FOLDER}/{number:05d}.json"


@dataclass(frozen=True)
class Change:
    """What became of an edition's units: how many, and bytes of their text."""

    same: tuple[int, int]
    new: tuple[int, int]
    gone: tuple[int, int]

    def words(self) -> str:
        """For people."""
        return ", ".join(
            f"{count} units {what} ({human_bytes(size)})"
            for what, (count, size) in (("unchanged", self.same), ("new", self.new), ("gone", self.gone))
        )


def change_between(older: Plan, newer: Plan) -> Change:
    """How an edition differs from an older one; reads all pages of both."""
    before = {unit.sha256: unit.n_bytes for unit in older.units}
    after = {unit.sha256: unit.n_bytes for unit in newer.units}

    def sums(hashes: set[str], sizes: dict[str, int]) -> tuple[int, int]:
        return len(hashes), sum(sizes[sha256] for sha256 in hashes)

    return Change(
        sums(before.keys() & after.keys(), after),
        sums(after.keys() - before.keys(), after),
        sums(before.keys() - after.keys(), before),
    )


def known_plans(store: Store) -> list[Plan]:
    """All editions of a run that are whole, the current one last; what is wrong with others their receipts tell."""
    plans: list[Plan] = []
    for key in [*store.list(FOLDER), PLAN_KEY]:
        try:
            plan = read_plan(store, key)
        except IntegrityError:
            continue
        if plan is not None and all(plan.hash != other.hash for other in plans):
            plans.append(plan)
    return plans


def newest_plan(store: Store) -> Plan | None:
    """The current plan, once a new edition that was cut off before its last step is put in place, or a lost index.

    Raises IntegrityError where the current index is damaged.
    """
    current = read_plan(store)
    begun = [plan for plan in known_plans(store) if current is None or plan.edition > current.edition]
    for plan in sorted(begun, key=lambda plan: plan.edition):
        if current is None or plan.index.parent == current.hash:
            current = _put_in_place(store, plan)
    return current


def keep(plan: Plan) -> str:
    """Copy the index of a plan to the number of its edition, if it is not there; returns where that is."""
    key = edition_key(plan.edition)
    plan.store.put_if_absent(key, plan.store.write_temp(key, index_bytes(plan.index)))
    return key


def succeed(older: Plan, index: Index) -> Plan:
    """Make `index` the edition after `older`, which is kept; returns the one that it became, of two planners' one."""
    store = older.store
    keep(Plan(index, store))
    newer = read_plan(store, edition_key(index.edition))
    if newer is None or newer.index.parent != older.hash:
        raise IntegrityError(
            f"{store.name}: {edition_key(index.edition)} is no edition after {older.hash[:12]}; run `bytecache verify "
            "--repair`, which sets it aside, then plan again"
        )
    return _put_in_place(store, newer)


def _put_in_place(store: Store, plan: Plan) -> Plan:
    store.replace(PLAN_KEY, store.write_temp(PLAN_KEY, index_bytes(plan.index)))
    return plan
