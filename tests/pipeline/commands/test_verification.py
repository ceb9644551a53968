"""verify --repair: just what is bad is made or fetched again, and nothing else is touched."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from bytecache.schemas.dataset import verification
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dataset.verification import verify_dataset
from tests.support.command_line import FakeTeacher, bytecache, finished_run, refusal
from tests.support.run_outputs import outputs
from tests.support.student_data import make_dataset


@pytest.fixture
def run(world: Path, fake_teacher: type[FakeTeacher], fake_convert: None, kept_runs: Path) -> Path:
    return finished_run(world, kept_runs, "--set", "convert.shard_bytes=2500")


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at if at >= 0 else len(raw) // 2] ^= 1 << at % 8
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "pattern",
    [
        "targets/*.zarr.zip", "targets/manifest.parquet", "targets/dataset.json", "plan/slices/*", "plan/plan.json",
        "plan/units/*", "receipts/convert/*", "receipts/plan/*",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "damage",
    [
        "flip",
        "remove",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("truncate", "folder", "pipe", "loop")),
    ],
)
def test_a_run_is_made_whole_without_its_teacher(run: Path, pattern: str, damage: str) -> None:
    before = outputs(run)
    victim = sorted(run.glob(pattern))[0]
    if damage == "flip":
        flip(victim)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-3])
    else:
        victim.unlink()
    if damage == "folder":
        victim.mkdir()
        (victim / "mine").write_text("words")
    elif damage == "pipe":
        os.mkfifo(victim)
    elif damage == "loop":
        victim.symlink_to(victim.name)
    stamps = {path: path.stat().st_mtime_ns for path in run.glob("teacher/*")}
    result = bytecache("verify", "--repair")
    assert result.exit_code == 0, result.output
    assert outputs(run) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in run.glob("teacher/*")}
    assert bytecache("verify").exit_code == 0
    if damage in ("folder", "pipe", "loop"):
        (aside,) = (path for path in (run / "set-aside").rglob("*") if path.name == victim.name)
        assert {"folder": aside.is_dir, "pipe": aside.is_fifo, "loop": aside.is_symlink}[damage]()
        shutil.rmtree(run / "set-aside")
    again = bytecache("verify", "--repair")
    assert again.stdout.count("\n") == 1, "a whole run is left alone"


def test_damaged_dump_parts_are_left_to_the_teacher(run: Path, fake_teacher: type[FakeTeacher]) -> None:
    before = outputs(run)
    part, shard = sorted(run.glob("teacher/*.parquet"))[1], sorted(run.glob("targets/train*.zip"))[0]
    flip(part)
    flip(shard)
    result = bytecache("verify", "--repair")
    assert "problems" in refusal(result, 4)
    assert "1 units of teacher; run `bytecache teacher`" in result.stdout
    assert "then run `bytecache convert`" in result.stdout
    assert not part.exists() and not shard.exists()
    opened = fake_teacher.opened
    assert "teacher: 1 units made" in bytecache("teacher").stdout
    assert fake_teacher.opened == opened + 1
    assert "convert: 1 units made" in bytecache("convert", "--set", "convert.shard_bytes=2500").stdout
    assert outputs(run) == before and bytecache("verify").exit_code == 0


def test_a_dump_deleted_after_conversion_is_missed_only_when_needed(
    run: Path,
    fake_teacher: type[FakeTeacher],
) -> None:
    before, small = outputs(run), ("--set", "convert.shard_bytes=2500")
    assert "the dump is deleted" in bytecache("convert", *small, "--set", "convert.delete_dump=true").stdout
    assert not list(run.glob("teacher/*.parquet"))
    opened = fake_teacher.opened
    for command in (("teacher",), ("convert", *small), ("convert", *small, "--set", "convert.delete_dump=true")):
        assert "nothing to do" in bytecache(*command).stdout
    assert "parts deleted after conversion" in bytecache("status").stdout
    assert "damaged" not in bytecache("status").stdout
    assert bytecache("verify").exit_code == 0 and fake_teacher.opened == opened
    shard = sorted(run.glob("targets/train*.zip"))[1]
    flip(shard)
    assert "`bytecache verify --repair`" in refusal(bytecache("convert", *small), 3)
    repaired = bytecache("verify", "--repair")
    refusal(repaired, 4)
    assert "needed again" in repaired.stdout and "run `bytecache teacher`" in repaired.stdout
    made = bytecache("teacher")
    total = len([key for key in before if key.startswith("teacher/")])
    count = len(list(run.glob("teacher/*.parquet")))
    assert f"teacher: {count} units made, {total - count} were" in made.stdout and 0 < count < total
    assert "convert: 1 units made" in bytecache("convert", *small).stdout
    after = outputs(run)
    assert {k: v for k, v in before.items() if k in after} == after
    assert bytecache("verify").exit_code == 0


def test_strangers_among_the_targets_are_moved_never_lost(run: Path) -> None:
    before = outputs(run)
    shard = sorted(run.glob("targets/train*.zip"))[0]
    shutil.copy(shard, run / "targets/train-00077-aaaaaaaaaaaa.zarr.zip")
    (run / "targets/train-00078-bbbbbbbbbbbb.zarr.zip").write_bytes(b"somebody's work")
    report = json.loads(bytecache("verify", "--repair", "--json").stdout)
    assert report["problems"] == [] and len(report["repaired"]) == 2
    assert (run / "set-aside/train-00078-bbbbbbbbbbbb.zarr.zip").read_bytes() == b"somebody's work"
    assert outputs(run) == before


def test_repair_reads_a_sound_data_set_for_strangers_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for strangers, once for faults, and once more by the `verify` that follows: it may be terabytes."""
    read: list[object] = []
    verify = verification.verify_dataset
    monkeypatch.setattr(
        verification, "verify_dataset", lambda *what, **how: (read.append(what), verify(*what, **how))[1]
    )
    assert bytecache("verify", "--repair").exit_code == 0
    assert len(read) == 3


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("published") / "d", documents=12, per_shard=3)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("seed", range(6))
def test_a_downloaded_data_set_fetches_only_what_is_bad(published: Path, tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    victims = choose.sample(sorted(content(copy).keys() - {"README.md"}), 2)
    for name in victims:
        path = copy / name
        damage = choose.choice(("flip", "truncate", "remove"))
        if damage == "flip":
            flip(path, choose.randrange(path.stat().st_size))
        elif damage == "truncate":
            path.write_bytes(path.read_bytes()[: choose.randrange(path.stat().st_size)])
        else:
            path.unlink()
    flip(copy / "README.md", choose.randrange((copy / "README.md").stat().st_size))
    stamps = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.zip") if path.name not in victims}
    assert bytecache("verify", copy).exit_code in (3, 4)
    result = bytecache("verify", copy, "--repair", "--from", f"file://{published}" if seed % 2 else published)
    assert result.exit_code == 0, result.output
    assert content(copy) == content(published)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in copy.glob("*.zip") if path.name not in victims}


def test_a_source_with_other_bytes_is_refused(published: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    other = make_dataset(tmp_path / "other", documents=6, sentences=5, per_shard=3)
    victim = copy / read_dataset(copy).split("train")[0].file
    flip(victim)
    damaged = content(copy)
    assert "the manifest says" in refusal(bytecache("verify", copy, "--repair", "--from", other), 4)
    assert "missing at the source" in refusal(bytecache("verify", copy, "--repair", "--from", tmp_path / "no"), 4)
    (copy / "dataset.json").write_text("{}")
    (other / "manifest.parquet").write_bytes(b"")
    refusal(bytecache("verify", copy, "--repair", "--from", other), 4)
    assert content(copy) == damaged | {"dataset.json": b"{}"}
    assert "--from PLACE" in refusal(bytecache("verify", copy, "--repair"), 2)
    assert "only --repair" in refusal(bytecache("verify", copy, "--from", other), 2)


def test_any_flipped_bit_of_a_data_set_is_found(published: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    choose = random.Random(0)
    assert verify_dataset(copy) == []
    for _ in range(150):
        path = choose.choice(sorted(copy.iterdir()))
        raw = path.read_bytes()
        flip(path, choose.randrange(len(raw)))
        assert verify_dataset(copy), path.name
        path.write_bytes(raw)
    assert verify_dataset(copy) == []
