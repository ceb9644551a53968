"""Where a page, a report or a script is to be written: never over what is read, over data, or into no folder."""

from pathlib import Path

import pytest

from bytecache.pipeline.commands import fidelity
from bytecache.pipeline.commands.fidelity import Sample
from bytecache.pipeline.context import open_context
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Settings
from tests.support.command_line import bytecache, refusal
from tests.support.student_data import make_dataset


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = make_dataset(tmp_path / "d", documents=4, per_shard=2)
    return folder / read_dataset(folder).entries[0].file


@pytest.mark.parametrize("way", ["itself", "link", "hard link", "neighbour", "index"])
def test_a_page_is_not_written_over_data(shard: Path, tmp_path: Path, way: str) -> None:
    place = {
        "itself": shard, "link": tmp_path / "page.html", "hard link": tmp_path / "page.html",
        "neighbour": shard.parent / read_dataset(shard.parent).entries[1].file, "index": shard.parent / "dataset.json",
    }[way]  # fmt: skip
    if way == "link":
        place.symlink_to(shard)
    elif way == "hard link":
        place.hardlink_to(shard)
    before = place.read_bytes()
    message = refusal(bytecache("inspect", shard, "--html", place), 2)
    assert "name another file" in message or "name a file or a new name" in message
    assert place.read_bytes() == before


def test_a_page_is_written_again(shard: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        assert bytecache("inspect", shard, "--html", page).exit_code == 0
    assert page.read_text().startswith("<!")


@pytest.mark.parametrize("place", ["/dev/null", ".", ""])
def test_a_place_that_is_no_file_is_refused_with_what_helps(shard: Path, place: str) -> None:
    message = refusal(bytecache("inspect", shard, "--html", place), 2)
    assert "name a file or a new name" in message and "--repair" not in message


def test_a_folder_that_is_missing_is_named(shard: Path) -> None:
    assert "no folder nowhere; make it" in refusal(bytecache("inspect", shard, "--html", "nowhere/page.html"), 6)


def test_a_job_is_not_written_over_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipeline.toml").write_text('[run]\ndir = "run"\n')
    assert "name another file" in refusal(bytecache("jobs", "slurm", "--out", "pipeline.toml"), 2)
    assert Path("pipeline.toml").read_text() == '[run]\ndir = "run"\n'


def test_a_probe_keeps_its_text(tmp_path: Path) -> None:
    text = tmp_path / "page.txt"
    text.write_text("some text")
    message = refusal(bytecache("probe", "--teacher", tmp_path, "--text-file", text, "--out", text), 2)
    assert "would be lost" in message and text.read_text() == "some text"


def test_a_certificate_is_not_written_over_an_index(shard: Path) -> None:
    index = shard.parent / "dataset.json"
    with pytest.raises(ConfigError, match="holds data or settings"):
        fidelity.fidelity(open_context(Settings()), shard.parent, "", Sample(1, 1, 0), index, any_teacher=True)
