"""The plan is the same however many processes make it and however the corpus is cut into files; none is left behind."""

import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as some

from bytecache.pipeline.plan import make, parts, slices
from bytecache.pipeline.plan.index import read_plan
from bytecache.pipeline.plan.parallel import in_order
from bytecache.pipeline.plan.writing import unique
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units import receipts
from bytecache.schemas.errors import ConfigError, InputError, Interrupted
from bytecache.schemas.files import file_sha256
from bytecache.schemas.settings import Settings
from bytecache.stages.corpus.files import File, corpus_files
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
    make.make_plan(store, wanted)
    return {key: file_sha256(store.get_path(key)) for key in store.list("") if not key.startswith(receipts.FOLDER)}


def contents(found: dict[str, str]) -> dict[str, str]:
    """All but the index, which names the source and counts its files."""
    return {key: sha256 for key, sha256 in found.items() if key != "plan/plan.json"}


@pytest.mark.parametrize("limit", [pytest.param(0, marks=pytest.mark.slow), 30_000])
def test_files_and_parts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    found = []
    for number, (files, part) in enumerate(((1, 10**6), (1, 2000), (7, 10**6), (7, 3000), (40, 1))):
        monkeypatch.setattr(parts, "PART_BYTES", part)
        source = corpus(tmp_path / f"corpus-{number}", records(120), files)
        store = LocalStore(tmp_path / f"run-{number}")
        found.append(contents(planned(store, settings(source, max_bytes=limit))))
    assert all(one == found[0] for one in found)
    plan = read_plan(store)
    assert plan is not None
    assert plan.n_heldout > 2
    rows = [pq.read_table(store.get_path(unit.slice)).to_pylist() for unit in plan.units]
    assert all(len({row["doc_id"] for row in unit}) == len(unit) for unit in rows)
    assert sum(map(len, rows)) == plan.corpus["n_documents"]
    names = sum(1 for unit in rows for row in unit if "#" in row["doc_id"])
    assert plan.corpus["n_ids_renamed"] == names > 2
    if not limit:
        texts = sorted(row["text"] for unit in rows for row in unit)
        assert texts == sorted(one["text"] for one in records(120) if one["text"])
        assert plan.corpus["n_empty_skipped"] == sum(not one["text"] for one in records(120))


def in_this_process(
    function: Callable[..., object], tasks: Iterable[object], jobs: int, stop: Callable[[], bool]
) -> Iterator[object]:
    """What `in_order` gives, without a process: parts that know nothing of each other."""
    for task in tasks:
        yield pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(task)), stop)))


@pytest.mark.parametrize("limit", [pytest.param(0, marks=pytest.mark.slow), 7000, 30_000])
def test_parts_cut_apart_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Every size of part, with and without an end of a slice that its reader can be certain of."""
    source = corpus(tmp_path / "corpus", records(300), 3)
    alone = planned(LocalStore(tmp_path / "alone"), settings(source, max_bytes=limit))
    monkeypatch.setattr(parts, "in_order", in_this_process)
    for part in (500, 3000, 9000, 40_000):
        monkeypatch.setattr(parts, "PART_BYTES", part)
        monkeypatch.setattr(slices, "LONGEST_HEAD", 2 * part)
        store = LocalStore(tmp_path / f"run-{part}")
        assert planned(store, settings(source, 4, max_bytes=limit)) == alone
        assert not make.make_plan(store, settings(source, 4, max_bytes=limit))[1]


@pytest.mark.parametrize("limit", [4000, 9000, 12_000, 21_000])
def test_a_limit_counts_lines_that_reach_beyond_their_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Documents of several ranges each: the last of a range may be the one that the limit leaves out."""
    documents = [{"text": f"{i} " * (100 + 900 * (i % 3))} for i in range(15)]
    source = corpus(tmp_path / "corpus", documents, 1)
    alone = planned(LocalStore(tmp_path / "alone"), settings(source, max_bytes=limit))
    monkeypatch.setattr(parts, "in_order", in_this_process)
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    monkeypatch.setattr(parts, "MAX_DOCUMENT", 7000)
    assert planned(LocalStore(tmp_path / "run"), settings(source, 4, max_bytes=limit)) == alone


def test_documents_that_are_all_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hash is lower than another: slices fill up, and who knows a part alone leaves it to who knows all."""
    source = corpus(tmp_path / "corpus", [{"text": "the same " * 10}] * 900, 3)
    alone = planned(LocalStore(tmp_path / "alone"), settings(source))
    monkeypatch.setattr(parts, "in_order", in_this_process)
    monkeypatch.setattr(parts, "PART_BYTES", 30_000)
    monkeypatch.setattr(slices, "LONGEST_HEAD", 10_000)
    assert planned(LocalStore(tmp_path / "run"), settings(source, 4)) == alone
    plan = read_plan(LocalStore(tmp_path / "run"))
    assert plan is not None
    assert set(plan.sizes[:-2]) == {1440}
    assert plan.n_bytes == 900 * 90


@pytest.mark.slow
def test_processes_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit, behind which a file is damaged: that is nobody's business, whoever reads ahead."""
    monkeypatch.setattr(parts, "PART_BYTES", 3000)
    source = corpus(tmp_path / "corpus", records(200), 20)
    (source / "018.jsonl").write_text("damaged")
    alone, together = LocalStore(tmp_path / "alone"), LocalStore(tmp_path / "together")
    limit = 40_000
    assert planned(alone, settings(source, max_bytes=limit)) == planned(together, settings(source, 3, max_bytes=limit))
    assert not make.make_plan(together, settings(source, 2, max_bytes=limit))[1]
    with pytest.raises(InputError, match=r"018\.jsonl, line 1 .*not JSON"):
        make.make_plan(LocalStore(tmp_path / "none"), settings(source, 2))
    (source / "001.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ConfigError, match="corpus text"):
        make.make_plan(together, settings(source, 2, max_bytes=limit))


@pytest.mark.parametrize("jobs", [1, 2])
def test_lines_of_a_long_file_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    source = tmp_path / "c.jsonl"
    source.write_text("".join(json.dumps({"text": f"line {i} " * 9}) + "\n" for i in range(200)) + "{no\n")
    wanted = settings(source, jobs)
    assert len(parts.cut_files([File(str(source), "c.jsonl")], 0)[0]) > 10
    with pytest.raises(InputError, match=r"c\.jsonl, line 201 \(byte \d+\): not JSON"):
        make.make_plan(LocalStore(tmp_path / "run"), wanted)


@pytest.mark.parametrize("what", ["insert", "delete", "change", "a file"])
def test_a_corpus_that_changes_keeps_its_slices_but_a_few(tmp_path: Path, what: str) -> None:
    """Documents without ids of their own, so that names must not depend on places either."""
    texts = [{"text": f"document {i} " * (1 + i * 7 % 13)} for i in range(600)]
    changed = list(texts)
    if what == "insert":
        changed.insert(200, {"text": "a new document"})
    elif what == "delete":
        del changed[200]
    elif what == "change":
        changed[200] = {"text": "another document"}
    names = []
    for number, documents in enumerate((texts, changed)):
        source = corpus(tmp_path / str(number), documents, 1)
        if number and what == "a file":
            (source / "0.txt").write_text("a file before all others")
        store = LocalStore(tmp_path / f"run-{number}")
        plan, _ = make.make_plan(store, settings(source, heldout_fraction=0.1))
        names.append({(unit.slice, unit.sha256) for unit in plan.units})
    before, after = names
    assert len(before) > 35
    assert 1 <= len(after - before) <= 6
    assert len(before - after) <= 6


def test_small_files_together_give_units_of_the_wanted_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path / "corpus", [{"text": f"{i} " * 12} for i in range(600)], 600)
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    plan, _ = make.make_plan(LocalStore(tmp_path / "run"), settings(source, unit_bytes=2000))
    assert min(plan.sizes) >= 1000 - 48
    assert max(plan.sizes) <= 2000
    assert len(parts.cut_files(corpus_files(settings(source).corpus)[0], 0)[0]) < 60


def test_a_corpus_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus", records(50), 2)
    store, calls = LocalStore(tmp_path / "run"), itertools.count()

    def meddle() -> bool:
        if next(calls) == 20:
            with (source / "000.jsonl").open("a") as stream:
                stream.write('{"text": "late"}\n')
        return False

    with pytest.raises(InputError, match="changed while it was being read"):
        make.make_plan(store, settings(source), meddle)
    assert read_plan(store) is None


@given(some.lists(some.sampled_from(["a", "b", "a#2", "a#3", "a#2#2", ""]), max_size=12))
def test_ids_of_a_slice_are_made_unique(ids: list[str]) -> None:
    names = unique(ids)
    assert len(set(names)) == len(ids)
    for at, (name, own) in enumerate(zip(names, ids, strict=True)):
        assert name == own if own not in ids[:at] else name.startswith(f"{own}#")


def test_small_corpora_and_built_in_ones_are_read_by_one_process(tmp_path: Path) -> None:
    """What is read apart and what in order: text is never longer than its file, unless that is compressed."""
    assert parts.cut_files([], 0) == parts.cut_files([], 10) == ([], [(0, ())])
    files = corpus_files(settings(corpus(tmp_path / "c", records(20), 4)).corpus)[0]
    sizes = [os.path.getsize(file.path) for file in files]
    assert parts.cut_files(files, 0) == ([(0, tuple(files))], [])
    assert parts.cut_files(files, sum(sizes[:2]) + 1) == ([(0, tuple(files[:2]))], [(1, tuple(files[2:]))])
    assert parts.cut_files(files, sum(sizes[:2])) == ([(0, tuple(files[:1]))], [(1, tuple(files[1:]))])
    compressed = [files[0], File(files[1].path, "1.jsonl.gz"), *files[2:]]
    assert parts.cut_files(compressed, 10**9) == ([(0, tuple(files[:1]))], [(1, tuple(compressed[1:]))])


def double(task: int, stop: Callable[[], bool]) -> int:
    if task == 5:
        raise InputError("five")
    while task == 7 and not stop():
        time.sleep(0.01)
    if task == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


@pytest.mark.slow
def test_answers_come_in_order_and_failures_in_their_turn() -> None:
    assert list(in_order(double, range(5), 2, lambda: False)) == [0, 2, 4, 6, 8]
    answers = in_order(double, [4, 5, 6], 2, lambda: False)
    assert next(answers) == 8
    with pytest.raises(InputError, match="five"):
        next(answers)
    asked = iter([False, True])
    with pytest.raises(Interrupted, match="rerun"):
        list(in_order(double, [1, 7], 2, lambda: next(asked, True)))
    with pytest.raises(Interrupted, match="killed from outside"):
        list(in_order(double, [1, 9], 2, lambda: False))


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
    plan, again = make.make_plan(alone, wanted)[0], read_plan(LocalStore(tmp_path / "run"))
    assert again is not None and again.hash == plan.hash
