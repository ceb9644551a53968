"""Runs in a local folder (or one that many machines mount): commit by hard link.

A write goes to a temporary name on the same device, is flushed to the platter, and is then *linked* to its
final key, which fails if the key exists: the local form of an object store's conditional put. Price: one fsync of the
file and one of its folder per object.
"""

import contextlib
import errno
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bytecache.pipeline.stores.base import TEMP_FOLDER, check_key, disk_errors, json_bytes, read_small
from bytecache.pipeline.stores.processes import has_ended, is_ours, process_name
from bytecache.schemas.errors import StorageError
from bytecache.schemas.files import file_sha256, flush_to_disk, kind_of, open_regular, put_in_place, refuse_to_write

STALE_SECONDS = 7 * 24 * 3600
# Links are refused (FAT, some network file systems): rename is atomic there, and the content is the same either way.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}


def refuse_no_file(store: object, *keys: str) -> None:
    """Raises StorageError, which names the remedy, where a folder, a pipe or the like stands in the place of a key.

    Work that cannot end for want of its file's place is not begun. An object store holds nothing but objects.
    """
    if isinstance(store, LocalStore):
        for key in keys:
            if os.path.lexists(store.root / key):
                store.get_path(key)


def refuse_no_files_in(store: object, folder: str) -> None:
    """The same of everything that lies directly in a folder of keys: a listing passes over folders."""
    if isinstance(store, LocalStore) and (store.root / folder).is_dir():
        refuse_no_file(store, *(f"{folder}/{path.name}" for path in sorted((store.root / folder).iterdir())))


class LocalStore:
    """A folder. `root` is made on first write, so that reading commands leave nothing behind."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._counter = itertools.count()

    @property
    def name(self) -> str:
        return str(self.root)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*check_key(key, self.name))

    def put_if_absent(self, key: str, source: Path) -> bool:
        target = self._path(key)
        with disk_errors(f"writing {target}"):
            try:
                self._make_folder(target.parent)
                flush_to_disk(source)
                try:
                    os.link(source, target)
                except FileExistsError:
                    if not target.is_file():
                        refuse_to_write(target)
                    return False
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    if target.exists():
                        return False
                    if error.errno == errno.EXDEV:
                        raise StorageError(
                            f"writing {target}: {source} is on another device; use temp_path()"
                        ) from None
                    os.rename(source, target)
                flush_to_disk(target.parent)
                return True
            finally:
                source.unlink(missing_ok=True)

    def put_json_if_absent(self, key: str, value: Any) -> bool:
        return self.put_if_absent(key, self.write_temp(key, json_bytes(value)))

    def replace(self, key: str, source: Path) -> None:
        target = self._path(key)
        with disk_errors(f"writing {target}"):
            try:
                self._make_folder(target.parent)
                flush_to_disk(source)
                put_in_place(source, target)
            finally:
                source.unlink(missing_ok=True)

    def replace_text(self, key: str, text: str) -> None:
        path = self._path(key)
        raw = text.encode("utf-8")
        if not path.is_file() or path.read_bytes() != raw:
            self.replace(key, self.write_temp(key, raw))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with disk_errors(f"deleting {path}"):
            path.unlink(missing_ok=True)

    def move(self, key: str, target: str) -> None:
        source, place = self.get_path(key), self._path(target)
        with disk_errors(f"moving {source} to {place}"):
            self._make_folder(place.parent)
            os.rename(source, place)
            flush_to_disk(place.parent)
            flush_to_disk(source.parent)

    def get_path(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            if os.path.lexists(path):
                raise StorageError(
                    f"{path} is {kind_of(path.lstat().st_mode)}, not a regular file; run `bytecache verify --repair`, "
                    "which sets it aside"
                )
            raise StorageError(f"{path} does not exist; rerun the stage that makes it, or check run.dir")
        return path

    def open(self, key: str) -> BinaryIO:
        return open_regular(self.get_path(key))

    def read_bytes(self, key: str) -> bytes:
        return read_small(self.get_path(key))

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int | None:
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def sha256(self, key: str, *, deep: bool = False) -> str:
        return file_sha256(self.get_path(key))

    def list(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix) if prefix else self.root
        keys: list[str] = []
        for place, folders, files in os.walk(folder):
            if Path(place) == self.root and TEMP_FOLDER in folders:
                folders.remove(TEMP_FOLDER)
            keys += [(Path(place) / name).relative_to(self.root).as_posix() for name in files]
        yield from sorted(keys)

    def temp_path(self, name: str) -> Path:
        folder = self.root / TEMP_FOLDER
        with disk_errors(f"writing in {self.root}"):
            self._make_folder(folder)
        return folder / f"{process_name()}-{next(self._counter)}-{name.rsplit('/', 1)[-1]}"

    def write_temp(self, name: str, raw: bytes) -> Path:
        path = self.temp_path(name)
        with disk_errors(f"writing {path}"):
            try:
                path.write_bytes(raw)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return path

    def release(self, key: str) -> None:
        pass

    def folder(self, prefix: str, record: str = "") -> Path:
        return self._path(prefix) if prefix else self.root

    def publish(self, prefix: str) -> int:
        return 0

    def sweep(self) -> int:
        """See `Store.sweep`.

        A name carries its writer's machine and process. Those of a dead process of this machine go at once;
        those of another machine only after a week, since nothing here can tell whether it lives.
        """
        removed = 0
        with contextlib.suppress(FileNotFoundError):
            for path in sorted((self.root / TEMP_FOLDER).iterdir()):
                if _is_stale(path):
                    with contextlib.suppress(OSError):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                        removed += 1
        return removed

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # in /proc and its like
            raise StorageError(
                f"{folder} cannot be made: no folder can be made there; choose another run.dir"
            ) from error
        # The new folder's own name must survive a power cut too, up to the first parent that was there before.
        for parent in (folder.parent, *folder.parent.parents):
            flush_to_disk(parent)
            if parent == self.root.parent:
                break


def _is_stale(path: Path) -> bool:
    if path.name.count("-") >= 3 and is_ours(path.name):
        return has_ended(path.name)
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    return False
