"""The plan is the same however many processes make it and however the corpus is cut into files; none is left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as some

from bytecache.pipeline.plan import make as planning
from bytecache.pipeline.plan import survey
from bytecache.pipeline.plan.index import read_plan
from bytecache.pipeline.plan.parallel import Processes
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units import receipts
from bytecache.schemas.errors import ConfigError, InputError, Interrupted
from bytecache.schemas.files import file_sha256
from bytecache.schemas.settings import Settings
from tests.support.places import ROOT


def records(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Documents of many sizes, some empty, with ids of which some repeat."""
    generator = random.Random(seed)
    return [
        {"id": f"id-{generator.randrange(n)}", "text": f"{i} " * generator.choice([0, 1, 20, 90, 400])}
        for i in range(n)
    ]


def corpus(folder: Path, documents: list[dict[str, str]], files: int) -> Path:
    """The documents in order in so many files."""
    folder.mkdir(parents=True)
    step = -(-len(documents) // files)
    for number in range(files):
        lines = [json.dumps(one) + "\n" for one in documents[number * step : (number + 1) * step]]
        (folder / f"{number:03d}.jsonl").write_text("".join(lines))
    return folder


def settings(source: Path, jobs: int = 1, **keys: object) -> Settings:
    shape = {"unit_bytes": 1500, "heldout_fraction": 0.3, "max_bytes": 0, **keys}
    return Settings.model_validate({"corpus": {"source": str(source), "jobs": jobs, **shape}})


def planned(store: LocalStore, wanted: Settings) -> dict[str, str]:
    planning.make_plan(store, wanted)
    return {key: file_sha256(store.get_path(key)) for key in store.list("") if not key.startswith(receipts.FOLDER)}


def contents(found: dict[str, str]) -> dict[str, str]:
    """All but the index, which names the source and counts its files."""
    return {key: sha256 for key, sha256 in found.items() if key != "plan/plan.json"}


@given(
    some.lists(some.tuples(some.sampled_from([0, 1, 5, 2**63, 2**64 - 1]), some.integers(1, 40)), max_size=40),
    some.sampled_from([0, 2, 2**63, 2**64]), some.sampled_from([-1, 1, 2**64 - 1]), some.integers(-1, 12),
    some.integers(0, 30),
)  # fmt: skip
def test_documents_together_are_as_one_by_one(
    documents: list[tuple[int, int]], threshold: int, train_hash: int, train_index: int, begun: int
) -> None:
    rule = survey.Rule(0, "text", threshold, train_hash, train_index)
    hashes, sizes = np.array([h for h, _ in documents], np.uint64), np.array([n for _, n in documents], np.int64)
    heldout = rule.heldout(hashes, 3)
    assert heldout.tolist() == [rule.split(h, 3 + at) == "heldout" for at, (h, _) in enumerate(documents)]
    alone, together = (survey.Packing(25, 7, {"train": begun, "heldout": 0}) for _ in range(2))
    for size in sizes.tolist():
        if alone.closes("train", size):
            alone.close("train")
        alone.add("train", size)
    together.add_all("train", sizes)
    assert alone == together


@pytest.mark.parametrize("limit", [0, 30_000])
def test_files_and_parts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    found = []
    for number, (files, part) in enumerate(((1, 10**6), (7, 10**6), (7, 3000), (40, 1))):
        monkeypatch.setattr(survey, "PART_BYTES", part)
        source = corpus(tmp_path / f"corpus-{number}", records(120), files)
        store = LocalStore(tmp_path / f"run-{number}")
        found.append(contents(planned(store, settings(source, max_bytes=limit))))
    assert all(one == found[0] for one in found)
    plan = read_plan(store)
    assert plan is not None and plan.n_heldout > 2
    rows = [row for unit in plan.units for row in pq.read_table(store.get_path(unit.slice)).to_pylist()]
    assert len({row["doc_id"] for row in rows}) == len(rows) == plan.corpus["n_documents"]
    assert plan.corpus["n_ids_renamed"] > 2
    if not limit:
        assert sorted(row["text"] for row in rows) == sorted(one["text"] for one in records(120) if one["text"])
        assert plan.corpus["n_empty_skipped"] == sum(not one["text"] for one in records(120))


def test_processes_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit, behind which a file is damaged: that is nobody's business, whoever reads ahead."""
    monkeypatch.setattr(survey, "PART_BYTES", 3000)
    source = corpus(tmp_path / "corpus", records(200), 20)
    (source / "018.jsonl").write_text("damaged")
    alone, together = LocalStore(tmp_path / "alone"), LocalStore(tmp_path / "together")
    limit = 40_000
    assert planned(alone, settings(source, max_bytes=limit)) == planned(together, settings(source, 3, max_bytes=limit))
    assert survey.processes_for(settings(source, 3, max_bytes=limit).corpus) == 3
    assert not planning.make_plan(together, settings(source, 2, max_bytes=limit))[1]
    with pytest.raises(InputError, match=r"018\.jsonl, line 1 .*not JSON"):
        planning.make_plan(LocalStore(tmp_path / "none"), settings(source, 2))
    (source / "001.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ConfigError, match="corpus text"):
        planning.make_plan(together, settings(source, 2, max_bytes=limit))


def test_a_corpus_that_changes_between_the_passes_is_noticed(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus", records(50), 2)
    wanted = settings(source)
    processes: Processes[object, object] = Processes(1, lambda: False)
    found = survey.Survey(wanted, processes)
    path = source / "001.jsonl"
    path.write_text(path.read_text().replace("49 ", "94 "))
    from bytecache.pipeline.plan.slices import write_slices

    with pytest.raises(InputError, match="changed while it was being read"):
        list(write_slices(LocalStore(tmp_path / "run"), wanted, found, processes))


def test_processes_for_small_corpora_and_built_in_ones(tmp_path: Path) -> None:
    assert survey.processes_for(Settings().corpus) == 1
    assert survey.processes_for(settings(corpus(tmp_path / "c", records(20), 4), 8).corpus) == 1


def double(task: int, stop: Callable[[], bool]) -> int:
    if task == 5:
        raise InputError("five")
    while task == 7 and not stop():
        time.sleep(0.01)
    if task == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


def test_answers_come_in_order_and_failures_in_their_turn() -> None:
    with Processes[int, int](2, lambda: False) as processes:
        assert list(processes.map(double, range(5))) == [0, 2, 4, 6, 8]
        answers = processes.map(double, [4, 5, 6])
        assert next(answers) == 8
        with pytest.raises(InputError, match="five"):
            next(answers)
    asked = iter([False, True])
    with Processes[int, int](2, lambda: next(asked, True)) as processes, pytest.raises(Interrupted, match="rerun"):
        list(processes.map(double, [1, 7]))
    with Processes[int, int](2, lambda: False) as processes, pytest.raises(Interrupted, match="killed from outside"):
        list(processes.map(double, [1, 9]))


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill the command", "kill a process", "end the group"])
def test_a_killed_plan_leaves_no_process_and_is_finished_by_a_rerun(tmp_path: Path, what: str) -> None:
    """Two parts; each process has seconds of work."""
    text = "the cache is a promise that somebody keeps " * 20
    source = tmp_path / "corpus"
    source.mkdir()
    for number in range(2):
        lines = [json.dumps({"text": f"{number} {i} {text}"}) + "\n" for i in range(24_000)]
        (source / f"{number}.jsonl").write_text("".join(lines))
    command = [
        sys.executable, "-m", "bytecache", "plan", "--jobs", "2", "--run-dir", str(tmp_path / "run"),
        "--source", str(source), "--set", "corpus.max_bytes=0", "--set", "corpus.unit_bytes=200000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    slices = tmp_path / "run" / "plan" / "slices"
    end = time.monotonic() + 60
    while not (slices.is_dir() and len(list(slices.iterdir())) > 20):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    family = children(process.pid)
    assert len(family) >= 2
    if what == "kill the command":
        process.kill()
    elif what == "kill a process":
        os.kill(family[-1], signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    code = process.wait(60)
    said = process.stderr.read().decode() if process.stderr else ""
    assert code == (-signal.SIGKILL if what == "kill the command" else 75), said
    end = time.monotonic() + 20
    while any(alive(child) for child in family):
        assert time.monotonic() < end, "processes are left behind"
        time.sleep(0.05)
    assert read_plan(LocalStore(tmp_path / "run")) is None
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    alone = LocalStore(tmp_path / "alone")
    wanted = settings(source, unit_bytes=200000, heldout_fraction=0.1)
    plan, again = planning.make_plan(alone, wanted)[0], read_plan(LocalStore(tmp_path / "run"))
    assert again is not None and again.hash == plan.hash
