"""az:// against Azurite, the emulator of Azure's storage, where `azurite-blob` is installed (npm install -g azurite).

BYTECACHE_AZURITE names the program if it is not on the path.
"""

import base64
import hashlib
import hmac
import itertools
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bytecache.pipeline.stores import Store
from bytecache.pipeline.stores.objects import ObjectStore
from tests.support.store_suite import StoreSuite, write_big

PROGRAM = os.environ.get("BYTECACHE_AZURITE") or shutil.which("azurite-blob")
ACCOUNT, CONTAINER = "devstoreaccount1", "bytecache"
KEY = base64.b64encode(b"a key of our own, known to all tests").decode()
numbers = itertools.count()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="needs azurite-blob (npm install -g azurite)"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address, with an empty container."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert PROGRAM
    options = ["--blobPort", str(port), "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]
    log = (tmp_path_factory.mktemp("azurite") / "log.txt").open("w")
    process = subprocess.Popen(
        [PROGRAM, *options, "--disableTelemetry"],
        stdout=log, stderr=log, env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                _create_container(address)
                break
            except urllib.error.URLError:
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()
        log.close()


def _create_container(address: str) -> None:
    """One request with the service's Shared Key signature."""
    headers = {"x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), "x-ms-version": "2021-08-06"}
    named = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    text = "PUT" + "\n" * 12 + named + f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    mark = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    request = urllib.request.Request(
        f"{address}/{ACCOUNT}/{CONTAINER}?restype=container", method="PUT",
        headers={**headers, "Authorization": f"SharedKey {ACCOUNT}:{mark}", "Content-Length": "0"},
    )  # fmt: skip
    urllib.request.urlopen(request, timeout=5).close()


class TestAzure(StoreSuite):
    @pytest.fixture
    def store(self, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        for name, value in {
            "AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": server,
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        return ObjectStore(f"az://{CONTAINER}/run-{next(numbers)}", tmp_path, patience=20, timeout=10)

    def test_large_objects_go_up_in_parts_and_still_only_once(self, store: Store) -> None:
        assert isinstance(store, ObjectStore)
        store._bucket.single_put = 1_000_000
        assert store.put_if_absent("dump", write_big(store, 20_000_000))
        assert store.size("dump") == 20_000_000
        assert store.sha256("dump") == store.sha256("dump", deep=True)
        assert not store.put_if_absent("dump", store.write_temp("dump", bytes(2_000_000)))
        assert list(store.list("")) == ["dump"]
