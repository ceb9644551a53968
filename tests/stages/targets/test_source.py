"""Datasets at URLs: the same bytes as from a folder, a bounded shared cache, and refusals by name."""

import functools
import http.server
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from bytecache.schemas import patience
from bytecache.schemas.dataset.index import Dataset, read_dataset
from bytecache.schemas.errors import BytecacheError, ConfigError, IntegrityError, StorageError
from bytecache.stages.targets import source
from bytecache.stages.targets.cache import FileCache
from bytecache.stages.targets.order import Order
from bytecache.stages.targets.shelf import Shelf
from bytecache.stages.targets.source import RemoteDataset, fetch_ahead, load_shard, open_dataset
from tests.support.loopback import Loopback, Quiet
from tests.support.student_data import make_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("source") / "d", documents=12, per_shard=3)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PATIENCE", 1.0)


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The dataset in fsspec's memory file system."""
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/bucket/set", recursive=True)
    yield "memory://bucket/set"
    fs.rm("/bucket", recursive=True)


class Files(Quiet, http.server.SimpleHTTPRequestHandler):
    """A folder's files."""


@pytest.fixture
def http_url(folder: Path) -> Iterator[str]:
    handler = functools.partial(Files, directory=str(folder))
    with Loopback(handler) as server:
        yield server.url


def same(one: Dataset, other: Dataset) -> None:
    assert one.content_sha256 == other.content_sha256 and one.entries == other.entries and one.info == other.info
    assert one.fidelity == other.fidelity
    for entry in one.entries:
        a, b = load_shard(one, entry), load_shard(other, entry)
        assert a.doc_id == b.doc_id and (a.dense(0, len(a)) == b.dense(0, len(b))).all()


def test_every_place_gives_the_same_dataset(folder: Path, memory: str, http_url: str, tmp_path: Path) -> None:
    local = read_dataset(folder)
    for place in (folder, str(folder), f"file://{folder}", local):
        same(open_dataset(place, cache_dir=tmp_path / "unused"), local)
    assert not (tmp_path / "unused").exists()
    for url in (memory, memory + "/", http_url):
        remote = open_dataset(url, cache_dir=tmp_path / "cache")
        assert isinstance(remote, RemoteDataset)
        same(remote, local)
    # Both URLs hold the same content: it is kept once.
    assert len(list((tmp_path / "cache").glob("*/*.zarr.zip"))) == len(local.entries)
    fsspec.filesystem("memory").rm("/bucket/set/" + local.entries[0].file)
    same(open_dataset(memory, cache_dir=tmp_path / "cache"), local)


def test_refusals_name_the_url_and_the_shard(folder: Path, memory: str, http_url: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    remote = open_dataset(memory, cache_dir=tmp_path)
    first, second, third = remote.entries[:3]
    data = fs.cat(f"/bucket/set/{first.file}")
    fs.pipe(f"/bucket/set/{first.file}", data[:50] + bytes([data[50] ^ 1]) + data[51:])
    fs.pipe(f"/bucket/set/{second.file}", data + bytes(9_000_000))
    fs.rm(f"/bucket/set/{third.file}")
    for entry, words in ((first, "manifest says"), (second, "more than"), (third, "missing at the source")):
        with pytest.raises(IntegrityError, match=f"{memory}/{entry.file}.*{words}"):
            load_shard(remote, entry)
    assert not list(tmp_path.glob("*/*.zarr.zip")) and not list(tmp_path.glob(".scratch*"))
    for url, kind, words in (
        (memory + "/none", IntegrityError, "missing at the source"),
        ("nothing://x/y", ConfigError, "Protocol not known"),
        (http_url + "/none", IntegrityError, "missing at the source"),
        ("http://127.0.0.1:9/x", StorageError, "cannot be read for 1 s"),
    ):
        with pytest.raises(kind, match=words):
            open_dataset(url, cache_dir=tmp_path)
    index = fs.cat("/bucket/set/dataset.json")
    fs.pipe("/bucket/set/dataset.json", index.replace(b'"splits"', b'"Splits"'))
    with pytest.raises(IntegrityError, match=f"{memory}/dataset.json.*damaged or edited"):
        open_dataset(memory, cache_dir=tmp_path)


def test_transfers_that_fail_are_tried_again(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.001)
    remote = open_dataset(memory, cache_dir=tmp_path)
    whole, starts = source._from, []

    def short(url: str, start: int, access: source.Access) -> Iterator[bytes]:
        starts.append(start)
        yield b"torn"

    monkeypatch.setattr(source, "_from", short)
    with pytest.raises(IntegrityError, match="4 bytes"):  # wrong bytes at the second try are believed
        load_shard(remote, remote.entries[0])
    assert starts == [0, 0]

    def flaky(url: str, start: int, access: source.Access) -> Iterator[bytes]:
        starts.append(start)
        for piece in whole(url, start, access):
            yield piece[:100]
            raise ConnectionResetError("the line went dead")

    monkeypatch.setattr(source, "_from", flaky)
    monkeypatch.setattr(source, "PROGRESS", 100)
    starts.clear()
    assert len(load_shard(remote, remote.entries[0]))
    assert starts == [*range(0, remote.entries[0].size, 100), remote.entries[0].size], (
        "each connection goes on where the last one ended"
    )

    def dead(url: str, start: int, access: source.Access) -> Iterator[bytes]:
        raise ConnectionResetError("dead")

    monkeypatch.setattr(source, "_from", dead)
    with pytest.raises(StorageError, match=r"cannot be read for 1 s.*dead"):
        load_shard(remote, remote.entries[1])


def test_a_damaged_cached_file_is_fetched_again(memory: str, tmp_path: Path) -> None:
    remote = open_dataset(memory, cache_dir=tmp_path)
    assert isinstance(remote, RemoteDataset) and remote.cache is not None
    entry = remote.entries[0]
    load_shard(remote, entry)
    path = remote.cache.path(entry.sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert len(load_shard(remote, entry)) == entry.n_positions
    with remote.held(entry) as again:
        assert again.read_bytes()[-1:] != b"?"


def test_the_cache_is_bounded_and_forgets_what_was_longest_unused(memory: str, tmp_path: Path) -> None:
    sizes = [entry.size for entry in open_dataset(memory, cache_dir=tmp_path).entries]
    remote = open_dataset(memory, cache_dir=tmp_path, cache_bytes=sum(sizes[:3]) + sizes[3] // 2)
    assert isinstance(remote, RemoteDataset) and remote.cache is not None
    cache, entries = remote.cache, remote.entries
    for number, entry in enumerate(entries[:3]):
        load_shard(remote, entry)
        os.utime(cache.path(entry.sha256), (number, number))
    load_shard(remote, entries[0])  # used again: now the youngest
    load_shard(remote, entries[3])
    assert [cache.has(entry.sha256) for entry in entries[:4]] == [True, False, True, True]
    # What is in use stays, even beyond the bound.
    small = open_dataset(memory, cache_dir=tmp_path / "small", cache_bytes=1)
    with small.held(entries[0]) as kept:
        for entry in entries[1:]:
            load_shard(small, entry)
        assert kept.stat().st_size == entries[0].size
    assert len(list((tmp_path / "small").glob("*/*.zarr.zip"))) == 2


def _reader(folder: Path, cache: Path, limit: int, seed: int, failures: "multiprocessing.Queue[str]") -> None:
    import random

    dataset = read_dataset(folder)
    store = FileCache(cache, limit)
    choose = random.Random(seed)
    try:
        for _ in range(150):
            entry = choose.choice(dataset.entries)
            data = (folder / entry.file).read_bytes()
            with store.held(entry.sha256, entry.size, lambda data=data: iter((data[:100], data[100:]))) as path:
                if path.read_bytes() != data:
                    failures.put(entry.file)
    except BaseException as error:
        failures.put(repr(error))


def test_processes_share_a_cache_that_is_too_small(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    limit = max(entry.size for entry in read_dataset(folder).entries) * 2
    workers = [context.Process(target=_reader, args=(folder, tmp_path, limit, n, failures)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert failures.empty(), failures.get()
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.zarr.zip")) <= limit + 3 * limit // 2


def test_files_are_fetched_before_they_are_asked_for(memory: str, tmp_path: Path) -> None:
    remote = open_dataset(memory, cache_dir=tmp_path)
    assert isinstance(remote, RemoteDataset) and remote.cache is not None
    entries = remote.split("train")
    order = Order("x", [entry.n_positions for entry in entries], 64, 0, pool=1)

    def shelf_of(dataset: Dataset) -> Shelf[int]:
        loaded: Callable[[int], int] = lambda number: len(load_shard(dataset, entries[number]))  # noqa: E731
        return Shelf(loaded, lambda number: fetch_ahead(dataset, entries[number]))

    with closing(shelf_of(remote).follow(order.pools())) as windows:
        first = next(windows)  # no shard has been asked for yet, and one pool is one shard
        second = next(pool for pool in islice(order.pools(), 1, None)).shards[0]
        for _ in range(500):
            if remote.cache.has(entries[second].sha256):
                break
            threading.Event().wait(0.01)
        assert first.shard != second and remote.cache.has(entries[second].sha256)
    broken = open_dataset(memory, cache_dir=tmp_path / "other")
    fsspec.filesystem("memory").rm("/bucket/set/" + entries[second].file)
    shelf = shelf_of(broken)
    with closing(shelf.follow(order.pools(0, 1))) as windows:
        seen = list(windows)  # a failed fetch is the load's to report
        assert len(seen) == order.epoch_length(0)
    with pytest.raises(BytecacheError, match=entries[second].file):
        shelf[second]


@pytest.mark.slow
def test_the_commands_train_from_a_url(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.command_line import bytecache, refusal

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline.toml").write_text(
        f'[run]\ndir = "run"\n[dataset]\nsource = "{memory}"\ncache_dir = "cache"\n'
        '[student]\nmodel = ""\ntokenizer = "bpe:300"\nhidden_size = 16\nlayers = 1\nheads = 2\n'
        "[train]\nsteps = 2\nbatch = 2\nwindow_bytes = 64\ncontrol = false\n"
    )
    assert "`run` makes its own data set" in refusal(bytecache("run"), 2)
    trained = bytecache("train")
    assert trained.exit_code == 0, trained.output
    assert "nothing to do" in bytecache("train").stdout
    assert bytecache("evaluate").exit_code == 0
    assert (tmp_path / "run/report/report.json").is_file() and not (tmp_path / "run/targets").exists()
    first = open_dataset(memory, cache_dir="cache").split("train")[0].file
    fsspec.filesystem("memory").rm(f"/bucket/set/{first}")
    for path in (tmp_path / "cache").glob("*/*.zarr.zip"):
        path.unlink()
    assert first in refusal(bytecache("train", "--set", "train.steps=3"), 4)
