"""One bucket and the requests to it: objects that appear whole or not at all, each with its sha256.

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

Price in memory: SINGLE_PUT, and for a larger object IN_FLIGHT.
"""

import contextlib
import hashlib
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError

from bytecache.pipeline.stores.base import MAX_SMALL, TEMP_FOLDER, json_bytes
from bytecache.pipeline.stores.credentials import is_about_credentials, remedy
from bytecache.pipeline.stores.retry import MOST_ALTERED, Damaged, Result, patiently
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
MAX_KEYS = 1 << 24
"""Objects of a listing: some for each of a million units."""


class Stored:
    """What a HEAD says of an object. `version` changes whenever the object does."""

    def __init__(self, result: Any) -> None:
        meta, attributes = result.meta, result.attributes
        self.size = int(meta["size"])
        self.version = str(meta["e_tag"] or meta["version"] or meta["last_modified"])
        self.sha256 = str(attributes.get("sha256", ""))
        self.tag = str(attributes.get("upload", ""))


class Bucket:
    """A prefix of a bucket.

    `clients`: the obstore stores to read from and to write to; `patience`: seconds that a failing request is repeated.
    A key that is not there raises StorageError; so does a service that fails for longer than `patience`.
    """

    def __init__(self, name: str, clients: tuple[Any, Any], patience: float) -> None:
        self.name = name
        self.backend, self.writer = clients
        self._patience, self._answered = patience, False
        self.single_put, self.copy_limit, self.largest = SINGLE_PUT, COPY_LIMIT, LARGEST

    # Writing

    def create_from(self, key: str, source: Path) -> bool:
        """Make an object of a file, if there is none of that key; whether this call made it."""
        size = source.stat().st_size
        if size > self.copy_limit:
            return self._create_huge(key, source)
        if size > self.single_put:
            return self._create_large(key, source)
        return self.create(key, source.read_bytes())

    def create(self, key: str, raw: bytes) -> bool:
        """Make an object of these bytes, if there is none of that key; whether this call made it."""
        tags = {"sha256": hashlib.sha256(raw).hexdigest(), "upload": uuid.uuid4().hex}

        def put() -> bool:
            try:
                obstore.put(self.writer, key, raw, mode="create", attributes=tags, use_multipart=False)
                return True
            except NotImplementedError:
                if self.head(key) is None:
                    obstore.put(self.writer, key, raw, attributes=tags, use_multipart=False)
                raise AlreadyExistsError from None  # who stands there is looked up below

        try:
            return self._try(f"writing {key}", put)
        except AlreadyExistsError:
            stored = self.head(key)
            return stored is not None and stored.tag == tags["upload"]

    def _create_large(self, key: str, source: Path) -> bool:
        """Staged multipart upload and conditional copy. An equal object that is already there counts as ours."""
        sha256, staged = file_sha256(source), f"{TEMP_FOLDER}/{source.name}"
        try:
            self.upload(staged, source, sha256)
            try:
                self._try(f"writing {key}", lambda: obstore.copy(self.writer, staged, key, overwrite=False))
            except AlreadyExistsError:
                return self.sha256(key) == sha256
            stored = self.head(key)
            if stored is not None and not stored.sha256:
                self.write(f"{HASHES}/{key}", json_bytes({"version": stored.version, "sha256": sha256}))
            return True
        finally:
            with contextlib.suppress(StorageError):
                self.remove(staged)

    def _create_huge(self, key: str, source: Path) -> bool:
        """Look, and upload in parts. An equal object that is already there counts as ours."""
        sha256 = file_sha256(source)
        if self.head(key) is not None:
            return self.sha256(key) == sha256
        self.upload(key, source, sha256)
        return True

    def write(self, key: str, raw: bytes) -> None:
        """Put bytes, whatever stood there."""
        tags = {"sha256": hashlib.sha256(raw).hexdigest()}
        self._try(
            f"writing {key}",
            lambda: obstore.put(self.writer, key, raw, attributes=tags, use_multipart=False),
        )

    def upload(self, key: str, source: Path, sha256: str) -> None:
        """Put a file of that hash, in parts if it is large, whatever stood there."""
        size = source.stat().st_size
        if size > self.largest:
            raise StorageError(
                f"{self.name}, writing {key}: {size} bytes, and an object holds {self.largest} at most; use smaller "
                "units (corpus.unit_bytes, convert.shard_bytes), or a folder as run.dir"
            )
        tries = 0

        def put() -> None:
            nonlocal tries
            tries += 1
            part = max(PART if tries == 1 else LEAST_PART, -(-size // N_PARTS))
            tags, at_once = {"sha256": sha256}, max((IN_FLIGHT // part) >> (2 * (tries - 1)), 1)
            obstore.put(self.writer, key, source, attributes=tags, chunk_size=part, max_concurrency=at_once)

        # All parts share the link: fewer and smaller ones are each done sooner.
        self._try(f"writing {key}", put, lambda: min(tries, SHRINKS))

    def copy(self, key: str, target: str) -> None:
        """On the server, whatever stood there: a damaged object fails the check of every download."""
        self._try(f"moving {key}", lambda: obstore.copy(self.writer, key, target))

    def remove(self, key: str) -> None:
        """Delete an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._try(f"deleting {key}", lambda: obstore.delete(self.backend, key))

    # Reading

    def head(self, key: str) -> Stored | None:
        """What the service says of an object; None where there is none."""

        def head() -> Stored:
            return Stored(obstore.get(self.backend, key, options={"head": True}))

        try:
            return self._try(f"looking for {key}", head)
        except FileNotFoundError:
            return None

    def known(self, key: str) -> Stored:
        """The same of an object that must be there."""
        stored = self.head(key)
        if stored is None:
            raise self._absent(key)
        return stored

    def fetch(self, key: str, target: Path) -> Stored:
        """Stream an object to a file and prove it whole; what broke off goes on where it was, if it is the same."""
        digest, size, version = hashlib.sha256(), 0, ""

        def get() -> Stored:
            nonlocal digest, size, version
            begun: obstore.GetOptions | None = {"range": {"offset": size}} if size else None
            result = obstore.get(self.backend, key, options=begun)
            stored = Stored(result)
            if size and stored.version != version:
                digest, size = hashlib.sha256(), 0
                result = obstore.get(self.backend, key)
                stored = Stored(result)
            version = stored.version
            with target.open("ab" if size else "wb") as stream:
                for chunk in result.stream(min_chunk_size=CHUNK):
                    digest.update(chunk)
                    size += stream.write(chunk)
            if size != stored.size or (stored.sha256 and digest.hexdigest() != stored.sha256):
                came, sha256, digest, size = size, digest.hexdigest(), hashlib.sha256(), 0
                raise Damaged(f"the {came} bytes that arrive are not the {stored.size} that were stored", sha256)
            return stored

        try:
            return self._try(f"reading {key}", get, lambda: size)
        except FileNotFoundError:
            raise self._absent(key) from None

    def read(self, key: str) -> bytes:
        """A whole small object."""

        def get() -> bytes:
            result = obstore.get(self.backend, key)
            stored, content = Stored(result), bytearray()
            if stored.size > MAX_SMALL:
                raise StorageError(
                    f"{self.name}/{key}: {stored.size} bytes, at most {MAX_SMALL} are read; it is no file of ours"
                )
            for chunk in result.stream(min_chunk_size=CHUNK):
                content += chunk
                if len(content) > stored.size:
                    break
            raw = bytes(content)
            sha256 = hashlib.sha256(raw).hexdigest()
            if len(raw) != stored.size or (stored.sha256 and sha256 != stored.sha256):
                raise Damaged(f"the {len(raw)} bytes that arrive are not the {stored.size} that were stored", sha256)
            return raw

        try:
            return self._try(f"reading {key}", get)
        except FileNotFoundError:
            raise self._absent(key) from None

    def sha256(self, key: str, *, deep: bool = False) -> str:
        """The hash that an object was written with; with `deep`, or where none is recorded, that of its bytes."""
        stored = self.known(key)
        recorded = stored.sha256 or self._recorded(key, stored.version)
        if recorded and not deep:
            return recorded
        # Read from the service, not from a copy: the question is what it holds. A hash that disagrees with the record
        # is believed when a second read gives it again; a single one may be the network's fault.
        digests = [self._hash(key)]
        while recorded and digests[-1] not in (recorded, *digests[:-1]) and len(digests) <= MOST_ALTERED:
            digests.append(self._hash(key))
        return digests[-1]

    def _hash(self, key: str) -> str:
        def read() -> str:
            digest = hashlib.sha256()
            for chunk in obstore.get(self.backend, key).stream(min_chunk_size=CHUNK):
                digest.update(chunk)
            return digest.hexdigest()

        return str(self._try(f"reading {key}", read))

    def _recorded(self, key: str, version: str) -> str:
        """The hash of a large object, noted apart; empty if there is no note or it is of another version."""
        with contextlib.suppress(StorageError, ValueError):
            note = strict_json.loads(self.read(f"{HASHES}/{key}"))
            if isinstance(note, dict) and note.get("version") == version:
                return str(note.get("sha256", ""))
        return ""

    def keys(self, prefix: str) -> list[str]:
        """Keys below a prefix, sorted; "" = all. What uploads and records leave is not listed."""
        place = f"listing {prefix or 'everything'}"

        def find() -> set[str]:
            keys: set[str] = set()
            for page in obstore.list(self.backend, prefix or None):
                before = len(keys)
                keys.update(str(item["path"]) for item in page)
                # A page of a listing that goes on has something new, or it goes round in a circle.
                if len(keys) > MAX_KEYS or (page and len(keys) == before):
                    raise StorageError(
                        f"{self.name}, {place}: the service's listing does not end ({len(keys)} keys so far, at most "
                        f"{MAX_KEYS}); see that it is the service you mean"
                    )
            return keys

        keys = self._try(place, find)
        return sorted(key for key in keys if key.split("/")[0] not in (TEMP_FOLDER, HASHES))

    def staged_before(self, moment: datetime) -> list[str]:
        """Keys that uploads left under `.tmp/`, last written before a moment."""

        def find() -> list[str]:
            pages = obstore.list(self.backend, TEMP_FOLDER)
            return [str(item["path"]) for page in pages for item in page if item["last_modified"] < moment]

        return self._try("listing temporary files", find)

    def _try(self, doing: str, request: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
        def asked() -> Result:
            try:
                result = request()
            except (FileNotFoundError, NotImplementedError, AlreadyExistsError):
                self._answered = True
                raise
            except Exception as error:
                # Later it is the machine's metadata service that does not answer now.
                if not self._answered and is_about_credentials(str(error)):
                    raise ConfigError(f"no credentials for {self.name}: {remedy(self.name)}") from error
                raise
            self._answered = True
            return result

        return patiently(f"{self.name}, {doing}", asked, self._patience, progress)

    def _absent(self, key: str) -> StorageError:
        return StorageError(f"{self.name}/{key} does not exist; rerun the stage that makes it, or check run.dir")
