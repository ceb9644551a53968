"""Where byte targets come from: a folder, or any fsspec URL (s3://, hf://, https://, memory://) through a local cache.

A dataset is opened by its two small index files, which are checked before a shard is touched; shards are fetched whole
when first needed, named only by the manifest (plain names, so nothing outside the dataset's folder can be asked for),
written to the cache only if size and sha256 are the manifest's, and hashed again at every load, because disks forget.
A shard that cannot be had whole is refused by name; none is ever skipped.
Price: hashing 1 GB/s per core. The cache's bound is `cache_bytes`; `shelf` hides latency by fetching ahead.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from bytecache.schemas.dataset.index import (
    DATASET,
    MANIFEST,
    MAX_JSON,
    MAX_MANIFEST,
    Dataset,
    ShardEntry,
    parse_index,
    read_dataset,
)
from bytecache.schemas.errors import BytecacheError, ConfigError, IntegrityError, StorageError
from bytecache.schemas.files import cache_folder, file_sha256, scratch_folder
from bytecache.schemas.shard.reader import ByteShard, read_shard
from bytecache.stages.targets.cache import FileCache, receive

CACHE_BYTES = 50 << 30
ATTEMPTS, BACKOFF = 4, 1.0
"""Tries of one transfer, and seconds before the second; each further one waits four times longer."""
PIECE = 1 << 22


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is to be read through fsspec (a plain path is not)."""
    return "://" in os.fspath(place)


def _transfer(url: str, limit: int) -> Iterator[bytes]:
    """The object's bytes in pieces, at most `limit` + 1 of them. Raises what the file system raises."""
    fs, path = fsspec.core.url_to_fs(url)
    # Without a block size http servers are read as one stream, which those without ranges serve too.
    options: dict[str, Any] = {"block_size": 0} if url.startswith(("http://", "https://")) else {}
    left = limit + 1
    with fs.open(path, "rb", **options) as file:
        while left > 0 and (piece := file.read(min(PIECE, left))):
            left -= len(piece)
            yield piece


def _retried(url: str, attempt: Callable[[], Any]) -> Any:
    """`attempt()`, again after failures that may pass; what remains is an error of ours that names the URL."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except (ConfigError, StorageError):
            raise
        except ImportError as error:
            raise ConfigError(f"{url}: {error}; pip install 'bytecache[remote]' or the package it names") from error
        except PermissionError as error:
            raise StorageError(f"{url}: access refused ({error}); check your credentials for it") from error
        except Exception as error:  # every file system has its own kinds of network error
            # fsspec's http file system calls a dead line a missing file too, and names the cause.
            if isinstance(error, FileNotFoundError) and _is_absence(error.__cause__):
                raise IntegrityError(f"{url}: missing at the source; ask its maker, or check the address") from error
            if isinstance(error, ValueError) and "Protocol not known" in str(error):
                raise ConfigError(f"{url}: {error}; use a folder, s3://, hf://, gs://, az:// or https://") from error
            # Wrong bytes twice are the source's own, not a torn transfer.
            if number == (2 if isinstance(error, IntegrityError) else ATTEMPTS):
                if isinstance(error, BytecacheError):
                    raise type(error)(f"{url}: {error}") from error
                why = f"{type(error).__name__}: {error}"
                raise StorageError(f"{url}: cannot be read after {ATTEMPTS} tries ({why[:300]}); try later") from error
            time.sleep(BACKOFF * 4 ** (number - 1))
    raise AssertionError


def _is_absence(cause: BaseException | None) -> bool:
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)


def fetch_bytes(url: str, limit: int) -> bytes:
    """A small object whole. Raises IntegrityError (missing, larger than `limit`), StorageError, ConfigError."""
    data: bytes = _retried(url, lambda: b"".join(_transfer(url, limit)))
    if len(data) > limit:
        raise IntegrityError(f"{url}: more than {limit} bytes; this is not an index of this format")
    return data


def fetch_file(url: str, path: Path, size: int, sha256: str) -> None:
    """Make `path` the object at `url` (or a plain path), if it is `size` bytes of that hash; it appears whole.

    Raises IntegrityError, naming the source, when it is not; StorageError, ConfigError.
    """

    def attempt() -> None:
        with scratch_folder(path.parent) as scratch:
            temporary = scratch / "file"
            receive(temporary, _transfer(url, size), size, sha256)
            os.replace(temporary, path)

    _retried(url, attempt)


@dataclass(frozen=True)
class RemoteDataset(Dataset):
    """A dataset at a URL; `folder` is its cache."""

    url: str = ""
    cache: FileCache | None = None

    @property
    def where(self) -> str:
        return self.url

    def path(self, entry: ShardEntry) -> Path:
        """Not for readers: a cached file may be evicted unless it is `held`."""
        raise TypeError("use held(): a cached shard may be evicted")

    @contextmanager
    def held(self, entry: ShardEntry) -> Iterator[Path]:
        """The shard in the cache, fetched if need be. Raises IntegrityError, StorageError, ConfigError."""
        assert self.cache is not None
        url, held = f"{self.url}/{entry.file}", None

        def enter() -> Path:
            nonlocal held
            assert self.cache is not None
            held = self.cache.held(entry.sha256, entry.size, lambda: _transfer(url, entry.size))
            return held.__enter__()

        path: Path = _retried(url, enter)
        try:
            yield path
        finally:
            if held is not None:
                held.__exit__(None, None, None)


def open_dataset(
    place: str | os.PathLike[str] | Dataset, *, cache_dir: str | os.PathLike[str] = "", cache_bytes: int = CACHE_BYTES
) -> Dataset:
    """Open a dataset of byte targets by its folder or fsspec URL; its index is read and checked, no shard is.

    An open dataset is returned as it is. `cache_dir` (default: `shards` in the cache, `scratch.cache_folder`) and
    `cache_bytes` are for URLs only.
    Raises IntegrityError for an index that is missing, damaged or of another version, StorageError when it cannot be
    read, ConfigError for a URL without a file system.
    """
    if isinstance(place, Dataset):
        return place
    if os.fspath(place).startswith(("file://", "local://")):
        place = str(fsspec.core.url_to_fs(os.fspath(place))[1])
    if not is_url(place):
        return read_dataset(Path(place).expanduser())
    url = os.fspath(place).rstrip("/")
    cache = FileCache(Path(cache_dir or cache_folder() / "shards").expanduser(), cache_bytes)
    document = fetch_bytes(f"{url}/{DATASET}", MAX_JSON)
    index = parse_index(cache.folder, url, document, lambda: fetch_bytes(f"{url}/{MANIFEST}", MAX_MANIFEST))
    return RemoteDataset(**vars(index), url=url, cache=cache)


def load_shard(dataset: Dataset, entry: ShardEntry) -> ByteShard:
    """Read one shard, its bytes hashed first.

    Raises IntegrityError naming the shard when it is missing, not the manifest's, or not a shard; StorageError.
    """
    for attempt in range(2):
        with dataset.held(entry) as path:
            try:
                found = file_sha256(path) if path.is_file() else ""
            except OSError as error:
                raise StorageError(f"{path}: cannot be read: {error}; check the path and permissions") from error
            if found == entry.sha256:
                return read_shard(path)
        if not isinstance(dataset, RemoteDataset) or dataset.cache is None or attempt:
            break
        dataset.cache.drop(entry.sha256)  # damaged on this disk: once more from the source
    what = f"sha256 is {found[:12]}, the manifest says {entry.sha256[:12]}" if found else "the shard is missing"
    raise IntegrityError(f"{dataset.where}/{entry.file}: {what}; fetch it again (verify --repair) or convert it again")


def fetch_ahead(dataset: Dataset, entry: ShardEntry) -> None:
    """Bring a remote shard into the cache; its failure is left to the load that needs it."""
    if isinstance(dataset, RemoteDataset) and dataset.cache is not None and not dataset.cache.has(entry.sha256):
        with suppress(BytecacheError), dataset.held(entry):
            pass
