"""Editions are a chain: an index with another parent, or another place in it, is found, whatever its own hash says."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytecache.pipeline.commands.repair_dataset import repair_dataset
from bytecache.schemas import strict_json
from bytecache.schemas.dataset.editions import edition_folder
from bytecache.schemas.dataset.index import (
    DATASET,
    MANIFEST,
    ShardEntry,
    describe_shard,
    read_dataset,
    seal,
    write_dataset,
)
from bytecache.schemas.dataset.verification import verify_dataset
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.shard.builder import ShardBuilder


def shard(folder: Path, number: int) -> ShardEntry:
    builder = ShardBuilder()
    builder.append(np.full(1, 65 + number, np.uint8), np.full((2, 257), 1 / 257, np.float32), np.zeros(2, np.float32))
    builder.end_document(f"document {number}")
    path = folder / f"train-0000{number}-{number:012x}.zarr.zip"
    return describe_shard(path, "train", f"{number}", builder.write(path, {}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three editions, each with another shard."""
    place = tmp_path / "targets"
    place.mkdir()
    entries, parent = [shard(place, 0)], ""
    for number in (1, 2, 3):
        if number > 1:
            older = place / edition_folder(number - 1)
            older.mkdir(parents=True)
            for name in (DATASET, MANIFEST):
                shutil.copyfile(place / name, older / name)
        entries = [*entries[:1], shard(place, number)]
        (place / "README.md").unlink(missing_ok=True)
        parent = write_dataset(place, entries, {"edition": {"number": number, "parent": parent}}).content_sha256
    return place


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = strict_json.parse(path.read_bytes())
    change(document["info"])
    path.write_bytes(seal(document))


def test_a_chain_that_is_whole(folder: Path) -> None:
    assert verify_dataset(folder) == []
    # A conversion that was ended between keeping the older index and writing the next one.
    shutil.copytree(folder / edition_folder(2), folder / edition_folder(3))
    for name in (DATASET, MANIFEST):
        shutil.copyfile(folder / name, folder / edition_folder(3) / name)
    assert verify_dataset(folder) == []
    shutil.rmtree(folder / edition_folder(3))
    shutil.rmtree(folder / edition_folder(1))  # pruned
    assert [problem.kind for problem in verify_dataset(folder)] == ["foreign"]


@pytest.mark.parametrize("edition", [{"number": 3, "parent": "f" * 64}, {"number": 3, "parent": ""},
                                     {"number": 2, "parent": "f" * 64}, {"number": 1, "parent": ""}])  # fmt: skip
def test_another_parent_or_place(edition: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    for place, kind in (("", "index"), (edition_folder(2), "older")):
        number = edition["number"] - 1 if place else edition["number"]
        if number:
            edit(folder / place / DATASET, lambda info, n=number: info.update(edition=edition | {"number": n}))  # type: ignore[misc]
            faults = [problem for problem in verify_dataset(folder) if problem.kind in ("index", "older")]
            assert any(problem.kind == kind for problem in faults), faults
            said = "; ".join(repair_dataset(folder, str(source)))
            assert "fetched: the index" in said and verify_dataset(folder) == []


@pytest.mark.parametrize("edition", [
    {"number": 1, "parent": "f" * 64}, {"number": 2, "parent": "../../x"}, {"number": 2, "parent": "\x1b[2J"},
    {"number": 2, "parent": "x" * 1_000_000}, {"number": 2, "parent": "F" * 64},
    {"number": 2, "parent": "f" * 64 + "\n"},
])  # fmt: skip
def test_a_parent_is_a_hash(edition: dict[str, Any], folder: Path) -> None:
    edit(folder / DATASET, lambda info: info.update(edition=edition))
    with pytest.raises(IntegrityError, match=r"edition\.parent is no content hash"):
        read_dataset(folder)


@pytest.mark.parametrize("file", ["editions/00001/dataset.json", "editions/00002/manifest.parquet", "older shard"])
def test_what_an_older_edition_lists_is_fetched_too(file: str, folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    name = next(path.name for path in folder.glob("train-00001*")) if file == "older shard" else file
    (folder / name).write_bytes(b"no such thing")
    assert verify_dataset(folder)
    assert any(line.startswith("fetched: ") for line in repair_dataset(folder, str(source)))
    assert verify_dataset(folder) == []
    (folder / name).write_bytes(b"no such thing")
    (source / name).write_bytes(b"no such thing")
    with pytest.raises(IntegrityError):
        repair_dataset(folder, str(source))
