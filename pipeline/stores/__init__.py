"""Where bytes live: the only package that knows. `Store` is the interface, `open_store` picks the backend by URL."""

from bytecache.pipeline.stores.base import TEMP_FOLDER, Store, disk_errors, json_bytes, overlapped
from bytecache.pipeline.stores.local import LocalStore, refuse_no_file, refuse_no_files_in
from bytecache.schemas.errors import ConfigError, install
from bytecache.schemas.files import cache_folder, local_path

__all__ = [
    "TEMP_FOLDER", "LocalStore", "Store", "disk_errors", "json_bytes", "open_store", "overlapped",
    "refuse_no_file", "refuse_no_files_in",
]  # fmt: skip


def open_store(place: str, scratch: str = "", *, private_redirects: bool = False) -> Store:
    """The store of a run: a path, or a URL (s3://bucket/prefix, gs://..., az://account/container/..., hf://datasets/...).

    `scratch`: local folder for copies and temporary files of remote runs; empty = `runs` in the cache
    (`schemas.files.cache_folder`). `private_redirects`: follow the hub to private addresses, too. Raises ConfigError
    for a scheme that has no store here or whose library is not installed.
    """
    scheme, separator, _ = place.partition("://")
    if not separator:
        _refuse_half_address(place)
        return LocalStore(local_path(place))
    folder = local_path(scratch) if scratch else cache_folder() / "runs"
    if scheme in READABLE:
        from bytecache.pipeline.stores.readonly import ReadOnlyStore

        return ReadOnlyStore(place, folder, private_redirects)
    if scheme not in WRITABLE:
        known = ", ".join(f"{name}://" for name in (*WRITABLE, *READABLE))
        raise ConfigError(f"run.dir = {place}: no store for {scheme}://; use a folder or one of {known}")
    try:
        from bytecache.pipeline.stores.objects import ObjectStore
    except ModuleNotFoundError as error:
        raise ConfigError(f"run.dir = {place} needs {error.name}; {install('remote')}") from None
    return ObjectStore(place, folder)


def _refuse_half_address(place: str) -> None:
    """A bucket's address with one slash would be a folder `s3:` here: a run on a machine that goes away is lost."""
    scheme, colon, rest = place.partition(":")
    if colon and scheme in (*WRITABLE, *READABLE, *_ELSEWHERE) and rest.startswith("/"):
        raise ConfigError(
            f"run.dir = {place}: an address has two slashes, {scheme}://{rest.lstrip('/')}; a folder of that name is "
            f"./{place}"
        )


_ELSEWHERE = ("file", "memory", "http", "https")
WRITABLE = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
READABLE = ("hf",)
