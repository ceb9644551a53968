"""Links in a data set: followed within its folder or one repository of the hub's cache, refused where they leave it."""

import os
import shutil
from pathlib import Path

import pytest

from bytecache.pipeline.commands import share
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dataset.verification import verify_dataset
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.files import StrayLinkError, refuse_stray
from bytecache.stages.targets.source import load_shard, open_dataset
from tests.support.student_data import make_dataset

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("links") / "d", documents=4, per_shard=2)


def moved_out(folder: Path, name: str, target: Path) -> Path:
    """The file of that name becomes a link to its own content elsewhere."""
    path = folder / (read_dataset(folder).entries[0].file if name == "shard" else name)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("name", ["shard", "README.md", "dataset.json", "manifest.parquet"])
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(
    folder: Path, tmp_path: Path, name: str, scheme: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    path = moved_out(source, name, tmp_path / "private" / "file")
    (problem,) = verify_dataset(source)
    assert "a link that leaves its folder" in problem.detail
    with pytest.raises(IntegrityError, match=r"problems, the first: .*a link that leaves its folder"):
        share.push(source, "hf://datasets/a/b")
    if name == "README.md":
        said: list[str] = []
        (tmp_path / "private" / "file").write_text(SECRET)
        share.pull(f"{scheme}{source}", tmp_path / "copy", said.append)
        assert SECRET not in (tmp_path / "copy" / name).read_text()
        assert any("a link that leaves its folder" in line for line in said)
        return
    with pytest.raises(IntegrityError, match=f"{path.name} is a link that leaves its folder"):
        share.pull(f"{scheme}{source}", tmp_path / "copy")
    if name == "shard":
        dataset = open_dataset(source)
        with pytest.raises(IntegrityError, match="is a link that leaves its folder"):
            load_shard(dataset, dataset.entries[0])


def hub_cache(folder: Path, root: Path) -> Path:
    """A snapshot as huggingface_hub leaves it: every file a link into `blobs`."""
    repository = root / "datasets--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40) / "set"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../../blobs/{number}")
    return snapshot


def test_the_cache_of_the_hub_is_read_through_its_links(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path / "disk")
    (tmp_path / "cache").symlink_to("disk")
    for place in (snapshot, tmp_path / "cache" / snapshot.relative_to(tmp_path / "disk")):
        assert not verify_dataset(place)
        dataset = open_dataset(place)
        assert load_shard(dataset, dataset.entries[0]).doc_id
    share.pull(str(snapshot), tmp_path / "copy")
    assert not verify_dataset(tmp_path / "copy") and not (tmp_path / "copy" / "README.md").is_symlink()


def test_a_folder_that_looks_like_that_cache_gets_no_further(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path)
    blobs = snapshot.parents[2] / "blobs"
    os.replace(blobs, tmp_path / "private")
    blobs.symlink_to(tmp_path / "private")
    with pytest.raises(IntegrityError, match="a link that leaves its folder"):
        read_dataset(snapshot)


def test_links_within_the_folder_and_of_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    moved_out(source, "shard", source / "kept" / "shard")
    (tmp_path / "named").symlink_to(source)
    assert not verify_dataset(tmp_path / "named")


@pytest.mark.parametrize("link", ["editions", "editions/00001", "editions/00001/dataset.json"])
def test_an_older_edition_lies_in_the_folder_of_its_data_set(tmp_path: Path, link: str) -> None:
    place = tmp_path / "set" / "editions" / "00001" / "dataset.json"
    place.parent.mkdir(parents=True)
    place.write_text(SECRET)
    refuse_stray(place)
    os.replace(tmp_path / "set" / link, tmp_path / "private")
    (tmp_path / "set" / link).symlink_to(tmp_path / "private")
    with pytest.raises(StrayLinkError):
        refuse_stray(place)
