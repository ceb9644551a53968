"""The hub's client, held to bounds: what it answers has a size and a time, and whatever else it says is a refusal.

The client believes its server. It reads an answer of any length, unpacks what is packed, follows a listing for as long
as that goes on, sends what it has to wherever a redirect or an address in an answer leads, and raises whatever its own
code raises on an answer that is made otherwise than it expects. Here it goes to the hub that the user named, and
elsewhere only to public addresses, unless the user allowed others (`schemas.web`).

Files are uploaded to a hub of one's own without Xet: that library asks addresses of the hub's answers by itself.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bytecache.schemas.errors import BytecacheError, ConfigError, StorageError
from bytecache.schemas.messages import one_line
from bytecache.schemas.web import (
    PrivateAddressError,
    is_private,
    is_proxied,
    leads_to_private,
    origin,
    refuse_downgrade,
    refuse_private,
)
from bytecache.stages.targets.hub_files import switched_off

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_ANSWER = 1 << 26
"""Bytes of one answer: a page of a listing has a thousand files in half a megabyte."""
ANSWER_S = 300.0
"""Seconds without a byte of an answer, and seconds that an answer may take once it has begun."""

XET_HUBS = ("huggingface.co", "hf.co")
"""Hosts whose answers may name where Xet uploads to."""


class _UnboundedError(Exception):
    """An answer that is more than was asked for."""


@contextmanager
def hub_session(*, private_redirects: bool = False) -> "Iterator[HfApi]":
    """The client, whose answers are bounded for as long as this lasts.

    `private_redirects`: go to private addresses, too, where the hub sends it.
    """
    from huggingface_hub import HfApi, constants, get_session

    session: Any = get_session()
    api = HfApi()
    hooks, timeout, without_xet = session.event_hooks, session.timeout, constants.HF_HUB_DISABLE_XET

    def judge(request: Any) -> None:
        _judge(request, str(api.endpoint), private_redirects)

    session.event_hooks = {
        "request": [*hooks["request"], _ask_plainly, judge],
        "response": [*hooks["response"], _bound],
    }
    session.timeout = ANSWER_S
    constants.HF_HUB_DISABLE_XET = without_xet or origin(str(api.endpoint))[0] not in XET_HUBS
    try:
        yield api
    finally:
        session.event_hooks, session.timeout, constants.HF_HUB_DISABLE_XET = hooks, timeout, without_xet


def _judge(request: Any, hub: str, private_redirects: bool) -> None:
    """Let a request go to the hub and, if it is not of the hub, to public addresses. Raises StorageError."""
    there = str(request.url)
    refuse_downgrade(hub, hub, there)
    if private_redirects or origin(there) == origin(hub):
        return

    def look(event: str, told: Any) -> None:
        if event == "connection.connect_tcp.complete":
            stream = told["return_value"]
            peer = stream.get_extra_info("server_addr")
            if peer and is_private(peer[0]):
                stream.close()
                raise leads_to_private(hub, there, peer[0])

    try:
        refuse_private(request.url.host)
    except PrivateAddressError as error:
        raise leads_to_private(hub, there, str(error)) from None
    if not is_proxied(there):
        request.extensions = {**request.extensions, "trace": look}


def _ask_plainly(request: Any) -> None:
    # A packed answer has no size that could be known before it is unpacked.
    request.headers["Accept-Encoding"] = "identity"


def _bound(response: Any) -> None:
    """Let an answer be read as far as `MAX_ANSWER` and `ANSWER_S` go. Raises _UnboundedError."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _UnboundedError("is packed, which was not asked for")
    read = response.iter_raw

    def pieces(*arguments: Any, **options: Any) -> Iterator[bytes]:
        size, end = 0, time.monotonic() + ANSWER_S
        for piece in read(*arguments, **options):
            size += len(piece)
            if size > MAX_ANSWER:
                raise _UnboundedError(f"is longer than {MAX_ANSWER >> 20} MiB")
            if time.monotonic() > end:
                raise _UnboundedError(f"has not ended after {ANSWER_S:.0f} s")
            yield piece

    response.iter_raw = pieces


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Around requests: what the client raises becomes a refusal with its remedy.

    Raises ConfigError where there is no token or the hub is switched off, StorageError for all else that is the
    hub's. A fault of this machine's files (OSError with a name) and what is no failure of an answer pass through.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # The library under the client changes its name between releases; the client derives its own errors of that one's.
    connection_errors = tuple(
        base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception) and base is not OSError
    )
    try:
        yield
    except (BytecacheError, MemoryError):
        raise
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"{url}: no token for the hub; set HF_TOKEN, or log in with `hf auth login`") from error
    except Exception as error:  # the client's own code fails in as many ways as an answer can be wrong
        for cause in _causes(error):
            if isinstance(cause, HfHubHTTPError):
                raise _refusal(url, cause) from error
            if isinstance(cause, BytecacheError):
                raise cause from None
            if isinstance(cause, OfflineModeIsEnabled):
                raise switched_off(url) from None
            if isinstance(cause, _UnboundedError):
                raise StorageError(f"{url}: an answer of the hub {cause}; nothing of it is used") from error
            if isinstance(cause, (*connection_errors, ConnectionError, TimeoutError)):
                raise StorageError(
                    f"{url}: the hub cannot be reached ({type(cause).__name__}); run the same again"
                ) from error
            if isinstance(cause, OSError) and cause.filename is not None:
                raise
        raise StorageError(
            f"{url}: the hub answers what is no answer to this request "
            f"({type(error).__name__}: {one_line(str(error), 120)}); see that HF_ENDPOINT is a hub, then run the same "
            "again"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those of which it was made."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _refusal(url: str, error: Any) -> StorageError:
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403):
        return StorageError(
            f"{url}: the hub refuses ({status}); set HF_TOKEN to a token that may write to this repository"
        )
    return StorageError(f"{url}: the hub answers {status}: {one_line(str(error).splitlines()[0], 300)}; run it again")
