"""What a stage may do with stored bytes, wherever they live. Objects appear whole or not at all, and never change.

Keys are relative POSIX paths ("teacher/ab12.parquet"). A writer fills a local `temp_path` and commits it with
`put_if_absent`, which fails if the key exists: of two writers one wins, and nobody can see half an object.
`Store` is the whole interface; `pipeline.stores.open_store` picks the backend by URL. tests/store_suite.py states the
contract as tests that every backend passes.
"""

import contextlib
import errno
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar

from bytecache.schemas.errors import ConfigError, StorageError
from bytecache.schemas.files import NotAFileError, read_regular

Item = TypeVar("Item")
Answer = TypeVar("Answer")
AT_ONCE = 64
"""Requests under way at a time in `overlapped`."""
TEMP_FOLDER = ".tmp"
MAX_SMALL = 1 << 28
"""Bytes of what `read_bytes` reads whole, at most."""
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
    errno.EEXIST: "something else stands where a folder is to be, a file or a link to nothing; move it away and rerun",
    errno.ELOOP: "a link leads back to itself; remove it, or choose another run.dir",
}


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

    def move(self, key: str, target: str) -> None:
        """Rename an object whose bytes may be damaged to a free key; they are not read. StorageError if absent."""
        ...

    def get_path(self, key: str) -> Path:
        """A local file with the object's bytes, to read only; files of one folder of keys are in one folder.

        Raises StorageError where there is no such object.
        """
        ...

    def open(self, key: str) -> BinaryIO:
        """The object as a readable stream."""
        ...

    def read_bytes(self, key: str) -> bytes:
        """The object as it is now, never from a cache: small documents that change. Raises StorageError if absent."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of the object, without downloading; None where there is no such object."""
        ...

    def sha256(self, key: str, *, deep: bool = False) -> str:
        """Hex sha256 of the object. Raises StorageError if absent.

        A local store reads the bytes. A remote one answers from what the writer recorded beside an upload that the
        service checked, and reads the bytes only if `deep` or if another program wrote the object.
        """
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys under the folder `prefix` (empty: all), sorted, temporary files excluded."""
        ...

    def temp_path(self, name: str) -> Path:
        """A fresh local path (a local store: on its own device) for a file to be committed with `put_if_absent`."""
        ...

    def write_temp(self, name: str, raw: bytes) -> Path:
        """Write `raw` to a `temp_path` and return it."""
        ...

    def replace_text(self, key: str, text: str) -> None:
        """`replace` for a small document; nothing is written where the content is already there."""
        ...

    def release(self, key: str) -> None:
        """The file of `get_path` is not needed any more: a store that downloaded it may free the space."""
        ...

    def folder(self, prefix: str, record: str = "") -> Path:
        """A local folder with every object under `prefix` (empty: all), in which a stage may write (see `publish`).

        A local store gives the folder itself, which may not exist yet. A remote one downloads what is missing here or
        was changed there; where `record` names a file that its writer publishes last, only if that is there.
        """
        ...

    def publish(self, prefix: str) -> int:
        """Make what a stage wrote in or removed from `folder(prefix)` true of the store; returns how many changed.

        Nothing to do in a local store. One writer per prefix: this is for a trainer's own folder, not for units.
        JSON documents go up last and away first, for they vouch for the other files.
        """
        ...

    def sweep(self) -> int:
        """Remove temporary files that no living process will finish; returns how many."""
        ...


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn the operating system's refusals (full, read-only, quota, limits) into StorageError with the remedy."""
    try:
        yield
    except NotAFileError as error:
        raise StorageError(
            f"{doing}: {error.filename} {error.strerror}; it was left as it is: run `bytecache verify --repair`, which "
            "sets aside what stands in the place of a run's file, or move it away yourself"
        ) from error
    except Exception as error:
        remedy = _REMEDIES.get(_refusal(error))
        if remedy is None:
            raise
        filename = getattr(error, "filename", None)
        place = f" {filename}" if filename and str(filename) not in doing else ""
        raise StorageError(f"{doing}{place}: {remedy}") from error


def _refusal(error: Exception) -> int:
    """The system's number for an error; 0 where it is none. Libraries in other languages keep the words alone."""
    words = str(error)
    if "No space left on device" in words:
        return errno.ENOSPC
    if isinstance(error, OSError):
        return error.errno or 0
    number = re.search(r"\(os error (\d+)\)", words)
    return int(number[1]) if number else 0


def read_small(path: Path) -> bytes:
    """The bytes of a document that is read whole. Raises StorageError for one beyond `MAX_SMALL`."""
    raw = read_regular(path, MAX_SMALL)
    if len(raw) > MAX_SMALL:
        raise StorageError(f"{path}: {path.stat().st_size} bytes, at most {MAX_SMALL} are read; it is no file of ours")
    return raw


def overlapped(function: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
    """`function` of every item, in order; many at a time where there are many, since a remote store answers each late.

    At 30 ms a request a million take 8 minutes instead of 8 hours. Raises what the first call that fails raises.
    """
    every = list(items)
    if len(every) <= AT_ONCE:
        return [function(item) for item in every]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, every))


def check_key(key: str, where: str) -> tuple[str, ...]:
    """The parts of a key. Raises ConfigError unless it is a plain path inside the store."""
    if not is_key(key):
        raise ConfigError(f"object key {key!r} is not a path inside the run folder {where}")
    return PurePosixPath(key).parts


def is_key(key: str) -> bool:
    """Whether it is a plain path inside a store."""
    parts = PurePosixPath(key).parts
    return bool(parts) and not key.startswith("/") and ".." not in parts and parts[0] != TEMP_FOLDER and "\0" not in key


def json_bytes(value: Any) -> bytes:
    """Readable JSON with a fixed form: sorted keys, two spaces, UTF-8, final newline. NaN and infinity are refused."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
