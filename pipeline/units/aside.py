"""Setting aside: what repair or conversion does not know is moved out of the way, never deleted.

`set-aside/` in the run folder mirrors the places that its files came from (those of the data set lie at its top). No
command reads it; whoever is sure deletes it. Price: a rename, or in an object store a copy on the server.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bytecache.pipeline.stores import Store
from bytecache.pipeline.stores.base import TEMP_FOLDER, disk_errors
from bytecache.pipeline.stores.local import LocalStore
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.runner import Task
from bytecache.schemas.errors import ConfigError, IntegrityError
from bytecache.schemas.files import kind_of

Made = TypeVar("Made")
ASIDE = "set-aside"
_TARGETS = "targets/"
_ENDINGS = (".json", ".jsonl", ".toml", ".parquet", ".md", ".html", ".zip", ".safetensors")
"""What only files of a run end with: a folder of such a name stands in a file's place."""


def set_aside(store: Store, key: str) -> str:
    """Move an object to `set-aside/`; returns its new key, numbered where that name is taken."""
    wanted = f"{ASIDE}/{key.removeprefix(_TARGETS)}"
    place, number = wanted, 0
    while store.exists(place):
        number += 1
        place = f"{wanted}.{number}"
    store.move(key, place)
    return place


def set_no_files_aside(store: Store) -> dict[str, str]:
    """Move what stands in a file's place and is none to `set-aside/`: folders, pipes, devices, links to no file.

    Returns:
        {key: "what it is, and where it went"}; nothing in an object store, which holds nothing but objects.
    """
    if not isinstance(store, LocalStore):
        return {}
    moved: dict[str, str] = {}
    for place, folders, files in os.walk(store.root):
        here = Path(place)
        folders[:] = [name for name in folders if here != store.root or name not in (ASIDE, TEMP_FOLDER)]
        wrong = [name for name in folders if name.endswith(_ENDINGS)]
        folders[:] = [name for name in folders if name not in wrong]
        for name in (*wrong, *(name for name in files if not (here / name).is_file())):
            path = here / name
            key = path.relative_to(store.root).as_posix()
            kind = "a folder" if name in wrong else kind_of(path.lstat().st_mode)
            moved[key] = f"{kind}, not a file: {_move_aside(store.root, path)}"
    return moved


def _move_aside(root: Path, path: Path) -> str:
    """Rename whatever `path` is to a free name in `set-aside/`; returns its key."""
    wanted = root / ASIDE / path.relative_to(root).as_posix().removeprefix(_TARGETS)
    place, number = wanted, 0
    while os.path.lexists(place):
        number += 1
        place = wanted.with_name(f"{wanted.name}.{number}")
    with disk_errors(f"moving {path} to {place}"):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, place)
    return place.relative_to(root).as_posix()


def set_folder_aside(store: Store, prefix: str) -> list[str]:
    """Move every object under a folder of keys to `set-aside/`; returns their new keys.

    The folder's local copy goes too where the store is a remote one, so that no stage takes it for its own work.
    """
    moved = [set_aside(store, key) for key in list(store.list(prefix))]
    shutil.rmtree(store.folder(prefix), ignore_errors=True)  # empty folders, or copies of what is set aside now
    return moved


def make_folder(
    store: Store, task: Task, make: Callable[[], Made], faults: tuple[type[Exception], ...] = (ConfigError,)
) -> tuple[Made, list[str]]:
    """What `make` gives, which makes the folder of a unit or finds it whole; and the new keys of what was set aside.

    A folder is set aside that its receipt does not fit, and one for which `make` raises one of `faults`: then it is
    called once more. Raises what it raises then, or where there was no folder.
    """
    moved = _set_damaged_folder_aside(store, task)
    try:
        return make(), moved
    except faults:
        moved = set_folder_aside(store, task.out)
        if not moved:
            raise
        return make(), moved


def _set_damaged_folder_aside(store: Store, task: Task) -> list[str]:
    """Set aside the folder of a unit whose receipt it does not fit; returns the new keys, none where it fits.

    A stage that finds its folder whole by a record inside it would otherwise vouch for what damaged that record.
    """
    try:
        receipt = receipts.read_receipt(store, task.stage, task.key)
    except IntegrityError:
        return []
    return set_folder_aside(store, task.out) if receipt and receipts.problems(store, receipt) else []
