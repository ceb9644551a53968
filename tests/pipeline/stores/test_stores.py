"""Every store passes one suite: a folder, memory, S3 (moto on loopback), S3 behind a proxy that fails."""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest

from bytecache.pipeline.stores import LocalStore, Store, open_store
from bytecache.pipeline.stores.objects import ObjectStore
from bytecache.pipeline.stores.readonly import ReadOnlyStore
from bytecache.schemas.errors import ConfigError, IntegrityError, StorageError
from tests.support.faulty_proxy import FaultyProxy, once, sometimes
from tests.support.s3_server import BUCKET, S3Server, environment
from tests.support.store_suite import StoreSuite, write_big

FAULTS = ("refuse", "slow", "torn_up", "lost", "torn_down", "altered")
numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    made = S3Server()
    yield made
    made.close()


class Proxied:
    """Stores of one prefix behind a proxy, each with a scratch folder of its own, as on different machines."""

    def __init__(self, server: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proxy = FaultyProxy(server.port, lambda method, path: "")
        for name, value in environment(self.proxy.port).items():
            monkeypatch.setenv(name, value)
        self.folder, self.url = folder, f"s3://{BUCKET}/proxied-{next(numbers)}"

    def store(self, patience: float = 20.0) -> ObjectStore:
        return ObjectStore(self.url, self.folder / f"machine-{next(numbers)}", patience=patience, timeout=5.0)


@pytest.fixture
def proxied(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxied]:
    made = Proxied(server, tmp_path, monkeypatch)
    yield made
    made.proxy.close()


class Torn:
    """What `obstore.get` gives, but each stream breaks off after so many bytes."""

    def __init__(self, result: Any, length: int) -> None:
        self._result, self._length = result, length
        self.meta, self.attributes = result.meta, result.attributes

    def stream(self, min_chunk_size: int) -> Iterator[bytes]:
        raw = bytes(self._result.bytes())
        yield raw[: self._length]
        if len(raw) > self._length:
            raise ConnectionError("the line went dead")


def test_a_download_that_breaks_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore("memory:///", tmp_path, patience=0.5)
    raw = os.urandom(10_000)
    store.replace("k", store.write_temp("k", raw))
    real, asked = obstore.get, []

    def torn(backend: Any, key: str, *, options: Any = None) -> Any:
        if options and options.get("head"):
            return real(backend, key, options=options)
        asked.append(options["range"]["offset"] if options else 0)
        time.sleep(0.2)  # together longer than the patience: what comes renews it
        return Torn(real(backend, key, options=options), 1500)

    monkeypatch.setattr(obstore, "get", torn)
    assert store.get_path("k").read_bytes() == raw
    assert asked == list(range(0, 10_000, 1500))


def test_a_download_of_what_changed_meanwhile_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore("memory:///", tmp_path, patience=2.0)
    store.replace("k", store.write_temp("k", b"old" * 1000))
    real, new = obstore.get, b"new!" * 1000

    def changing(backend: Any, key: str, *, options: Any = None) -> Any:
        result = real(backend, key, options=options)
        if options and options.get("head"):
            return result
        if options is None and not changed:
            changed.append(key)
            broken = Torn(result, 1000)
            obstore.put(backend, key, new, attributes={"sha256": hashlib.sha256(new).hexdigest()})
            return broken
        return result

    changed: list[str] = []
    monkeypatch.setattr(obstore, "get", changing)
    assert store.get_path("k").read_bytes() == new


class TestLocal(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "run")


class TestMemory(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return ObjectStore("memory:///", tmp_path)


class TestS3(StoreSuite):
    @pytest.fixture
    def store(self, proxied: Proxied) -> Store:
        return proxied.store()


@pytest.mark.slow
class TestS3Staged(StoreSuite):
    """Every object takes the path of large ones: multipart upload, then a conditional copy."""

    @pytest.fixture
    def store(self, proxied: Proxied) -> Store:
        store = proxied.store()
        store._bucket.single_put = -1
        return store

    @pytest.mark.skip("an equal object counts as ours on this path")
    def test_first_writer_wins(self, store: Store) -> None: ...


@pytest.mark.slow
class TestS3WithoutConditions(StoreSuite):
    @pytest.fixture
    def store(self, proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
        return proxied.store()

    @pytest.mark.skip("the fallback promises no single winner among writers of the same moment")
    def test_one_of_many_writers_wins(self, store: Store) -> None: ...


@pytest.mark.slow
class TestS3BehindFaults(StoreSuite):
    """One request in four fails, in every way there is."""

    @pytest.fixture
    def store(self, proxied: Proxied) -> Iterator[Store]:
        proxied.proxy.choose = sometimes(0.25, next(numbers), FAULTS)
        return proxied.store(patience=60)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_creating_is_survived_and_the_winner_known(proxied: Proxied, fault: str) -> None:
    """`lost` above all: the service has the object, the writer never heard so, and must not think it lost."""
    store = proxied.store()
    proxied.proxy.choose = once(fault, "PUT")
    assert store.put_json_if_absent("lease", {"owner": 1})
    assert proxied.proxy.seen[fault] == 1
    assert not proxied.store().put_json_if_absent("lease", {"owner": 1})
    assert proxied.store().read_bytes("lease") == b'{\n  "owner": 1\n}\n'


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_reading_is_survived(proxied: Proxied, fault: str) -> None:
    raw = os.urandom(300_000)
    writer = proxied.store()
    writer.put_if_absent("x", writer.write_temp("x", raw))
    for read in (lambda store: store.get_path("x").read_bytes(), lambda store: store.read_bytes("x")):
        proxied.proxy.choose = once(fault, "GET")
        assert read(proxied.store()) == raw
        proxied.proxy.choose = once(fault, "HEAD")
        assert read(proxied.store()) == raw


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 7_000_000])
def test_what_goes_up_is_no_silence(proxied: Proxied, size: int) -> None:
    """The service answers when it has everything: on a slow link that is later than reading ever waits."""
    store = ObjectStore(proxied.url, proxied.folder / "slow", patience=5.0, timeout=0.5)
    store._bucket.single_put = 1_000_000
    proxied.proxy.slow_seconds = 1.5
    proxied.proxy.choose = once("slow", "PUT")
    assert store.put_if_absent("dump", store.write_temp("dump", bytes(size)))
    assert proxied.proxy.seen["slow"] == 1 and store.size("dump") == size


@pytest.mark.slow
def test_parts_become_smaller_and_fewer_where_they_take_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore("memory:///", tmp_path, patience=0.2)
    asked: list[tuple[int, int]] = []

    def put(client: Any, key: str, source: Path, *, chunk_size: int, max_concurrency: int, **more: Any) -> None:
        asked.append((chunk_size >> 20, max_concurrency))
        time.sleep(0.3)  # longer than the store has patience
        raise TimeoutError("too slow")

    monkeypatch.setattr("bytecache.pipeline.stores.bucket.obstore.put", put)
    with pytest.raises(StorageError, match="too slow"):
        store.replace("dump", store.write_temp("dump", b"words"))
    assert asked == [(16, 12), (5, 9), (5, 2), (5, 1), (5, 1)]


@pytest.mark.slow
def test_large_objects_go_up_in_parts_and_still_only_once(proxied: Proxied) -> None:
    first, second = proxied.store(), proxied.store()
    for store in (first, second):
        store._bucket.single_put = 1_000_000
    path = write_big(first, 20_000_000)
    proxied.proxy.choose = once("refuse", "PUT")
    assert first.put_if_absent("dump", path)
    methods = proxied.proxy.seen
    assert methods["none"] >= 4  # parts, copy, completion
    assert first.size("dump") == 20_000_000
    assert first.sha256("dump") == first.sha256("dump", deep=True)
    assert not second.put_if_absent("dump", second.write_temp("dump", bytes(2_000_000)))
    assert second.put_if_absent("dump", write_big(second, 20_000_000))  # equal: as good as ours
    assert list(first.list("")) == ["dump"]
    assert list(obstore.list(first._bucket.backend, ".tmp").collect()) == []
    second.replace("dump", second.write_temp("dump", b"other"))
    assert first.sha256("dump") == first.sha256("dump", deep=True) == second.sha256("dump")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "torn_up", "lost"])
def test_objects_too_large_for_a_copy_go_up_in_parts(
    proxied: Proxied, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above 5 GiB, with smaller numbers: parts grow where there would be too many, and a fault tears nothing."""
    monkeypatch.setattr("bytecache.pipeline.stores.bucket.PART", 5 * 2**20)
    monkeypatch.setattr("bytecache.pipeline.stores.bucket.N_PARTS", 3)
    first, second = proxied.store(), proxied.store()
    for store in (first, second):
        store._bucket.single_put, store._bucket.copy_limit, store._bucket.largest = 1_000_000, 6_000_000, 30_000_000
    path = write_big(first, 20_000_000)
    proxied.proxy.choose = once(fault, "PUT")
    assert first.put_if_absent("dump", path)
    assert proxied.proxy.seen[fault] == 1
    assert first.size("dump") == 20_000_000
    assert first.sha256("dump") == first.sha256("dump", deep=True)
    assert not path.exists()
    assert not second.put_if_absent("dump", second.write_temp("dump", bytes(7_000_000)))
    assert second.put_if_absent("dump", write_big(second, 20_000_000))  # equal: as good as ours
    assert first.size("dump") == 20_000_000
    assert list(first.list("")) == ["dump"]
    with pytest.raises(StorageError, match=r"30000001 bytes, and an object holds 30000000 at most; use smaller"):
        first.put_if_absent("other", first.write_temp("other", bytes(30_000_001)))
    assert not first.exists("other")


def test_copies_follow_the_store(proxied: Proxied) -> None:
    here, there = proxied.store(), proxied.store()
    here.replace("x", here.write_temp("x", b"one"))
    path = there.get_path("x")
    before = proxied.proxy.seen["none"]
    assert there.get_path("x") == path
    assert proxied.proxy.seen["none"] == before + 1  # one HEAD, no download
    here.replace("x", here.write_temp("x", b"two"))
    assert there.get_path("x").read_bytes() == b"two"
    there.get_path("x").write_bytes(b"t?o")
    os.utime(there.get_path("x"), (1, 1))
    assert there.get_path("x").read_bytes() == b"two"


def test_a_trainers_folder_moves_between_machines(proxied: Proxied) -> None:
    here, there = proxied.store(), proxied.store()
    folder = here.folder("train/a")
    folder.mkdir(parents=True)
    (folder / "step-1.bin").write_bytes(b"1")
    assert here.publish("train/a") == 1
    other = there.folder("train/a")
    assert (other / "step-1.bin").read_bytes() == b"1"
    (other / "step-2.bin").write_bytes(b"2")
    (other / "step-1.bin").unlink()
    assert there.publish("train/a") == 2
    (folder / "unpublished").write_bytes(b"u")
    assert sorted(path.name for path in here.folder("train/a").iterdir()) == ["step-2.bin", "unpublished"]


def test_links_in_a_trainers_folder_stay_behind(proxied: Proxied) -> None:
    """As wandb lays them to its newest log; the log itself goes up."""
    store = proxied.store()
    folder = store.folder("train/a")
    (folder / "wandb" / "run-1").mkdir(parents=True)
    (folder / "wandb" / "run-1" / "debug.log").write_text("all is well")
    (folder / "wandb" / "latest-run").symlink_to("run-1")
    (folder / "wandb" / "debug.log").symlink_to("run-1/debug.log")
    assert store.publish("train/a") == 1
    assert list(store.list("train")) == ["train/a/wandb/run-1/debug.log"]
    (folder / "wandb" / "run-1" / "debug.log").write_text("all is well still")
    assert store.publish("train/a") == 1


def test_a_folder_without_its_record_does_not_count(proxied: Proxied) -> None:
    """An upload that a kill cut short: the record goes up last."""
    here = proxied.store()
    here.replace("student/model.bin", here.write_temp("m", b"half"))
    folder = proxied.store().folder("student", "student.json")
    assert not folder.exists()
    folder.mkdir()
    (folder / "student.json").write_text("{}")


@pytest.mark.slow
def test_the_service_refuses_or_stays_away(proxied: Proxied, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="bucket"):
        list(ObjectStore("s3://nobody/x", tmp_path, patience=5).list(""))
    with pytest.raises(StorageError, match="bucket"):
        ObjectStore("s3://nobody/x", tmp_path, patience=5).put_json_if_absent("x", {})
    store = proxied.store(patience=1)
    proxied.proxy.choose = lambda method, path: "refuse"
    began = time.monotonic()
    with pytest.raises(StorageError, match="still failing after 1 s"):
        store.put_json_if_absent("x", {})
    assert time.monotonic() - began < 30
    proxied.proxy.choose = lambda method, path: ""
    store.put_json_if_absent("x", {})
    proxied.proxy.choose = lambda method, path: "altered" if method == "GET" else ""
    with pytest.raises(IntegrityError, match="delete the object"):
        store.get_path("x")


def test_bytes_that_changed_in_the_store_are_seen_by_a_deep_look(proxied: Proxied) -> None:
    """What a service's own tool, or a fault of its disks, does: other bytes under the old record."""
    store = proxied.store()
    store.put_json_if_absent("x", {"a": 1})
    record = store.sha256("x")
    obstore.put(store._bucket.backend, "x", b'{\n  "a": 2\n}\n', attributes={"sha256": record})
    assert store.sha256("x") == record
    assert store.sha256("x", deep=True) != record
    obstore.put(store._bucket.backend, "y", b"by another program")
    assert store.sha256("y") == store.sha256("y", deep=True)


def test_old_staging_objects_are_swept(proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    store = proxied.store()
    obstore.put(store._bucket.backend, ".tmp/left-behind", b"x")
    assert store.sweep() == 0
    monkeypatch.setattr("bytecache.pipeline.stores.objects.STALE_SECONDS", -60)
    assert store.sweep() == 1


def test_urls_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    with pytest.raises(ConfigError, match="no store for ftp://"):
        open_store("ftp://host/x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(ConfigError, match=r"run\.dir = s3://"):
        open_store("s3://", str(tmp_path))


@pytest.mark.parametrize("place", ["s3:/bucket/run", "gs:/bucket", "hf:/datasets/a/b", "memory:/x", "file:/x"])
def test_an_address_with_one_slash_is_no_folder(place: str) -> None:
    scheme, _, rest = place.partition(":/")
    with pytest.raises(ConfigError, match=f"two slashes, {scheme}://{rest}; a folder of that name is ./{place}"):
        open_store(place)
    assert isinstance(open_store(f"./{place}"), LocalStore)


def test_an_address_without_a_bucket_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write s3://BUCKET/PREFIX"):
        ObjectStore("s3://", tmp_path)


def test_what_is_only_read(tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/shared/set/targets/dataset.json", json.dumps({"a": 1}).encode())
    files.pipe("/shared/set/targets/x.bin", b"123")
    store = ReadOnlyStore("memory://shared/set", tmp_path)
    assert list(store.list("")) == list(store.list("targets")) == ["targets/dataset.json", "targets/x.bin"]
    assert (store.size("targets/x.bin"), store.size("targets"), store.exists("nothing")) == (3, None, False)
    assert store.read_bytes("targets/x.bin") == b"123"
    assert sorted(path.name for path in store.folder("targets").iterdir()) == ["dataset.json", "x.bin"]
    files.pipe("/shared/set/targets/x.bin", b"1234")
    assert store.get_path("targets/x.bin").read_bytes() == b"1234"
    with pytest.raises(ConfigError, match="not a path inside"):
        store.get_path("../x")
    for write in (lambda: store.temp_path("x"), lambda: store.delete("x"), lambda: store.replace_text("x", "")):
        with pytest.raises(StorageError, match="only read"):
            write()
    files.rm("/shared", recursive=True)
