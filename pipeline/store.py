"""The only place that knows where bytes live. Objects appear whole or not at all, and never change.

A write goes to a temporary name on the same device, is flushed to the platter, and is then *linked* to its
final key, which fails if the key exists: the local form of an object store's conditional put. Nobody can
see half an object, and of two writers one wins. Price: one fsync of the file and one of its folder per
object. Keys are relative POSIX paths ("teacher/ab12.parquet"); `Store` is the whole interface, so an object
store needs no change elsewhere.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from schemas.errors import ConfigError, StorageError

TEMP_FOLDER = ".tmp"
STALE_SECONDS = 7 * 24 * 3600
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free space or point run.dir at a larger disk, then rerun the same command",
    errno.EDQUOT: "the disk quota is used up; free space or raise it, then rerun the same command",
    errno.EFBIG: "a file-size limit was hit; raise `ulimit -f` or use another file system, then rerun the same command",
    errno.EROFS: "the file system is read-only; point run.dir at a writable folder",
    errno.EACCES: "permission denied; point run.dir at a folder you may write",
    errno.EPERM: "permission denied; point run.dir at a folder you may write",
    errno.EIO: "the device reports an input/output error; check the disk, then rerun the same command",
    errno.ENAMETOOLONG: "the path is too long; use a shorter run.dir",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another run.dir",
}
# Links are refused (FAT, some network file systems): rename is atomic there, and the content is the same either way.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}


class Store(Protocol):
    """What a stage may do with stored bytes. All methods raise StorageError where the medium refuses."""

    @property
    def name(self) -> str:
        """The store as the user named it, for messages."""
        ...

    def put_if_absent(self, key: str, source: Path) -> bool:
        """Make `source` (a `temp_path`, consumed either way) the object `key`; False if the key already exists."""
        ...

    def put_json_if_absent(self, key: str, value: Any) -> bool:
        """Like `put_if_absent` for a small JSON document."""
        ...

    def replace(self, key: str, source: Path) -> None:
        """Make `source` the object `key`, whatever was there: repair, and documents that describe the latest run."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object found to be damaged; absent is fine."""
        ...

    def get_path(self, key: str) -> Path:
        """A local file with the object's bytes, to read only. Raises StorageError where there is no such object."""
        ...

    def open(self, key: str) -> BinaryIO:
        """The object as a readable stream."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys under the folder `prefix` (empty: all), sorted, temporary files excluded."""
        ...

    def temp_path(self, name: str) -> Path:
        """A fresh path, on the store's own device, for a file to be committed with `put_if_absent`."""
        ...

    def write_temp(self, name: str, raw: bytes) -> Path:
        """Write `raw` to a `temp_path` and return it."""
        ...

    def replace_text(self, key: str, text: str) -> None:
        """`replace` for a small document; nothing is written where the content is already there."""
        ...

    def sweep(self) -> int:
        """Remove temporary files that no living process will finish; returns how many."""
        ...


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn the operating system's refusals (full, read-only, quota, limits) into StorageError with the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None and "No space left" in str(error):  # Arrow keeps the words, not always the number
            remedy = _REMEDIES[errno.ENOSPC]
        if remedy is None:
            raise
        raise StorageError(f"{doing}: {remedy}") from error


class LocalStore:
    """A folder. `root` is made on first write, so that reading commands leave nothing behind."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._counter = itertools.count()

    @property
    def name(self) -> str:
        return str(self.root)

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or parts[0] == TEMP_FOLDER:
            raise ConfigError(f"object key {key!r} is not a path inside the run folder {self.root}")
        return self.root.joinpath(*parts)

    def put_if_absent(self, key: str, source: Path) -> bool:
        target = self._path(key)
        with disk_errors(f"writing {target}"):
            try:
                self._make_folder(target.parent)
                _fsync(source)
                try:
                    os.link(source, target)
                except FileExistsError:
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
                _fsync(target.parent)
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
                _fsync(source)
                os.replace(source, target)
                _fsync(target.parent)
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

    def get_path(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise StorageError(f"{path} does not exist; rerun the stage that makes it, or check run.dir")
        return path

    def open(self, key: str) -> BinaryIO:
        return self.get_path(key).open("rb")

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix) if prefix else self.root
        found: list[str] = []
        for place, folders, files in os.walk(folder):
            if Path(place) == self.root and TEMP_FOLDER in folders:
                folders.remove(TEMP_FOLDER)
            found += [(Path(place) / name).relative_to(self.root).as_posix() for name in files]
        yield from sorted(found)

    def temp_path(self, name: str) -> Path:
        folder = self.root / TEMP_FOLDER
        with disk_errors(f"writing in {self.root}"):
            self._make_folder(folder)
        return folder / f"{_owner()}-{next(self._counter)}-{name.rsplit('/', 1)[-1]}"

    def write_temp(self, name: str, raw: bytes) -> Path:
        path = self.temp_path(name)
        with disk_errors(f"writing {path}"):
            try:
                path.write_bytes(raw)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return path

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
        folder.mkdir(parents=True, exist_ok=True)
        # The new folder's own name must survive a power cut too, up to the first parent that was there before.
        for parent in (folder.parent, *folder.parent.parents):
            _fsync(parent)
            if parent == self.root.parent:
                break


def json_bytes(value: Any) -> bytes:
    """Readable JSON with a fixed form: sorted keys, two spaces, UTF-8, final newline. NaN and infinity are refused."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _machine() -> str:
    """A tag shared exactly by the processes that can see each other's process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks; tells a recycled id from the writer. Empty where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def _owner() -> str:
    # Not cached: a forked worker must not pass for its parent.
    return f"{_machine()}-{os.getpid()}-{_process_start(os.getpid()) or 0}"


def _is_stale(path: Path) -> bool:
    parts = path.name.split("-", 3)
    if len(parts) == 4 and parts[0] == _machine() and parts[1].isdigit():
        try:
            os.kill(int(parts[1]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return (_process_start(int(parts[1])) or "0") != parts[2]
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    return False
