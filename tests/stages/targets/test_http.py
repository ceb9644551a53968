"""Transfers over servers on loopback that break, stall, trickle and redirect."""

import base64
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from bytecache.schemas import web
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.web import is_private
from bytecache.stages.targets import http as transfer
from bytecache.stages.targets import source
from bytecache.stages.targets.http import pieces
from bytecache.stages.targets.source import Access, fetch_bytes, fetch_file
from tests.support.loopback import Loopback, Quiet

DATA = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(DATA).hexdigest()
ALLOWED = Access(private_redirects=True)


class Server(Quiet, BaseHTTPRequestHandler):
    """Serves DATA; its class attributes say how it fails. `asked`: the Range headers it saw."""

    protocol_version = "HTTP/1.1"
    cuts: list[int]
    asked: list[str | None]
    ranges = True
    pause = 0.0
    redirect = ""
    status = 0

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Range"))
        if self.redirect and self.path == "/x":
            return self._head(302, 0, Location=self.redirect)
        if self.status:
            return self._head(self.status, 0)
        start = 0
        if self.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(DATA):
                return self._head(416, 0, Content_Range=f"bytes */{len(DATA)}")
        body = DATA[start:]
        partly = {"Content-Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"} if start else {}
        self._head(206 if start else 200, len(body), **partly)
        cut = self.cuts.pop(0) if self.cuts else len(body)
        for at in range(0, min(cut, len(body)), 1 << 15):
            self.wfile.write(body[at : min(at + (1 << 15), cut)])
            self.wfile.flush()
            time.sleep(self.pause)
        if cut < len(body):
            self.close_connection = True
        return None

    def _head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PATIENCE", 1.0)
    monkeypatch.setattr(source, "PROGRESS", 1000)


@pytest.fixture
def serve() -> Iterator[Any]:
    running = []

    def start(**attributes: Any) -> tuple[str, list[str | None]]:
        asked: list[str | None] = []
        kind = type("Case", (Server,), {"cuts": [], "asked": asked, **attributes})
        running.append(Loopback(kind))
        return running[-1].url, asked

    yield start
    for server in running:
        server.close()


def test_a_transfer_that_breaks_often_goes_on_where_it_ended(serve: Any, tmp_path: Path) -> None:
    url, asked = serve(cuts=[50_000, 60_000, 1_000, 70_000, 5_000, 200_000, 10_000])
    fetch_file(f"{url}/x", tmp_path / "x", len(DATA), SHA256)
    assert (tmp_path / "x").read_bytes() == DATA
    starts = [int(one.removeprefix("bytes=")[:-1]) if one else 0 for one in asked]
    assert starts == sorted(set(starts)) and len(starts) == 8, "never again at a byte that came already"


def test_a_server_without_ranges_is_read_past_what_is_known(serve: Any) -> None:
    url, asked = serve(cuts=[50_000, 100_000], ranges=False)
    assert fetch_bytes(f"{url}/x", len(DATA)) == DATA and len(asked) == 3


def test_connections_that_bring_nothing_end_it_and_say_what_came(serve: Any) -> None:
    url, asked = serve(cuts=[50_000] + [5] * 100)
    with pytest.raises(StorageError, match=r"cannot be read for 1 s, 5\d{4} bytes came .*ended .* early"):
        fetch_bytes(f"{url}/x", len(DATA))
    assert 2 <= len(asked) < 100


@pytest.mark.slow
def test_time_is_bounded_by_silence_not_by_length(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SILENCE", 0.5)
    monkeypatch.setattr(web, "TRICKLE_S", 0.3)
    url, asked = serve(pause=0.1)  # 16 pauses: three times as long as silence may be
    assert fetch_bytes(f"{url}/x", len(DATA)) == DATA and len(asked) == 1
    url, asked = serve(pause=3.0)
    monkeypatch.setattr(source, "PATIENCE", 0.0)
    with pytest.raises(StorageError, match=r"timed out|TimeoutError"):
        fetch_bytes(f"{url}/x", len(DATA))


@pytest.mark.parametrize("part", ["line", "headers", "body", "refusal"])
def test_a_trickle_is_silence(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of an answer it is that drips."""
    monkeypatch.setattr(web, "TRICKLE_S", 0.2)
    monkeypatch.setattr(source, "PATIENCE", 0.0)
    stop = threading.Event()

    class Drip(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            begin = {"line": b"", "headers": b"HTTP/1.1 200 OK\r\nX: ", "body": b"HTTP/1.1 200 OK\r\n\r\n"}
            with suppress(OSError):
                self.wfile.write(begin.get(part, b"HTTP/1.1 302 Found\r\nLocation: /"))
                while not stop.is_set():
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.02)

    with Loopback(Drip) as server:
        with pytest.raises(StorageError, match=r"bytes in \d s, at least 16384 must come"):
            fetch_bytes(f"{server.url}/x", 1 << 20)
        stop.set()


@pytest.mark.parametrize("scheme", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/", "data:text/plain,x"])
def test_other_schemes_are_not_followed(serve: Any, scheme: str) -> None:
    url, asked = serve(redirect=scheme)
    for access in (Access(), ALLOWED):
        with pytest.raises(StorageError, match="is not followed"):
            fetch_bytes(f"{url}/x", 100, access)
    assert len(asked) == 2, "asked once each: a refusal is not tried again"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_a_redirect_into_a_private_network_is_followed_only_where_that_is_allowed(serve: Any, host: str) -> None:
    inner, seen = serve()
    port = inner.rsplit(":", 1)[1]
    url, _ = serve(redirect=f"http://{host}:{port}/secret")
    with pytest.raises(StorageError, match=r"is not followed .*private address.*dataset\.private_redirects = true"):
        fetch_bytes(f"{url}/x", len(DATA))
    assert not seen, "not a byte was sent there"
    if not host.startswith("["):
        assert fetch_bytes(f"{url}/x", len(DATA), ALLOWED) == DATA and len(seen) == 1


def test_a_redirect_on_the_host_that_the_user_named_is_followed(serve: Any) -> None:
    url, asked = serve(redirect="/y")
    assert fetch_bytes(f"{url}/x", len(DATA)) == DATA and len(asked) == 2
    url, asked = serve(redirect="/x")
    with pytest.raises(StorageError, match="more than 5 redirects"):
        fetch_bytes(f"{url}/x", len(DATA))


def test_a_password_goes_to_its_host_and_into_no_message() -> None:
    seen: list[tuple[str, str | None]] = []

    class Ask(Quiet, BaseHTTPRequestHandler):
        target = ""

        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            first = self.path.startswith("/x")
            self.send_response(302 if first else 403)
            if first:
                self.send_header("Location", self.target)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with (
        Loopback(type("There", (Ask,), {})) as there,
        Loopback(type("Here", (Ask,), {"target": f"{there.url}/y"})) as here,
    ):
        url = here.url.replace("http://", "http://me:hunter22@") + "/x?token=t0ken"
        with pytest.raises(StorageError, match="access refused") as caught:
            fetch_bytes(url, 100, ALLOWED)
        assert "hunter22" not in str(caught.value) and "t0ken" not in str(caught.value)
    assert [path for path, _ in seen] == ["/x?token=t0ken", "/y"]
    assert seen[0][1] == "Basic " + base64.b64encode(b"me:hunter22").decode()
    assert seen[1][1] is None, "another host does not get the password"


@pytest.mark.parametrize(("status", "kind", "words", "tries"), [
    (404, IntegrityError, "missing at the source", 1),
    (403, StorageError, "access refused", 1),
    (400, StorageError, "answers HTTP 400", 1),
    (503, StorageError, "cannot be read for 1 s", 2),
    (429, StorageError, "cannot be read for 1 s", 2),
])  # fmt: skip
def test_what_the_server_says(serve: Any, status: int, kind: type, words: str, tries: int) -> None:
    url, asked = serve(status=status)
    with pytest.raises(kind, match=words):
        fetch_bytes(f"{url}/x", 100)
    assert len(asked) == 1 if tries == 1 else len(asked) >= tries


def test_an_object_that_became_shorter_is_wrong_bytes_and_no_end_of_tries(serve: Any) -> None:
    for ranges in (True, False):
        url, _ = serve(ranges=ranges)
        with pytest.raises(IntegrityError, match="became shorter"):
            list(pieces(f"{url}/x", len(DATA) + 5))


@pytest.mark.parametrize(("address", "private"), [
    ("127.0.0.1", True), ("10.1.2.3", True), ("169.254.169.254", True), ("192.168.0.1", True), ("100.64.0.1", True),
    ("0.0.0.0", True), ("224.0.0.1", True), ("::1", True), ("fe80::1%eth0", True), ("fd00::1", True),
    ("::ffff:10.0.0.1", True), ("64:ff9b::a9fe:a9fe", True), ("2002:7f00:1::", True),
    ("93.184.216.34", False), ("2606:2800:220:1:248:1893:25c8:1946", False), ("example.org", False),
])  # fmt: skip
def test_private_addresses(address: str, private: bool) -> None:
    assert is_private(address) is private


def test_a_transfer_that_broke_at_the_very_end_is_whole(serve: Any) -> None:
    url, _ = serve()
    assert list(pieces(f"{url}/x", len(DATA))) == []


def test_a_connection_is_judged_by_the_address_it_has(monkeypatch: pytest.MonkeyPatch, serve: Any) -> None:
    """A name that resolves to a private address, whatever it said a moment ago."""
    inner, seen = serve()
    port = int(inner.rsplit(":", 1)[1])
    url, _ = serve(redirect=f"http://public.example:{port}/x")
    real = socket.getaddrinfo

    def lie(host: Any, *rest: Any, **more: Any) -> Any:
        return real("127.0.0.1" if host == "public.example" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lie)
    with pytest.raises(StorageError, match=r"is not followed .127\.0\.0\.1, a private address"):
        fetch_bytes(f"{url}/x", len(DATA))
    assert not seen


@pytest.mark.parametrize(("page", "said"), [
    (b"<!DOCTYPE html><title>Log in</title>", "it begins with '<!DOCTYPE html><title>Log in</title>'"),
    (b"", "it begins with ''"), (b"\x1b[2Jno", r"it begins with '\\\\x1b\[2Jno'"), (b"\x1f\x8b\x08", "is not JSON"),
])  # fmt: skip
def test_a_page_in_the_place_of_an_index_is_shown(page: bytes, said: str, tmp_path: Path) -> None:
    """What portals and servers of single pages answer to everything, with status 200."""

    class Portal(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    with Loopback(Portal) as server, pytest.raises(IntegrityError, match=said):
        source.open_dataset(server.url, cache_dir=tmp_path)
