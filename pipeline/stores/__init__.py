"""Where bytes live: the only package that knows. `Store` is the interface, `open_store` picks the backend by URL."""

from pathlib import Path

from pipeline.stores.base import TEMP_FOLDER, Store, disk_errors, json_bytes, sha256_file
from pipeline.stores.local import LocalStore

__all__ = ["TEMP_FOLDER", "LocalStore", "Store", "disk_errors", "json_bytes", "open_store", "sha256_file"]


def open_store(place: str) -> Store:
    """The store of a run folder: a path."""
    return LocalStore(Path(place).expanduser())
