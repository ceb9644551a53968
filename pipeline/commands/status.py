"""What a run folder holds, from its receipts; no model, no GPU. Price: receipts and file sizes are read, no content."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from bytecache.pipeline.commands.dataset import read_index
from bytecache.pipeline.commands.editions import older_datasets
from bytecache.pipeline.commands.missing import summary
from bytecache.pipeline.commands.straight import is_straight
from bytecache.pipeline.commands.teacher import teacher_changes
from bytecache.pipeline.context import Context
from bytecache.pipeline.fleet.report import fleet_status, fleet_table
from bytecache.pipeline.plan.index import Plan, read_plan
from bytecache.pipeline.stores import Store, overlapped
from bytecache.pipeline.units import documents, receipts
from bytecache.pipeline.units.progress import human_bytes
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.dataset.editions import edition_of
from bytecache.schemas.errors import IntegrityError


def status(context: Context) -> dict[str, Any]:
    """Per stage what is done of what is planned. A receipt counts if its files are there with the right size.

    {"run": folder, "stages": [{"stage", "what", "done", "total" (None: unknown), "bytes", "note"}],
    "fleet": see `pipeline.fleet.report.fleet_status`, "damaged": [...]}
    """
    store = context.store
    damaged: list[str] = []
    by_stage: dict[str, list[Receipt]] = defaultdict(list)
    for receipt_or_fault in overlapped(lambda place: _look(store, *place), receipts.list_receipts(store)):
        if isinstance(receipt_or_fault, Receipt):
            by_stage[receipt_or_fault.stage].append(receipt_or_fault)
        elif receipt_or_fault:
            damaged.append(receipt_or_fault)
    planned = read_plan(store)
    edition = planned.edition if planned else 1
    stages = [_plan_row(planned, by_stage["plan"])]
    if is_straight(context.settings):
        stages.append(_straight_row(context, planned, by_stage["convert"]))
    else:
        stages += _teacher_rows(context, planned, by_stage["teacher"])
    stages.append(_convert_row(store, [*by_stage["convert"], *by_stage["mix"]], edition))
    stages += _train_rows(store, by_stage["train"], edition)
    stages += [_simple_row(stage, receipt) for stage in ("evaluate", "export") for receipt in by_stage[stage]]
    return {"run": store.name, "stages": stages, "fleet": fleet_status(context, edition), "damaged": damaged}


def _look(store: Store, stage: str, key: str) -> Receipt | str | None:
    """A receipt whose files are there, what is wrong with it, or None if it went meanwhile."""
    try:
        receipt = receipts.read_receipt(store, stage, key)
    except IntegrityError as error:
        return str(error)
    if receipt is not None:
        receipt = documents.settled(store, receipt)
    present = () if receipt is None or receipt.deleted else receipt.files
    wrong = [file.path for file in present if store.size(file.path) != file.size]
    return f"{stage} {receipt.name}: {', '.join(wrong)} missing or of another size" if receipt and wrong else receipt


def status_table(report: dict[str, Any]) -> str:
    """`status` for a person."""
    lines = [f"{report['run']}"]
    for row in report["stages"]:
        total = "?" if row["total"] is None else row["total"]
        size = human_bytes(row["bytes"]) if row["bytes"] else "-"
        done = f"{row['done']}/{total}"
        line = f"  {row['stage']:<9} {row['what']:<24} {done:>11} {size:>9}  {row['note']}"
        lines.append(line.rstrip())
    if report["fleet"]:
        lines.append(fleet_table(report["fleet"]))
    lines += [f"  damaged: {line}" for line in report["damaged"]]
    if report["damaged"]:
        lines.append("  rerun the stage to repair what is damaged")
    return "\n".join(lines)


def _row(stage: str, what: str, done: int, total: int | None, size: int, note: str = "") -> dict[str, Any]:
    return {"stage": stage, "what": what, "done": done, "total": total, "bytes": size, "note": note}


def _size(of_stage: list[Receipt]) -> int:
    return sum(file.size for receipt in of_stage for file in receipt.files if not receipt.deleted)


def _plan_row(planned: Plan | None, of_stage: list[Receipt]) -> dict[str, Any]:
    if planned is None:
        return _row("plan", "-", 0, 1, 0, "run `bytecache plan`")
    note = f"{human_bytes(planned.n_bytes)} of text, {len(planned.sizes)} units, {planned.n_heldout} held out"
    note += f", edition {planned.edition}, after {planned.index.parent[:12]}" if planned.edition > 1 else ""
    note += ", the first of more (corpus.max_bytes)" if planned.corpus.get("is_cut") else ""
    if ignored := planned.corpus.get("n_files_ignored"):
        note += f", {ignored} files of other kinds ignored"
    return _row("plan", planned.hash[:12], 1, 1, _size(of_stage), note)


def _teacher_rows(context: Context, planned: Plan | None, of_stage: list[Receipt]) -> list[dict[str, Any]]:
    groups: dict[str, list[Receipt]] = defaultdict(list)
    slices = {unit.sha256 for unit in planned.units} if planned else set()
    for receipt in of_stage:
        if receipt.inputs.get("slice") in slices:
            groups[receipt.group].append(receipt)
    total = len(planned.sizes) if planned else None
    rows = []
    for group, dumps in sorted(groups.items()):
        changes = teacher_changes(dumps[0], context.settings.teacher.resolved())
        note = f"other settings than the configuration: {'; '.join(changes)}" if changes else ""
        gone = sum(receipt.deleted for receipt in dumps)
        notes = [note] if note else []
        notes += [f"{gone} parts deleted after conversion"] if gone else []
        rows.append(_row("teacher", group, len(dumps), total, _size(dumps), "; ".join(notes)))
    return rows or [_row("teacher", "-", 0, total, 0)]


def _straight_row(context: Context, planned: Plan | None, shards: list[Receipt]) -> dict[str, Any]:
    """Units whose shards the teacher's workers have made, of those that the plan has."""
    slices = {unit.sha256 for unit in planned.units} if planned else set()
    fitting = [receipt for receipt in shards if slices.issuperset(receipt.inputs.get("slices", [None]))]
    changes = teacher_changes(fitting[0], context.settings.teacher.resolved()) if fitting else []
    other = f"; other settings than the configuration: {'; '.join(changes)}" if changes else ""
    done = sum(len(receipt.inputs["slices"]) for receipt in fitting)
    note = f"straight to targets, no dump: {len(fitting)} shards{other}"
    return _row("teacher", fitting[0].group if fitting else "-", done, len(slices) if planned else None, 0, note)


def _convert_row(store: Store, of_stage: list[Receipt], edition: int) -> dict[str, Any]:
    try:
        dataset = read_index(store)
    except IntegrityError as error:
        return _row("convert", "-", len(of_stage), None, _size(of_stage), str(error))
    if dataset is None:
        return _row("convert", "-", len(of_stage), None, _size(of_stage), "no data set published yet")
    listed = {entry.file for entry in dataset.entries}
    done = [receipt for receipt in of_stage if Path(receipt.files[0].path).name in listed]
    missing = dataset.info["creation"].get("missing", [])
    note = "data set published" + (f"; {summary(missing)}" if missing else "")
    number = edition_of(dataset.info)
    note += f", edition {number}" if number > 1 or edition > number else ""
    if older := _older(store):
        note += f", beside edition{'s' * (len(older) > 1)} {', '.join(map(str, older))}"
    note += f"; the plan is edition {edition}: run `bytecache teacher`, then `convert`" if edition > number else ""
    return _row("convert", dataset.content_sha256[:12], len(done), len(listed), _size(done), note)


def _older(store: Store) -> list[int]:
    """Older editions of the data set that are there; what is wrong with one `verify` says."""
    try:
        return [edition_of(dataset.info) for dataset in older_datasets(store)]
    except IntegrityError:
        return []


def _train_rows(store: Store, of_stage: list[Receipt], edition: int) -> list[dict[str, Any]]:
    rows = []
    finished = {Path(receipt.counts["checkpoint"]).parent.name for receipt in of_stage}
    for receipt in of_stage:
        steps = receipt.inputs["train"]["steps"]
        seen = receipt.counts.get("edition", 1)
        note = f"of edition {seen}" if seen > 1 or edition > 1 else ""
        name = Path(receipt.counts["checkpoint"]).parent.name
        rows.append(_row("train", name, steps, steps, _size([receipt]), note))
    last: dict[str, int] = {}
    for key in store.list("train"):
        path = Path(key)
        if path.suffix == ".safetensors" and path.stem.startswith("step-"):
            last[path.parent.name] = int(path.stem.removeprefix("step-"))  # listed in order: the last one stays
    for name, done in sorted(last.items()):
        if name not in finished:
            rows.append(_row("train", name, done, None, 0, "unfinished: `bytecache train` continues here"))
    return rows or [_row("train", "-", 0, None, 0)]


def _simple_row(stage: str, receipt: Receipt) -> dict[str, Any]:
    return _row(stage, receipt.name, 1, 1, _size([receipt]), receipt.files[0].path if stage == "evaluate" else "")
