"""`mix`: finished data sets of several teachers over the same text become one, in a run folder of its own.

A shard of the first data set is a unit: its key holds the content of all shards that are read for it, the weights, and
a fingerprint of the code. Beside each shard lies the teachers' divergence at every position, `<shard>.jsd.npy`
(float32 [N], nats), for whoever selects positions. `info.mix` of dataset.json says what was mixed, with the identity
and the certificate of each; there is no certificate of the mixture, since there is no reference to measure it against.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.pipeline.commands.dataset import TARGETS, keep_settings, shard_entry, whole_index
from bytecache.pipeline.context import Context
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.aside import set_aside
from bytecache.pipeline.units.receipts import FileRecord, Receipt, unit_key
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work, commit_file, outcome_line, run_job
from bytecache.schemas.dataset.card import FILE, is_ours
from bytecache.schemas.dataset.index import DATASET, SUFFIX, Dataset, index_documents
from bytecache.schemas.errors import ConfigError, IntegrityError
from bytecache.schemas.shard.codes import FORMAT, VERSION
from bytecache.stages.convert.precision import precision_of
from bytecache.stages.mix.documents import Documents, Name, common_to
from bytecache.stages.mix.mix import Mixer, Mixing, Part, mix_shard, parts_by_shard
from bytecache.stages.targets.source import open_dataset

STAGE = "mix"
DIVERGENCE = ".jsd.npy"
_CODE = tuple(f"bytecache.{module}" for module in (
    "stages.mix.mix", "stages.mix.pool", "stages.mix.documents", "stages.convert.precision", "schemas.shard.builder",
    "schemas.shard.blocks", "schemas.shard.gather", "schemas.shard.sorting", "schemas.shard.prior",
    "schemas.shard.quantise", "schemas.shard.logarithms", "schemas.shard.codes", "schemas.shard.reader",
    "schemas.shard.expansion", "schemas.shard.zarr_zip", "schemas.arrays",
))  # fmt: skip
"""Modules whose code decides the bytes of a mixed shard."""
_TEXTS = ("license", "corpus_license", "teacher_license", "attribution")


def mix(context: Context, places: Sequence[str], mixing: Mixing, *, partial: bool = False) -> Outcome:
    """Mix the data sets at `places` (folders or URLs) into the run folder's own, and publish it.

    `partial`: only the documents that all have. Raises InputError where their texts differ, ConfigError where one of
    them is there twice or another data set lies in the run folder, IntegrityError for a source that is damaged.
    """
    settings = context.settings.dataset
    opened = [
        open_dataset(
            place, cache_dir=settings.cache_dir, cache_bytes=int(settings.cache_gib * 2**30),
            private_redirects=settings.private_redirects,
        )
        for place in places
    ]  # fmt: skip
    _refuse_twice(opened)
    sets = [Documents(dataset) for dataset in opened]
    common, lines = common_to(sets, partial=partial)
    _refuse_idle_routes(mixing, common)
    for line in lines:
        context.say(f"mix: {line}; left out")
    info = _info(context, sets, mixing, lines)
    _refuse_other(context, info)
    job = _job(context, sets, mixing, common)
    _forget_incomplete(context.store, job)
    outcome = run_job(context.store, job, context.stop)
    outcome = Outcome([_with_divergence(context.store, receipt) for receipt in outcome.receipts], outcome.made)
    info["mix"] |= _measured(outcome.receipts)
    published = _publish(context, outcome.receipts, info)
    keep_settings(context, changed=outcome.made > 0 or published)
    context.say(outcome_line(STAGE, outcome))
    for line in _summary(info["mix"], [one.dataset for one in sets]):
        context.say(f"mix: {line}")
    return outcome


def _refuse_twice(sets: Sequence[Dataset]) -> None:
    """One data set has one vote, however often and by whatever name it is given. Raises ConfigError."""
    seen: dict[str, str] = {}
    for dataset in sets:
        if dataset.content_sha256 in seen:
            raise ConfigError(
                f"{dataset.where} is the same data set as {seen[dataset.content_sha256]} (content "
                f"{dataset.content_sha256[:12]}): a mixture with itself is what it was; name each data set once, and "
                "say with --weights how much it counts"
            )
        seen[dataset.content_sha256] = dataset.where


def _refuse_idle_routes(mixing: Mixing, common: Iterable[Name]) -> None:
    """A route that weighs no document is a misspelt one. Raises ConfigError."""
    names = {doc_id for _, doc_id, _ in common}
    taken = {
        next((i for i, (pattern, _) in enumerate(mixing.routes) if fnmatchcase(name, pattern)), -1) for name in names
    }
    for number, (pattern, _) in enumerate(mixing.routes):
        if number not in taken:
            raise ConfigError(
                f"--route {pattern}: weighs no document that is mixed, or an earlier route takes all of its own; names "
                f"are like {min(names)!r}"
            )


def _job(context: Context, sets: Sequence[Documents], mixing: Mixing, common: dict[Name, int]) -> Job:
    """One unit for each shard of the first data set that holds anything common."""
    settings = context.settings.convert
    spent = settings.prune, precision_of(settings)
    shape = {"prune": settings.prune, "precision": list(spent[1])}
    code = receipts.code_fingerprint(*_CODE)[:16]
    first = sets[0].dataset.entries
    groups = [(number, parts) for number, parts in enumerate(parts_by_shard(sets, common)) if parts]
    mixer = Mixer(sets, mixing)

    def task(index: int) -> Task:
        number, parts = groups[index]
        inputs = {
            "split": first[number].split, "sources": _sources(sets, parts), "mixing": mixing.as_json(),
            "documents": receipts.unit_key("documents", {"names": [_place(part) for part in parts]}),
            "convert": shape, "format": [FORMAT, VERSION], "code": code,
        }  # fmt: skip
        name = first[number].file.removesuffix(SUFFIX).rpartition("-")[0] or f"{first[number].split}-{number:05d}"
        out = f"{TARGETS}/{name}-{unit_key(STAGE, inputs)[:12]}{SUFFIX}"
        return Task(STAGE, name, out, inputs, first[number].n_bytes, payload=parts)

    @contextmanager
    def open_work(stop: Callable[[], bool]) -> Iterator[Work]:
        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            attrs = {"split": task.inputs["split"], "mixing": mixing.as_json(), "sources": task.inputs["sources"]}
            if sets[0].kind != "text":
                attrs["kind"] = sets[0].kind
            counts, divergence = mix_shard(mixer, task.payload, out, spent, attrs, stop, tick)
            record = _commit_divergence(context.store, task.out, divergence)
            return counts | {"divergence": record.model_dump()}

        yield work

    sizes = [sum(_size(sets[0], part) for part in parts) for _, parts in groups]
    return Job(STAGE, {"mixing": mixing.as_json(), "code": code}, sizes, task, open_work)


def _size(documents: Documents, part: Part) -> int:
    """For progress: a document's share of its shard's text."""
    entry = documents.dataset.entries[part.places[0].entry]
    return entry.n_bytes // max(1, entry.n_documents)


def _sources(sets: Sequence[Documents], parts: Sequence[Part]) -> list[list[str]]:
    """sha256 of the shards of each data set that hold the documents."""
    return [
        [one.dataset.entries[entry].sha256 for entry in sorted({part.places[number].entry for part in parts})]
        for number, one in enumerate(sets)
    ]


def _place(part: Part) -> list[Any]:
    return [part.name[1], [place.document for place in part.places]]


def _commit_divergence(store: Store, out: str, divergence: Any) -> FileRecord:
    key = out.removesuffix(SUFFIX) + DIVERGENCE
    temporary = store.temp_path(key)
    with temporary.open("wb") as file:
        np.save(file, divergence, allow_pickle=False)
    try:
        return commit_file(store, key, temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _with_divergence(store: Store, receipt: Receipt) -> Receipt:
    """The receipt with the file of divergences beside the shard, so that `verify` looks after it."""
    record = FileRecord.model_validate(receipt.counts["divergence"])
    if receipt.beside == (record,):
        return receipt
    complete = receipt.model_copy(update={"beside": (record,)})
    receipts.replace_receipt(store, complete)
    return complete


def _forget_incomplete(store: Store, job: Job) -> None:
    """A shard whose divergences are lost is mixed again: they are made together."""
    for task in job.tasks:
        try:
            receipt = receipts.read_receipt(store, STAGE, task.key)
        except IntegrityError:
            continue  # the runner says so
        if receipt and receipts.file_fault(store, FileRecord.model_validate(receipt.counts["divergence"])):
            store.delete(receipts.receipt_path(STAGE, task.key))


# ---- the index


def _info(context: Context, sets: Sequence[Documents], mixing: Mixing, left_out: list[str]) -> dict[str, Any]:
    first = sets[0].dataset.info
    shown = context.settings.dataset
    sources = [
        {
            "content_sha256": one.dataset.content_sha256, "name": one.dataset.info["name"],
            "teacher": one.dataset.info["teacher"], "settings": one.dataset.info["settings"],
            "fidelity": one.dataset.fidelity, **{name: one.dataset.info[name] for name in _TEXTS},
        }
        for one in sets
    ]  # fmt: skip
    texts = {name: _joined([str(source[name]) for source in sources]) for name in _TEXTS}
    names = [teacher_name(one.dataset) for one in sets]
    return {
        "teacher": {"model": f"{mixing.pool} pool of {', '.join(names)}", "kind": "mix"},
        "corpus": first["corpus"],
        "settings": {"convert": context.settings.convert.shaping()},
        "software": receipts.software_versions(),
        "creation": {"set_aside": {}, **({"left_out": left_out} if left_out else {})},
        "mix": {**mixing.as_json(), "sources": sources},
        "name": shown.name,
        "license": shown.license or texts["license"],
        "corpus_license": context.settings.corpus.license or texts["corpus_license"],
        "teacher_license": shown.teacher_license or texts["teacher_license"],
        "attribution": context.settings.corpus.attribution or texts["attribution"],
    }


def teacher_name(dataset: Dataset) -> str:
    """The teacher of a data set, for people."""
    teacher = dataset.info["teacher"]
    return str(teacher.get("model") or teacher.get("name") or dataset.content_sha256[:12])


def _joined(texts: list[str]) -> str:
    """What each says, once: a mixture is under all of their terms."""
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _measured(shards: Sequence[Receipt]) -> dict[str, Any]:
    """Figures over all supervised positions, six digits."""
    positions = sum(receipt.counts["mixed_positions"] for receipt in shards)
    size = sum(receipt.counts["mixed_bytes"] for receipt in shards)

    def columns(name: str) -> list[float]:
        return [math.fsum(values) for values in zip(*(receipt.counts[name] for receipt in shards), strict=True)]

    def mean(total: float, count: float) -> float:
        return float(f"{total / max(1.0, count):.6g}")

    *bits, mixture = (mean(nats / math.log(2), size) for nats in columns("nll"))
    return {
        "jsd_mean": mean(math.fsum(receipt.counts["jsd_sum"] for receipt in shards), positions),
        "bits_per_byte": bits, "bits_per_byte_mixed": mixture, "silent": columns("silent"),
        "weight_mean": [mean(total, positions) for total in columns("weight_sum")],
        "divergence": {Path(r.files[0].path).name: r.counts["divergence"]["sha256"] for r in shards},
    }  # fmt: skip


def _summary(mixed: dict[str, Any], sets: Sequence[Dataset]) -> Iterator[str]:
    parts = zip(sets, mixed["bits_per_byte"], mixed["weight_mean"], mixed["silent"], strict=True)
    for dataset, bits, weight, silent in parts:
        said = f", silent at {silent:.0f} positions" if silent else ""
        yield f"{teacher_name(dataset)}: {bits:.4f} bits/byte, mean weight {weight:.3f}{said}"
    bits, best = mixed["bits_per_byte_mixed"], min(mixed["bits_per_byte"])
    yield f"mixture: {bits:.4f} bits/byte; teachers differ by {mixed['jsd_mean']:.4f} nats (JSD)"
    if bits > best:
        yield f"warning: the mixture is worse than the best teacher alone ({best:.4f} bits/byte); more can hurt"


def _refuse_other(context: Context, info: dict[str, Any]) -> None:
    """Raise ConfigError where the run folder holds a data set that was not mixed so."""
    published = whole_index(context.store)
    if published is None:  # a damaged one is made again
        return
    old = published.info.get("mix")
    same = isinstance(old, dict) and all(old.get(name) == value for name, value in info["mix"].items())
    if not same or published.info["settings"] != info["settings"]:
        raise ConfigError(
            f"{context.store.name}/{TARGETS} holds another data set; choose a new run.dir for this mixture"
        )


def _publish(context: Context, shards: Sequence[Receipt], info: dict[str, Any]) -> bool:
    """Write the index unless it says the same already; what it does not list is set aside. True if written."""
    store = context.store
    documents = index_documents([shard_entry(receipt) for receipt in shards], info)
    keys = {receipt.key for receipt in shards}
    files = {file.path for receipt in shards for file in (*receipt.files, *receipt.beside)}
    stale = [key for key in store.list(TARGETS) if key.endswith((SUFFIX, DIVERGENCE)) and key not in files]
    stale += [receipts.receipt_path(STAGE, key) for _, key in receipts.list_receipts(store, STAGE) if key not in keys]
    moved = [set_aside(store, key) for key in stale]
    if moved:
        context.say(f"mix: {len(moved)} files of another mixture are set aside ({moved[0]}, ...)")
    place = f"{TARGETS}/{DATASET}"
    if store.exists(place) and store.read_bytes(place) == documents[DATASET]:
        return False
    for name, raw in documents.items():
        key = f"{TARGETS}/{name}"
        if name != FILE or not store.exists(key) or is_ours(store.get_path(key)):
            store.replace(key, store.write_temp(name, raw))
    return True
