"""Only regular files are read, and only regular files or new names are written; what stands there otherwise stays."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bytecache.pipeline.stores import LocalStore
from bytecache.schemas.errors import StorageError
from bytecache.schemas.files import (
    NotAFileError,
    file_sha256,
    make_folder,
    new_file,
    open_regular,
    put_in_place,
    read_regular,
    replace_file,
    scratch_folder,
)
from bytecache.schemas.settings import Train
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.stages.targets.cache import FileCache
from bytecache.stages.targets.source import fetch_file
from bytecache.stages.train.metrics import Metrics

Make = Callable[[Path], None]


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def _file(path: Path) -> None:
    path.write_bytes(b"theirs")


def _link_to_a_file(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(b"theirs")
    path.symlink_to("elsewhere")


ODD: dict[str, Make] = {
    "named pipe": lambda path: os.mkfifo(path),
    "socket": _socket,
    "folder": lambda path: path.mkdir(),
    "link to a file": _link_to_a_file,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to a device": lambda path: path.symlink_to("/dev/null"),
}


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Kind, inode and content of everything in a folder, links not followed."""
    found = {}
    for path in sorted(folder.iterdir()):
        seen = path.lstat()
        regular = stat.S_ISREG(seen.st_mode)
        found[path.name] = (stat.S_IFMT(seen.st_mode), seen.st_ino, path.read_bytes() if regular else b"")
    return found


def _into_a_store(path: Path) -> None:
    store = LocalStore(path.parent)
    store.replace(path.name, store.write_temp("x", b"new"))


def _new_into_a_store(path: Path) -> None:
    store = LocalStore(path.parent)
    if not store.put_if_absent(path.name, store.write_temp("x", b"new")):
        # A link to a file is an object of the store, as the readers of a store see it.
        assert path.is_file()
        raise StorageError("is there already")


def _a_shard(path: Path) -> None:
    builder = ShardBuilder()
    certain = np.zeros((2, 257), np.float32)
    certain[0, 97] = certain[1, 256] = 1.0
    builder.append(np.array([97], np.uint8), certain, np.zeros(2, np.float32))
    builder.end_document("d")
    builder.write(path, {})


def _a_fetched_file(path: Path) -> None:
    source = path.parent.parent / "source"
    source.write_bytes(b"new")
    fetch_file(f"local://{source}", path, 3, file_sha256(source))


WRITERS: dict[str, Callable[[Path], object]] = {
    "replace_file": lambda path: replace_file(path, b"new"),
    "store.replace": _into_a_store,
    "store.put_if_absent": _new_into_a_store,
    "shard": _a_shard,
    "fetch_file": _a_fetched_file,
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_writes_leaves_what_is_no_file_alone(writer: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "name.zarr.zip"
    ODD[kind](path)
    before = state(folder)
    with pytest.raises((StorageError, NotAFileError)):
        WRITERS[writer](path)
    after = {name: seen for name, seen in state(folder).items() if name != ".tmp"}
    assert after == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make device nodes")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_device_node_stays_a_device_node(writer: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "null"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no device nodes here")
    with pytest.raises((StorageError, NotAFileError), match="device"):
        WRITERS[writer](path)
    assert stat.S_ISCHR(path.lstat().st_mode)


def test_the_log_of_a_run_and_the_lock_of_a_cache_are_not_written_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to(theirs)
    with pytest.raises(NotAFileError):
        Metrics(run, 0, Train(tensorboard=False), "distilled")
    cache = FileCache(tmp_path / "cache", 1 << 20)
    sha256 = "ab" * 32
    lock = cache.path(sha256).parent / ".lock"
    lock.parent.mkdir(parents=True)
    lock.symlink_to(theirs)
    with pytest.raises(StorageError), cache.held(sha256, 3, lambda: iter([b"new"])):
        pass
    assert theirs.read_bytes() == b"theirs"


def test_writing_to_a_new_name_and_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)  # as long as a name can be
    for content in (b"one", b"two"):
        replace_file(path, content)
        assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == [path.name]
    umask = os.umask(0o027)
    try:
        replace_file(path, b"three")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "a new file has the mode that the user gives new files"


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def break_off() -> None:
        with new_file(path) as stream:
            stream.write(b"half of it")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(StorageError, match=r"there is no folder .*; make it"):
        replace_file(tmp_path / "missing" / "file", b"new")
    with pytest.raises(NotAFileError):
        put_in_place(path, tmp_path)


@pytest.mark.parametrize("kind", ["named pipe", "folder", "link to a device"])
def test_reading_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "name"
    ODD[kind](path)
    for read in (open_regular, file_sha256, lambda place: read_regular(place, 10)):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            read(path)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    _link_to_a_file(tmp_path / "name")
    assert read_regular(tmp_path / "name", 100) == b"theirs"
    assert read_regular(tmp_path / "name", 3) == b"thei", "one more than asked for says that there is more"


@pytest.mark.parametrize("make", [_link_to_nothing, _file])
@pytest.mark.parametrize("below", ["", "more/still"])
def test_a_folder_is_not_made_where_something_else_stands(tmp_path: Path, make: Make, below: str) -> None:
    """A file, or a link to nothing, in the place of a folder: one line that names it, from every kind of writer."""
    place = tmp_path / "place"
    make(place)
    with pytest.raises(StorageError, match=r"place.*move (it|that) away"):
        make_folder(place / below)
    with pytest.raises(StorageError, match=r"place.*move (it|that) away"), scratch_folder(place / below):
        pass
    store = LocalStore(tmp_path)
    with pytest.raises(StorageError, match=r"place.*(move it away|not a folder)"):
        store.put_json_if_absent("place/x.json" if not below else f"place/{below}/x.json", {})
