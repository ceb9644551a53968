"""A bounded, content-addressed cache of files, safe for any number of processes that share its folder.

A file is named by the sha256 of its content and appears under that name by one rename, whole and hashed. Whoever uses
a file holds a shared lock on it; whoever makes room takes the files longest unused first and passes over locked ones,
so a file never vanishes under its reader and the bound is kept but for files in use. Locks are the operating system's
(flock): a killed process holds none. What was damaged on disk is found by its reader, dropped and fetched again.
Price: one stat per cached file for each fetch, and a rename; the transfer is the source's.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.files import scratch_folder

Fetch = Callable[[], Iterator[bytes]]
"""Opens the source and yields the content in pieces; what it raises reaches the caller as it is."""


class _SourceError(Exception):
    """Carries what a `Fetch` raised past the handling of this disk's errors."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


def _guarded(fetch: Fetch) -> Iterator[bytes]:
    try:
        yield from fetch()
    except Exception as error:
        raise _SourceError(error) from error


def receive(path: Path, pieces: Iterable[bytes], size: int, sha256: str) -> None:
    """Write pieces to a new file and flush it; IntegrityError unless they are `size` bytes of this hash.

    Never writes more than `size` bytes and a piece, whatever the source sends.
    """
    digest, length = hashlib.sha256(), 0
    with path.open("wb") as out:
        for piece in pieces:
            length += len(piece)
            if length > size:
                break
            digest.update(piece)
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    if length != size or digest.hexdigest() != sha256:
        what = f"more than {size} bytes" if length > size else f"{length} bytes of {digest.hexdigest()}"
        raise IntegrityError(f"the source sends {what}, the manifest says {size} bytes of {sha256}")


def _turn(path: Path) -> BinaryIO:
    """A file to lock, made where there is none; never one behind a link, and nothing is written to it."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "rb")


class FileCache:
    """Files by sha256 under `folder`, at most `limit` bytes of them (files in use excepted)."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def path(self, sha256: str) -> Path:
        """Where a file lies, if it is there."""
        return self.folder / sha256[:2] / f"{sha256}.zarr.zip"

    @contextmanager
    def held(self, sha256: str, size: int, fetch: Fetch) -> Iterator[Path]:
        """The file of this hash, fetched if need be, kept from eviction while the block runs.

        Raises IntegrityError when what `fetch` yields is not `size` bytes of that hash; StorageError when the disk
        refuses.
        """
        file = self._lock(sha256) or self._fetch(sha256, size, fetch)
        with file:
            yield self.path(sha256)

    def has(self, sha256: str) -> bool:
        """Whether a file of that hash is there; its bytes are not checked."""
        return self.path(sha256).is_file()

    def drop(self, sha256: str) -> None:
        """Forget a file that proved damaged."""
        with suppress(FileNotFoundError):
            self.path(sha256).unlink()

    def _lock(self, sha256: str) -> BinaryIO | None:
        """The open, share-locked file, or None where there is none (any more)."""
        path = self.path(sha256)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{path}: cannot read: {error}; check dataset.cache_dir and its permissions") from error
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink == 0:  # evicted between open and lock
            file.close()
            return None
        with suppress(OSError):  # a read-only cache is still a cache
            os.utime(path)
        return file

    def _fetch(self, sha256: str, size: int, fetch: Fetch) -> BinaryIO:
        path = self.path(sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _turn(path.parent / ".lock") as turn, scratch_folder(self.folder) as scratch:
                fcntl.flock(turn, fcntl.LOCK_EX)  # workers of one machine want the same shards: fetch each once
                if (file := self._lock(sha256)) is not None:
                    return file
                self._make_room(size)
                temporary = scratch / "file"
                receive(temporary, _guarded(fetch), size, sha256)
                file = temporary.open("rb")
                fcntl.flock(file, fcntl.LOCK_SH)  # before it has a name that others could evict
                os.replace(temporary, path)
                return file
        except _SourceError as error:
            raise error.cause from None
        except OSError as error:
            hint = (
                "free space or lower dataset.cache_gib" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check it"
            )
            raise StorageError(f"{self.folder}: cannot write the shard cache: {error}; {hint}") from error

    def _make_room(self, size: int) -> None:
        files = []
        for path in self.folder.glob("??/*.zarr.zip"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(entry[1] for entry in files) + size - self.limit
        for _, length, path in sorted(files):
            if excess <= 0:
                return
            with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_nlink:
                    path.unlink()
                    excess -= length
