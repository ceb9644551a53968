"""Runs in an object store: s3://, gs://, az:// (and memory:// for tests), through `obstore`.

Commit: one PUT with "If-None-Match: *" carries the whole object, its sha256 and a tag of this very call, so the
service itself lets one writer win. A response lost after success shows as "exists already" in the retry; the tag tells
that the object is ours. Above `SINGLE_PUT` bytes (a single PUT holds them in memory): multipart upload to a staging key
under `.tmp/`, then a server-side copy that fails if the key exists (on S3: UploadPartCopy and a conditional
CompleteMultipartUpload). S3 loses an object's metadata in that copy, so the hash goes to `.sha256/<key>` beside the
version it belongs to. Above `COPY_LIMIT`, the most that one UploadPartCopy moves: look, then a multipart upload to the
key itself, whose completion makes it appear whole (the client library has no conditional one). What a killed upload
leaves is invisible but billed: give the bucket a rule that aborts incomplete uploads.

Where a service has no conditional writes (set AWS_CONDITIONAL_PUT=disabled for it): look, put, and look whose tag
stands. Two writers may then both believe they won if they met within milliseconds, as above `COPY_LIMIT` while one of
them uploads. For units that is harmless (equal keys hold equal bytes); for leases it costs a unit done twice.

Reading: `get_path` downloads to a mirror folder, checks size and sha256, and asks the service for the version each
time (one HEAD). Writing: `temp_path` is a file of that local folder.

Price: a unit costs 2 PUT (object, receipt) and about 4 HEAD; no LIST. Memory: SINGLE_PUT, and
for a larger object IN_FLIGHT.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import obstore
from obstore.exceptions import AlreadyExistsError

from bytecache.pipeline.stores.base import TEMP_FOLDER, check_key, disk_errors, json_bytes
from bytecache.pipeline.stores.local import STALE_SECONDS, LocalStore
from bytecache.pipeline.stores.mirror import Mirror
from bytecache.pipeline.stores.retry import Damaged, Result, patiently
from bytecache.pipeline.stores.services import open_clients
from bytecache.schemas import strict_json
from bytecache.schemas.errors import ConfigError, StorageError
from bytecache.schemas.files import file_sha256

SINGLE_PUT = 32 * 1024 * 1024
COPY_LIMIT = 5 * 1024**3
LARGEST = 5 * 1024**4
"""What S3 takes as one object; other services take as much."""
PART, LEAST_PART = 16 * 1024 * 1024, 5 * 1024 * 1024
"""Bytes of a part of an upload, and the least that S3 takes, for links on which more takes too long."""
SHRINKS = 4
"""How often parts become smaller and fewer at a time before an upload that takes too long is given up."""
N_PARTS = 10_000
"""Parts that an upload may have; above PART x N_PARTS bytes the parts grow."""
IN_FLIGHT = 192 * 1024 * 1024
"""Bytes of parts in memory during an upload (one part, where that is more)."""
CHUNK = 4 * 1024 * 1024
HASHES = ".sha256"
PATIENCE = 120.0


class _Found:
    """What a HEAD says of an object. `version` changes whenever the object does."""

    def __init__(self, result: Any) -> None:
        meta, attributes = result.meta, result.attributes
        self.size = int(meta["size"])
        self.version = str(meta["e_tag"] or meta["version"] or meta["last_modified"])
        self.sha256 = str(attributes.get("sha256", ""))
        self.tag = str(attributes.get("upload", ""))


class ObjectStore:
    """A prefix of a bucket. `scratch` is a local folder for copies and temporary files; runs may share it.

    `patience`: seconds that a failing request is repeated; `timeout`: seconds without a byte that arrives, and a tenth
    of what a request that writes may take. `backend`: an obstore store, for tests. Raises ConfigError for a URL that
    names no bucket or options that the service's client refuses.
    """

    def __init__(
        self, url: str, scratch: Path, *, patience: float = PATIENCE, timeout: float = 120.0, backend: Any = None
    ) -> None:
        self._url = url.rstrip("/")
        self._patience = patience
        self.root = scratch / f"{_plain(self._url)}-{hashlib.sha256(self._url.encode()).hexdigest()[:12]}"
        self._files = LocalStore(self.root)
        self._mirror = Mirror(self.root)
        self._single_put, self._copy_limit, self._largest = SINGLE_PUT, COPY_LIMIT, LARGEST
        try:
            self._backend, self._writer = (backend, backend) if backend else open_clients(self._url, timeout)
        except Exception as error:  # the library's own classes, and ValueError
            raise ConfigError(f"run.dir = {url}: {str(error).splitlines()[0][:300]}") from error

    @property
    def name(self) -> str:
        return self._url

    # Writing

    def put_if_absent(self, key: str, source: Path) -> bool:
        check_key(key, self.name)
        try:
            size = source.stat().st_size
            if size > self._copy_limit:
                return self._create_huge(key, source)
            if size > self._single_put:
                return self._create_large(key, source)
            return self._create(key, source.read_bytes())
        finally:
            source.unlink(missing_ok=True)

    def put_json_if_absent(self, key: str, value: Any) -> bool:
        check_key(key, self.name)
        return self._create(key, json_bytes(value))

    def _create(self, key: str, raw: bytes) -> bool:
        tags = {"sha256": hashlib.sha256(raw).hexdigest(), "upload": uuid.uuid4().hex}

        def put() -> bool:
            try:
                obstore.put(self._writer, key, raw, mode="create", attributes=tags, use_multipart=False)
                return True
            except NotImplementedError:
                if self._head(key) is None:
                    obstore.put(self._writer, key, raw, attributes=tags, use_multipart=False)
                raise AlreadyExistsError from None  # who stands there is looked up below

        try:
            return self._try(f"writing {key}", put)
        except AlreadyExistsError:
            found = self._head(key)
            return found is not None and found.tag == tags["upload"]

    def _create_large(self, key: str, source: Path) -> bool:
        """Staged multipart upload and conditional copy. An equal object that is already there counts as ours."""
        sha256, staged = file_sha256(source), f"{TEMP_FOLDER}/{source.name}"
        try:
            self._upload(staged, source, sha256)
            try:
                self._try(f"writing {key}", lambda: obstore.copy(self._writer, staged, key, overwrite=False))
            except AlreadyExistsError:
                return self.sha256(key) == sha256
            found = self._head(key)
            if found is not None and not found.sha256:
                self._write(f"{HASHES}/{key}", json_bytes({"version": found.version, "sha256": sha256}))
            return True
        finally:
            with contextlib.suppress(StorageError):
                self._remove(staged)

    def _create_huge(self, key: str, source: Path) -> bool:
        """Look, and upload in parts. An equal object that is already there counts as ours."""
        sha256 = file_sha256(source)
        if self._head(key) is not None:
            return self.sha256(key) == sha256
        self._upload(key, source, sha256)
        return True

    def replace(self, key: str, source: Path) -> None:
        check_key(key, self.name)
        try:
            self._upload(key, source, file_sha256(source))
        finally:
            source.unlink(missing_ok=True)

    def replace_text(self, key: str, text: str) -> None:
        check_key(key, self.name)
        raw = text.encode("utf-8")
        found = self._head(key)
        if found is None or found.sha256 != hashlib.sha256(raw).hexdigest():
            self._write(key, raw)

    def _write(self, key: str, raw: bytes) -> None:
        tags = {"sha256": hashlib.sha256(raw).hexdigest()}
        self._try(
            f"writing {key}",
            lambda: obstore.put(self._writer, key, raw, attributes=tags, use_multipart=False),
        )

    def _upload(self, key: str, source: Path, sha256: str) -> None:
        size = source.stat().st_size
        if size > self._largest:
            raise StorageError(
                f"{self.name}, writing {key}: {size} bytes, and an object holds {self._largest} at most; use smaller "
                "units (corpus.unit_bytes, convert.shard_bytes), or a folder as run.dir"
            )
        tries = 0

        def put() -> None:
            nonlocal tries
            tries += 1
            part = max(PART if tries == 1 else LEAST_PART, -(-size // N_PARTS))
            tags, at_once = {"sha256": sha256}, max((IN_FLIGHT // part) >> (2 * (tries - 1)), 1)
            obstore.put(self._writer, key, source, attributes=tags, chunk_size=part, max_concurrency=at_once)

        # All parts share the link: fewer and smaller ones are each done sooner.
        self._try(f"writing {key}", put, lambda: min(tries, SHRINKS))

    def delete(self, key: str) -> None:
        check_key(key, self.name)
        self._remove(key)
        self._mirror.drop(key)

    def move(self, key: str, target: str) -> None:
        check_key(target, self.name)
        if self._head(key) is None:
            raise self._absent(key)
        # On the server: a damaged object fails the check of every download.
        self._try(f"moving {key}", lambda: obstore.copy(self._writer, key, target))
        self.delete(key)

    def _remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try(f"deleting {key}", lambda: obstore.delete(self._backend, key))

    # Reading

    def get_path(self, key: str) -> Path:
        check_key(key, self.name)
        found = self._head(key)
        if found is None:
            raise self._absent(key)
        if self._mirror.fresh(key, found.version):
            return self._mirror.path(key)
        return self._download(key)

    def _download(self, key: str) -> Path:
        temporary = self.temp_path(key)
        with disk_errors(f"writing {temporary}"):
            try:
                found = self._fetch(key, temporary)
                return self._mirror.adopt(key, temporary, found.version)
            finally:
                temporary.unlink(missing_ok=True)

    def _fetch(self, key: str, target: Path) -> _Found:
        """Stream an object to a file and prove it whole; what broke off goes on where it was, if it is the same."""
        digest, size, version = hashlib.sha256(), 0, ""

        def get() -> _Found:
            nonlocal digest, size, version
            begun: obstore.GetOptions | None = {"range": {"offset": size}} if size else None
            result = obstore.get(self._backend, key, options=begun)
            stored = _Found(result)
            if size and stored.version != version:
                digest, size = hashlib.sha256(), 0
                result = obstore.get(self._backend, key)
                stored = _Found(result)
            version = stored.version
            with target.open("ab" if size else "wb") as stream:
                for chunk in result.stream(min_chunk_size=CHUNK):
                    digest.update(chunk)
                    size += stream.write(chunk)
            if size != stored.size or (stored.sha256 and digest.hexdigest() != stored.sha256):
                came, digest, size = size, hashlib.sha256(), 0
                raise Damaged(f"the {came} bytes that arrive are not the {stored.size} that were stored")
            return stored

        try:
            return self._try(f"reading {key}", get, lambda: size)
        except FileNotFoundError:
            raise self._absent(key) from None

    def open(self, key: str) -> BinaryIO:
        return self.get_path(key).open("rb")

    def read_bytes(self, key: str) -> bytes:
        check_key(key, self.name)

        def get() -> bytes:
            result = obstore.get(self._backend, key)
            stored, raw = _Found(result), bytes(result.bytes())
            if len(raw) != stored.size or (stored.sha256 and hashlib.sha256(raw).hexdigest() != stored.sha256):
                raise Damaged(f"the {len(raw)} bytes that arrive are not the {stored.size} that were stored")
            return raw

        try:
            return self._try(f"reading {key}", get)
        except FileNotFoundError:
            raise self._absent(key) from None

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        check_key(key, self.name)
        found = self._head(key)
        return found.size if found else None

    def sha256(self, key: str, *, deep: bool = False) -> str:
        check_key(key, self.name)
        found = self._head(key)
        if found is None:
            raise self._absent(key)
        recorded = found.sha256 or self._recorded(key, found.version)
        if recorded and not deep:
            return recorded
        # Read from the service, not from a copy: the question is what it holds. A hash that disagrees with the record
        # is believed when a second read gives it again; a single one may be the network's fault.
        digest = self._hash(key)
        while recorded and digest != recorded:
            digest, before = self._hash(key), digest
            if digest == before:
                break
        return digest

    def _hash(self, key: str) -> str:
        def read() -> str:
            digest = hashlib.sha256()
            for chunk in obstore.get(self._backend, key).stream(min_chunk_size=CHUNK):
                digest.update(chunk)
            return digest.hexdigest()

        return str(self._try(f"reading {key}", read))

    def _recorded(self, key: str, version: str) -> str:
        """The hash of a large object, noted apart; empty if there is no note or it is of another version."""
        with contextlib.suppress(StorageError, ValueError):
            note = strict_json.loads(self.read_bytes(f"{HASHES}/{key}"))
            if isinstance(note, dict) and note.get("version") == version:
                return str(note.get("sha256", ""))
        return ""

    def list(self, prefix: str) -> Iterator[str]:
        if prefix:
            check_key(prefix, self.name)

        def find() -> list[str]:
            return [str(item["path"]) for page in obstore.list(self._backend, prefix or None) for item in page]

        keys = self._try(f"listing {prefix or 'everything'}", find)
        yield from sorted(key for key in keys if key.split("/")[0] not in (TEMP_FOLDER, HASHES))

    # The local side

    def temp_path(self, name: str) -> Path:
        return self._files.temp_path(name)

    def write_temp(self, name: str, raw: bytes) -> Path:
        return self._files.write_temp(name, raw)

    def release(self, key: str) -> None:
        self._mirror.drop(key)

    def folder(self, prefix: str, record: str = "") -> Path:
        if prefix:
            check_key(prefix, self.name)
        here = self._mirror.path(prefix)
        here.parent.mkdir(parents=True, exist_ok=True)
        if record and not self.exists(f"{prefix}/{record}"):
            return here
        there = list(self.list(prefix))
        for key in set(self._mirror.keys(prefix)) - set(there):
            if self._mirror.unaltered(key):
                self._mirror.drop(key)  # deleted in the store since it was copied
        for key in there:
            found, note = self._head(key), self._mirror.note(key)
            # What was changed here since stays: it is the newer one, and `publish` will say so to the store.
            same = note is not None and found is not None and note.version == found.version
            if found is not None and not (same and self._mirror.path(key).is_file()):
                self._download(key)
        return here

    def publish(self, prefix: str) -> int:
        check_key(prefix, self.name)
        here, there = self._mirror.keys(prefix), set(self.list(prefix))
        gone = sorted(there - set(here), key=_documents_first)
        for key in gone:
            self.delete(key)
        changed = 0
        for key in sorted(here, key=_documents_first, reverse=True):
            if key in there and self._mirror.unaltered(key):
                continue
            path, temporary = self._mirror.path(key), self.temp_path(key)
            with disk_errors(f"writing {temporary}"):
                before = path.stat()
                if key.endswith(".safetensors"):
                    os.link(path, temporary)
                else:
                    shutil.copyfile(path, temporary)  # a log may be appended to while it goes up
            self.replace(key, temporary)
            found = self._head(key)
            if found is not None:
                self._mirror.describe(key, found.version, before)
            changed += 1
        return changed + len(gone)

    def sweep(self) -> int:
        removed = self._files.sweep()
        before = datetime.now(UTC) - timedelta(seconds=STALE_SECONDS)

        def find() -> list[str]:
            pages = obstore.list(self._backend, TEMP_FOLDER)
            return [str(item["path"]) for page in pages for item in page if item["last_modified"] < before]

        for key in self._try("listing temporary files", find):
            self._remove(key)
            removed += 1
        return removed

    # Requests

    def _head(self, key: str) -> _Found | None:
        def head() -> _Found:
            return _Found(obstore.get(self._backend, key, options={"head": True}))

        try:
            return self._try(f"looking for {key}", head)
        except FileNotFoundError:
            return None

    def _try(self, doing: str, request: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
        return patiently(f"{self.name}, {doing}", request, self._patience, progress)

    def _absent(self, key: str) -> StorageError:
        return StorageError(f"{self.name}/{key} does not exist; rerun the stage that makes it, or check run.dir")


def _documents_first(key: str) -> tuple[bool, str]:
    return not key.endswith(".json"), key


def _plain(url: str) -> str:
    """The last words of a URL as a file name, for people who look into the scratch folder."""
    return "".join(char if char.isalnum() else "-" for char in url.split("://", 1)[-1])[-40:]
