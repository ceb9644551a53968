"""An object behind http:// or https:// as pieces, from any byte on, over one connection.

Time: a transfer may take as long as it takes, but the other side may not be silent for longer than `SILENCE`, nor
send less than `TRICKLE` bytes in five times that. Whoever reads goes on at byte n with a range request after a
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
import ipaddress
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.messages import masked

SILENCE = 60.0
"""Seconds without a byte after which a connection counts as lost."""
TRICKLE = 16 * 1024
"""Bytes that must come in five times `SILENCE`."""
MAX_REDIRECTS = 5
PIECE = 1 << 20
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for those of IPv4."""
_REDIRECTS = (301, 302, 303, 307, 308)
_GONE, _DENIED = (404, 410), (401, 403, 407)


class PassingError(OSError):
    """The server says that it cannot answer now (429, 5xx); `wait` seconds may help."""

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


class _PrivateError(StorageError):
    """The connection leads to a private address, and may not."""


class _NothingMoreError(Exception):
    """The object ends where the transfer is to go on."""


def is_http(url: str) -> bool:
    """Whether it begins with http:// or https://."""
    return url.lower().startswith(("http://", "https://"))


def pieces(url: str, start: int = 0, *, private_redirects: bool = False) -> Iterator[bytes]:
    """The bytes of the object from `start` on. `private_redirects`: follow a redirect to a private address, too.

    Raises FileNotFoundError and PermissionError as the server says; StorageError for a redirect that is not followed
    and an answer that no repetition helps; IntegrityError where the object ends before `start`; PassingError, OSError,
    http.client.HTTPException for what may pass.
    """
    try:
        opened = _open(url, start, private_redirects)
    except _NothingMoreError:
        return
    with opened as answer:
        behind = start if answer.status == 200 else 0  # no ranges here: the known part comes again
        if answer.status == 206 and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            raise StorageError(f"{masked(url)}: answers another range than it is asked for; it cannot be read")
        came, since = 0, time.monotonic()
        while piece := answer.read1(PIECE):
            came += len(piece)
            if time.monotonic() - since > 5 * SILENCE:
                if came < TRICKLE:
                    raise TimeoutError(f"{came} bytes in {5 * SILENCE:.0f} s")
                came, since = 0, time.monotonic()
            if behind >= len(piece):
                behind -= len(piece)
                continue
            yield piece[behind:] if behind else piece
            behind = 0
        if answer.length:  # read1 ends quietly where the connection does
            raise ConnectionError(f"the connection ended {answer.length} bytes early")
        if behind:
            raise IntegrityError("the object became shorter while it was fetched")


def _open(url: str, start: int, private_redirects: bool) -> http.client.HTTPResponse:
    """The answer after redirects. Raises as `pieces` does."""
    bare, login = _without_login(url)
    named = _origin(bare)
    target = bare
    for _ in range(MAX_REDIRECTS + 1):
        headers = {"User-Agent": "bytecache", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if login and _origin(target) == named:
            headers["Authorization"] = login
        public_only = _origin(target) != named and not private_redirects
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
        except _PrivateError as error:
            raise _not_followed(url, target, f"{error}, a private address") from None
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
    scheme = urlsplit(there).scheme
    if scheme not in ("http", "https"):
        raise _not_followed(url, there, f"{scheme}:// is no address of the web")
    if scheme == "http" and urlsplit(target).scheme == "https":
        raise _not_followed(url, there, "it leaves https")
    return _without_login(there)[0]


def _not_followed(url: str, there: str, why: str) -> StorageError:
    return StorageError(
        f"{masked(url)}: a redirect to {masked(there)[:200]} is not followed ({why}); name that address yourself"
        + (", or set dataset.private_redirects = true" if "private" in why else "")
    )


def _without_login(url: str) -> tuple[str, str]:
    """The URL without user and password, and the header that carries them ("" for none)."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, ""
    login = base64.b64encode(unquote(user).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), f"Basic {login}"


def _origin(url: str) -> tuple[str, int]:
    """Host and port. An upgrade to https on the usual ports stays the same origin, for the server's own redirect."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.hostname or "", 443 if port == 80 else port


def is_private(address: str) -> bool:
    """Whether an IP address is not one of the public internet."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if ip in _NAT64:
        mapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not (mapped or ip).is_global or (mapped or ip).is_multicast


class _CheckedPublic(http.client.HTTPConnection):
    """A connection that looks at the address it really has, and ends, before anything is sent to a private one."""

    def connect(self) -> None:
        super().connect()
        peer = self.sock.getpeername()[0]
        if is_private(peer):
            self.close()
            raise _PrivateError(peer)


class _CheckedPublicTls(http.client.HTTPSConnection, _CheckedPublic):
    """The same; the order of its bases lets the check come before the handshake."""


def _opener(public_only: bool, target: str) -> urllib.request.OpenerDirector:
    host = urlsplit(target).hostname or ""
    if public_only and (is_private(host) or host == "localhost" or host.endswith(".localhost")):
        raise _PrivateError(host)
    proxied = urlsplit(target).scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    judged = public_only and not proxied

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(_CheckedPublic if judged else http.client.HTTPConnection, request)

    class Tls(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(_CheckedPublicTls if judged else http.client.HTTPSConnection, request)

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments: Any) -> None:
            return None

    return urllib.request.build_opener(Plain, Tls, Stay)
