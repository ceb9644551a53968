"""Partial runs of one plan, made in different places, become one.

Everything is checked before anything is written: every source has the same plan; all dumps are of one teacher identity;
no unit has two different outputs (an output is a receipt's list of sha256). Then every file is copied with its hash
recomputed on the way, and its receipt last, so a merge that is killed is repeated and goes on. What the destination
has is left alone; what is damaged in a source is skipped and named. Index, students and reports are not merged: the
next `bytecache convert` publishes the index.

Price: each file is read once and written once; memory: one receipt per unit.
"""

import shutil
from dataclasses import dataclass, field
from typing import Any

from bytecache.pipeline.config import changed_keys, flattened
from bytecache.pipeline.fleet.ledger import STAGES
from bytecache.pipeline.plan.editions import edition_key
from bytecache.pipeline.plan.index import PLAN_KEY, Plan, corpus_identity, read_plan
from bytecache.pipeline.stores import Store, disk_errors
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import FileRecord, Receipt
from bytecache.pipeline.units.runner import commit_receipt
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError
from bytecache.schemas.files import file_sha256


@dataclass
class Merged:
    """What a merge did: units copied and already there per stage; what was skipped, and why."""

    copied: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    present: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    skipped: list[str] = field(default_factory=list)


def merge(destination: Store, sources: list[Store]) -> Merged:
    """Bring the units of `sources` into `destination`, which may be empty.

    Raises InputError (a source without a plan), ConfigError (another plan or teacher), IntegrityError (two outputs of
    one unit); nothing has been written then.
    """
    result = Merged()
    plan, giver = _common_plan(destination, sources)
    slices = {unit.sha256 for unit in plan.units}
    wanted: list[tuple[Store, Receipt]] = []
    for stage in STAGES:
        here = _receipts(destination, stage, result)
        claimed: dict[str, tuple[Store, Receipt]] = {key: (destination, receipt) for key, receipt in here.items()}
        for source in sources:
            for key, receipt in sorted(_receipts(source, stage, result).items()):
                if not _slices_of(receipt) <= slices:
                    result.skipped.append(f"{source.name}: {stage} {receipt.name} is of no unit of the plan")
                    continue
                known = claimed.setdefault(key, (source, receipt))
                if known[1].files != receipt.files:
                    raise IntegrityError(
                        f"{stage} {receipt.name} has two different outputs: {_names(known[1].files)} in "
                        f"{known[0].name} and {_names(receipt.files)} in {source.name}; delete the receipt "
                        f"{receipts.receipt_path(stage, key)} of the one you do not trust, then merge again"
                    )
                if known[0] is source:
                    wanted.append((source, receipt))
                else:
                    result.present[stage] += 1
        _refuse_two_teachers([(store, receipt) for store, receipt in claimed.values() if _slices_of(receipt)])
    if read_plan(destination) is None and giver is not None:
        _copy_plan(plan, giver, destination)
    for source, receipt in wanted:
        try:
            for file in receipt.files:
                _copy(source, destination, file)
        except IntegrityError as error:
            result.skipped.append(str(error))
            continue
        commit_receipt(destination, receipt)
        result.copied[receipt.stage] += 1
    return result


def _copy_plan(plan: Plan, giver: Store, destination: Store) -> None:
    """Slices, pages and index, then their receipts."""
    for unit in plan.units:
        _copy(giver, destination, FileRecord(path=unit.slice, size=giver.size(unit.slice) or 0, sha256=unit.sha256))
    edition_keys = [edition_key(plan.edition)] if plan.edition > 1 else []
    for key in (*plan.page_keys, *edition_keys, PLAN_KEY):
        _copy(giver, destination, receipts.record_file(giver, key))
    for sha256 in (*plan.index.pages, plan.hash):
        planned = receipts.read_receipt(giver, "plan", sha256)
        if planned is not None:
            receipts.write_receipt(destination, planned)


def _common_plan(destination: Store, sources: list[Store]) -> tuple[Plan, Store | None]:
    """The plan of all, and a source to copy it from if the destination has none."""
    plan, owner = read_plan(destination), destination
    giver = None
    for source in sources:
        other = read_plan(source)
        if other is None:
            raise InputError(f"{source.name} holds no plan; name run folders")
        if plan is None:
            plan, owner, giver = other, source, source
        elif plan.hash != other.hash:
            changes = list(changed_keys(_decisive(plan), _decisive(other)))
            detail = f" ({'; '.join(changes[:4])})" if changes else ""
            raise ConfigError(
                f"{source.name} has plan {other.hash[:12]}, {owner.name} has {plan.hash[:12]}{detail}; only runs of "
                "one plan can be merged"
            )
    if plan is None:
        raise InputError("nothing to merge: name at least one run folder")
    return plan, giver


def _decisive(plan: Plan) -> dict[str, Any]:
    """What of a plan makes it another one."""
    return {**plan.settings, **corpus_identity(plan.corpus), "edition": plan.edition}


def _receipts(store: Store, stage: str, result: Merged) -> dict[str, Receipt]:
    by_key = {}
    for _, key in receipts.list_receipts(store, stage):
        try:
            receipt = receipts.read_receipt(store, stage, key)
        except IntegrityError as error:
            result.skipped.append(str(error))
            continue
        if receipt is None:
            continue
        if receipts.unit_key(stage, receipt.inputs) != key:
            result.skipped.append(f"{store.name}: {stage} {receipt.name}: its inputs do not hash to its key")
            continue
        by_key[key] = receipt
    return by_key


def _slices_of(receipt: Receipt) -> set[str | None]:
    """The text that a teacher evaluated for this unit; none where it was made from a dump."""
    one = {receipt.inputs.get("slice")} if receipt.stage == "teacher" else set()
    return one | set(receipt.inputs.get("slices", ()))


def _refuse_two_teachers(dumps: list[tuple[Store, Receipt]]) -> None:
    first: dict[str, tuple[Store, Receipt]] = {}
    for store, receipt in dumps:
        first.setdefault(receipt.group, (store, receipt))
    if len(first) > 1:
        (one, mine), (other, theirs) = list(first.values())[:2]
        changes = changed_keys(flattened(mine.inputs["teacher"]), flattened(theirs.inputs["teacher"]))
        raise ConfigError(
            f"{one.name} and {other.name} hold dumps of different teachers, settings or software "
            f"({'; '.join(list(changes)[:4])}); parts of both never make one data set"
        )


def _names(files: tuple[FileRecord, ...]) -> str:
    return ", ".join(f"{file.path} {file.sha256[:12]}" for file in files)


def _copy(source: Store, destination: Store, file: FileRecord) -> None:
    """Copy one object. Raises IntegrityError if the source's bytes are not those of its receipt."""
    if destination.size(file.path) == file.size and destination.sha256(file.path) == file.sha256:
        return
    if source.size(file.path) is None:
        raise IntegrityError(f"{source.name}: {file.path} is missing though it has a receipt; make it again there")
    temporary = destination.temp_path(file.path)
    try:
        with (
            disk_errors(f"copying {file.path} from {source.name}"),
            source.open(file.path) as reader,
            temporary.open("wb") as writer,
        ):
            shutil.copyfileobj(reader, writer, 1 << 20)
        if temporary.stat().st_size != file.size or file_sha256(temporary) != file.sha256:
            raise IntegrityError(f"{source.name}: {file.path} differs from its receipt; make it again there")
        if destination.exists(file.path):
            destination.replace(file.path, temporary)  # without a receipt its wholeness is unproven; ours is whole
        else:
            destination.put_if_absent(file.path, temporary)
    finally:
        temporary.unlink(missing_ok=True)
