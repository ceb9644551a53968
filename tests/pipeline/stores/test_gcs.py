"""gs:// against a server of our own that keeps to Google's documentation, alone and behind a proxy that fails."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from bytecache.pipeline.stores import Store, bucket
from bytecache.pipeline.stores.objects import ObjectStore
from bytecache.schemas.errors import StorageError
from tests.support.faulty_proxy import FaultyProxy, once, sometimes
from tests.support.gcs_server import PAGE, GCSServer
from tests.support.store_suite import StoreSuite, write_big

FAULTS = ("refuse", "slow", "torn_up", "lost", "torn_down", "altered")
numbers = itertools.count()


class Service:
    """Stores of one prefix, each with a scratch folder of its own, as on different machines."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = GCSServer()
        self.proxy = FaultyProxy(self.server.port, lambda method, path: "")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{self.proxy.port}")
        self.folder, self.url = folder, f"gs://bucket/run-{next(numbers)}"

    def store(self, patience: float = 20.0) -> ObjectStore:
        return ObjectStore(self.url, self.folder / f"machine-{next(numbers)}", patience=patience, timeout=5.0)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service(tmp_path, monkeypatch)
    yield made
    made.proxy.close()
    made.server.close()


class TestGCS(StoreSuite):
    @pytest.fixture
    def store(self, service: Service) -> Store:
        return service.store()


@pytest.mark.slow
class TestGCSBehindFaults(StoreSuite):
    """One request in four fails, in every way there is."""

    @pytest.fixture
    def store(self, service: Service) -> Store:
        service.proxy.choose = sometimes(0.25, next(numbers), FAULTS)
        return service.store(patience=60)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_creating_is_survived_and_the_winner_known(service: Service, fault: str) -> None:
    """`lost`: the repeated request meets 412, and the tag tells that the object is ours."""
    service.proxy.choose = once(fault, "PUT")
    assert service.store().put_json_if_absent("lease", {"owner": 1})
    assert service.proxy.seen[fault] == 1
    assert ("PreconditionFailed" in service.server.refused) == (fault == "lost")
    assert not service.store().put_json_if_absent("lease", {"owner": 1})
    assert service.server.refused[-1] == "PreconditionFailed"


@pytest.mark.parametrize(
    "fault", ["lost", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("", "refuse", "torn_up"))]
)
def test_large_objects_go_up_in_parts_and_still_only_once(service: Service, fault: str) -> None:
    first, second = service.store(), service.store()
    for store in (first, second):
        store._bucket.single_put = 1_000_000
    service.proxy.choose = once(fault, "PUT") if fault else service.proxy.choose
    path = write_big(first, 20_000_000)
    raw = path.read_bytes()
    assert first.put_if_absent("dump", path)
    assert second.read_bytes("dump") == raw
    assert first.sha256("dump") == second.sha256("dump", deep=True)
    assert not second.put_if_absent("dump", second.write_temp("dump", bytes(2_000_000)))
    assert second.put_if_absent("dump", write_big(second, 20_000_000))  # equal: as good as ours
    # A copy keeps the hash among the metadata here, so that no note is needed; nothing staged is left.
    assert [key.split("/", 1)[1] for key in service.server.objects] == ["dump"]


def test_objects_too_large_for_a_copy_go_up_in_parts(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytecache.pipeline.stores.bucket.PART", 5 * 2**20)
    monkeypatch.setattr("bytecache.pipeline.stores.bucket.N_PARTS", 3)
    store = service.store()
    store._bucket.single_put, store._bucket.copy_limit = 1_000_000, 6_000_000
    assert store.put_if_absent("dump", write_big(store, 20_000_000))
    assert store.sha256("dump") == store.sha256("dump", deep=True)
    assert not store.put_if_absent("dump", store.write_temp("dump", bytes(7_000_000)))


@pytest.mark.slow
def test_an_object_takes_one_write_a_second(service: Service) -> None:
    """As heartbeats and reports are written: 429 is waited for."""
    service.server.rate = True
    store = service.store()
    for beat in range(3):
        store.replace_text("worker", f"{beat}")
    assert store.read_bytes("worker") == b"2"
    assert "SlowDown" in service.server.refused


def test_ranges_and_pages(service: Service) -> None:
    store = service.store()
    for number in range(2 * PAGE + 1):
        store.put_json_if_absent(f"units/{number:02d}", {"number": number})
    assert list(store.list("units")) == [f"units/{number:02d}" for number in range(2 * PAGE + 1)]
    assert bytes(obstore.get_range(store._bucket.backend, "units/00", start=0, length=5)) == b'{\n  "'


def test_a_missing_bucket_is_refused_by_name(service: Service, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="bucket"):
        ObjectStore("gs://nobody/x", tmp_path, patience=5).put_json_if_absent("a", {})
    with pytest.raises(StorageError, match="bucket"):
        list(ObjectStore("gs://nobody/x", tmp_path, patience=5).list(""))


def test_an_address_may_be_a_url(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{os.environ['STORAGE_EMULATOR_HOST']}/")
    store = service.store()
    assert store.put_json_if_absent("a", {}) and store.read_bytes("a") == b"{}\n"


def test_a_listing_that_goes_round_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that answers every page with the same names and "go on" would be listened to for ever."""
    store = service.store()
    for number in range(3):
        store.put_json_if_absent(f"a/{number}", {})
    page = service.server.page
    again = b"<NextContinuationToken>x</NextContinuationToken></ListBucketResult>"

    def round_and_round(query: dict[str, str]) -> bytes:
        query.pop("continuation-token", None)
        return page(query).replace(b"</ListBucketResult>", again)

    monkeypatch.setattr(service.server, "page", round_and_round)
    with pytest.raises(StorageError, match=r"listing a: the service's listing does not end \(3 keys so far"):
        list(store.list("a"))


def test_a_listing_and_a_small_object_have_a_size(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    store = service.store()
    for number in range(PAGE + 1):
        store.put_json_if_absent(f"a/{number}", {"text": "x" * 100})
    assert len(list(store.list("a"))) == PAGE + 1
    monkeypatch.setattr(bucket, "MAX_SMALL", 50)
    with pytest.raises(StorageError, match=r"a/0: \d+ bytes, at most 50 are read"):
        store.read_bytes("a/0")
    monkeypatch.setattr(bucket, "MAX_KEYS", PAGE)
    with pytest.raises(StorageError, match=rf"does not end \({PAGE + 1} keys so far, at most {PAGE}\)"):
        list(store.list("a"))
