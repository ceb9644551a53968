"""`--worker`, `status`, `retry` and `merge` as a user calls them."""

import json
import shutil
from pathlib import Path

import pytest

from bytecache.pipeline.config import load_settings
from bytecache.pipeline.context import open_context
from bytecache.pipeline.fleet.report import fleet_status, fleet_table
from bytecache.pipeline.plan.index import read_plan
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units import receipts
from bytecache.schemas.errors import InputError, IntegrityError
from tests.support.command_line import FakeTeacher, bytecache, refusal

# ---- the commands


@pytest.mark.usefixtures("world", "fake_teacher", "fake_convert")
def test_worker_commands_make_a_data_set_and_status_shows_it() -> None:
    quick = ["--set", "fleet.heartbeat_s=0.1", "--set", "fleet.lease_s=1.0"]
    assert bytecache("plan").exit_code == 0
    assert "0 of" in refusal(bytecache("convert", "--worker", *quick), 3)
    FakeTeacher.fail_at = 2  # and all after it
    failing = refusal(bytecache("teacher", "--worker", *quick, "--set", "fleet.max_failures=1"), 1)
    FakeTeacher.fail_at = -1
    assert "set aside after repeated failure" in failing and "poisoned unit; remove it" in failing
    report = json.loads(bytecache("status", "--json").stdout)["fleet"][0]
    assert report["quarantine"][0]["reasons"][0].endswith("poisoned unit; remove it")
    assert "set aside: unit" in bytecache("status").stdout
    assert "poisoned unit; remove it" in refusal(bytecache("convert", "--worker", *quick), 3)
    assert "may be tried again" in bytecache("retry", "teacher").stdout
    assert bytecache("teacher", "--worker", *quick).exit_code == 0
    other = bytecache("convert", "--worker", *quick, "--set", "teacher.top_k=3")
    assert "top_k: 16 -> 3" in refusal(other, 2)
    done = bytecache("convert", "--worker", *quick)
    assert done.exit_code == 0, done.output
    assert bytecache("verify").exit_code == 0
    for report in json.loads(bytecache("status", "--json").stdout)["fleet"]:
        assert report["done"] == report["units"] > 0
        assert report["held"] == 0 and report["quarantine"] == []
    assert "nothing to do" in bytecache("convert").stdout
    assert "nothing to do" in bytecache("teacher").stdout
    assert "this worker made 0" in bytecache("convert", "--worker", *quick).stdout
    other = bytecache("teacher", "--worker", *quick, "--set", "teacher.top_k=3")
    assert "top_k: 16 -> 3" in refusal(other, 2)
    assert "given up" in bytecache("retry", "teacher", "--new-job").stdout
    assert "no stage of workers" in refusal(bytecache("retry", "train"), 3)


@pytest.mark.slow
@pytest.mark.usefixtures("world", "fake_teacher", "fake_convert")
@pytest.mark.parametrize("worker", [True, False])
def test_the_rest_is_converted_without_units_set_aside_and_the_data_set_says_so(
    worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bytecache.schemas.dataset.index import read_dataset

    quick = ["--set", "fleet.heartbeat_s=0.1", "--set", "fleet.lease_s=1.0", "--set", "convert.shard_bytes=2500"]
    convert = ["convert", *(["--worker"] if worker else []), *quick]
    allowed = [*convert, "--set", "convert.allow_quarantined=true"]
    texts = [f"document {number} " * 20 for number in range(60)]
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert bytecache("plan").exit_code == 0
    assert bytecache("plan", "--run-dir", "whole").exit_code == 0
    dump = FakeTeacher.dump_unit
    poisoned = [3, 5]
    plan = read_plan(LocalStore(Path("run")))
    assert plan is not None
    number_of = {Path(unit.slice).name: unit.index for unit in plan.units}

    def poison(self: FakeTeacher, piece: Path, *rest: object) -> dict:
        if number_of[piece.name] in poisoned:
            raise InputError("this text is poison")
        return dump(self, piece, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeTeacher, "dump_unit", poison)
    teacher = ["teacher", "--worker", *quick, "--set", "fleet.max_failures=1"]
    assert "allow_quarantined" in refusal(bytecache(*teacher), 1)
    refused = refusal(bytecache(*convert), 3)
    assert "2 units have no dump" in refused and "this text is poison" in refused and "retry teacher" in refused
    assert not Path("run/targets/dataset.json").exists()
    done = bytecache(*allowed)
    assert done.exit_code == 0, done.output
    assert bytecache("verify").exit_code == 0
    plan = read_plan(LocalStore(Path("run")))
    assert plan is not None
    dataset = read_dataset(Path("run/targets"))
    lost = sum(plan.sizes[unit] for unit in poisoned)
    assert sum(entry.n_bytes for entry in dataset.entries) == plan.n_bytes - lost
    missing = dataset.info["creation"]["missing"]
    assert [unit["unit"] for unit in missing] == poisoned
    assert all(len(unit["documents"]) == unit["n_documents"] and "poison" in unit["reason"] for unit in missing)
    assert sum(unit["n_bytes"] for unit in missing) == lost
    assert "2 units (3, 5) with" in bytecache("status").stdout
    assert "this text is poison" in Path("run/targets/README.md").read_text()
    # Again: nothing to do; without the permission: refused; shards that miss nothing are those of the whole data set.
    assert "made 0" in bytecache(*allowed).stdout or "nothing to do" in bytecache(*allowed).stdout
    assert "2 units have no dump" in refusal(bytecache(*convert), 3)
    poisoned.clear()
    assert bytecache("teacher", "--run-dir", "whole", *quick).exit_code == 0
    assert bytecache("convert", "--run-dir", "whole", *quick).exit_code == 0
    whole = {entry.file for entry in read_dataset(Path("whole/targets")).entries}
    here = {entry.file for entry in dataset.entries}
    assert 0 < len(whole - here) <= 2 < len(whole & here)
    # Once all is there, the same folder is not changed behind its readers' backs.
    assert bytecache("retry", "teacher").exit_code == 0
    assert bytecache(*teacher).exit_code == 0
    assert "missing" in refusal(bytecache(*convert), 2)


def halves(place: Path) -> tuple[LocalStore, LocalStore]:
    """Two copies of a whole run, each without every other dump of the other."""
    stores = []
    for number in (0, 1):
        folder = place / f"half-{number}"
        shutil.copytree(place / "run", folder)
        store = LocalStore(folder)
        for _, key in list(receipts.list_receipts(store, "teacher"))[number::2]:
            receipt = receipts.read_receipt(store, "teacher", key)
            assert receipt is not None
            store.delete(receipt.files[0].path)
            store.delete(receipts.receipt_path("teacher", key))
        stores.append(store)
    return stores[0], stores[1]


@pytest.mark.usefixtures("world", "fake_teacher", "fake_convert")
def test_partial_runs_are_merged_into_the_whole() -> None:
    place = Path.cwd()
    from tests.support.run_outputs import outputs

    assert bytecache("plan").exit_code == 0
    assert bytecache("teacher").exit_code == 0
    halves(place)
    done = bytecache("merge", "half-0", "half-1", "--run-dir", "whole")
    assert done.exit_code == 0, done.output
    assert "0 skipped" in done.stdout
    assert outputs(place / "whole") == outputs(place / "run")
    assert bytecache("convert", "--run-dir", "whole").exit_code == 0
    assert bytecache("verify", "whole").exit_code == 0
    again = bytecache("merge", "half-0", "half-1", "--run-dir", "whole")
    assert "0 units of teacher copied" in again.stdout


@pytest.mark.usefixtures("world", "fake_teacher", "fake_convert")
def test_merging_refuses_conflicts_before_it_writes() -> None:
    place = Path.cwd()
    assert bytecache("plan").exit_code == 0
    assert bytecache("teacher").exit_code == 0
    halves(place)
    # Another output of a unit that the other half has too.
    store = LocalStore(place / "half-0")
    _, key = next(receipts.list_receipts(store, "teacher"))
    receipt = receipts.read_receipt(store, "teacher", key)
    assert receipt is not None
    path = store.get_path(receipt.files[0].path)
    path.write_bytes(b"other bytes")
    changed = receipt.model_copy(update={"files": (receipts.record_file(store, receipt.files[0].path),)})
    store.delete(receipts.receipt_path("teacher", key))
    receipts.write_receipt(store, changed)
    shutil.copytree(place / "run", place / "other")
    assert "two different outputs" in refusal(bytecache("merge", "half-0", "other", "--run-dir", "whole"), 4)
    assert not (place / "whole").exists()
    # A damaged file is skipped and named, whatever its receipt says.
    path.write_bytes(b"damaged....")
    done = bytecache("merge", "half-0", "--run-dir", "whole")
    assert "1 skipped" in done.stdout and "differs from its receipt" in done.stdout
    # Another plan, another teacher, no plan.
    assert bytecache("plan", "--run-dir", "second", "--set", "run.seed=5").exit_code == 0
    said = refusal(bytecache("merge", "second", "--run-dir", "whole"), 2)
    assert "only runs of one plan" in said and "(seed: 0 -> 5);" in said
    # The same text under another name is the same text.
    (place / "folder").mkdir()
    shutil.copyfile(place / "corpus.jsonl", place / "folder" / "corpus.jsonl")
    more = ("--source", "folder", "--set", "run.seed=5")
    assert bytecache("plan", "--run-dir", "named-otherwise", *more).exit_code == 0
    assert "(seed: 0 -> 5);" in refusal(bytecache("merge", "named-otherwise", "--run-dir", "whole"), 2)
    shutil.copytree(place / "run/plan", place / "third/plan")
    assert bytecache("teacher", "--run-dir", "third", "--set", "teacher.top_k=3").exit_code == 0
    assert "top_k: 16 -> 3" in refusal(bytecache("merge", "run", "third", "--run-dir", "new"), 2)
    assert "holds no plan" in refusal(bytecache("merge", "nowhere", "--run-dir", "new"), 3)
    assert not (place / "new").exists()


HEARTBEAT = {"worker": "w", "host": "h", "unit": 1, "made": 0, "failed": 0, "time": 1.0, "seconds": 1.0, "bytes": 1}


@pytest.mark.parametrize(
    "changes",
    [{"time": "x"}, {"time": None}, {"time": -1e308}, {"seconds": []}, {"bytes": 10**400}, {"unit": "1"},
     {"unit": True}, {"worker": 5}, {"host": None}, {"made": {}}, {"failed": "0"}],
)  # fmt: skip
def test_a_file_that_is_no_heartbeat_is_no_worker(changes: dict[str, object], tmp_path: Path) -> None:
    """Who writes to a run's store is not always a worker of ours, and `status` has to be looked at all the same."""
    context = open_context(load_settings(None, [f"run.dir={tmp_path / 'run'}"]), lambda line: None)
    store = context.store
    store.put_json_if_absent("fleet/convert/job.json", {"units": 3, "bytes": 10, "identity": {}})
    store.put_json_if_absent("fleet/convert/workers/good.json", HEARTBEAT)
    store.replace_text("fleet/convert/workers/bad.json", json.dumps(HEARTBEAT | changes))
    (job,) = fleet_status(context)
    assert [worker["worker"] for worker in job["workers"]] == ["w"]
    assert fleet_table([job])


@pytest.mark.parametrize("job", [{}, {"units": [], "bytes": 1}, {"units": -1, "bytes": 1}, {"units": 1, "bytes": "x"}])
def test_a_job_that_is_none_is_named(job: dict[str, object], tmp_path: Path) -> None:
    context = open_context(load_settings(None, [f"run.dir={tmp_path / 'run'}"]), lambda line: None)
    context.store.put_json_if_absent("fleet/convert/job.json", job)
    with pytest.raises(
        IntegrityError, match=r"job\.json is no record of a job; run `bytecache retry convert --new-job`"
    ):
        fleet_status(context)
