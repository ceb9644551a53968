"""Where byte targets come from: a folder, or any fsspec URL (s3://, hf://, https://, memory://) through a local cache.

A dataset is opened by its two small index files, which are checked before a shard is touched; shards are fetched whole
when first needed, named only by the manifest (plain names, so nothing outside the dataset's folder can be asked for),
written to the cache only if size and sha256 are the manifest's, and hashed again at every load, because disks forget.
A shard that cannot be had whole is refused by name; none is ever skipped. A transfer that breaks goes on where it
ended, however long it takes: what ends it is silence (`http`).
Price: hashing 1 GB/s per core. The cache's bound is `cache_bytes`; `shelf` hides latency by fetching ahead.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from bytecache.schemas.dataset.editions import edition_folder, edition_of, open_edition
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
from bytecache.schemas.errors import BytecacheError, ConfigError, IntegrityError, StorageError, install
from bytecache.schemas.files import (
    NotAFileError,
    cache_folder,
    file_sha256,
    local_path,
    open_regular,
    put_in_place,
    refuse_stray,
    refuse_to_write,
    scratch_folder,
)
from bytecache.schemas.messages import masked
from bytecache.schemas.patience import Patience
from bytecache.stages.targets import http
from bytecache.stages.targets.cache import FileCache, receive
from bytecache.stages.targets.hub_files import hub_file, is_hub

if TYPE_CHECKING:  # an index is looked at without what reads a shard
    from bytecache.schemas.shard.reader import ByteShard

CACHE_BYTES = 50 << 30
PATIENCE = 30.0
"""Seconds that a transfer is tried again while it brings nothing (`schemas.patience`)."""
PROGRESS = 64 * 1024
"""Bytes that a connection must bring before it breaks, to count as something."""
PIECE = 1 << 22
_LOCAL = ("file://", "local://")


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is to be read through fsspec (a plain path is not)."""
    return "://" in os.fspath(place)


@dataclass(frozen=True)
class Access:
    """How a place may be read. `private_redirects`: see `stages.targets.http`."""

    private_redirects: bool = False


DIRECT = Access()


def _from(url: str, start: int, access: Access) -> Iterator[bytes]:
    """The object's bytes from `start` on, over one connection. Raises what the file system raises."""
    if is_hub(url):
        there = hub_file(url)
        yield from http.pieces(there.address, start, private_redirects=access.private_redirects, login=there.login)
        return
    if http.is_http(url):
        yield from http.pieces(url, start, private_redirects=access.private_redirects)
        return
    fs, path = fsspec.core.url_to_fs(url)
    # A folder from a stranger may hold a pipe in a file's place, whose opening would wait for ever, or a link to a file
    # that is none of its own.
    if _is_local(url):
        refuse_stray(path)
    with open_regular(path) if _is_local(url) else fs.open(path, "rb") as file:
        if start:
            file.seek(start)
        while piece := file.read(PIECE):
            yield piece


def _is_local(url: str) -> bool:
    return not is_url(url) or url.startswith(_LOCAL)


def _transfer(url: str, limit: int, access: Access) -> Iterator[bytes]:
    """The object's bytes in pieces, at most `limit` + 1 of them, over as many connections as that takes.

    A connection that breaks is followed by another one that goes on where it ended. `PATIENCE` seconds in which none
    brings `PROGRESS` bytes end it. Raises StorageError, IntegrityError, ConfigError, naming the URL.
    """
    done, patience = 0, Patience(PATIENCE)
    while done <= limit:
        begun = done
        try:
            for piece in _from(url, done, access):
                part = piece[: limit + 1 - done]
                done += len(part)
                yield part
                if done > limit:
                    break
            return
        except Exception as error:  # every file system has its own kinds of network error
            refusal = _permanent(url, error)
            if refusal is not None:
                raise refusal from error
            if done - begun >= PROGRESS:
                patience.renew()
            if not patience.pause(getattr(error, "wait", 0.0)):
                why = f"{type(error).__name__}: {masked(str(error))}"
                raise StorageError(
                    f"{masked(url)}: cannot be read for {PATIENCE:.0f} s, {done} bytes came ({why[:300]}); try later"
                ) from error


def _permanent(url: str, error: Exception) -> BytecacheError | None:
    """What is said of a failure that no repetition mends; None for one that may pass."""
    place = masked(url)
    if isinstance(error, BytecacheError):
        return error if place in str(error) else type(error)(f"{place}: {error}")
    if isinstance(error, NotAFileError):
        return IntegrityError(f"{place} {error.strerror}; fetch or make it again")
    if isinstance(error, ImportError):
        return ConfigError(f"{place}: {error}; {install('remote')}, or the package it names")
    if isinstance(error, PermissionError) and is_hub(url):
        return StorageError(
            f"{place}: the hub refuses ({masked(str(error))}): there is no such place, or not for everybody; check the "
            "name, and set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, PermissionError) or "credentials" in type(error).__name__.lower():
        return StorageError(f"{place}: access refused ({masked(str(error))}); check your credentials for it")
    # Some file systems call a dead line a missing file too, and name the cause.
    if isinstance(error, FileNotFoundError) and _is_absence(error.__cause__):
        return IntegrityError(f"{place}: missing at the source; ask its maker, or check the address")
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return ConfigError(f"{place}: {error}; use a folder, s3://, hf://, gs://, az:// or https://")
    return None


def _twice(url: str, attempt: Callable[[], Any]) -> Any:
    """`attempt()`, once more where the bytes were wrong: twice they are the source's own, not a torn transfer."""
    try:
        return attempt()
    except IntegrityError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise
    try:
        return attempt()
    except IntegrityError as error:
        place = masked(url)
        raise IntegrityError(str(error) if place in str(error) else f"{place}: {error}") from error


def _is_absence(cause: BaseException | None) -> bool:
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)


def fetch_bytes(url: str, limit: int, access: Access = DIRECT) -> bytes:
    """A small object whole. Raises IntegrityError (missing, larger than `limit`), StorageError, ConfigError."""
    data = b"".join(_transfer(url, limit, access))
    if len(data) > limit:
        raise IntegrityError(f"{masked(url)}: more than {limit} bytes; this is not an index of this format")
    return data


def fetch_file(url: str, path: Path, size: int, sha256: str, access: Access = DIRECT) -> None:
    """Make `path` the object at `url` (or a plain path), if it is `size` bytes of that hash; it appears whole.

    Raises IntegrityError, naming the source, when it is not; StorageError, ConfigError.
    """

    def attempt() -> None:
        with scratch_folder(path.parent) as scratch:
            temporary = scratch / "file"
            receive(temporary, _transfer(url, size, access), size, sha256)
            put_in_place(temporary, path)

    try:
        refuse_to_write(path)
    except NotAFileError as error:
        raise StorageError(f"{path} {error.strerror}: move it away; it was left as it is") from error
    _twice(url, attempt)


@dataclass(frozen=True)
class RemoteDataset(Dataset):
    """A dataset at a URL; `folder` is its cache."""

    url: str = ""
    cache: FileCache | None = None
    access: Access = DIRECT

    @property
    def where(self) -> str:
        """The URL without its secrets."""
        return masked(self.url)

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
            held = self.cache.held(entry.sha256, entry.size, lambda: _transfer(url, entry.size, self.access))
            return held.__enter__()

        path: Path = _twice(url, enter)
        try:
            yield path
        finally:
            if held is not None:
                held.__exit__(None, None, None)


def fetch_sized(url: str, path: Path, size: int, access: Access = DIRECT) -> None:
    """Write the object at `url` to the new file `path`. Raises StorageError unless it is `size` bytes; ConfigError."""
    came = 0
    with path.open("wb") as out:
        for piece in _transfer(url, size, access):
            came += len(piece)
            out.write(piece)
    if came != size:
        more = f"more than {size}" if came > size else f"{came}"
        raise StorageError(f"{masked(url)}: {more} bytes came, the listing says {size}; run the same again")


def open_dataset(
    place: str | os.PathLike[str] | Dataset, *, cache_dir: str | os.PathLike[str] = "", cache_bytes: int = CACHE_BYTES,
    private_redirects: bool = False, edition: int = 0,
) -> Dataset:  # fmt: skip
    """Open a dataset of byte targets by its folder or fsspec URL; its index is read and checked, no shard is.

    An open dataset is returned as it is. `edition`: its number, of a corpus that changed; 0 = the newest. `cache_dir`
    (default: `shards` in the cache, `scratch.cache_folder`) and `cache_bytes` are for URLs only, `private_redirects`
    (follow them to private addresses) for http(s) alone.
    Raises IntegrityError for an index that is missing, damaged or of another version, InputError for an edition that is
    not there, StorageError when it cannot be read, ConfigError for a URL without a file system.
    """
    if isinstance(place, Dataset):
        return place
    if os.fspath(place).startswith(_LOCAL):
        place = str(fsspec.core.url_to_fs(os.fspath(place))[1])
    if not is_url(place):
        return open_edition(local_path(place), edition) if edition else read_dataset(local_path(place))
    url = os.fspath(place).rstrip("/")
    cache = FileCache(local_path(cache_dir or cache_folder() / "shards"), cache_bytes)
    access = Access(private_redirects)
    index = _fetch_index(url, "", cache.folder, access)
    if edition and edition_of(index.info) != edition:
        index = _fetch_index(url, f"{edition_folder(edition)}/", cache.folder, access)
    return RemoteDataset(**vars(index), url=url, cache=cache, access=access)


def _fetch_index(url: str, place: str, folder: Path, access: Access) -> Dataset:
    document = fetch_bytes(f"{url}/{place}{DATASET}", MAX_JSON, access)
    table = partial(fetch_bytes, f"{url}/{place}{MANIFEST}", MAX_MANIFEST, access)
    return parse_index(folder, masked(f"{url}/{place}".rstrip("/")), document, table)


def load_shard(dataset: Dataset, entry: ShardEntry) -> "ByteShard":
    """Read one shard, its bytes hashed first.

    Raises IntegrityError naming the shard when it is missing, not the manifest's, or not a shard; StorageError.
    """
    from bytecache.schemas.shard.reader import read_shard

    for attempt in range(2):
        with dataset.held(entry) as path:
            try:
                refuse_stray(path)
                sha256 = file_sha256(path) if path.is_file() else ""
            except NotAFileError as error:
                raise IntegrityError(f"{path} {error.strerror}; fetch or make it again") from error
            except OSError as error:
                raise StorageError(f"{path}: cannot be read: {error}; check the path and permissions") from error
            if sha256 == entry.sha256:
                return _as_listed(dataset, entry, read_shard(path))
        if not isinstance(dataset, RemoteDataset) or dataset.cache is None or attempt:
            break
        dataset.cache.drop(entry.sha256)  # damaged on this disk: once more from the source
    what = f"sha256 is {sha256[:12]}, the manifest says {entry.sha256[:12]}" if sha256 else "the shard is missing"
    raise IntegrityError(
        f"{dataset.where}/{entry.file}: {what}; run `bytecache convert` where it was made, or "
        "`bytecache verify FOLDER --repair --from PLACE` where it came from PLACE"
    )


def _as_listed(dataset: Dataset, entry: ShardEntry, shard: "ByteShard") -> "ByteShard":
    """The shard, if it is what its manifest says of it: data order and totals are made from the manifest alone."""
    from bytecache.schemas.dataset.verification import contradictions

    wrong = contradictions(shard, entry)
    if wrong:
        raise IntegrityError(
            f"{dataset.where}/{entry.file}: {'; '.join(wrong)}; the manifest was made wrongly or altered: do not train "
            "on it, fetch the data set again, or run `bytecache verify --deep --repair` where it was made"
        )
    return shard


def fetch_ahead(dataset: Dataset, entry: ShardEntry) -> None:
    """Bring a remote shard into the cache; its failure is left to the load that needs it."""
    if isinstance(dataset, RemoteDataset) and dataset.cache is not None and not dataset.cache.has(entry.sha256):
        with suppress(BytecacheError), dataset.held(entry):
            pass
