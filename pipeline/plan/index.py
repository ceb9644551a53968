"""The plan as it lies in the store: an index of all units, and pages that say where the text of each one is.

    plan/plan.json              of the whole: identity of the text, bytes of every unit, which are held out, hashes
                                of the pages
    plan/units/NUMBER-HASH.json a page: `PAGE` units, each with its slice, its hash and its counts
    plan/slices/...             the text
    plan/editions/NUMBER.json   older plans of a corpus that changed, and the current one (`pipeline.plan.editions`)

Each is committed after all that it names: a plan that exists is whole. A worker reads the index once, and a page when
it claims a unit from it; claims go through a page in order (`pipeline.fleet.claims`), so it keeps the last few.

Price, at a million units (10 TB of text in units of 10 MB; `benchmarks/queue_simulation.py`): an index of 12.8 MB and
977 pages of 0.2 MB, of which a worker of a hundred units reads a few. In one file it was 190 MB for each worker.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, Self, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bytecache.pipeline.config import changed_keys
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units.receipts import canonical_json, unit_key
from bytecache.schemas import strict_json
from bytecache.schemas.arrays import U64
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError
from bytecache.schemas.settings import Settings
from bytecache.schemas.whole import Count, Whole, is_whole, same

PLAN_VERSION = 5
PLAN_KEY = "plan/plan.json"
PAGE = 1024
"""Units of a page: four blocks of claims."""
MARK = 4
"""Hexadecimal digits of a unit's mark: neighbours are equal once in 65,536, and then the first counts."""
KEPT = 4
"""Pages that a worker keeps."""
Split = Literal["train", "heldout"]
_SHAPING = ("seed", "unit_bytes", "heldout_fraction")
"""Settings that shape the slices. Where the text came from does not, its content does."""
_TEXT = "corpus text"
_GROW = "; `bytecache plan` makes a new edition of a corpus that changed"


class Unit(BaseModel):
    """One slice: `slice` is its store key, `sha256` that of the slice file, `n_bytes` of UTF-8 text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    index: Count
    split: Split
    slice: str
    sha256: str
    n_docs: Count
    n_bytes: Count


class Index(BaseModel):
    """`plan.json`. `sizes`: bytes of text of every unit; `heldout`: indices of those that are; `pages`: their sha256.

    `corpus`: identity and counts of the text; `settings`: what shaped the slices; `hash` names the whole plan.
    `edition` counts the plans of this run from 1 on, `parent` is the hash of the one before ("" of the first).
    `threshold`: in hexadecimal; a document whose hash is under it is held out. `marks`: of every
    unit the first `MARK` digits of the hash of its slice, by which shards are cut (`pipeline.commands.groups`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Whole
    corpus: dict[str, Any]
    settings: dict[str, Any]
    sizes: tuple[Count, ...]
    heldout: tuple[Count, ...]
    page: Annotated[Count, Field(ge=1)]
    pages: tuple[str, ...]
    edition: Annotated[Count, Field(ge=1)] = 1
    parent: str = ""
    threshold: Annotated[str, Field(pattern="^[0-9a-f]{1,17}$")]
    marks: str
    hash: str

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        count = len(self.sizes)
        if not isinstance(self.corpus.get("sha256"), str) or not all(
            is_whole(self.corpus.get(name), 0) for name in ("n_documents", "n_bytes")
        ):
            raise ValueError("corpus has no sha256, n_documents or n_bytes")
        if len(self.pages) != -(-count // self.page) or len(self.marks) != MARK * count:
            raise ValueError(f"{len(self.pages)} pages and {len(self.marks)} digits of marks for {count} units")
        if max(self.heldout, default=-1) >= count:
            raise ValueError(f"unit {max(self.heldout)} is held out, of {count}")
        return self


@dataclass(frozen=True)
class Plan:
    """An index and the store that its pages are in. Two plans are equal if their indices are."""

    index: Index
    store: Store = field(compare=False, repr=False)

    @property
    def hash(self) -> str:
        """The identity of the plan."""
        return self.index.hash

    @property
    def corpus(self) -> dict[str, Any]:
        """What the corpus was."""
        return self.index.corpus

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that made the plan."""
        return self.index.settings

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of text in every unit; reads no page."""
        return self.index.sizes

    @property
    def edition(self) -> int:
        """Which plan of this run it is, from 1 on."""
        return self.index.edition

    @cached_property
    def marks(self) -> U64:
        """[units] a number of every unit's content; reads no page."""
        digits = self.index.marks
        return np.array([int(digits[at : at + MARK], 16) for at in range(0, len(digits), MARK)], np.uint64)

    @property
    def n_heldout(self) -> int:
        """Units that are held out."""
        return len(self.index.heldout)

    @property
    def n_bytes(self) -> int:
        """Bytes of text in all units."""
        return sum(self.index.sizes)

    def of_split(self, split: Split) -> list[int]:
        """Indices of a split's units, in order; reads no page."""
        if split == "heldout":
            return list(self.index.heldout)
        heldout = set(self.index.heldout)
        return [index for index in range(len(self.sizes)) if index not in heldout]

    @property
    def page_keys(self) -> list[str]:
        """Store keys of the pages."""
        return [page_key(number, sha256) for number, sha256 in enumerate(self.index.pages)]

    @cached_property
    def units(self) -> "Units":
        """All units; reads pages as they are asked for."""
        return Units(self)


class Units(Sequence[Unit]):
    """The units of a plan. Raises IntegrityError where a page is missing or not as the index states."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pages: dict[int, tuple[Unit, ...]] = {}

    def __len__(self) -> int:
        return len(self._plan.sizes)

    @overload
    def __getitem__(self, at: int) -> Unit: ...
    @overload
    def __getitem__(self, at: slice) -> list[Unit]: ...
    def __getitem__(self, at: int | slice) -> Unit | list[Unit]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        size = self._plan.index.page
        return self.page(at // size)[at % size]

    def __iter__(self) -> Iterator[Unit]:
        for number in range(len(self._plan.index.pages)):
            yield from self.page(number)

    def page(self, number: int) -> tuple[Unit, ...]:
        """The units of one page."""
        units = self._pages.get(number)
        if units is None:
            units = read_page(self._plan.store, number, self._plan.index.pages[number])
            first = number * self._plan.index.page
            if [unit.n_bytes for unit in units] != list(self._plan.sizes[first : first + self._plan.index.page]):
                raise IntegrityError(
                    f"{self._plan.store.name}: page {number} of the plan has other units than the plan; run `bytecache "
                    "verify --repair` to plan again"
                )
            while len(self._pages) >= KEPT:
                del self._pages[next(iter(self._pages))]
            self._pages[number] = units
        return units


def page_key(number: int, sha256: str) -> str:
    """Where a page is stored. The name holds the content: a half-written plan never lends a page to another one."""
    return f"plan/units/{number:05d}-{sha256[:12]}.json"


def page_bytes(units: Sequence[Unit]) -> bytes:
    """A page as it is stored."""
    return canonical_json([unit.model_dump() for unit in units]) + b"\n"


def read_page(store: Store, number: int, sha256: str) -> tuple[Unit, ...]:
    """The units of a page. Raises IntegrityError where it is missing or altered."""
    key = page_key(number, sha256)
    raw = store.read_bytes(key) if store.exists(key) else b""
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise IntegrityError(f"{store.name}: {key} is missing or altered; run `bytecache plan` to repair it")
    try:
        return tuple(Unit.model_validate(unit) for unit in strict_json.parse(raw))
    except (ValueError, TypeError) as error:  # pydantic's refusals are ValueErrors
        reason = str(error).splitlines()[0]
        raise IntegrityError(f"{store.name}: {key} is damaged ({reason}); run `bytecache plan` to repair it") from None


def make_index(
    corpus: dict[str, Any], shape: dict[str, Any], units: Sequence[Unit], pages: Sequence[str], *,
    threshold: int = 0, edition: int = 1, parent: str = "", page: int = PAGE,
) -> Index:  # fmt: skip
    """The index of pages that are committed, of `page` units each."""
    index = Index(
        version=PLAN_VERSION, corpus=corpus, settings=shape, sizes=tuple(unit.n_bytes for unit in units),
        heldout=tuple(unit.index for unit in units if unit.split == "heldout"), page=page, pages=tuple(pages),
        edition=edition, parent=parent, threshold=f"{threshold:017x}",
        marks="".join(unit.sha256[:MARK] for unit in units), hash="",
    )  # fmt: skip
    return index.model_copy(update={"hash": _plan_hash(index)})


def index_bytes(index: Index) -> bytes:
    """`plan.json` as it is stored."""
    return canonical_json(index.model_dump()) + b"\n"


def read_plan(store: Store, key: str = PLAN_KEY) -> Plan | None:
    """The plan of a run folder as written, or None. Raises IntegrityError if it is damaged or of another version.

    `key`: where it is stored; that of an older one is `pipeline.plan.editions.edition_key`.
    """
    if not store.exists(key):
        return None
    raw, path = store.read_bytes(key), f"{store.name}/{key}"
    try:
        values = strict_json.loads(raw)
        version = values.get("version")
        if same(version, PLAN_VERSION):
            index = Index.model_validate(values)
    except (ValueError, ValidationError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(f"{path} is damaged ({reason}); run `bytecache verify --repair` to plan again") from None
    if not same(version, PLAN_VERSION):
        raise IntegrityError(
            f"{path} has version {version}, this software reads {PLAN_VERSION}; finish the run with the version "
            "that planned it, or plan again in a new run.dir"
        )
    if index.hash != _plan_hash(index):
        raise IntegrityError(f"{path} was edited: its hash differs; run `bytecache verify --repair` to plan again")
    return Plan(index, store)


def current_edition(store: Store) -> int:
    """The edition of a run's plan; 1 where there is none. Raises IntegrityError as `read_plan`."""
    plan = read_plan(store)
    return plan.edition if plan else 1


def load_plan(store: Store, settings: Settings) -> Plan:
    """The plan a stage works from. Raises InputError if there is none, ConfigError if settings changed since."""
    plan = read_plan(store)
    if plan is None:
        raise InputError(f"{store.name} holds no plan; run `bytecache plan` with this run.dir first")
    refuse_changes(plan, settings, None)
    return plan


def refuse_changes(plan: Plan, settings: Settings, corpus: dict[str, Any] | None) -> None:
    """Raise ConfigError if the plan was made with other settings or, where `corpus` is given, of other text."""
    changes = list(changed_keys(plan.settings, shape_of(settings)))
    if corpus is not None and plan.corpus["sha256"] != corpus["sha256"]:
        changes.append(
            _TEXT
            + ": {n_documents} documents, {n_bytes} bytes, sha256 {sha256:.12}".format(**plan.corpus)
            + " -> {n_documents} documents, {n_bytes} bytes, sha256 {sha256:.12}".format(**corpus)
        )
    if changes:
        raise ConfigError(
            f"{plan.store.name} was planned otherwise ({'; '.join(changes)}); restore that, or use a new run.dir"
            + (_GROW if len(changes) == 1 and changes[0].startswith(_TEXT) else "")
        )


def shape_of(settings: Settings) -> dict[str, Any]:
    """The settings that decide the slices."""
    shape = {"seed": settings.run.seed, **settings.corpus.model_dump()}
    return {name: shape[name] for name in _SHAPING} | ({"kind": shape["kind"]} if shape["kind"] != "text" else {})


def corpus_identity(corpus: dict[str, Any]) -> dict[str, Any]:
    """What of a plan's `corpus` identifies the text."""
    return {name: corpus[name] for name in ("sha256", "n_documents", "n_bytes")}


def _plan_hash(index: Index) -> str:
    parts = index.model_dump(exclude={"hash", "corpus"})
    return unit_key("plan", {**parts, "corpus": corpus_identity(index.corpus)})
