"""What a run folder holds, by its own word: receipts that check, those that do not, and files that none of them names.

Every file of a run is vouched for by something: a receipt (which seals itself), the plan, the index of the data set, or
the small record beside a checkpoint of a run under way. What has a name that only we give and no voucher is either work
that was cut off between file and receipt, or work whose receipt is lost; nothing here can tell which.

Price: receipts are read, content is not; one listing of each stage's folder.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from bytecache.pipeline.config import RESOLVED_FILE
from bytecache.pipeline.plan.editions import edition_key, known_plans
from bytecache.pipeline.plan.index import PLAN_KEY
from bytecache.pipeline.stores import Store, overlapped
from bytecache.pipeline.units import documents, receipts
from bytecache.pipeline.units.receipts import FileRecord, OtherVersion, Receipt
from bytecache.schemas import strict_json
from bytecache.schemas.errors import IntegrityError

_STAGE_OF = {
    "plan": "plan", "teacher": "teacher", "targets": "convert", "train": "train", "report": "evaluate",
    "export": "export",
}  # fmt: skip
"""Folder: the command that writes there."""
_OURS = re.compile(
    r"config\.toml|plan/(plan\.json|config\.toml|(units|slices|editions)/[^/]+\.(json|parquet))"
    r"|teacher/([^/]+\.parquet|config\.toml|start/[^/]+\.json)"
    r"|targets/config\.toml|train/(student|distilled|control)-[0-9a-f]{12}/.+|report/([^/]+-[0-9a-f]{12}\.json"
    r"|(report|lm-eval)\.(json|md)|summary\.md|report\.html|config\.toml)|export/[^/]+-[0-9a-f]{12}(\.config\.toml|/.+)"
)
"""Names that only commands of ours give."""
_RUN_FILE = re.compile(
    r"train/(?:distilled|control)-[0-9a-f]{12}/(?:step-\d+\.(?:json|safetensors)|metrics\.jsonl|.+/.+)"
)
"""What a training run under way keeps; its checkpoints have records of their own."""


@dataclass
class Inventory:
    """Receipts of a run folder, and the keys of files that nothing vouches for."""

    whole: list[Receipt] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """place of a receipt that does not check: why"""
    misplaced: dict[str, Receipt] = field(default_factory=dict)
    """place of a receipt that checks, but is that of another unit: the receipt"""
    orphans: list[str] = field(default_factory=list)

    @property
    def records(self) -> dict[str, FileRecord]:
        """Every file that a receipt names and that should be there, by key."""
        kept = [receipt for receipt in self.whole if not receipt.deleted]
        return {file.path: file for receipt in kept for file in (*receipt.files, *receipt.beside)}

    def of(self, stage: str) -> list[Receipt]:
        """Receipts that check of one stage."""
        return [receipt for receipt in self.whole if receipt.stage == stage]


def stage_of(key: str) -> str:
    """The command that makes the file `key`."""
    if key in ("report/summary.md", "report/report.html"):
        return "run"
    return _STAGE_OF.get(key.partition("/")[0], "run")


def take_inventory(store: Store) -> Inventory:
    """Read every receipt, and list what none of them names. Raises OtherVersion for a run of other software."""
    inventory = Inventory()

    def read(place: tuple[str, str]) -> tuple[str, Receipt | None, str]:
        name = receipts.receipt_path(*place)
        try:
            receipt = receipts.read_receipt(store, *place)
            fault = receipts.key_fault(receipt) if receipt else ""
        except OtherVersion:
            raise
        except IntegrityError as error:
            receipt, fault = None, str(error)
        if receipt is not None:
            receipt = documents.settled(store, receipt)
        return name, None if fault else receipt, fault

    for place, receipt, fault in overlapped(read, receipts.list_receipts(store)):
        if receipt is not None:
            inventory.whole.append(receipt)
        elif fault:
            elsewhere = _of_another(store, place)
            if elsewhere is not None:
                inventory.misplaced[place] = elsewhere
            else:
                inventory.damaged[place] = fault
    inventory.orphans = list(_orphans(store, inventory))
    return inventory


def _of_another(store: Store, place: str) -> Receipt | None:
    """The receipt that lies in the place of another; None where what lies there is none that checks."""
    size = store.size(place)  # none of what is no file
    if size is None or size > receipts.MAX_RECEIPT:
        return None
    try:
        return receipts.parse_receipt(store.read_bytes(place), place)
    except IntegrityError:  # a bucket's bytes that are not those that were stored
        return None


def _orphans(store: Store, inventory: Inventory) -> Iterator[str]:
    known = {file.path for receipt in inventory.whole for file in (*receipt.files, *receipt.beside)}
    known |= _planned(store)
    folders = {path.rpartition("/")[0] for path in known}
    keys = [key for prefix in _STAGE_OF for key in store.list(prefix)]
    for key in [*keys, *([RESOLVED_FILE] if store.exists(RESOLVED_FILE) else [])]:
        hidden = any(part.startswith(".") for part in key.split("/"))
        if hidden or key in known or not _OURS.fullmatch(key):
            continue
        folder = key.rpartition("/")[0]
        mine = key.startswith(("train/student-", "export/")) and folder.count("/") == 1
        if (mine and folder in folders) or _RUN_FILE.fullmatch(key):
            continue  # people may put a file of theirs into a folder of ours
        yield key


def _planned(store: Store) -> set[str]:
    keys = {PLAN_KEY}
    for plan in known_plans(store):
        keys |= {edition_key(plan.edition), *plan.page_keys}
        with suppress(IntegrityError):  # a page, which its receipt tells
            keys.update(unit.slice for unit in plan.units)
    return keys


def unfinished_runs(store: Store, inventory: Inventory) -> Iterator[tuple[str, list[str], bool]]:
    """Folders of training runs without a receipt: (folder, keys of their checkpoints' records, whether at their end).

    A run at its last step without a receipt was killed just before the receipt, or has lost it.
    """
    finished = {file.path.rpartition("/")[0] for receipt in inventory.of("train") for file in receipt.files}
    folders: dict[str, list[str]] = {}
    for key in store.list("train"):
        folder, _, name = key.rpartition("/")
        if re.fullmatch(r"step-\d+\.json", name) and folder not in finished:
            folders.setdefault(folder, []).append(key)
    for folder, records in sorted(folders.items()):
        yield folder, records, _ended(store, records[-1])


def _ended(store: Store, record: str) -> bool:
    """Whether a checkpoint is that of its run's last step, by the state in its header (safetensors: length, JSON)."""
    if checkpoint_fault(store, record):
        return False
    try:
        with store.open(record.removesuffix(".json") + ".safetensors") as file:
            header = strict_json.loads(file.read(int.from_bytes(file.read(8), "little")))
        state = strict_json.loads(header["__metadata__"]["state"])
        return bool(state["step"] >= state["identity"]["settings"]["steps"])
    except (ValueError, KeyError, TypeError):
        return False


def checkpoint_fault(store: Store, record: str) -> str:
    """What is wrong with a checkpoint of a run under way, by the record beside it; "" = nothing."""
    key = record.removesuffix(".json") + ".safetensors"
    try:
        facts = strict_json.loads(store.read_bytes(record))
        file = FileRecord(path=key, size=facts["size"], sha256=facts["sha256"])
        named = (
            facts["file"] == key.rpartition("/")[2] and f"step-{facts['step']:08d}.json" == record.rpartition("/")[2]
        )
    except (ValueError, KeyError, TypeError):
        named = False
    if not named:
        return f"{record}: is no record of this checkpoint"
    fault = receipts.file_fault(store, file, deep=True)
    return f"{key}: {fault}" if fault else ""
