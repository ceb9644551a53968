"""`verify --repair`: what is damaged is put back, made or fetched again, or set aside with the command that makes it.

In a run folder, in this order: what stands in a file's place and is none is set aside; receipts and files that lie in
each other's places are put back by their hashes; what is damaged is set aside with its receipt (nothing that repair
does not know is deleted); what needs no model is made again, slices from the corpus, shards and the index from whole
dump parts; for the rest the command that makes it is named. A data set that came from elsewhere is repaired from its
source (`repair_dataset`). Price: every byte is read once before `verify` reads it again.
"""

from collections import defaultdict
from pathlib import Path

from bytecache.pipeline.commands.dataset import TARGETS, mend_card
from bytecache.pipeline.commands.inventory import (
    checkpoint_fault,
    stage_of,
    take_inventory,
    unfinished_runs,
)
from bytecache.pipeline.commands.straight import is_straight
from bytecache.pipeline.commands.verify import (
    bad_slices,
    disputes,
    has_targets,
    pending,
    target_problems,
    unrecorded_shards,
    without_receipt,
)
from bytecache.pipeline.config import RESOLVED_FILE
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan.index import PLAN_KEY, read_plan
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import documents, receipts
from bytecache.pipeline.units.aside import set_aside, set_folder_aside, set_no_files_aside
from bytecache.pipeline.units.receipts import FileRecord, Receipt
from bytecache.schemas.dataset import card
from bytecache.schemas.dataset.index import DATASET, SUFFIX
from bytecache.schemas.errors import BytecacheError, IntegrityError, Interrupted

_COMMAND = {"student": "train", "index": "convert"}
"""Stage of a receipt: the command that makes it, where that has another name."""
_LEFT = ("teacher", "mix", "train", "evaluate", "export", "run")
"""Commands that repair leaves to the user, in the order in which they are to be run."""
_FOLDERS = ("student", "export")
"""Stages whose unit is a whole folder, made anew as one."""


def repair_run(context: Context, *, deep: bool = False) -> list[str]:
    """Repair a run folder; returns what was done, line by line, and what is left to which command ("left: ...").

    Raises whatever plan and convert raise when the corpus or the settings are not those of the run.
    """
    return _Repair(context).run(deep)


class _Repair:
    """One repair of a run folder. `done`: lines for people. `left`: command, and names of what it has to make again."""

    def __init__(self, context: Context) -> None:
        self.context, self.store = context, context.store
        self.done: list[str] = []
        self.left: dict[str, list[str]] = defaultdict(list)
        self.configurations: list[str] = []

    def run(self, deep: bool) -> list[str]:
        self.done += [f"set aside: {key} ({fault})" for key, fault in set_no_files_aside(self.store).items()]
        self._receipts()
        faulty = self._files_back(self._faulty())
        self._units_aside(faulty)
        self._checkpoints()
        self._plan()
        self._targets(deep)
        self._orphans()
        for key in self.configurations:
            self.context.save_config(key, published=key.startswith(f"{TARGETS}/"))
            self.done.append(f"made again: {key}, from the settings in use")
        self.done += [_left(command, self.left[command]) for command in _LEFT if self.left[command]]
        return self.done

    def _receipts(self) -> None:
        """Receipts that check but lie elsewhere go to their own places; those that do not check are set aside."""
        inventory = take_inventory(self.store)
        returned = {receipts.receipt_path(r.stage, r.key): r for r in inventory.misplaced.values()}
        for place in inventory.misplaced:
            self.store.delete(place)  # written again at its own place below
        for place, fault in inventory.damaged.items():
            self.done.append(f"set aside: {place} as {set_aside(self.store, place)} ({fault})")
            stage = place.split("/")[1]
            if place not in returned and stage not in _FOLDERS:  # of a folder the name is found below
                self._lost(stage, Path(place).stem[:12])
        for place, receipt in returned.items():
            if not self.store.exists(place):
                receipts.replace_receipt(self.store, receipt)
                self.done.append(f"put back: the receipt of {receipt.stage} {receipt.name}")

    def _faulty(self) -> dict[str, FileRecord]:
        """Files that are not as their receipts say, by key."""
        records = take_inventory(self.store).records
        return {key: file for key, file in records.items() if receipts.file_fault(self.store, file, deep=True)}

    def _files_back(self, faulty: dict[str, FileRecord]) -> dict[str, FileRecord]:
        """Put files whose content is that of another faulty one into its place; returns what is faulty still."""
        if not faulty:
            return faulty
        wanted = {(file.size, file.sha256): key for key, file in faulty.items()}
        sizes = {size for size, _ in wanted}
        # What no receipt names may be a file under another name, too.
        strays = [*faulty, *take_inventory(self.store).orphans, *_without_record(self.store)]
        moves: dict[str, str] = {}
        for key in dict.fromkeys(strays):
            size = self.store.size(key)
            if size is not None and size in sizes:
                target = wanted.get((size, self.store.sha256(key, deep=True)), key)
                if target != key and target not in moves.values():
                    moves[key] = target
        held = {key: set_aside(self.store, key) for key in dict.fromkeys([*moves, *moves.values()])
                if self.store.exists(key)}  # fmt: skip
        for key, target in moves.items():
            self.store.move(held[key], target)
            self.done.append(f"put back: {target}, which lay at {key}")
        return {key: file for key, file in faulty.items() if key not in moves.values()}

    def _units_aside(self, faulty: dict[str, FileRecord]) -> None:
        """Set aside what is damaged, with the receipt of its unit; a unit that lost only logs keeps its receipt."""
        for receipt in take_inventory(self.store).whole:
            bad = [file for file in receipt.files if file.path in faulty and not receipt.deleted]
            lost = [file for file in receipt.beside if file.path in faulty]
            if bad and receipt.stage in _FOLDERS:
                self._folder_aside(receipt.files[0].path.rpartition("/")[0])
                self._unit_lost(receipt, bad, "its folder is set aside")
            elif bad:
                self._unit_lost(receipt, bad, self._aside([file.path for file in (*bad, *lost)]))
            elif lost:
                moved = self._aside([file.path for file in lost])
                rest = tuple(file for file in receipt.beside if file not in lost)
                receipts.replace_receipt(self.store, receipt.model_copy(update={"beside": rest}))
                names = ", ".join(file.path for file in lost)
                self.done.append(f"forgotten: {names}: nothing depends on it, and only a new run makes it ({moved})")

    def _unit_lost(self, receipt: Receipt, bad: list[FileRecord], moved: str) -> None:
        place = receipts.receipt_path(receipt.stage, receipt.key)
        set_aside(self.store, place)
        faults = "; ".join(f"{file.path}: damaged or missing" for file in bad)
        self.done.append(f"removed: {receipt.stage} {receipt.name} ({faults}; {moved})")
        self._lost(receipt.stage, receipt.name)

    def _aside(self, keys: list[str]) -> str:
        """Set aside those that are there; says where they went."""
        places = [set_aside(self.store, key) for key in keys if self.store.exists(key)]
        return f"set aside: {', '.join(places)}" if places else "nothing of it is left"

    def _folder_aside(self, folder: str) -> None:
        set_folder_aside(self.store, folder)

    def _lost(self, stage: str, name: str) -> None:
        """Note what makes a unit again. A document without its receipt is an orphan, which comes later."""
        if stage != documents.STAGE:
            self.left[_COMMAND.get(stage, stage)].append(name)
        elif name.endswith(RESOLVED_FILE):
            self.configurations.append(name)
        elif "/" in name:
            self.left[stage_of(name)].append(name)

    def _checkpoints(self) -> None:
        """Damaged checkpoints of runs under way are set aside: the run goes on from the one before."""
        for folder, records, ended in list(unfinished_runs(self.store, take_inventory(self.store))):
            for record in records:
                fault = checkpoint_fault(self.store, record)
                if fault:
                    pair = [record, record.removesuffix(".json") + ".safetensors"]
                    self.done.append(f"{self._aside(pair)} ({fault})")
            name = folder.removeprefix("train/").partition("-")[0]
            if ended and name not in self.left["train"]:
                self.left["train"].append(name)

    def _plan(self) -> None:
        from bytecache.pipeline.commands.plan import plan

        faults: list[str] = []
        try:
            planned = read_plan(self.store)
        except IntegrityError as error:
            planned, faults = None, [PLAN_KEY]
            self.done.append(f"set aside: {PLAN_KEY} as {set_aside(self.store, PLAN_KEY)} ({error})")
        try:
            faults += bad_slices(self.store) if planned else []
            faults += without_receipt(planned, take_inventory(self.store)) if planned else []
        except IntegrityError as error:
            faults.append(str(error))
        if self.left.pop("plan", []) or faults:
            plan(self.context, grow=False)
            self.done.append("made again: what the plan lacked, from the corpus")

    def _targets(self, deep: bool) -> None:
        from bytecache.pipeline.commands.convert import convert

        requeued = _requeue_deleted(self.store)
        if requeued:
            self.done.append(
                f"requeued: {len(requeued)} dump parts that were deleted after conversion and are needed again"
            )
            self.left["teacher"] += requeued
        self.done += _settle_strangers(self.context)
        inventory = take_inventory(self.store)
        faults = (
            target_problems(self.store.folder(TARGETS), pending(self.store), deep=deep)
            if has_targets(self.store)
            else []
        )
        faults += unrecorded_shards(self.store, inventory)
        disputed = disputes(self.store, inventory)
        if disputed or (deep and faults):
            from bytecache.pipeline.commands.judgement import judge

            self.done += judge(self.store, inventory)
        lost = self.left.pop("convert", [])
        if not (lost or faults or disputed):
            return
        try:
            made = convert(self.context).made
            self.done.append(f"made again: {made} shards and the index, from the dump")
        except Interrupted:
            raise
        except BytecacheError as error:
            if is_straight(self.context.settings):
                self.left["teacher"] += lost or ["shards"]
            self.done.append(f"left: the targets cannot be made again yet ({error}); then run `bytecache convert`")

    def _orphans(self) -> None:
        """Set aside what no receipt names; configurations are written again, for the rest its command is named."""
        folders: set[str] = set()
        for key in take_inventory(self.store).orphans:
            folder = "/".join(key.split("/")[:2])
            if key.startswith(("train/student-", "export/")) and folder.count("/") and folder != key:
                if folder not in folders:
                    folders.add(folder)
                    self._folder_aside(folder)
                    self.done.append(f"set aside: {folder}, which no receipt names")
                    self.left[stage_of(key)].append(folder.partition("/")[2].partition("-")[0])
                continue
            self.done.append(f"set aside: {key} as {set_aside(self.store, key)}, which no receipt names")
            if key.endswith(RESOLVED_FILE):
                self.configurations.append(key)
            elif stage_of(key) in _LEFT:
                self.left[stage_of(key)].append(key)


def _left(command: str, names: list[str]) -> str:
    """What a command has to make again, and how to call it so that it does."""
    calls = [f"`bytecache {command}`"]
    if command == "export":
        calls = [f"`bytecache export --only {name}`" for name in dict.fromkeys(names)]
    return f"left: {len(names)} units of {command}; run {' and '.join(calls)} to make them again"


def _without_record(store: Store) -> list[str]:
    """Files of the targets that no receipt names: the index, the card, shards that are listed nowhere."""
    known = set(take_inventory(store).records)
    return [key for key in store.list(TARGETS) if key not in known]


def _requeue_deleted(store: Store) -> list[str]:
    """Forget dump parts deleted after conversion (convert.delete_dump) whose shard is gone; returns their names."""
    inventory = take_inventory(store)
    served = {part for receipt in inventory.of("convert") for part in receipt.inputs.get("parts", ())}
    lost = [
        receipt for receipt in inventory.of("teacher")
        if receipt.deleted and not served.issuperset(file.sha256 for file in receipt.files)
    ]  # fmt: skip
    for receipt in lost:
        store.delete(receipts.receipt_path("teacher", receipt.key))
    return [receipt.name for receipt in lost]


def _settle_strangers(context: Context) -> list[str]:
    """Second copies of listed shards go, shards that nothing lists are set aside, a damaged card is made again."""
    from bytecache.schemas.dataset.verification import verify_dataset

    store, done = context.store, []
    if not store.exists(f"{TARGETS}/{DATASET}"):
        return [
            f"moved: {key}, which no index lists and no receipt names, to {set_aside(store, key)}"
            for key in _without_record(store)
            if key.endswith(SUFFIX)
        ]
    problems = verify_dataset(store.folder(TARGETS))
    if older := [problem for problem in problems if problem.kind == "older"]:
        for problem in older:
            done += [
                f"set aside: {index} as {set_aside(store, index)} ({problem.detail})"
                for index in list(store.list(f"{TARGETS}/{problem.file}".rpartition("/")[0]))
            ]
        problems = verify_dataset(store.folder(TARGETS))  # what those alone listed is a stranger now
    strangers = {problem.file for problem in problems if problem.kind == "foreign"} - pending(store)
    recorded = {receipt.files[0].path: receipt for receipt in take_inventory(store).of("convert")} if strangers else {}
    for problem in problems:
        key = f"{TARGETS}/{problem.file}"
        if problem.kind == "duplicated":
            store.delete(key)
            done.append(f"removed: {problem.file}, a second copy of a listed shard")
        elif problem.file in strangers:
            done.append(f"moved: {problem.file}, which no index lists, to {set_aside(store, key)}")
            if key in recorded:
                set_aside(store, receipts.receipt_path("convert", recorded[key].key))
        elif problem.file == card.FILE and mend_card(context):
            done.append(f"made again: {problem.file} ({problem.detail})")
    return done
