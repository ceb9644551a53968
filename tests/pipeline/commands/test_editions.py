"""A corpus that changed: a new edition of the plan and of the data set, made from what is unchanged and what is not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from bytecache.pipeline.plan import editions
from bytecache.pipeline.plan.index import Plan, read_plan
from bytecache.pipeline.stores import LocalStore
from bytecache.schemas.dataset.editions import open_edition
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dataset.verification import verify_dataset
from bytecache.schemas.errors import InputError
from bytecache.stages.targets.source import open_dataset
from tests.support.command_line import FakeTeacher, bytecache, finished_run, refusal

TEXTS = [f"{i}: " + "the student reads the notes as often as it likes, " * (1 + i % 3) for i in range(120)]
CHANGED = [*TEXTS[:10], "changed: " + TEXTS[10], *TEXTS[11:30], *TEXTS[31:], *(f"new {text}" for text in TEXTS[:9])]
"""One document changed, one gone, nine new at the end."""


def write(world: Path, texts: list[str]) -> None:
    (world / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def said(*arguments: object) -> str:
    done = bytecache(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def finish(*names: str) -> str:
    return "".join(said(name) for name in names)


@pytest.fixture
def run(world: Path, fake_teacher: type[FakeTeacher], fake_convert: None, kept_runs: Path) -> Path:
    """The first edition, converted; the corpus has changed since."""
    (world / "pipeline.toml").write_text((world / "pipeline.toml").read_text() + "[convert]\nshard_bytes = 2500\n")
    write(world, TEXTS)
    first = finished_run(world, kept_runs)
    write(world, CHANGED)
    return first


def plan_of(run: Path) -> Plan:
    plan = read_plan(LocalStore(run))
    assert plan is not None
    return plan


def read_plan_of(run: Path, edition: int) -> Plan:
    plan = read_plan(LocalStore(run), editions.edition_key(edition))
    assert plan is not None
    return plan


def shards(run: Path) -> dict[str, int]:
    """Name and time of every shard file."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "targets").glob("*.zarr.zip")}


def _in_memory(folder: Path) -> str:
    """A copy of the indices of a data set in fsspec's memory; its path."""
    files = fsspec.filesystem("memory")
    for path in (*folder.rglob("dataset.json"), *folder.rglob("manifest.parquet")):
        files.pipe(f"/{folder.parent.name}/{path.relative_to(folder)}", path.read_bytes())
    return f"/{folder.parent.name}"


def contents(run: Path) -> set[str]:
    return {entry.sha256 for entry in read_dataset(run / "targets").entries}


def test_an_edition_computes_what_changed_and_reuses_the_rest(run: Path, fake_teacher: type[FakeTeacher]) -> None:
    first, before, content = plan_of(run), shards(run), read_dataset(run / "targets").content_sha256
    output = said("plan")
    second = plan_of(run)
    assert (second.edition, second.index.parent) == (2, first.hash)
    same = {unit.sha256 for unit in first.units} & {unit.sha256 for unit in second.units}
    fresh = len(second.units) - len(same)
    assert 2 * fresh < len(second.units)
    assert f"edition 2 of a corpus that changed, {len(same)} units unchanged" in output
    assert f"{fresh} units new" in output and f"{len(first.units) - len(same)} units gone" in output
    assert "files match their hashes" in said("verify")

    assert f"{fresh} units made, {len(same)} were already whole" in said("teacher")
    assert "files match their hashes" in said("verify")
    assert "the plan is edition 2: run" in said("status")

    assert "edition 2 of the data set" in said("convert")
    dataset = read_dataset(run / "targets")
    assert dataset.info["edition"] == {"number": 2, "parent": content}
    after = shards(run)
    assert before.items() <= after.items(), "nothing of the first edition is touched"
    listed = {entry.file for entry in dataset.entries}
    assert len(listed & before.keys()) > len(listed) / 2
    assert "files match their hashes" in said("verify", "--deep")
    assert "edition 2, beside edition 1" in said("status")


def test_an_edition_is_what_a_run_of_its_own_is(run: Path, world: Path) -> None:
    finish("plan", "teacher", "convert")
    alone = [f"--set=run.dir={world / 'alone'}"]
    for command in ("plan", "teacher", "convert"):
        said(command, *alone)
    assert contents(run) == contents(world / "alone")
    texts = [
        [pq.read_table(folder / unit.slice).column("text").to_pylist() for unit in plan_of(folder).units]
        for folder in (run, world / "alone")
    ]
    assert texts[0] == texts[1]


def test_older_editions_stay_data_sets(run: Path, world: Path) -> None:
    index = read_dataset(run / "targets")
    finish("plan", "teacher", "convert")
    write(world, TEXTS)
    finish("plan", "teacher", "convert")
    assert plan_of(run).edition == 3, "back to the old text is an edition too"
    old = open_edition(run / "targets", 1)
    assert (old.entries, old.content_sha256) == (index.entries, index.content_sha256)
    newest = open_edition(run / "targets", 3)
    assert newest.entries == index.entries
    middle = open_edition(run / "targets", 2)
    assert newest.info["edition"] == {"number": 3, "parent": middle.content_sha256}
    assert verify_dataset(run / "targets", deep=True) == []
    assert open_dataset(run / "targets", edition=2).entries == middle.entries
    remote = [open_dataset(f"memory://{_in_memory(run / 'targets')}", edition=number) for number in (1, 2, 3)]
    assert [each.entries for each in remote] == [old.entries, middle.entries, newest.entries]
    with pytest.raises(InputError, match="no edition 4; it has 00001, 00002, 00003"):
        open_edition(run / "targets", 4)
    victim = next(entry for entry in middle.entries if entry not in newest.entries)
    (run / "targets" / victim.file).unlink()
    assert [problem.file for problem in verify_dataset(run / "targets")] == [victim.file]


def test_what_is_held_out_stays_so(run: Path) -> None:
    def heldout(plan: Plan) -> set[str]:
        return {
            text for unit in plan.units if unit.split == "heldout"
            for text in pq.read_table(run / unit.slice).column("text").to_pylist()
        }  # fmt: skip

    before = heldout(plan_of(run))
    said("plan")
    assert before & set(CHANGED) == heldout(plan_of(run)) & set(TEXTS)


def test_what_shapes_the_slices_is_still_refused(run: Path) -> None:
    assert "unit_bytes: 1000 -> 2000" in refusal(bytecache("plan", "--set", "corpus.unit_bytes=2000"), 2)
    assert plan_of(run).edition == 1


@pytest.mark.parametrize("step", ["older", "newer", "place", "receipts"])
def test_a_plan_killed_at_any_step_is_finished_by_the_next(
    run: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before the old index is copied, before the new one is, and before or after `plan.json` is replaced."""
    calls: list[str] = []

    def dying(wanted: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            calls.append(wanted)
            if step == wanted and calls.count(wanted) == 1 + (step == "newer"):
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        if step in ("older", "newer"):
            original = LocalStore.put_if_absent
            patch.setattr(
                LocalStore, "put_if_absent",
                lambda store, key, path: (
                    dying(step, original)(store, key, path) if key.startswith(editions.FOLDER)
                    else original(store, key, path)
                ),
            )  # fmt: skip
        elif step == "place":
            patch.setattr(editions, "_put_in_place", dying(step, editions._put_in_place))
        else:
            from bytecache.pipeline.plan import make

            patch.setattr(make, "_write_receipts", dying(step, make._write_receipts))
        assert bytecache("plan").exit_code != 0
    assert calls
    said("plan")
    assert plan_of(run).edition == 2
    assert "files match their hashes" in said("verify")
    finish("teacher", "convert")
    assert "files match their hashes" in said("verify", "--deep")


def test_an_edition_under_way_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its first shard and its index nothing is reported, and repair leaves the shards where they are."""
    from bytecache.pipeline.commands import convert as command

    finish("plan", "teacher")

    def cut_off(*arguments: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "publish_index", cut_off)
        assert bytecache("convert").exit_code != 0
    before = shards(run)
    assert "files match their hashes" in said("verify")
    said("verify", "--repair")
    assert shards(run) == before
    assert "nothing to do" in said("convert")
    assert read_dataset(run / "targets").info["edition"]["number"] == 2


def test_a_lost_index_of_the_plan_comes_back_from_its_edition(run: Path) -> None:
    finish("plan", "teacher", "convert")
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("{}")):
        damage(run / "plan" / "plan.json")
        said("verify", "--repair")
        assert plan_of(run).edition == 2
        assert "files match their hashes" in said("verify")


def test_repair_does_not_take_a_changed_corpus_for_damage(run: Path) -> None:
    (run / plan_of(run).units[0].slice).unlink()
    line = refusal(bytecache("verify", "--repair"), 2)
    assert "corpus text: 120 documents" in line and "makes a new edition" in line


def test_a_damaged_older_edition_is_set_aside_whole(run: Path) -> None:
    finish("plan", "teacher", "convert")
    (run / "targets" / "editions" / "00001" / "manifest.parquet").write_bytes(b"PAR1")
    assert "older" in bytecache("verify").output
    said("verify", "--repair")
    assert "files match their hashes" in said("verify")
    kept = [path for path in (run / "set-aside").rglob("*") if path.is_file()]
    assert any(path.name == "dataset.json" for path in kept), "nothing is deleted"
    assert read_dataset(run / "targets").info["edition"]["number"] == 2


def test_workers_share_an_edition_and_publish_it(run: Path) -> None:
    quick = ("--set", "fleet.heartbeat_s=0.1", "--set", "fleet.lease_s=1")
    first = shutil.copytree(run, run.parent / "copy")
    said("plan")
    assert "this worker made" in said("teacher", "--worker", *quick)
    assert "by workers" in said("status")
    said("convert", "--worker", *quick)
    assert read_dataset(run / "targets").info["edition"]["number"] == 2
    said("plan", f"--set=run.dir={first}")
    for command in ("teacher", "convert"):
        said(command, f"--set=run.dir={first}")
    assert contents(first) == contents(run)


def test_each_edition_has_a_ledger_of_its_own(run: Path, world: Path) -> None:
    quick = ("--set", "fleet.heartbeat_s=0.1", "--set", "fleet.lease_s=1")
    said("plan")
    said("teacher", "--worker", *quick)
    write(world, [*CHANGED, "one more " * 40])
    said("plan")
    assert "this worker made" in said("teacher", "--worker", *quick)
    said("convert", "--worker", *quick)
    edition = read_dataset(run / "targets").info["edition"]
    assert edition == {"number": 3, "parent": open_edition(run / "targets", 1).content_sha256}, "2 was never published"


def test_deleted_dump_parts_come_back_only_where_they_are_needed(run: Path) -> None:
    said("convert", "--set", "convert.delete_dump=true")
    assert not list((run / "teacher").glob("*.parquet"))
    same = len({unit.sha256 for unit in plan_of(run).units})
    output = said("plan")
    requeued = int(output.split(" dump parts that were deleted")[0].split()[-1])
    assert 0 < requeued < same / 2
    finish("teacher", "convert")
    assert "files match their hashes" in said("verify")
    assert read_dataset(run / "targets").info["edition"]["number"] == 2


def test_prune_lists_and_removes_what_older_editions_alone_name(run: Path, world: Path) -> None:
    finish("plan", "teacher", "convert")
    newest, before = contents(run), {path for path in run.rglob("*") if path.is_file()}
    slices = {unit.sha256: unit.slice for unit in read_plan_of(run, 1).units}
    alone = [place for sha256, place in slices.items() if sha256 not in {unit.sha256 for unit in plan_of(run).units}]
    listed = said("prune")
    assert "nothing was removed" in listed and f"older editions (1) alone: {len(alone) + 2} files of plans" in listed
    assert {path for path in run.rglob("*") if path.is_file()} == before
    assert "older editions (none" in said("prune", "--keep", "2", "--remove")
    assert {path for path in run.rglob("*") if path.is_file()} == before

    before = sum(path.is_file() for path in run.rglob("*"))
    removed = re.search(r"prune: removed (\d+) files", said("prune", "--remove"))
    assert removed and before - sum(path.is_file() for path in run.rglob("*")) == int(removed[1]) > 0
    assert alone and not any((run / place).exists() for place in alone)
    assert contents(run) == newest and not list((run / "targets" / "editions").rglob("*.json"))
    on_disk = {path.name for path in (run / "targets").glob("*.zarr.zip")}
    assert on_disk == {entry.file for entry in read_dataset(run / "targets").entries}
    assert "files match their hashes" in said("verify", "--deep")
    assert "0 units made" in finish("teacher", "convert") or "nothing to do" in finish("teacher", "convert")
    write(world, TEXTS)
    finish("plan", "teacher", "convert")
    assert plan_of(run).edition == 3
    assert "files match their hashes" in said("verify", "--deep")


def test_prune_keeps_what_is_published_and_what_is_coming(run: Path) -> None:
    finish("plan", "teacher")
    said("prune", "--remove")
    assert "files match their hashes" in said("verify")
    assert read_dataset(run / "targets").info.get("edition", {"number": 1})["number"] == 1
    assert "0 units made" in said("teacher") or "nothing to do" in said("teacher")
    said("convert")
    said("prune", "--remove")
    assert "files match their hashes" in said("verify", "--deep")


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 4, 9, 15])
def test_a_prune_that_is_killed_goes_on(run: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finish("plan", "teacher", "convert")
    delete, calls = LocalStore.delete, 0

    def dying(store: LocalStore, key: str) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        delete(store, key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", dying)
        assert bytecache("prune", "--remove").exit_code != 0
    said("prune", "--remove")
    assert "files match their hashes" in said("verify", "--deep")
    assert "0 files of plans (0 B), 0 dump parts (0 B), 0 shards (0 B)" in said("prune")


def test_prune_waits_for_workers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bytecache.pipeline.commands import prune

    finish("plan", "teacher", "convert")
    living = [{"workers": [{"worker": "w1", "alive": edition == 1}]} for edition in (1, 2)]
    monkeypatch.setattr(prune, "fleet_status", lambda context, edition: [living[edition - 1]])
    before = {path for path in run.rglob("*") if path.is_file()}
    assert "1 workers of edition 1 are alive (w1)" in refusal(bytecache("prune", "--remove"), 2)
    assert {path for path in run.rglob("*") if path.is_file()} == before
