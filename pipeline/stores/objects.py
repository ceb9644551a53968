"""Runs in an object store: s3://, gs://, az:// (and memory:// for tests), through `obstore` (`bucket`).

Reading: `get_path` downloads to a mirror folder, checks size and sha256, and asks the service for the version each
time (one HEAD). Writing: `temp_path` is a file of that local folder.

Price: a unit costs 2 PUT (object, receipt) and about 4 HEAD; no LIST.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from bytecache.pipeline.stores.base import check_key, disk_errors, json_bytes
from bytecache.pipeline.stores.bucket import Bucket
from bytecache.pipeline.stores.credentials import refuse_without_credentials
from bytecache.pipeline.stores.local import STALE_SECONDS, LocalStore
from bytecache.pipeline.stores.mirror import Mirror
from bytecache.pipeline.stores.services import open_clients
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.files import file_sha256, make_folder

PATIENCE = 120.0


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
        self.root = scratch / f"{_plain(self._url)}-{hashlib.sha256(self._url.encode()).hexdigest()[:12]}"
        self._files = LocalStore(self.root)
        self._mirror = Mirror(self.root)
        if backend is None:
            refuse_without_credentials(self._url)
        try:
            clients = (backend, backend) if backend else open_clients(self._url, timeout)
        except Exception as error:  # the library's own classes, and ValueError
            why = str(error).splitlines()[0][:300]
            if "Account must be" in why:
                why += " (AZURE_STORAGE_ACCOUNT_NAME)"
            if "recognise URL" in why:
                why += "; write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://ACCOUNT/CONTAINER/PREFIX"
            raise ConfigError(f"run.dir = {url}: {why}") from error
        self._bucket = Bucket(self._url, clients, patience)

    @property
    def name(self) -> str:
        return self._url

    # Writing

    def put_if_absent(self, key: str, source: Path) -> bool:
        check_key(key, self.name)
        try:
            return self._bucket.create_from(key, source)
        finally:
            source.unlink(missing_ok=True)

    def put_json_if_absent(self, key: str, value: Any) -> bool:
        check_key(key, self.name)
        return self._bucket.create(key, json_bytes(value))

    def replace(self, key: str, source: Path) -> None:
        check_key(key, self.name)
        try:
            self._bucket.upload(key, source, file_sha256(source))
        finally:
            source.unlink(missing_ok=True)

    def replace_text(self, key: str, text: str) -> None:
        check_key(key, self.name)
        raw = text.encode("utf-8")
        stored = self._bucket.head(key)
        if stored is None or stored.sha256 != hashlib.sha256(raw).hexdigest():
            self._bucket.write(key, raw)

    def delete(self, key: str) -> None:
        check_key(key, self.name)
        self._bucket.remove(key)
        self._mirror.drop(key)

    def move(self, key: str, target: str) -> None:
        check_key(target, self.name)
        self._bucket.known(key)
        self._bucket.copy(key, target)
        self.delete(key)

    # Reading

    def get_path(self, key: str) -> Path:
        check_key(key, self.name)
        if self._mirror.fresh(key, self._bucket.known(key).version):
            return self._mirror.path(key)
        return self._download(key)

    def _download(self, key: str) -> Path:
        temporary = self.temp_path(key)
        with disk_errors(f"writing {temporary}"):
            try:
                return self._mirror.adopt(key, temporary, self._bucket.fetch(key, temporary).version)
            finally:
                temporary.unlink(missing_ok=True)

    def open(self, key: str) -> BinaryIO:
        return self.get_path(key).open("rb")

    def read_bytes(self, key: str) -> bytes:
        check_key(key, self.name)
        return self._bucket.read(key)

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        check_key(key, self.name)
        stored = self._bucket.head(key)
        return stored.size if stored else None

    def sha256(self, key: str, *, deep: bool = False) -> str:
        check_key(key, self.name)
        return self._bucket.sha256(key, deep=deep)

    def list(self, prefix: str) -> Iterator[str]:
        if prefix:
            check_key(prefix, self.name)
        yield from self._bucket.keys(prefix)

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
        make_folder(here.parent)
        if record and not self.exists(f"{prefix}/{record}"):
            return here
        there = list(self.list(prefix))
        for key in set(self._mirror.keys(prefix)) - set(there):
            if self._mirror.unaltered(key):
                self._mirror.drop(key)  # deleted in the store since it was copied
        for key in there:
            stored, note = self._bucket.head(key), self._mirror.note(key)
            # What was changed here since stays: it is the newer one, and `publish` will say so to the store.
            same = note is not None and stored is not None and note.version == stored.version
            if stored is not None and not (same and self._mirror.path(key).is_file()):
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
            stored = self._bucket.head(key)
            if stored is not None:
                self._mirror.describe(key, stored.version, before)
            changed += 1
        return changed + len(gone)

    def sweep(self) -> int:
        removed = self._files.sweep()
        for key in self._bucket.staged_before(datetime.now(UTC) - timedelta(seconds=STALE_SECONDS)):
            self._bucket.remove(key)
            removed += 1
        return removed


def _documents_first(key: str) -> tuple[bool, str]:
    return not key.endswith(".json"), key


def _plain(url: str) -> str:
    """The last words of a URL as a file name, for people who look into the scratch folder."""
    return "".join(char if char.isalnum() else "-" for char in url.split("://", 1)[-1])[-40:]
