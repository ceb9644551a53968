"""A hub that sends more than was declared, sends its reader elsewhere, or refuses: what is read of it has bounds."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.commands import share
from bytecache.pipeline.commands.verify import verify_place
from bytecache.pipeline.stores.hub_session import asking, hub_session
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dataset.verification import verify_dataset
from bytecache.schemas.errors import ConfigError, IntegrityError, StorageError
from bytecache.stages.targets import source
from bytecache.stages.targets.hub_files import hub_file
from tests.support.hub_server import serving
from tests.support.loopback import Loopback
from tests.support.student_data import make_dataset

PLACE = "hf://datasets/me/set"
MOST = 64 << 20
"""Bytes that a sender gets rid of before it is told off: a piece, and what lies in buffers; endless is more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("elsewhere") / "d", documents=6, per_shard=2)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`hub(**methods)`: a hub that holds the set and is asked from now on; its handler is returned."""
    running = []

    def start(**methods: Any) -> Any:
        handler = type("Elsewhere", (serving(folder),), methods)
        running.append(Loopback(handler))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running[-1].url)
        return handler

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield start
    for server in running:
        server.close()


def whole(self: Any) -> None:
    type(self).__mro__[1].do_GET(self)


@pytest.mark.parametrize("name", ["shard", "manifest.parquet", "dataset.json", "README.md"])
def test_of_no_file_more_is_taken_than_was_declared(
    folder: Path, hub: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MAX_MANIFEST", 1 << 20)
    monkeypatch.setattr(source, "MAX_JSON", 1 << 20)
    wanted = read_dataset(folder).entries[1].file if name == "shard" else name
    sent = []

    def endless(self: Any) -> None:
        if not self.path.endswith(f"/{wanted}"):
            return whole(self)
        self.send_response(206 if "Range" in self.headers else 200)
        self.end_headers()
        piece = bytes(1 << 20)
        while sum(sent) < 4 * MOST:
            self.wfile.write(piece)
            sent.append(len(piece))
        return None

    hub(do_GET=endless)
    if name == "README.md":
        said: list[str] = []
        share.pull(PLACE, tmp_path / "copy", said.append)
        assert any("no card can be had" in line and "more than" in line for line in said)
        assert verify_dataset(tmp_path / "copy") == []
    else:
        with pytest.raises(IntegrityError, match="more than"):
            share.pull(PLACE, tmp_path / "copy")
    assert sum(sent) <= 2 * MOST
    held = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert held <= sum(path.stat().st_size for path in folder.iterdir())


def test_a_private_address_is_asked_only_where_that_is_allowed(hub: Any, folder: Path, tmp_path: Path) -> None:
    with Loopback(serving(folder)) as inner:

        def away(self: Any) -> None:
            self._send(b"", 302, {"Location": f"{inner.url}{self.path}"})

        seen = inner.server.RequestHandlerClass.asked  # type: ignore[attr-defined]
        hub(do_GET=away)
        with pytest.raises(StorageError, match=r"not followed .*private address.*dataset\.private_redirects = true"):
            share.pull(PLACE, tmp_path / "copy")
        assert not seen, "nothing was sent there"
        assert (
            share.pull(PLACE, tmp_path / "copy", private_redirects=True)[0] == len(read_dataset(folder).entries)
            and seen
        )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "public.example"])
def test_the_client_keeps_to_public_addresses_too(
    hub: Any, folder: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def lie(name: Any, *rest: Any, **more: Any) -> Any:
        name = "127.0.0.1" if name in ("public.example", b"public.example") else name
        return real(name, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lie)
    with Loopback(serving(folder)) as inner:

        def away(self: Any) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._send(b"", 307, {"Location": f"http://{host}:{inner.port}{self.path}"})

        hub(do_GET=away, do_POST=away)
        seen = inner.server.RequestHandlerClass.asked  # type: ignore[attr-defined]
        place = share.HubPlace.parse(PLACE)
        with hub_session() as api:
            with pytest.raises(StorageError, match=r"is not followed .*a private address"), asking(PLACE):
                api.create_repo("me/set", repo_type="dataset")
            with pytest.raises(StorageError, match=r"is not followed .*a private address"):
                share._listing(api, place, PLACE)
        with pytest.raises(StorageError, match=r"is not followed .*a private address"):
            verify_place(PLACE, str(folder.parent / "scratch"))
        assert not seen
        with hub_session(private_redirects=True) as api:
            assert share._listing(api, place, PLACE) and seen


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_final_and_names_the_token(hub: Any, tmp_path: Path, status: int) -> None:
    asked: list[str] = []

    def refuses(self: Any) -> None:
        asked.append(self.path)
        self._json({"error": "no"}, status)

    hub(do_GET=refuses)
    with pytest.raises(StorageError, match=rf"refuses .HTTP {status}.*set HF_TOKEN"):
        share.pull(PLACE, tmp_path / "copy")
    assert len(asked) == 1


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[tuple[str, str | None]] = []
    monkeypatch.setenv("HF_TOKEN", "hf_secretofthetest")

    def inside(self: Any) -> None:
        keys.append(("inside", self.headers.get("Authorization")))
        whole(self)

    with Loopback(type("Inside", (serving(folder),), {"do_GET": inside})) as inner:

        def away(self: Any) -> None:
            keys.append(("hub", self.headers.get("Authorization")))
            self._send(b"", 302, {"Location": f"{inner.url}{self.path}"})

        hub(do_GET=away)
        share.pull(PLACE, tmp_path / "copy", private_redirects=True)
    assert set(keys) == {("hub", "Bearer hf_secretofthetest"), ("inside", None)}


def test_a_file_that_is_listed_larger_than_declared_is_not_fetched_to_be_verified(
    hub: Any, folder: Path, tmp_path: Path
) -> None:
    shard = read_dataset(folder).entries[0].file

    def larger(self: Any, name: str) -> Any:
        entry = type(self).__mro__[1]._entry(self, name)
        return entry | ({"size": 1 << 40} if name == shard else {})

    handler = hub(_entry=larger)
    with pytest.raises(IntegrityError, match=f"{1 << 40} bytes are listed, at most .* nothing was fetched"):
        verify_place(PLACE, str(tmp_path))
    assert not any(shard in asked for asked in handler.asked if "/resolve/" in asked)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("hf://datasets/me/set/a b.json", "datasets/me/set/resolve/main/a%20b.json"),
        ("hf://datasets/me/set@v2/x/y@z", "datasets/me/set/resolve/v2/x/y%40z"),
        ("hf://datasets/me/set@refs/pr/1/x", "datasets/me/set/resolve/refs%2Fpr%2F1/x"),
        ("hf://me/model/x@y", "me/model/resolve/main/x%40y"),
    ],
)
def test_addresses(hub: Any, url: str, path: str) -> None:
    hub()
    assert hub_file(url).address.split("/", 3)[3] == path
    for bad in ("hf://datasets/me/set", "hf://datasets/me/set/../x", "hf://buckets/me/x/y", "hf://datasets/me@/x"):
        with pytest.raises(ConfigError, match="a place on the hub"):
            hub_file(bad)


def test_a_hub_that_is_switched_off_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with (
        pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set.*unset it"),
        hub_session() as api,
        asking("hf://datasets/owner/name"),
    ):
        api.dataset_info("owner/name")
