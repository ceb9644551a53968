"""Folders of this machine: scratch gone at exit, kept when renamed, a dead owner's swept; one cache for all copies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bytecache.pipeline.stores import open_store
from bytecache.pipeline.stores.readonly import ReadOnlyStore
from bytecache.schemas.files import cache_folder, scratch_folder
from tests.support.places import ROOT

OWNER = """
import sys
from pathlib import Path
from bytecache.schemas.files import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_gone_at_exit_unless_renamed(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        (folder / "x").write_text("x")
        folder.rename(tmp_path / "kept")
    with pytest.raises(RuntimeError), scratch_folder(tmp_path):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_killed_owners_folder_is_swept_by_the_next(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    with scratch_folder(tmp_path):
        assert len(list(tmp_path.iterdir())) == 2  # the living owner's is left alone
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder(tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]


def test_all_copies_lie_in_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BYTECACHE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache/bytecache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/bytecache"
    monkeypatch.setenv("BYTECACHE_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
    places: list[Path] = []
    monkeypatch.setattr(ReadOnlyStore, "__init__", lambda self, url, scratch: places.append(scratch))
    open_store("hf://datasets/me/books")
    open_store("hf://datasets/me/books", "~/here")
    assert places == [tmp_path / "own/runs", tmp_path / "here"]
