"""Editions of a data set: the index of a corpus that changed, and those before it, beside the same shards.

    dataset.json, manifest.parquet           the newest edition; its `info.edition` is {"number", "parent"}
    editions/NUMBER/dataset.json, manifest.parquet   an older one, as it was published
    *.zarr.zip                               the shards of all: what an edition shares with another is one file

`parent` is the content hash of the edition before ("" of the first), so editions are a chain. An older edition is a
whole data set still: whoever trains from it goes on, and `open_edition` opens it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecache.schemas.errors import InputError

if TYPE_CHECKING:  # who asks for a number only needs no Parquet
    from bytecache.schemas.dataset.index import Dataset

FOLDER = "editions"


def edition_folder(number: int) -> str:
    """Folder of an older edition's index, within that of the data set."""
    return f"{FOLDER}/{number:05d}"


def edition_of(info: dict[str, Any]) -> int:
    """The number of the edition that an index says it is; 1 where it says nothing."""
    return int((info.get("edition") or {}).get("number", 1))


def older_editions(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path within the data set, folder) of every older index, oldest first."""
    from bytecache.schemas.dataset.index import DATASET, MANIFEST

    root = folder / FOLDER
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if any((path / name).exists() for name in (DATASET, MANIFEST)):
            yield f"{FOLDER}/{path.name}", path


def open_edition(folder: Path, number: int) -> "Dataset":
    """A local data set as it was in an edition: its index, and the shards beside the newest one's.

    Raises InputError where there is no such edition, IntegrityError for an index that is damaged.
    """
    from bytecache.schemas.dataset.index import DATASET, read_dataset

    if (folder / edition_folder(number) / DATASET).is_file():
        return replace(read_dataset(folder / edition_folder(number)), folder=folder)
    newest = read_dataset(folder)
    if edition_of(newest.info) != number:
        known = [path.name for _, path in older_editions(folder)] + [f"{edition_of(newest.info):05d}"]
        raise InputError(f"{folder} has no edition {number}; it has {', '.join(known)}")
    return newest
