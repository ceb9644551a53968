"""Folders of this machine: the cache, and scratch folders beside what they become.

A scratch folder is named after its owner, so that the next owner can sweep a dead one's. Libraries that write files
make temporary ones of their own beside the target; inside a scratch folder a kill cannot leave them among the outputs.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".scratch-"


def cache_folder() -> Path:
    """Where copies of what can be had again are kept: models, static states, shards, remote runs.

    $BYTECACHE_CACHE, else `bytecache` in $XDG_CACHE_HOME or ~/.cache.
    """
    if own := os.environ.get("BYTECACHE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bytecache"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, gone at exit unless renamed; first removes those of dead processes of this machine."""
    parent.mkdir(parents=True, exist_ok=True)
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
