"""Files of this machine: read only where they are files, written whole or not at all; scratch folders, the cache.

Reading. A folder from a stranger may hold a named pipe, a device or a socket where a file is expected: opening a pipe
waits for ever, and /dev/zero never ends. `open_regular` opens without waiting and refuses what is not a regular file.
A link to one is followed where a person named it. A file of a data set may be a link, too, for the hub's cache keeps
files behind links, but only to what lies within the same folder, or within the same repository of such a cache
(`refuse_stray`): a stranger's README.md that links to somebody's key is not read, copied or published.

Writing. `new_file` gives a stream to a file without a name of its own yet; when the block ends it is flushed and
renamed to its path, so a reader sees the old content or the new one. A path that is a link, a device, a pipe or a
folder is refused before anything is written: a rename would replace the link or the device node itself (as root it
would even take away /dev/null), and a plain write would go to wherever the link points.

A scratch folder lies beside what it becomes and is named after its owner, so that the next owner can sweep a dead
one's. Libraries that write files make temporary ones of their own beside the target; inside a scratch folder a kill
cannot leave them among the outputs.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from bytecache.schemas.errors import ConfigError, StorageError

_KINDS = (
    (stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a link"), (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


class NotAFileError(OSError):
    """Something else than a regular file stands where one is to be read or written."""

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(errno.EINVAL, f"is {kind}, not a regular file", os.fspath(path))


class StrayLinkError(NotAFileError):
    """A file of a data set is a link to what lies outside its folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "a link that leaves its folder (if you made it, put a copy of the file in its place)")


def kind_of(mode: int) -> str:
    """What a mode of `os.stat` is of, in words: "a file", "a named pipe", ..."""
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "no file")


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """A regular file, opened to read bytes. Raises OSError; NotAFileError for a pipe, a device, a folder, a socket."""
    # Without O_NONBLOCK the opening of a pipe would wait for its writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise NotAFileError(path, kind_of(mode))
        return os.fdopen(handle, "rb")
    except BaseException:
        with suppress(OSError):
            os.close(handle)
        raise


_HUB_REPOSITORY = re.compile(r"(?:datasets|models|spaces)--.+")
_EDITIONS = "editions"


def refuse_stray(path: str | os.PathLike[str]) -> None:
    """Raises StrayLinkError where a file of a data set is, through links, a file outside of that data set's folder.

    The folder itself may be reached through links: a person named it. Of an older edition it is the one that holds
    `editions`. In the hub's cache (`datasets--OWNER--NAME/snapshots/COMMIT/...`, whose files link to `blobs` beside
    `snapshots`) the bound is the folder of the repository.
    """
    place = Path(path)
    folder = place.parent
    if folder.parent.name == _EDITIONS:
        folder = folder.parent.parent
    bound = Path(os.path.realpath(folder))
    for snapshots in (each for each in (bound, *bound.parents) if each.name == "snapshots"):
        if _HUB_REPOSITORY.fullmatch(snapshots.parent.name):
            bound = snapshots.parent
    if not Path(os.path.realpath(place)).is_relative_to(bound):
        raise StrayLinkError(path)


def read_member(path: str | os.PathLike[str], limit: int) -> bytes:
    """`read_regular` of a file of a data set. Raises StrayLinkError where a link leads out of it, OSError."""
    refuse_stray(path)
    return read_regular(path, limit)


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """At most `limit` + 1 bytes of a regular file: whoever gets that many knows that it is too long. Raises OSError."""
    with open_regular(path) as file:
        return file.read(limit + 1)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a regular file's bytes, read once in pieces. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrow_path(path: str | os.PathLike[str]) -> Path:
    """A path as Arrow may have it: of a relative one with a colon (`2026-11-30T12:00/...`) it makes an address."""
    return Path(path).absolute()


def refuse_to_write(path: Path) -> None:
    """Raises NotAFileError unless `path` is a regular file or a name that nothing has yet; links are not followed."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            raise NotAFileError(path, kind_of(mode))


_KEPT = (".zarr.zip", ".parquet", ".arrow", ".jsonl", ".gz", ".zst", ".toml", ".safetensors", ".npy", "dataset.json")
"""Ends of names under which text, settings, weights and data lie: no page, report or script has one."""


def refuse_output(path: Path, option: str, *inputs: Path) -> None:
    """Refuse, before any work, a place for a page, a report or a script where something else would be lost.

    That is one of the `inputs`, a file that by its name is data or settings, or what is no file. Raises ConfigError,
    naming the `option`.
    """
    try:
        refuse_to_write(path)
    except NotAFileError as error:
        raise ConfigError(f"{option} {path} {error.strerror}: name a file or a new name; nothing was written") from None
    except OSError:
        return  # whoever writes there says why it cannot be done
    if not path.exists():
        return
    if any(each.exists() and each.samefile(path) for each in inputs):
        raise ConfigError(f"{option} {path} is what is read here, and would be lost: name another file")
    if path.name.endswith(_KEPT):
        raise ConfigError(f"{option} {path} is there already and by its name holds data or settings: name another file")


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished, flushed file its name, in place of the file that has it. Raises OSError, NotAFileError."""
    refuse_to_write(path)
    os.replace(temporary, path)
    flush_to_disk(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content appears at `path` when the block ends, flushed; after an exception nothing has changed.

    The file gets the mode that the process gives new files. Raises OSError; NotAFileError (nothing is written) where
    `path` is a link, a device or anything else than a file.
    """
    refuse_to_write(path)
    # Not the path's own name with something added: that could be too long.
    temporary = path.parent / f".bytecache-{os.getpid()}-{secrets.token_hex(6)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        put_in_place(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Atomically give `path` this content. Raises StorageError: the disk refuses, or `path` is no regular file."""
    try:
        with new_file(path) as stream:
            stream.write(data)
    except NotAFileError as error:
        raise StorageError(f"{path} {error.strerror}: name a file or a new name; nothing was written") from error
    except FileNotFoundError as error:
        raise StorageError(f"{path}: there is no folder {path.parent}; make it, or name another place") from error
    except OSError as error:
        why = error.strerror or error
        raise StorageError(f"{path}: cannot write: {why}; free space or fix permissions, then rerun") from error


def write_text(path: Path, text: str) -> None:
    """`replace_file` with UTF-8."""
    replace_file(path, text.encode("utf-8"))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there yet. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(
            f"{error.filename or folder}: a folder is to be made here, and a file, or a link to nothing, stands in its "
            "place or above it; move that away, or name another folder"
        ) from error
    except OSError as error:
        why = error.strerror or error
        raise StorageError(f"{folder}: cannot be made: {why}; free space, fix permissions or name another") from error


def local_path(place: str | os.PathLike[str]) -> Path:
    """A path of this machine, with a `~` in front spelled out. Raises ConfigError where that is nobody's home."""
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{os.fspath(place)}: nobody's home folder is known by that name; write the path out"
        ) from error


_PREFIX = ".scratch-"


def cache_folder() -> Path:
    """Where copies of what can be had again are kept: models, static states, shards, remote runs.

    $BYTECACHE_CACHE, else `bytecache` in $XDG_CACHE_HOME or ~/.cache; for a user without a home, in the folder for
    temporary files.
    """
    if folder := os.environ.get("BYTECACHE_CACHE"):
        return local_path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bytecache"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"bytecache-{os.getuid()}"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, gone at exit unless renamed; first removes those of dead processes of this machine."""
    make_folder(parent)
    host = socket.gethostname().replace("-", "_")
    for old in parent.glob(f"{_PREFIX}{host}-*"):
        if not _alive(old.name.split("-")[2]):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{host}-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Return when the file's content, or the folder's list of names, survives a power cut. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True
