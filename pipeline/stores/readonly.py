"""Runs and data sets on a service that is only read here: hf:// through huggingface_hub, by way of fsspec.

Copies go to a mirror folder, as with object stores; the version is the file's content id. Whatever would write is
refused: publish a finished run with the service's own tools.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from bytecache.pipeline.stores.base import check_key, disk_errors, read_small
from bytecache.pipeline.stores.hub_session import asking, hub_session
from bytecache.pipeline.stores.local import LocalStore
from bytecache.pipeline.stores.mirror import Mirror
from bytecache.schemas.errors import ConfigError, StorageError
from bytecache.schemas.files import file_sha256
from bytecache.stages.targets.source import Access, fetch_sized


class ReadOnlyStore:
    """An address of the hub. Raises ConfigError where its file system cannot be made; see `Store` for the methods."""

    def __init__(self, url: str, scratch: Path, private_redirects: bool = False) -> None:
        import fsspec

        self._url, self._private_redirects = url.rstrip("/"), private_redirects
        try:
            self._files, self._base = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url}: {str(error).splitlines()[0][:300]}") from error
        self._base = self._base.strip("/")
        root = scratch / f"read-{hashlib.sha256(self._url.encode()).hexdigest()[:12]}"
        self._temporary = LocalStore(root)
        self._mirror = Mirror(root)

    @property
    def name(self) -> str:
        return self._url

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with hub_session(private_redirects=self._private_redirects), asking(self.name):
            yield

    def _find(self, key: str) -> dict[str, Any] | None:
        check_key(key, self.name)
        with self._asking():
            try:
                info: dict[str, Any] = self._files.info(f"{self._base}/{key}")
            except FileNotFoundError:
                return None
        return info if info.get("type") == "file" else None

    def get_path(self, key: str) -> Path:
        info = self._find(key)
        if info is None:
            raise StorageError(f"{self.name}/{key} does not exist; check run.dir")
        parts = [info.get("blob_id"), info.get("lfs"), info.get("ETag"), info.get("created"), info["size"]]
        version = hashlib.sha256(repr(parts).encode()).hexdigest()
        if self._mirror.fresh(key, version):
            return self._mirror.path(key)
        temporary = self._temporary.temp_path(key)
        with disk_errors(f"writing {temporary}"):
            try:
                fetch_sized(f"{self.name}/{key}", temporary, info["size"], Access(self._private_redirects))
                return self._mirror.adopt(key, temporary, version)
            finally:
                temporary.unlink(missing_ok=True)

    def read_bytes(self, key: str) -> bytes:
        return read_small(self.get_path(key))

    def open(self, key: str) -> BinaryIO:
        return self.get_path(key).open("rb")

    def exists(self, key: str) -> bool:
        return self._find(key) is not None

    def size(self, key: str) -> int | None:
        info = self._find(key)
        return int(info["size"]) if info else None

    def sha256(self, key: str, *, deep: bool = False) -> str:
        return file_sha256(self.get_path(key))

    def list(self, prefix: str) -> Iterator[str]:
        if prefix:
            check_key(prefix, self.name)
        top = f"{self._base}/{prefix}".strip("/")
        with self._asking():
            try:
                paths = self._files.find(top) if self._files.isdir(top) else []
            except FileNotFoundError:
                paths = []
        keys = [str(path).strip("/").removeprefix(self._base).strip("/") for path in paths]
        # A listing is a stranger's text: what would leave the folder is not a key.
        yield from sorted(key for key in keys if key and ".." not in key.split("/") and not key.startswith("."))

    def folder(self, prefix: str, record: str = "") -> Path:
        if prefix:
            check_key(prefix, self.name)
        for key in self.list(prefix):
            self.get_path(key)
        return self._mirror.path(prefix)

    def release(self, key: str) -> None:
        self._mirror.drop(key)

    def sweep(self) -> int:
        return self._temporary.sweep()

    def _refuse(self, key: str = "") -> NoReturn:
        raise StorageError(
            f"{self.name} is only read here; use a folder or an object store as run.dir to write {key}".rstrip()
        )

    def temp_path(self, name: str) -> Path:
        self._refuse(name)

    def write_temp(self, name: str, raw: bytes) -> Path:
        self._refuse(name)

    def put_if_absent(self, key: str, source: Path) -> bool:
        self._refuse(key)

    def put_json_if_absent(self, key: str, value: Any) -> bool:
        self._refuse(key)

    def replace(self, key: str, source: Path) -> None:
        self._refuse(key)

    def replace_text(self, key: str, text: str) -> None:
        self._refuse(key)

    def delete(self, key: str) -> None:
        self._refuse(key)

    def move(self, key: str, target: str) -> None:
        self._refuse(key)

    def publish(self, prefix: str) -> int:
        self._refuse(prefix)
