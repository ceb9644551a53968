"""`push` and `pull` against a hub on loopback: what is sent, what is not, what a broken push leaves."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.commands import share
from bytecache.pipeline.commands.share import HubPlace
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dataset.verification import verify_dataset
from bytecache.schemas.errors import ConfigError, IntegrityError
from tests.support.hub_server import hub_environment, serving
from tests.support.loopback import Loopback
from tests.support.places import ROOT
from tests.support.student_data import make_dataset

PLACE = "hf://datasets/me/set"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class World:
    """A hub with an empty repository, and commands that reach it."""

    def __init__(self, home: Path) -> None:
        self.home, self.repository = home, home / "repository"
        self.repository.mkdir()
        self.handler = serving(self.repository, token="secret-token")
        self.server = Loopback(self.handler)

    def run(self, *arguments: str, token: str = "secret-token") -> Any:
        environment = {**hub_environment(self.server.url, self.home), "HF_TOKEN": token}
        command = [sys.executable, "-m", "bytecache", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=100)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("sets") / "d", documents=6, per_shard=2)


def test_places_on_the_hub() -> None:
    assert HubPlace.parse("hf://datasets/me/set@v2/a/b") == ("me/set", "v2", "a/b")
    assert HubPlace.parse("hf://datasets/me/set").path("x") == "x"
    for bad in ("hf://me/set", "s3://bucket/x", "hf://datasets/me", "hf://datasets/me/set/../x", "hf://datasets//set"):
        with pytest.raises(ConfigError, match="hf://datasets/OWNER/NAME"):
            HubPlace.parse(bad)


@pytest.mark.slow
def test_a_push_sends_what_the_set_lists_and_a_pull_brings_it_back(hub: World, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "config.toml").write_text("secret = 1\n")
    done = hub.run("push", PLACE, str(source))
    assert done.returncode == 0, done.stderr
    own = {path.name for path in folder.iterdir()}
    names = {*own, "croissant.json", "preview/entropy.svg", "preview/heldout.parquet", "preview/train.parquet"}
    assert files(hub.repository).keys() == names
    assert (
        f"{len(names)} files sent" in done.stdout and "1 files are no part of it, not sent: config.toml" in done.stdout
    )
    # The index comes after every shard.
    commits = [asked for asked in hub.handler.asked if "/commit/" in asked]
    assert len(commits) == 2
    hub.handler.asked.clear()
    again = hub.run("push", PLACE, str(source))
    assert again.returncode == 0 and f"0 files sent (0 B), {len(names)} were there" in again.stdout
    assert not [asked for asked in hub.handler.asked if "/commit/" in asked or asked.startswith("PUT")]
    copy = tmp_path / "copy"
    pulled = hub.run("pull", PLACE, str(copy))
    assert pulled.returncode == 0, pulled.stderr
    assert read_dataset(copy).entries == read_dataset(folder).entries
    mine, theirs = files(folder), files(copy)
    assert mine.keys() == theirs.keys() and mine.pop("README.md") != theirs.pop("README.md") and mine == theirs
    assert verify_dataset(copy) == [] and PLACE in (copy / "README.md").read_text()
    shard = next(copy.glob("*.zarr.zip"))
    shard.write_bytes(b"damaged")
    mended = hub.run("pull", PLACE, str(copy))
    assert "1 shards fetched" in mended.stdout and shard.read_bytes() == (folder / shard.name).read_bytes()


@pytest.mark.slow
def test_a_push_that_broke_off_goes_on_and_sends_nothing_twice(hub: World, folder: Path) -> None:
    hub.handler.failures.append(400)
    broken = hub.run("push", PLACE, str(folder))
    assert broken.returncode == 6 and "the hub answers 400" in broken.stderr
    assert not (hub.repository / "dataset.json").exists()
    sent = [asked for asked in hub.handler.asked if asked.startswith("PUT")]
    hub.handler.asked.clear()
    assert hub.run("push", PLACE, str(folder)).returncode == 0
    again = [asked for asked in hub.handler.asked if asked.startswith("PUT")]
    assert sent and not set(sent) & set(again)
    assert (hub.repository / "dataset.json").exists()


@pytest.mark.slow
def test_another_data_set_is_replaced_only_when_asked(hub: World, folder: Path, tmp_path: Path) -> None:
    assert hub.run("push", PLACE, str(folder)).returncode == 0
    other = make_dataset(tmp_path / "other", documents=4, sentences=5, per_shard=2)
    refused = hub.run("push", PLACE, str(other))
    assert refused.returncode == 2 and "holds another data set" in refused.stderr and "--replace" in refused.stderr
    done = hub.run("push", PLACE, str(other), "--replace")
    assert done.returncode == 0, done.stderr
    assert {name for name in files(hub.repository) if "preview" not in name} == {*files(other), "croissant.json"}
    assert "of the data set before it removed" in done.stdout
    taken = tmp_path / "taken"
    shutil.copytree(folder, taken)
    refused = hub.run("pull", PLACE, str(taken))
    assert refused.returncode == 2 and "holds another data set" in refused.stderr


@pytest.mark.slow
def test_a_refusal_names_the_remedy_and_no_token(hub: World, folder: Path) -> None:
    done = hub.run("push", PLACE, str(folder), token="wrong-token")
    assert done.returncode == 6 and "HF_TOKEN" in done.stderr and "wrong-token" not in done.stdout + done.stderr
    assert not list(hub.repository.iterdir())


def test_a_damaged_folder_is_not_sent(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    next(broken.glob("*.zarr.zip")).write_bytes(b"x")
    with pytest.raises(IntegrityError, match="nothing was sent"):
        share.push(broken, PLACE)
