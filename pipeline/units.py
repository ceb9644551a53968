"""The plan: the corpus cut once into immutable slices, the units of all later work.

Two streaming passes. The first hashes every document and finds the held-out threshold; it is all that a
repeated `plan` costs. The second writes slices: documents in corpus order, each split apart, a slice closed
before it would exceed `corpus.unit_bytes` (a longer document is a slice alone). A document is held out if
sha256(seed, text) falls under `corpus.heldout_fraction`, so equal texts never straddle the splits.
`plan.json` is committed after every slice it names: a plan that exists is whole. Memory: two open slices.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import changed_keys
from pipeline.receipts import (
    Receipt,
    canonical_json,
    read_receipt,
    record_file,
    software_versions,
    unit_key,
    write_receipt,
)
from pipeline.stores import Store, disk_errors, sha256_file
from schemas.errors import ConfigError, InputError, IntegrityError, Interrupted
from schemas.settings import Settings
from stages.conversations import KIND_KEY, opening
from stages.corpus import CorpusReader, Document

PLAN_VERSION = 1
PLAN_KEY = "plan/plan.json"
Split = Literal["train", "heldout"]
SLICE_SCHEMA = pa.schema([("doc_id", pa.string()), ("text", pa.string()), ("context", pa.string())])
# Only these shape the slices; where the text came from does not, its content does.
_SHAPING = ("seed", "unit_bytes", "heldout_fraction")


class Unit(BaseModel):
    """One slice: `slice` is its store key, `sha256` that of the slice file, `n_bytes` of UTF-8 text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    index: int
    split: Split
    slice: str
    sha256: str
    n_docs: int
    n_bytes: int


class Plan(BaseModel):
    """`corpus`: identity and counts of the text; `settings`: what shaped the slices; `hash` names the whole plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int
    corpus: dict[str, Any]
    settings: dict[str, Any]
    units: tuple[Unit, ...]
    hash: str

    @property
    def n_bytes(self) -> int:
        """Bytes of text in all units."""
        return sum(unit.n_bytes for unit in self.units)


class TextHash:
    """Identity of a corpus: sha256 over the length-prefixed id, text and context of every document, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> None:
        """Take in the next document."""
        for part in document if document.context else document[:2]:
            raw = part.encode("utf-8")
            self._hash.update(len(raw).to_bytes(8, "little"))
            self._hash.update(raw)

    def hexdigest(self) -> str:
        """Hex sha256 of the documents so far."""
        return self._hash.hexdigest()


class _Survey:
    """First pass: identity of the text, and the hash below which a document is held out."""

    def __init__(self, settings: Settings, stop: Callable[[], bool]) -> None:
        reader = CorpusReader(settings.corpus)
        digest = TextHash()
        threshold = int(settings.corpus.heldout_fraction * 2**64)
        below = 0
        lowest, highest = (2**64, -1), (-1, -1)
        for index, document in enumerate(reader):
            _check(stop)
            digest.add(document)
            value = split_hash(settings.run.seed, _split_by(document, settings.corpus.kind))
            below += value < threshold
            lowest = min(lowest, (value, index))
            highest = max(highest, (value, index))
        self.threshold = threshold
        self.forced_train: tuple[int, int] = (-1, -1)
        # A small corpus can miss either side by chance: give it its nearest document, if a split was asked for.
        if settings.corpus.heldout_fraction > 0 and reader.n_documents >= 2:
            if below == 0:
                self.threshold = lowest[0] + 1
                below = reader.n_documents if lowest[0] == highest[0] else 1
            if below == reader.n_documents:
                # All turns of a conversation, unless there is nothing else.
                self.forced_train = (highest[0] if lowest[0] != highest[0] else -1, highest[1])
        self.corpus = {
            "sha256": digest.hexdigest(),
            "n_documents": reader.n_documents,
            "n_bytes": reader.n_bytes,
            "n_empty_skipped": reader.n_empty,
            "n_ids_renamed": reader.n_renamed,
            "n_files_ignored": reader.n_ignored_files,
            "source": Path(settings.corpus.source).name,
        }

    def split(self, index: int, seed: int, text: str) -> Split:
        value = split_hash(seed, text)
        forced = value == self.forced_train[0] or index == self.forced_train[1]
        return "train" if forced or value >= self.threshold else "heldout"


def _split_by(document: Document, kind: str) -> str:
    """What decides a document's split: its text; where it answers something, what it answers."""
    return document.text if kind == "text" else opening(document.context, kind)


def split_hash(seed: int, text: str) -> int:
    """A uniform integer below 2^64 from (seed, text): compared with heldout_fraction * 2^64."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0".encode() + text.encode("utf-8")).digest()[:8], "big")


def make_plan(store: Store, settings: Settings, stop: Callable[[], bool] = lambda: False) -> tuple[Plan, bool]:
    """Plan the run; returns the plan and whether it is new.

    Raises InputError (corpus), ConfigError (a plan of another corpus or other settings is already there),
    Interrupted (`stop()` became true; rerun).
    """
    survey = _Survey(settings, stop)
    old = read_plan(store)
    if old is not None:
        _refuse_changes(store, old, settings, survey.corpus)
        damaged = [unit for unit in old.units if not slice_is_whole(store, unit)]
        if not damaged:
            if read_receipt(store, "plan", old.hash) is None:
                write_receipt(store, _receipt(store, old))
            return old, False
    units = _write_slices(store, settings, survey, stop)
    corpus, shape = survey.corpus, _shape(settings)
    plan = Plan(
        version=PLAN_VERSION, corpus=corpus, settings=shape, units=tuple(units), hash=_plan_hash(corpus, shape, units)
    )
    if old is not None and old.hash != plan.hash:
        raise IntegrityError(f"{store.name}: damaged slices cannot be rewritten alike; plan again in a new run.dir")
    if not store.put_json_if_absent(PLAN_KEY, plan.model_dump(mode="json")):
        plan = read_plan(store) or plan
        _refuse_changes(store, plan, settings, corpus)
    write_receipt(store, _receipt(store, plan))
    return plan, old is None


def read_plan(store: Store) -> Plan | None:
    """The plan of a run folder as written, or None. Raises IntegrityError if it is damaged or of another version."""
    if not store.exists(PLAN_KEY):
        return None
    raw, path = store.read_bytes(PLAN_KEY), f"{store.name}/{PLAN_KEY}"
    try:
        version = json.loads(raw).get("version")
        if version != PLAN_VERSION:
            raise IntegrityError(f"{path} has version {version}, not {PLAN_VERSION}; plan again in a new run.dir")
        plan = Plan.model_validate_json(raw)
    except (ValueError, ValidationError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(f"{path} is damaged ({reason}); delete it and run `bytecache plan` again") from None
    if plan.hash != _plan_hash(plan.corpus, plan.settings, plan.units):
        raise IntegrityError(f"{path} was edited: its hash differs; delete it and run `bytecache plan` again")
    return plan


def load_plan(store: Store, settings: Settings) -> Plan:
    """The plan a stage works from. Raises InputError if there is none, ConfigError if settings changed since."""
    plan = read_plan(store)
    if plan is None:
        raise InputError(f"{store.name} holds no plan; run `bytecache plan` with this run.dir first")
    _refuse_changes(store, plan, settings, None)
    return plan


def _refuse_changes(store: Store, plan: Plan, settings: Settings, corpus: dict[str, Any] | None) -> None:
    changes = list(changed_keys(plan.settings, _shape(settings)))
    if corpus is not None and plan.corpus["sha256"] != corpus["sha256"]:
        changes.append(
            "corpus text: {n_documents} documents, {n_bytes} bytes, sha256 {sha256:.12}".format(**plan.corpus)
            + " -> {n_documents} documents, {n_bytes} bytes, sha256 {sha256:.12}".format(**corpus)
        )
    if changes:
        raise ConfigError(
            f"{store.name} was planned otherwise ({'; '.join(changes)}); restore that, or use a new run.dir"
        )


def _shape(settings: Settings) -> dict[str, Any]:
    shape = {"seed": settings.run.seed, **settings.corpus.model_dump()}
    return {name: shape[name] for name in _SHAPING} | ({"kind": shape["kind"]} if shape["kind"] != "text" else {})


def _identity(corpus: dict[str, Any]) -> dict[str, Any]:
    return {name: corpus[name] for name in ("sha256", "n_documents", "n_bytes")}


def _plan_hash(corpus: dict[str, Any], shape: dict[str, Any], units: Sequence[Unit]) -> str:
    listed = [unit.model_dump() for unit in units]
    return unit_key("plan", {"version": PLAN_VERSION, "corpus": _identity(corpus), "settings": shape, "units": listed})


def _receipt(store: Store, plan: Plan) -> Receipt:
    files = [record_file(store, key) for key in (PLAN_KEY, *(unit.slice for unit in plan.units))]
    return Receipt(
        stage="plan",
        key=plan.hash,
        name="plan",
        files=tuple(files),
        inputs={"corpus": _identity(plan.corpus), "settings": plan.settings},
        counts={**plan.corpus, "units": len(plan.units)},
        versions=software_versions(),
    )


def slice_is_whole(store: Store, unit: Unit) -> bool:
    """Whether the unit's slice file is there and hashes to the plan's sha256."""
    return store.exists(unit.slice) and store.sha256(unit.slice) == unit.sha256


def _write_slices(store: Store, settings: Settings, survey: _Survey, stop: Callable[[], bool]) -> list[Unit]:
    units: list[Unit] = []
    open_docs: dict[Split, list[Document]] = {"train": [], "heldout": []}
    open_bytes: dict[Split, int] = {"train": 0, "heldout": 0}

    def close(split: Split) -> None:
        if open_docs[split]:
            units.append(
                _write_slice(store, len(units), split, open_docs[split], open_bytes[split], settings.corpus.kind)
            )
            open_docs[split], open_bytes[split] = [], 0

    digest = TextHash()
    for index, document in enumerate(CorpusReader(settings.corpus)):
        _check(stop)
        digest.add(document)
        split = survey.split(index, settings.run.seed, _split_by(document, settings.corpus.kind))
        size = len(document.text.encode("utf-8"))
        if open_bytes[split] + size > settings.corpus.unit_bytes:
            close(split)
        open_docs[split].append(document)
        open_bytes[split] += size
    close("train")
    close("heldout")
    if digest.hexdigest() != survey.corpus["sha256"]:
        raise InputError(f"corpus {settings.corpus.source} changed while it was being read; rerun when it is at rest")
    return units


def _write_slice(store: Store, index: int, split: Split, docs: list[Document], n_bytes: int, kind: str) -> Unit:
    # The name holds the content, so a half-written plan of other settings can never lend a slice to this one.
    content = hashlib.sha256(canonical_json([kind, *docs])).hexdigest()
    key = f"plan/slices/{index:05d}-{split}-{content[:12]}.parquet"
    temporary = store.temp_path(key)
    with disk_errors(f"writing {temporary}"):
        try:
            columns = [pa.array(column, pa.string()) for column in zip(*docs, strict=True)]
            table = pa.Table.from_arrays(columns, schema=SLICE_SCHEMA.with_metadata({KIND_KEY: kind}))
            pq.write_table(table, temporary, compression="zstd", compression_level=3, row_group_size=1024)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sha256 = sha256_file(temporary)
    if store.exists(key) and store.sha256(key) != sha256:
        store.replace(key, temporary)
    else:
        store.put_if_absent(key, temporary)
    return Unit(index=index, split=split, slice=key, sha256=sha256, n_docs=len(docs), n_bytes=n_bytes)


def _check(stop: Callable[[], bool]) -> None:
    if stop():
        raise Interrupted("plan stopped by a signal before it was whole; rerun the same command")
