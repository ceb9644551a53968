"""Requests go where they were sent, and answers come at a pace: what all that asks the web has in common.

No secret goes to another host than the one it is for, nothing to a private address that nobody named.

A stranger's server may send its reader to places that only this machine can reach: a cloud's metadata service, a
router. What is asked of a host that the user named himself goes there wherever it is; what a server names must be
public, unless the user allowed the other. The address that counts is the one that the connection really has.

An answer that has begun brings `TRICKLE` bytes in every `TRICKLE_S` seconds until it ends: a time-out of the socket is
one of silence, and a byte a minute is none. The clock is below the reader of headers, chunks and bodies.
"""

import http.client
import io
import ipaddress
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from bytecache.schemas.errors import StorageError
from bytecache.schemas.messages import masked

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for those of IPv4."""


TRICKLE, TRICKLE_S = 16 * 1024, 300.0
"""Bytes that an answer must bring in so many seconds, once it has begun."""


class PrivateAddressError(StorageError):
    """A connection leads to a private address, and may not."""


class _Paced(io.RawIOBase):
    """A socket's bytes. Raises TimeoutError where an answer that has begun brings next to nothing."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw, self._came, self._since = raw, 0, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        length = self._raw.readinto(buffer)
        now = time.monotonic()
        self._since = self._since or now
        self._came += length or 0
        if now - self._since > TRICKLE_S:
            if length and self._came < TRICKLE:
                raise TimeoutError(f"{self._came} bytes in {now - self._since:.0f} s, at least {TRICKLE} must come")
            self._came, self._since = 0, now
        return length

    def close(self) -> None:
        self._raw.close()
        super().close()


class PacedResponse(http.client.HTTPResponse):
    """An answer under that clock, from its first line on."""

    def __init__(self, sock: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Paced(self.fp.detach()))


class PacedConnection(http.client.HTTPConnection):
    """Its answers are `PacedResponse`s."""

    response_class = PacedResponse


class PacedTlsConnection(http.client.HTTPSConnection):
    """The same."""

    response_class = PacedResponse


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(PacedConnection, request)


class _Tls(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(PacedTlsConnection, request)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def staying_opener() -> urllib.request.OpenerDirector:
    """Opens addresses and follows no redirect: the library would send keys along, to whatever host a server names.

    A redirect is an HTTPError like any other refusal. Answers are paced.
    """
    return urllib.request.build_opener(_Stay, _Plain, _Tls)


def origin(url: str) -> tuple[str, int]:
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


def refuse_private(address: str) -> None:
    """Raises PrivateAddressError for a host that is spelled as a private address, or is this machine by name."""
    if is_private(address) or address == "localhost" or address.endswith(".localhost"):
        raise PrivateAddressError(address)


def is_proxied(url: str) -> bool:
    """Whether a proxy of the environment connects to it: then the address of the connection is the proxy's."""
    parts = urlsplit(url)
    return parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or "")


def refuse_downgrade(url: str, target: str, there: str) -> None:
    """Raises StorageError where `url`, by way of `target`, leads on to what is not http(s), or from https to http."""
    scheme = urlsplit(there).scheme
    if scheme not in ("http", "https"):
        raise not_followed(url, there, f"{scheme}:// is no address of the web")
    if scheme == "http" and urlsplit(target).scheme == "https":
        raise not_followed(url, there, "it leaves https")


def not_followed(url: str, there: str, why: str, otherwise: str = "") -> StorageError:
    """What is said of an address that a server names and that is not asked; `otherwise`: another remedy."""
    return StorageError(
        f"{masked(url)}: a redirect to {masked(there)[:200]} is not followed ({why}); name that address yourself"
        + otherwise
    )


def leads_to_private(url: str, there: str, address: str) -> StorageError:
    """What is said where `there` is, or is at, a private address."""
    return not_followed(url, there, f"{address}, a private address", ", or set dataset.private_redirects = true")
