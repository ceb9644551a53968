"""What a run folder holds, from its receipts: `status` counts them, `verify` recomputes every hash they state.

Neither needs a model, a configuration or a GPU. Price: `status` reads receipts and file sizes; `verify` reads every
byte once (about 1 GB/s per core).
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeline import receipts, units
from pipeline.commands_data import TARGETS, teacher_changes
from pipeline.context import Context
from pipeline.progress import human_bytes
from pipeline.receipts import Receipt
from pipeline.store import LocalStore
from schemas.errors import InputError, IntegrityError


def status(context: Context) -> dict[str, Any]:
    """Per stage what is done of what is planned. A receipt counts if its files are there with the right size.

    {"run": folder, "stages": [{"stage", "what", "done", "total" (None: unknown), "bytes", "note"}], "damaged": [...]}
    """
    store = context.store
    damaged: list[str] = []
    by_stage: dict[str, list[Receipt]] = defaultdict(list)
    for stage, key in receipts.list_receipts(store):
        try:
            receipt = receipts.read_receipt(store, stage, key)
        except IntegrityError as error:
            damaged.append(str(error))
            continue
        if receipt is None:
            continue
        wrong = [file.path for file in receipt.files if not _has_size(store, file.path, file.size)]
        if wrong:
            damaged.append(f"{stage} {receipt.name}: {', '.join(wrong)} missing or of another size")
        else:
            by_stage[stage].append(receipt)
    planned = units.read_plan(store)
    stages = [_plan_row(planned, by_stage["plan"])]
    stages += _teacher_rows(context, planned, by_stage["teacher"])
    stages.append(_convert_row(store, by_stage["convert"]))
    stages += _train_rows(store, by_stage["train"])
    stages += [_simple_row(stage, receipt) for stage in ("evaluate", "export") for receipt in by_stage[stage]]
    return {"run": str(store.root), "stages": stages, "damaged": damaged}


def status_table(report: dict[str, Any]) -> str:
    """`status` for a person."""
    lines = [f"{report['run']}"]
    for row in report["stages"]:
        total = "?" if row["total"] is None else row["total"]
        size = human_bytes(row["bytes"]) if row["bytes"] else "-"
        done = f"{row['done']}/{total}"
        line = f"  {row['stage']:<9} {row['what']:<24} {done:>11} {size:>9}  {row['note']}"
        lines.append(line.rstrip())
    lines += [f"  damaged: {line}" for line in report["damaged"]]
    if report["damaged"]:
        lines.append("  rerun the stage to repair what is damaged")
    return "\n".join(lines)


def verify(store: LocalStore) -> tuple[list[str], int]:
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
            found += [f"{stage} {receipt.name}: {problem}" for problem in receipts.problems(store, receipt)]
            if receipts.unit_key(stage, receipt.inputs) != key and stage != "plan":
                found.append(f"{stage} {receipt.name}: its inputs do not hash to its key; delete the receipt and rerun")
            checked |= {file.path for file in receipt.files}
    found += _verify_plan(store)
    folder = store.root / TARGETS
    if (folder / "dataset.json").is_file() or (folder / "manifest.parquet").is_file():
        found += _verify_targets(folder)
        checked |= {f"{TARGETS}/dataset.json", f"{TARGETS}/manifest.parquet"}
    if not checked and not found:
        raise InputError(f"{store.root} holds nothing with a receipt; name a run folder or a folder with dataset.json")
    # Every damaged shard is found twice, by its receipt and by the manifest; both lines help.
    return found, len(checked)


def verify_folder(folder: Path) -> tuple[list[str], int]:
    """`verify` for a run folder, or for a data set on its own (a folder with dataset.json)."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a run folder or a folder with dataset.json")
    if (folder / "dataset.json").is_file():
        return _verify_targets(folder), sum(path.name.endswith(".zarr.zip") for path in folder.iterdir()) + 2
    return verify(LocalStore(folder))


def _verify_plan(store: LocalStore) -> list[str]:
    try:
        planned = units.read_plan(store)
    except IntegrityError as error:
        return [str(error)]
    if planned is None:
        return []
    return [
        f"plan {unit.slice}: missing or altered; run `bytecache plan` to repair it"
        for unit in planned.units
        if not units.slice_is_whole(store, unit)
    ]


def _verify_targets(folder: Path) -> list[str]:
    from schemas.manifest import verify_dataset

    return [f"targets {file}: {kind}: {detail}" for file, kind, detail in verify_dataset(folder)]


def _has_size(store: LocalStore, key: str, size: int) -> bool:
    return store.exists(key) and store.get_path(key).stat().st_size == size


def _row(stage: str, what: str, done: int, total: int | None, size: int, note: str = "") -> dict[str, Any]:
    return {"stage": stage, "what": what, "done": done, "total": total, "bytes": size, "note": note}


def _size(found: list[Receipt]) -> int:
    return sum(file.size for receipt in found for file in receipt.files)


def _plan_row(planned: units.Plan | None, found: list[Receipt]) -> dict[str, Any]:
    if planned is None:
        return _row("plan", "-", 0, 1, 0, "run `bytecache plan`")
    heldout = sum(unit.split == "heldout" for unit in planned.units)
    note = f"{human_bytes(planned.n_bytes)} of text, {len(planned.units)} units, {heldout} held out"
    return _row("plan", planned.hash[:12], 1, 1, _size(found), note)


def _teacher_rows(context: Context, planned: units.Plan | None, found: list[Receipt]) -> list[dict[str, Any]]:
    groups: dict[str, list[Receipt]] = defaultdict(list)
    slices = {unit.sha256 for unit in planned.units} if planned else set()
    for receipt in found:
        if receipt.inputs.get("slice") in slices:
            groups[receipt.group].append(receipt)
    total = len(planned.units) if planned else None
    rows = []
    for group, dumps in sorted(groups.items()):
        changes = teacher_changes(dumps[0], context.settings.teacher.resolved())
        note = f"other settings than the configuration: {'; '.join(changes)}" if changes else ""
        rows.append(_row("teacher", group, len(dumps), total, _size(dumps), note))
    return rows or [_row("teacher", "-", 0, total, 0)]


def _convert_row(store: LocalStore, found: list[Receipt]) -> dict[str, Any]:
    from schemas.manifest import read_dataset

    folder = store.root / TARGETS
    if not (folder / "dataset.json").is_file():
        return _row("convert", "-", len(found), None, _size(found), "no data set published yet")
    try:
        dataset = read_dataset(folder)
    except IntegrityError as error:
        return _row("convert", "-", len(found), None, _size(found), str(error))
    listed = {entry.file for entry in dataset.entries}
    done = [receipt for receipt in found if Path(receipt.files[0].path).name in listed]
    return _row("convert", dataset.manifest_hash[:12], len(done), len(listed), _size(done), "data set published")


def _train_rows(store: LocalStore, found: list[Receipt]) -> list[dict[str, Any]]:
    rows = []
    finished = {Path(receipt.counts["checkpoint"]).parent.name for receipt in found}
    for receipt in found:
        steps = receipt.inputs["train"]["steps"]
        rows.append(_row("train", Path(receipt.counts["checkpoint"]).parent.name, steps, steps, _size([receipt])))
    for folder in sorted((store.root / "train").glob("*-*")):
        names = sorted(path.stem for path in folder.glob("step-*.safetensors"))
        if folder.name not in finished and names:
            done = int(names[-1].removeprefix("step-"))
            rows.append(_row("train", folder.name, done, None, 0, "unfinished: `bytecache train` continues here"))
    return rows or [_row("train", "-", 0, None, 0)]


def _simple_row(stage: str, receipt: Receipt) -> dict[str, Any]:
    return _row(stage, receipt.name, 1, 1, _size([receipt]), receipt.files[0].path if stage == "evaluate" else "")
