"""An object behind http:// or https:// as pieces, from any byte on, over one connection.

Time: a transfer may take as long as it takes, but the other side may not be silent for longer than `SILENCE`, nor
trickle (`schemas.web`). Whoever reads goes on at byte n with a range request after a
connection broke; a server that knows no ranges sends the object anew, and what is known of it is read past.

Redirects: a server may send its reader elsewhere, and a stranger's server may send it to places that only this machine
can reach: a cloud's metadata service, a router, a file. So a redirect is followed (`MAX_REDIRECTS` times) only over
http or https, never from https back to http, and to a private address (loopback, link-local, RFC 1918, ...) only where
the user allowed that or named the same host and port himself. The address that counts is the one that the connection
really has, looked at before anything is sent there. A password goes to the host that the user gave it for.

Proxies are those of the environment (HTTPS_PROXY, ...); behind one it is the proxy that connects, and only addresses
that are spelled out can be judged here.
"""

import base64
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.messages import masked
from bytecache.schemas.web import (
    PacedConnection,
    PacedTlsConnection,
    PrivateAddressError,
    is_private,
    is_proxied,
    leads_to_private,
    origin,
    refuse_downgrade,
    refuse_private,
)

SILENCE = 60.0
"""Seconds without a byte after which a connection counts as lost."""
MAX_REDIRECTS = 5
PIECE = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
_GONE, _DENIED = (404, 410), (401, 403, 407)


class PassingError(OSError):
    """The server says that it cannot answer now (429, 5xx); `wait` seconds may help."""

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


class _NothingMoreError(Exception):
    """The object ends where the transfer is to go on."""


def is_http(url: str) -> bool:
    """Whether it begins with http:// or https://."""
    return url.lower().startswith(("http://", "https://"))


def pieces(url: str, start: int = 0, *, private_redirects: bool = False, login: str = "") -> Iterator[bytes]:
    """The bytes of the object from `start` on. `private_redirects`: follow a redirect to a private address, too.

    `login`: what the host of `url` alone gets as Authorization; "" = the user and password in the URL, if any.

    Raises FileNotFoundError and PermissionError as the server says; StorageError for a redirect that is not followed
    and an answer that no repetition helps; IntegrityError where the object ends before `start`; PassingError, OSError,
    http.client.HTTPException for what may pass.
    """
    try:
        opened = _open(url, start, private_redirects, login)
    except _NothingMoreError:
        return
    with opened as answer:
        behind = start if answer.status == 200 else 0  # no ranges here: the known part comes again
        if answer.status == 206 and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            raise StorageError(f"{masked(url)}: answers another range than it is asked for; it cannot be read")
        while piece := answer.read1(PIECE):
            if behind >= len(piece):
                behind -= len(piece)
                continue
            yield piece[behind:] if behind else piece
            behind = 0
        if answer.length:  # read1 ends quietly where the connection does
            raise ConnectionError(f"the connection ended {answer.length} bytes early")
        if behind:
            raise IntegrityError("the object became shorter while it was fetched")


def _open(url: str, start: int, private_redirects: bool, login: str) -> http.client.HTTPResponse:
    """The answer after redirects. Raises as `pieces` does."""
    bare, own_login = _without_login(url)
    login = login or own_login
    named = origin(bare)
    target = bare
    for _ in range(MAX_REDIRECTS + 1):
        headers = {"User-Agent": "bytecache", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if login and origin(target) == named:
            headers["Authorization"] = login
        public_only = origin(target) != named and not private_redirects
        try:
            request = urllib.request.Request(target, headers=headers)
            answer: http.client.HTTPResponse = _opener(public_only, target).open(request, timeout=SILENCE)
            return answer
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in _REDIRECTS:
                    raise _refusal(url, error, start) from None
                target = _next(url, target, error.headers.get("Location"))
        except urllib.error.URLError as error:
            if isinstance(error.reason, BaseException):
                raise error.reason from None  # a time-out, a refused connection, a certificate
            raise ConnectionError(str(error.reason)) from None
        except PrivateAddressError as error:
            raise leads_to_private(url, target, str(error)) from None
    raise StorageError(f"{masked(url)}: more than {MAX_REDIRECTS} redirects; name the address that it ends at")


def _refusal(url: str, error: urllib.error.HTTPError, start: int) -> Exception:
    if error.code in _GONE:
        return FileNotFoundError(f"HTTP {error.code}")
    if error.code in _DENIED:
        return PermissionError(f"HTTP {error.code}")
    if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
        return _NothingMoreError()
    if error.code == 416:
        return IntegrityError("the object became shorter while it was fetched")
    if error.code in (408, 425, 429) or error.code >= 500:
        wait = error.headers.get("Retry-After") or ""
        return PassingError(f"HTTP {error.code}", min(float(wait), SILENCE) if wait.isdecimal() else 0.0)
    return StorageError(f"{masked(url)}: the server answers HTTP {error.code} ({error.reason}); check the address")


def _next(url: str, target: str, location: str | None) -> str:
    """Where a redirect leads. Raises StorageError where it may not."""
    if not location:
        raise StorageError(f"{masked(url)}: a redirect to nowhere; check the address")
    there = urljoin(target, location)
    refuse_downgrade(url, target, there)
    return _without_login(there)[0]


def _without_login(url: str) -> tuple[str, str]:
    """The URL without user and password, and the header that carries them ("" for none)."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, ""
    login = base64.b64encode(unquote(user).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), f"Basic {login}"


class _CheckedPublic(PacedConnection):
    """A connection that looks at the address it really has, and ends, before anything is sent to a private one."""

    def connect(self) -> None:
        super().connect()
        peer = self.sock.getpeername()[0]
        if is_private(peer):
            self.close()
            raise PrivateAddressError(peer)


class _CheckedPublicTls(PacedTlsConnection, _CheckedPublic):
    """The same; the order of its bases lets the check come before the handshake."""


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """The authorities that this machine trusts; those of the package certifi, if it is there, where it names none."""
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if not context.get_ca_certs() and not paths.cafile and not (paths.capath and any(Path(paths.capath).iterdir())):
        with suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    return context


def _opener(public_only: bool, target: str) -> urllib.request.OpenerDirector:
    if public_only:
        refuse_private(urlsplit(target).hostname or "")
    judged = public_only and not is_proxied(target)

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(_CheckedPublic if judged else PacedConnection, request)

    class Tls(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            kind = _CheckedPublicTls if judged else PacedTlsConnection
            return self.do_open(kind, request, context=_trusted())

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments: Any) -> None:
            return None

    return urllib.request.build_opener(Plain, Tls, Stay)
