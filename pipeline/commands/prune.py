"""`prune`: what older editions of a run alone still name, listed, and removed where that is asked for.

An edition that stays keeps all that it names: slices, dump parts, shards, indices. What goes is what no such edition
names. Nothing under way is touched: the newest edition stays, and so does the one that is published; a shard that the
newest will list when it is published stays too. Training runs are not looked at: what they made stays, but one that
reads an older edition cannot go on once its shards are gone.

Order, for a kill at any point: the older indices first, so that nothing names what goes; then each unit's files, then
its receipt. Run again, it goes on. Price: every receipt and every page of the plans is read; content is not.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from bytecache.pipeline.commands.dataset import TARGETS, read_index
from bytecache.pipeline.commands.inventory import Inventory, take_inventory
from bytecache.pipeline.context import Context
from bytecache.pipeline.fleet.report import fleet_status
from bytecache.pipeline.plan.editions import edition_key, known_plans
from bytecache.pipeline.plan.index import PLAN_KEY, Plan, read_plan
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.dataset.editions import FOLDER, edition_folder, edition_of
from bytecache.schemas.dataset.index import DATASET, MANIFEST, Dataset, read_dataset
from bytecache.schemas.errors import ConfigError, InputError

_WHAT = {"plan": "files of plans", "teacher": "dump parts", "convert": "shards"}


@dataclass(frozen=True)
class Leftover:
    """What can go: numbers of editions, keys of their indices, receipts, and the files of those that nobody keeps."""

    editions: tuple[int, ...]
    indices: tuple[str, ...]
    units: tuple[Receipt, ...]
    sizes: dict[str, int]

    def lines(self) -> Iterator[str]:
        """For people: a line for each kind of file, and one for all."""
        count, size = Counter[str](), Counter[str]()
        for receipt in self.units:
            for file in receipt.files:
                if file.path in self.sizes and not receipt.deleted:
                    count[receipt.stage] += 1
                    size[receipt.stage] += file.size
        numbers = ", ".join(map(str, self.editions)) or "none that is there still"
        parts = [f"{count[stage]} {what} ({human_bytes(size[stage])})" for stage, what in _WHAT.items()]
        parts.append(f"{len(self.indices)} files of indices and {len(self.units)} receipts")
        yield f"prune: of older editions ({numbers}) alone: {', '.join(parts)}; {human_bytes(size.total())} in all"


def prune(context: Context, keep: int = 1, *, remove: bool = False) -> Leftover:
    """List what the newest `keep` editions do not name, and remove it where `remove` says so.

    Raises InputError where there is no plan, ConfigError while workers live, IntegrityError where a plan or an index is
    damaged: what it names cannot be told then.
    """
    store = context.store
    leftover = _leftover(store, keep)
    for line in leftover.lines():
        context.say(line)
    if not remove:
        context.say("prune: nothing was removed; add --remove to remove it")
        return leftover
    _refuse_living_workers(context)
    removed = {
        *leftover.indices,
        *leftover.sizes,
        *(receipts.receipt_path(unit.stage, unit.key) for unit in leftover.units),
    }
    for key in leftover.indices:
        store.delete(key)
    for receipt in leftover.units:
        for file in (*receipt.files, *receipt.beside):
            if file.path in leftover.sizes:
                store.delete(file.path)
        store.delete(receipts.receipt_path(receipt.stage, receipt.key))
    context.say(f"prune: removed {len(removed)} files")
    return leftover


def _refuse_living_workers(context: Context) -> None:
    """Raise ConfigError while any worker of any edition lives: it may hold a unit that is about to go."""
    for plan in known_plans(context.store):
        living = [
            worker["worker"]
            for job in fleet_status(context, plan.edition)
            for worker in job["workers"]
            if worker["alive"]
        ]
        if living:
            raise ConfigError(
                f"prune --remove: {len(living)} workers of edition {plan.edition} are alive ({', '.join(living[:3])}); "
                "wait until they have ended, or end them, then run it again"
            )


def _leftover(store: Store, keep: int) -> Leftover:
    current, published = read_plan(store), read_index(store)
    if current is None:
        raise InputError(f"{store.name} holds no plan, so nothing says what can go; name a run folder")
    plans = sorted(known_plans(store), key=lambda plan: plan.edition)
    shown = edition_of(published.info) if published else 0
    stay = [plan for plan in plans if plan.edition > current.edition - max(1, keep) or plan.edition == shown]
    numbers = {plan.edition for plan in stay}
    gone = [plan for plan in plans if plan.edition not in numbers]
    listed = {entry.file for dataset in [*_whole(store, numbers), published] if dataset for entry in dataset.entries}
    inventory = take_inventory(store)
    units = tuple(_unnamed(inventory, stay, listed, is_published=shown == current.edition))
    mine = {(unit.stage, unit.key) for unit in units}
    kept = {file.path for r in inventory.whole if (r.stage, r.key) not in mine for file in (*r.files, *r.beside)}
    kept |= {PLAN_KEY, *(edition_key(number) for number in numbers)}
    files = [file for unit in units for file in (*unit.files, *unit.beside) if not unit.deleted]
    keeping = tuple(f"{TARGETS}/{edition_folder(number)}/" for number in numbers)
    # One that was cut off may have left half of an index.
    indices = [key for key in store.list(f"{TARGETS}/{FOLDER}") if not key.startswith(keeping)]
    indices += [edition_key(plan.edition) for plan in gone]
    return Leftover(
        tuple(plan.edition for plan in gone), tuple(indices), units,
        {file.path: file.size for file in files if file.path not in kept},
    )  # fmt: skip


def _whole(store: Store, numbers: set[int]) -> Iterator[Dataset]:
    """The older indices that stay. Raises IntegrityError where one of them is damaged."""
    for number in sorted(numbers):
        folder = f"{TARGETS}/{edition_folder(number)}"
        if store.exists(f"{folder}/{DATASET}"):
            store.get_path(f"{folder}/{MANIFEST}")
            yield read_dataset(store.get_path(f"{folder}/{DATASET}").parent)


def _unnamed(inventory: Inventory, stay: list[Plan], listed: set[str], *, is_published: bool) -> Iterator[Receipt]:
    """Receipts of units that no edition of `stay` names. `listed`: shards of those editions' indices.

    `is_published`: whether the newest edition has an index; else a shard of its text alone is one that it will list.
    """
    slices = {unit.sha256 for plan in stay for unit in plan.units}
    planned = set(chain.from_iterable((plan.hash, *plan.index.pages) for plan in stay))
    parts = set()
    for receipt in inventory.of("teacher"):
        if receipt.inputs.get("slice") in slices:
            parts |= {file.sha256 for file in receipt.files}
        else:
            yield receipt
    for receipt in inventory.of("convert"):
        own = [*receipt.inputs.get("parts", ()), *receipt.inputs.get("slices", ())]
        coming = not is_published and all(each in parts or each in slices for each in own)
        if not coming and not any(file.path.rpartition("/")[2] in listed for file in receipt.files):
            yield receipt
    yield from (receipt for receipt in inventory.of("plan") if receipt.key not in planned)
