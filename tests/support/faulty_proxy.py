"""An HTTP proxy in front of an S3 server on loopback that fails as networks and services fail.

Faults: `refuse` answers 503; `slow` waits before it forwards; `torn_up` cuts the request's body half way to the
server; `lost` forwards, then closes without an answer; `torn_down` cuts the answer's body half way; `altered` flips a
byte of it.
Writes that create are serialised: the server under test looks and writes in two steps, which a real one does not.
"""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from tests.support.loopback import Loopback, Quiet

Choose = Callable[[str, str], str]
"""(method, path) -> fault, or "" for none."""


class FaultyProxy(Loopback):
    """Runs in threads of this process; `choose` decides each request's fault, `seen` counts what was done."""

    def __init__(self, target_port: int, choose: Choose, slow_seconds: float = 0.2) -> None:
        self.choose, self.slow_seconds = choose, slow_seconds
        self.seen: Counter[str] = Counter()
        proxy, writes = self, threading.Lock()

        class Handler(Quiet):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                fault = proxy.choose(self.command, self.path)
                proxy.seen[fault or "none"] += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fault == "refuse":
                    self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>", 0)
                    return
                if fault == "slow":
                    time.sleep(proxy.slow_seconds)
                if fault == "torn_up":
                    self.forward_torn(body)
                    self.close_connection = True
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
                if self.command in ("PUT", "POST"):
                    with writes:
                        status, headers, raw = self.forward(upstream, body)
                else:
                    status, headers, raw = self.forward(upstream, body)
                if fault == "lost":
                    self.close_connection = True
                    return
                cut = 0
                if fault == "torn_down" and len(raw) > 1:
                    cut = len(raw) // 2
                if fault == "altered" and raw and self.command == "GET" and status == 200:
                    raw = raw[:-1] + bytes([raw[-1] ^ 1])
                self.answer(status, headers, raw, cut)

            def forward(self, upstream: http.client.HTTPConnection, body: bytes) -> tuple[int, dict[str, str], bytes]:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                upstream.request(self.command, self.path, body, headers)
                reply = upstream.getresponse()
                raw = reply.read()
                upstream.close()
                return reply.status, dict(reply.getheaders()), raw

            def forward_torn(self, body: bytes) -> None:
                lines = [f"{self.command} {self.path} HTTP/1.1"] + [f"{k}: {v}" for k, v in self.headers.items()]
                with socket.create_connection(("127.0.0.1", target_port)) as upstream:
                    upstream.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: len(body) // 2])

            def answer(self, status: int, headers: dict[str, str], raw: bytes, cut: int) -> None:
                self.send_response_only(status)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(raw)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(raw[: len(raw) - cut])
                if cut:
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        super().__init__(Handler)


def sometimes(rate: float, seed: int, faults: tuple[str, ...]) -> Choose:
    """Each request fails with probability `rate`, in one of the given ways."""
    generator, lock = random.Random(seed), threading.Lock()

    def choose(method: str, path: str) -> str:
        with lock:
            return generator.choice(faults) if generator.random() < rate else ""

    return choose


def once(fault: str, method: str) -> Choose:
    """The first request of this method fails; all others pass."""
    left, lock = [fault], threading.Lock()

    def choose(asked: str, path: str) -> str:
        with lock:
            return left.pop() if asked == method and left else ""

    return choose
