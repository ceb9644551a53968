"""`verify`: every hash of a folder recomputed, every file accounted for.

Needs no model and no configuration: receipts, plan and the data set's index state the hashes, and each vouches for
itself. What is found is made right by `pipeline.commands.repair`. Price: every byte is read once (about 1 GB/s per
core); `deep` decodes every shard too (40-75 MB of text/s per core).
"""

from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from bytecache.pipeline.commands.dataset import TARGETS, certificate, contradictions, whole_index
from bytecache.pipeline.commands.editions import pending_shards
from bytecache.pipeline.commands.inventory import Inventory, checkpoint_fault, stage_of, take_inventory, unfinished_runs
from bytecache.pipeline.plan.index import Plan, current_edition, read_plan
from bytecache.pipeline.plan.make import slice_is_whole
from bytecache.pipeline.stores import LocalStore, Store, open_store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.dataset.index import DATASET, MANIFEST, MAX_JSON, MAX_MANIFEST, parse_index
from bytecache.schemas.errors import InputError, IntegrityError, StorageError

_INDEX = (DATASET, MANIFEST)
MAX_UNDECLARED = 1 << 24
"""Bytes of a file elsewhere that its data set does not list: a card, previews."""


def verify(store: Store, *, deep: bool = False) -> tuple[list[str], int]:
    """Recompute the hash of every file with a receipt, of the plan and of the data set.

    Returns what is wrong, one line each, and how many files were checked. Raises InputError for a folder that
    holds nothing to verify.
    """
    inventory = take_inventory(store)
    problems = [*inventory.damaged.values(), *misplacements(inventory)]
    problems += [line for receipt in inventory.whole for line in _faults(store, receipt)]
    checked = set(inventory.records)
    problems += _plan_problems(store, inventory)
    if has_targets(store):
        problems += _targets_of(store, TARGETS, pending(store), deep=deep)
        problems += _index_problems(store, inventory)
        checked |= {f"{TARGETS}/{name}" for name in _INDEX}
    for folder, records, ended in unfinished_runs(store, inventory):
        problems += [fault for record in records if (fault := checkpoint_fault(store, record))]
        checked |= set(records)
        if ended:
            problems.append(f"{folder}: its last step is done, but it has no receipt; run `bytecache train`")
    problems += _orphan_lines(inventory.orphans)
    if not checked and not problems:
        raise InputError(f"{store.name} holds nothing with a receipt; name a run folder or a folder with dataset.json")
    # Every damaged shard is found twice, by its receipt and by the manifest; both lines help.
    return problems, len(checked)


def verify_place(
    place: str, scratch: str = "", *, deep: bool = False, private_redirects: bool = False
) -> tuple[list[str], int]:
    """`verify` for a run folder, or for a data set on its own (a folder with dataset.json); a path or a URL."""
    store = open_store(place, scratch, private_redirects=private_redirects)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise InputError(f"{place} is not a folder; name a run folder or a folder with dataset.json")
    if any(store.exists(name) for name in _INDEX):
        if not isinstance(store, LocalStore):
            _refuse_more_than_declared(store)
        shards = sum(key.endswith(".zarr.zip") for key in store.list(""))
        return _targets_of(store, "", deep=deep), shards + len(_INDEX)
    return verify(store, deep=deep)


def _refuse_more_than_declared(store: Store) -> None:
    """Before a data set is fetched to be verified: no file of it may be larger than its index says, no other large.

    Raises IntegrityError.
    """
    keys = list(store.list(""))
    own = {DATASET: MAX_JSON, MANIFEST: MAX_MANIFEST}
    limits = {key: own[name] for key in keys if (name := key.rpartition("/")[2]) in own}

    def refuse(key: str) -> None:
        size, limit = store.size(key) or 0, limits.get(key, MAX_UNDECLARED)
        if size > limit:
            raise IntegrityError(
                f"{store.name}/{key}: {size} bytes are listed, at most {limit} belong to this data set; nothing was "
                "fetched: ask its maker"
            )

    for key in list(limits):
        refuse(key)
        edition, _, name = key.rpartition("/")
        if name == DATASET:  # of an older edition, too
            table = f"{edition}/{MANIFEST}".lstrip("/")
            with suppress(IntegrityError, StorageError):  # what is wrong with an index is said of its copy
                index = parse_index(Path(), store.name, store.read_bytes(key), partial(store.read_bytes, table))
                limits |= {entry.file: entry.size for entry in index.entries}
    for key in keys:
        refuse(key)


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a data set on its own rather than a run."""
    return any((folder / name).is_file() for name in _INDEX)


def has_targets(store: Store) -> bool:
    """Whether a run holds a published data set, or what is left of one."""
    return any(store.exists(f"{TARGETS}/{name}") for name in _INDEX)


def _targets_of(store: Store, prefix: str, awaited: Collection[str] = (), *, deep: bool = False) -> list[str]:
    """`target_problems` of a folder of a store, wherever that is."""
    try:
        folder = store.folder(prefix)
    except IntegrityError:
        return [f"targets {line}" for line in _unreadable(store, prefix)]
    return target_problems(folder, awaited, deep=deep)


def _unreadable(store: Store, prefix: str) -> Iterator[str]:
    """A line for each object whose bytes are not those that were stored."""
    for key in store.list(prefix):
        try:
            store.get_path(key)
        except IntegrityError as error:
            yield str(error)


def target_problems(folder: Path, awaited: Collection[str] = (), *, deep: bool = False) -> list[str]:
    """What is wrong with a data set, one line each; `awaited`: shards that an index will list (`pending`)."""
    from bytecache.schemas.dataset.verification import verify_dataset

    return [
        f"targets {file}: {kind}: {detail}"
        for file, kind, detail in verify_dataset(folder, deep=deep)
        if kind != "foreign" or file not in awaited
    ]


def pending(store: Store) -> set[str]:
    """Shards of an edition that is under way: sound, and in no index yet."""
    try:
        return pending_shards(store, whole_index(store), current_edition(store))
    except IntegrityError:
        return set()


def misplacements(inventory: Inventory) -> list[str]:
    """One line for each receipt that lies in the place of another."""
    return [
        f"receipt {place} is that of {receipt.stage} {receipt.name}; run `bytecache verify --repair` to put it back"
        for place, receipt in inventory.misplaced.items()
    ]


def bad_slices(store: Store) -> list[str]:
    """Slices that are not as the plan states. Raises IntegrityError for a damaged plan."""
    planned = read_plan(store)
    return [unit.slice for unit in planned.units if not slice_is_whole(store, unit)] if planned else []


def without_receipt(planned: Plan, inventory: Inventory) -> list[str]:
    """What of a plan has no receipt: its pages, itself."""
    keys = {receipt.key for receipt in inventory.of("plan")}
    return [
        *(key for key, sha256 in zip(planned.page_keys, planned.index.pages, strict=True) if sha256 not in keys),
        *(["plan/plan.json"] if planned.hash not in keys else []),
    ]


def disputes(store: Store, inventory: Inventory) -> list[str]:
    """Where the published index and the receipts of its very shards and their parts say different things."""
    published = whole_index(store)
    if published is None:
        return []
    listed = {entry.file for entry in published.entries}
    shards = [receipt for receipt in inventory.of("convert") if Path(receipt.files[0].path).name in listed]
    if not shards or len(shards) != len(listed):
        return []
    teacher = published.info.get("teacher", {})
    disputed = contradictions(published, shards, certificate(shards, teacher))
    parts = {part for receipt in shards for part in receipt.inputs.get("parts", ())}
    said = [receipt for receipt in inventory.of("teacher") if receipt.files[0].sha256 in parts]
    said += [receipt for receipt in shards if "teacher" in receipt.inputs]  # made without a dump
    return disputed + (["the teacher"] if any(receipt.inputs["teacher"] != teacher for receipt in said) else [])


def unrecorded_shards(store: Store, inventory: Inventory) -> list[str]:
    """Shards that the index of a run lists and that have no receipt; none where shards were never made here."""
    if not inventory.of("plan"):
        return []
    recorded = {Path(file.path).name for receipt in inventory.of("convert") for file in receipt.files}
    published = whole_index(store)
    return sorted({entry.file for entry in published.entries} - recorded) if published else []


def _faults(store: Store, receipt: Receipt) -> Iterator[str]:
    for problem in receipts.problems(store, receipt, deep=True):
        yield f"{receipt.stage} {receipt.name}: {problem}"
    for file in receipt.beside:
        fault = receipts.file_fault(store, file, deep=True)
        if fault:
            yield f"{receipt.stage} {receipt.name}: {file.path}: {fault} (nothing depends on it)"


def _plan_problems(store: Store, inventory: Inventory) -> Iterator[str]:
    try:
        planned = read_plan(store)
        for key in bad_slices(store):
            yield f"plan {key}: missing or altered; run `bytecache plan` to repair it"
        for key in without_receipt(planned, inventory) if planned else ():
            yield f"plan {key}: its receipt is missing; run `bytecache plan` to repair it"
    except IntegrityError as error:
        yield str(error)


def _index_problems(store: Store, inventory: Inventory) -> Iterator[str]:
    for line in disputes(store, inventory):
        yield f"targets: receipts and index disagree: {line}; run `bytecache verify --repair`"
    for name in unrecorded_shards(store, inventory):
        yield f"targets {name}: its receipt is missing; run `bytecache convert` to make it again"


def _orphan_lines(orphans: list[str]) -> Iterator[str]:
    """One line for each file that nothing vouches for; folders of many files are one line."""
    folders = sorted({_unit_of(key) for key in orphans})
    for unit in folders:
        yield (
            f"{unit}: no receipt names it: work that was cut off, or its receipt is lost; run `bytecache "
            f"{stage_of(unit)}` to make it again, or `bytecache verify --repair` to set it aside"
        )


def _unit_of(key: str) -> str:
    parts = key.split("/")
    return "/".join(parts[:2]) if parts[0] in ("train", "export") else key
