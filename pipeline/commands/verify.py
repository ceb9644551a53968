"""`verify` and its repair: every hash of a folder recomputed; what is bad removed, fetched or made again, no more.

Verify needs no model and no configuration: receipts, plan and the data set's index state the hashes. Repair removes
what is damaged, with its receipt, and makes again what needs no teacher: slices from the corpus, shards and the index
from whole dump parts. What needs a model is left pending for its stage, whose next call does just those units. A data
set that came from elsewhere is repaired from its source: only bytes with the manifest's sha256 are accepted, so the
source need not be trusted. Price: `verify` reads every byte once (about 1 GB/s per core).
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bytecache.pipeline.commands.dataset import TARGETS
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan.index import PLAN_KEY, read_plan
from bytecache.pipeline.plan.make import slice_is_whole
from bytecache.pipeline.stores import LocalStore, Store, open_store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas import strict_json
from bytecache.schemas.dataset import card
from bytecache.schemas.dataset.index import DATASET
from bytecache.schemas.errors import BytecacheError, InputError, IntegrityError, Interrupted
from bytecache.schemas.files import replace_file

ASIDE = "set-aside"
"""Where repair of a run puts shards that no index lists; nothing of unknown origin is deleted."""


def verify(store: Store) -> tuple[list[str], int]:
    """Recompute the hash of every file with a receipt, of the plan and of the data set.

    Returns what is wrong, one line each, and how many files were checked. Raises InputError for a folder that
    holds nothing to verify.
    """
    found: list[str] = []
    checked: set[str] = set()
    for stage, key in receipts.list_receipts(store):
        try:
            receipt = receipts.read_receipt(store, stage, key)
        except IntegrityError as error:
            found.append(str(error))
            continue
        if receipt is not None:
            found += [f"{stage} {receipt.name}: {problem}" for problem in _faults(store, stage, key, receipt)]
            checked |= {file.path for file in receipt.files}
    try:
        found += [f"plan {key}: missing or altered; run `bytecache plan` to repair it" for key in _bad_slices(store)]
    except IntegrityError as error:
        found.append(str(error))
    if _has_targets(store):
        found += _verify_targets(store.folder(TARGETS))
        checked |= {f"{TARGETS}/dataset.json", f"{TARGETS}/manifest.parquet"}
    if not checked and not found:
        raise InputError(f"{store.name} holds nothing with a receipt; name a run folder or a folder with dataset.json")
    # Every damaged shard is found twice, by its receipt and by the manifest; both lines help.
    return found, len(checked)


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a data set on its own rather than a run."""
    return (folder / "dataset.json").is_file() or (folder / "manifest.parquet").is_file()


def _has_targets(store: Store) -> bool:
    return store.exists(f"{TARGETS}/dataset.json") or store.exists(f"{TARGETS}/manifest.parquet")


def verify_place(place: str, scratch: str = "") -> tuple[list[str], int]:
    """`verify` for a run folder, or for a data set on its own (a folder with dataset.json); a path or a URL."""
    store = open_store(place, scratch)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise InputError(f"{place} is not a folder; name a run folder or a folder with dataset.json")
    if store.exists("dataset.json") or store.exists("manifest.parquet"):
        shards = sum(key.endswith(".zarr.zip") for key in store.list(""))
        return _verify_targets(store.folder("")), shards + 2
    return verify(store)


def _faults(store: Store, stage: str, key: str, receipt: Receipt) -> list[str]:
    found = receipts.problems(store, receipt, deep=True)
    if receipts.unit_key(stage, receipt.inputs) != key and stage != "plan":
        found.append("its inputs do not hash to its key; delete the receipt and rerun")
    return found


def _bad_slices(store: Store) -> list[str]:
    """Slices that are not as the plan states. Raises IntegrityError for a damaged plan."""
    planned = read_plan(store)
    return [unit.slice for unit in planned.units if not slice_is_whole(store, unit)] if planned else []


def _verify_targets(folder: Path) -> list[str]:
    from bytecache.schemas.dataset.verification import verify_dataset

    return [f"targets {file}: {kind}: {detail}" for file, kind, detail in verify_dataset(folder)]


def repair_run(context: Context) -> list[str]:
    """Remove what is damaged in a run folder and make again what needs no model; returns what was done, line by line.

    Raises whatever plan and convert raise when the corpus or the settings are not those of the run.
    """
    store = context.store
    done: list[str] = []
    pending: Counter[str] = Counter()
    for stage, key in list(receipts.list_receipts(store)):
        place = receipts.receipt_path(stage, key)
        try:
            receipt = receipts.read_receipt(store, stage, key)
            faults = _faults(store, stage, key, receipt) if receipt else []
        except IntegrityError as error:
            receipt, faults = None, [str(error)]
        if not faults:
            continue
        for file in receipt.files if receipt else ():
            if any(fault.startswith(f"{file.path}:") for fault in faults):
                store.delete(file.path)
        store.delete(place)
        done.append(f"removed: {stage} {receipt.name if receipt else key[:12]} ({'; '.join(faults)})")
        pending[stage] += 1
    requeued = _requeue_deleted(store)
    if requeued:
        done.append(f"requeued: {requeued} dump parts that were deleted after conversion and are needed again")
    pending["teacher"] += requeued
    try:
        slices = _bad_slices(store)
    except IntegrityError as error:
        store.delete(PLAN_KEY)
        done.append(f"removed: {PLAN_KEY} ({error})")
        slices, pending["plan"] = [], 1
    if slices or pending["plan"]:
        from bytecache.pipeline.commands.plan import plan

        plan(context)
        done.append(f"made again: the plan and {len(slices)} slices, from the corpus")
    done += _settle_strangers(store)
    bad_shards = _verify_targets(store.folder(TARGETS)) if _has_targets(store) else []
    if pending["convert"] or bad_shards:
        from bytecache.pipeline.commands.convert import convert

        try:
            made = convert(context).made
            done.append(f"made again: {made} shards and the index, from the dump")
        except Interrupted:
            raise
        except BytecacheError as error:
            done.append(f"left: the targets cannot be made again yet ({error}); then run `bytecache convert`")
    for stage in ("teacher", "train", "evaluate", "export"):
        if pending[stage]:
            done.append(f"left: {pending[stage]} units of {stage}; run `bytecache {stage}` to make them again")
    return done


def _requeue_deleted(store: Store) -> int:
    """Forget dump parts deleted after conversion (convert.delete_dump) whose shard is gone; returns how many."""
    held = {stage: list(_sound(store, stage)) for stage in ("teacher", "convert")}
    served = {part for receipt in held["convert"] for part in receipt.inputs.get("parts", ())}
    lost = [r for r in held["teacher"] if r.deleted and not served.issuperset(file.sha256 for file in r.files)]
    for receipt in lost:
        store.delete(receipts.receipt_path("teacher", receipt.key))
    return len(lost)


def _sound(store: Store, stage: str) -> Iterator[Receipt]:
    for _, key in list(receipts.list_receipts(store, stage)):
        receipt = receipts.read_receipt(store, stage, key)
        if receipt is not None:
            yield receipt


def _settle_strangers(store: Store) -> list[str]:
    """Second copies of listed shards go; shards that nothing lists and a damaged card are moved out of the data set."""
    from bytecache.schemas.dataset.verification import verify_dataset

    done: list[str] = []
    if not store.exists(f"{TARGETS}/dataset.json"):
        return done
    folder, aside = store.folder(TARGETS), store.folder(ASIDE)
    for problem in verify_dataset(folder):
        if problem.kind in ("duplicated", "foreign") or problem.file == card.FILE:
            done.append(_settle(folder, problem.file, problem.kind, aside))
    if done:
        store.publish(ASIDE)
        store.publish(TARGETS)
    return done


def _settle(folder: Path, file: str, kind: str, aside: Path) -> str:
    if kind == "duplicated":
        (folder / file).unlink()
        return f"removed: {file}, a second copy of a listed shard"
    aside.mkdir(parents=True, exist_ok=True)
    os.replace(folder / file, aside / file)
    if file == card.FILE:
        document = strict_json.parse((folder / DATASET).read_bytes())
        replace_file(folder / file, card.render(document))
        return f"made again: {file}, which was damaged; the old one is in {aside}"
    return f"moved: {file}, which no index lists, to {aside}"


def repair_dataset(folder: Path, source: str) -> list[str]:
    """Fetch again what is bad in a data set that came from `source` (a folder or URL); returns what was done.

    Raises IntegrityError when the source does not hold the bytes that the manifest states, StorageError when it
    cannot be read.
    """
    from bytecache.schemas.dataset.index import MANIFEST, MAX_JSON, MAX_MANIFEST, read_dataset
    from bytecache.schemas.dataset.verification import verify_dataset
    from bytecache.schemas.files import scratch_folder
    from bytecache.stages.targets.source import fetch_bytes, fetch_file

    base = source.rstrip("/")
    done = []
    try:
        read_dataset(folder)
    except IntegrityError as error:
        # Into a scratch folder first: a source that is no data set must not cost the index that is here.
        with scratch_folder(folder) as scratch:
            document, table = (
                fetch_bytes(f"{base}/{DATASET}", MAX_JSON),
                fetch_bytes(f"{base}/{MANIFEST}", MAX_MANIFEST),
            )
            (scratch / DATASET).write_bytes(document)
            (scratch / MANIFEST).write_bytes(table)
            read_dataset(scratch)
        replace_file(folder / MANIFEST, table)
        replace_file(folder / DATASET, document)
        done.append(f"fetched: the index ({error})")
    entries = {entry.file: entry for entry in read_dataset(folder).entries}
    for problem in verify_dataset(folder):
        if problem.kind in ("duplicated", "foreign") or problem.file == card.FILE:
            done.append(_settle(folder, problem.file, problem.kind, folder / ASIDE))
            continue
        entry = entries[problem.file]
        fetch_file(f"{base}/{entry.file}", folder / entry.file, entry.size, entry.sha256)
        done.append(f"fetched: {entry.file} ({problem.kind}: {problem.detail})")
    return done
