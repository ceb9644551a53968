"""What stands in a file's place and is none: named with its remedy before work begins, never read, never replaced."""

import os
import stat
from pathlib import Path

import pytest
import torch

from bytecache.pipeline.commands.inventory import take_inventory
from bytecache.pipeline.stores import LocalStore, disk_errors, refuse_no_file, refuse_no_files_in
from bytecache.pipeline.units.receipts import FileRecord, Receipt, read_receipt, receipt_path, unit_key, write_receipt
from bytecache.pipeline.units.runner import Task, finished
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.stages.train import checkpoint

KEY = unit_key("fake", {})
REMEDY = r"not a regular file.*`bytecache verify --repair`"


def put(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")


KINDS = ("folder", "pipe", "link", "device")


@pytest.mark.parametrize("kind", KINDS)
def test_a_receipt(kind: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    place = receipt_path("fake", KEY)
    put(tmp_path / place, kind)
    with pytest.raises(IntegrityError, match=rf"receipt .*{KEY}.*{REMEDY}"):
        read_receipt(store, "fake", KEY)
    with pytest.raises(StorageError, match=REMEDY):
        finished(store, Task("fake", "x", "fake/x", {}, 1))
    with pytest.raises(StorageError, match=REMEDY):
        refuse_no_files_in(store, "receipts/fake")
    inventory = take_inventory(store)  # a listing passes over folders
    assert kind == "folder" or place in inventory.damaged
    assert not stat.S_ISREG((tmp_path / place).lstat().st_mode)


@pytest.mark.parametrize("kind", KINDS)
def test_a_units_file(kind: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    put(tmp_path / "fake/x", kind)
    record = FileRecord(path="fake/x", size=1, sha256="0" * 64)
    write_receipt(store, Receipt(stage="fake", key=KEY, name="x", files=(record,)))
    with pytest.raises(StorageError, match=REMEDY):
        finished(store, Task("fake", "x", "fake/x", {}, 1))
    refuse_no_file(store, "fake/nothing", receipt_path("fake", KEY))
    refuse_no_files_in(store, "nothing")
    refuse_no_file(object(), "fake/x")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint(kind: str, suffix: str, tmp_path: Path) -> None:
    """A pipe was read without end, and replaced; a folder was called a full disk."""
    path = checkpoint.save(tmp_path, 1, {"a": torch.zeros(1)}, {})
    put(path.with_suffix(suffix), kind)
    with pytest.raises(IntegrityError, match="use an earlier checkpoint"):
        checkpoint.verify(path)
    with pytest.raises(StorageError, match=REMEDY), disk_errors("train"):
        checkpoint.save(tmp_path, 1, {"a": torch.zeros(1)}, {})
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, step, {"a": torch.zeros(1)}, {})
    assert not stat.S_ISREG(path.with_suffix(suffix).lstat().st_mode), "it was replaced"
