"""`pull` of data sets that name files as strangers do, or hold other things than files: nothing outside, no waiting."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from bytecache.pipeline.commands import share
from bytecache.schemas.dataset.index import ShardEntry, index_documents, read_dataset
from bytecache.schemas.errors import IntegrityError, StorageError
from tests.support.student_data import make_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("names") / "d", documents=4, per_shard=2)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://names/set"
    fsspec.filesystem("memory").rm("/names", recursive=True)


def renamed(folder: Path, place: str, name: str, which: int = 0) -> None:
    """At `place` the same data set, one of whose shards has another name, which its index states."""
    dataset = read_dataset(folder)
    entries = list(dataset.entries)
    entries[which] = ShardEntry.model_construct(**{**entries[which].model_dump(), "file": name})
    fs = fsspec.filesystem("memory")
    fs.put(f"{folder}/", "/names/set/", recursive=True)
    for file, raw in index_documents(entries, dataset.info, dataset.fidelity).items():
        fs.pipe(f"/names/set/{file}", raw)
    fs.pipe(f"/names/set/{name}", (folder / dataset.entries[which].file).read_bytes())


@pytest.mark.parametrize("name", [
    "../../x.zarr.zip", "/x.zarr.zip", "a/b.zarr.zip", "..\\x.zarr.zip", "x.zarr.zip\n", "..zarr.zip",
    "http://x/y.zarr.zip", "a\0.zarr.zip", "%2e%2e%2fx.zarr.zip", "x?y=.zarr.zip", ".x.zarr.zip",
])  # fmt: skip
def test_a_name_that_is_no_plain_one_is_refused(folder: Path, memory: str, name: str, tmp_path: Path) -> None:
    renamed(folder, memory, name)
    with pytest.raises(IntegrityError, match=r"manifest\.parquet: file .* refused"):
        share.pull(memory, tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_names_that_differ_in_case_alone_are_refused(folder: Path, memory: str, tmp_path: Path) -> None:
    first = read_dataset(folder).entries[0].file
    renamed(folder, memory, first.removesuffix(".zarr.zip").upper() + ".zarr.zip", which=1)
    with pytest.raises(IntegrityError, match="differ in case alone"):
        share.pull(memory, tmp_path / "copy")
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(folder: Path, tmp_path: Path, kind: str, scheme: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    shard = source / read_dataset(folder).entries[1].file
    for path in (shard, source / "README.md"):
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
    with pytest.raises(IntegrityError, match=f"{shard.name} is a .*, not a regular file"):
        share.pull(f"{scheme}{source}", tmp_path / "copy")
    shutil.rmtree(shard) if kind == "folder" else shard.unlink()
    shutil.copyfile(folder / shard.name, shard)
    said: list[str] = []
    share.pull(f"{scheme}{source}", tmp_path / "copy", said.append)
    assert any("no card can be had" in line for line in said) and read_dataset(tmp_path / "copy").entries


@pytest.mark.parametrize("name", ["shard", "README.md", "dataset.json", "manifest.parquet"])
def test_nothing_is_written_through_a_link(folder: Path, tmp_path: Path, name: str) -> None:
    copy, victim = tmp_path / "copy", tmp_path / "victim"
    victim.write_text("mine")
    copy.mkdir()
    (copy / (read_dataset(folder).entries[0].file if name == "shard" else name)).symlink_to(victim)
    with pytest.raises(StorageError, match="is a link, not a regular file"):
        share.pull(str(folder), copy)
    assert victim.read_text() == "mine"
