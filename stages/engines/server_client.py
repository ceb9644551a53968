"""An OpenAI-compatible completions server: what it serves, and what it says of the tokens of a prompt.

Two ways to ask for log-probabilities of a prompt are known:

    prompt_logprobs   vLLM's field: at every position the k likeliest tokens with their ids and ranks
    echo              `echo` with `logprobs`, as OpenAI's own completions had it; tokens come as text, or as
                      "token_id:N" where the server knows `return_tokens_as_token_ids`

A request that may yet succeed (no connection, a cut answer, 408, 425, 429, 5xx) is repeated by the policy of everything
that is read elsewhere (`schemas.patience`); one that the server refuses is not. Every answer is checked: no longer than
what was asked for (`answers`), the model that was asked for, one entry for every token of the prompt, the token itself
among them, finite numbers that are no more than probabilities. One that lacks any of this is no answer; nothing is made
of it.

A key for the server is read from the environment ($BYTECACHE_SERVER_KEY) and written nowhere.
"""

import http.client
import json
import math
import os
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np

from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.schemas.messages import masked
from bytecache.schemas.patience import Patience
from bytecache.schemas.settings import Teacher
from bytecache.schemas.web import staying_opener
from bytecache.schemas.whole import is_number, is_whole
from bytecache.stages.engines.answers import Bound, Raw, TruncatedError, as_object, read_bounded

Item = TypeVar("Item")
Answer = TypeVar("Answer")
KEY = "BYTECACHE_SERVER_KEY"
PATIENCE = 120.0
"""Seconds that a request is repeated without success: a server that restarts takes as long."""
SILENCE = 600.0
"""Seconds without a byte of an answer: a request may wait behind others. What has begun is paced (`schemas.web`)."""
_PASSING = (408, 425, 429)
_BY_ID = "token_id:"
MOST_OVER = 1e-3
"""By how much listed probabilities may add up to more than 1: half precision and rounding."""


class Listed(NamedTuple):
    """What is listed at one position: the likeliest tokens, without one that is there only because it is true."""

    ids: np.ndarray
    """int64 [K]"""
    logps: np.ndarray
    """float64 [K], nats"""


class Served(NamedTuple):
    """A model as its server names it."""

    model: str
    max_tokens: int
    """Of a request; 0: the server does not say."""
    version: str
    """Of the server's software; empty where it does not say."""


def refuse_address(address: str, backend: str = "server") -> None:
    """Raise ConfigError unless this can be the address of an API, with nothing secret in it. Asks nobody."""
    if not address:
        raise ConfigError(
            f'teacher.backend = "{backend}" needs teacher.server, the address of its API, e.g. http://127.0.0.1:8000/v1'
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"teacher.server = {masked(address)!r}: give an address like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"teacher.server = {masked(address)!r}: no password or token in the address; put a key into ${KEY}"
        )


class Client:
    """Asks one server. Calls may come from several threads.

    Args:
        address: of the API, e.g. http://127.0.0.1:8000/v1. model: to ask for; empty: the only one that is served.
        patience: seconds that a request is repeated.
    """

    def __init__(self, address: str, model: str = "", patience: float = PATIENCE) -> None:
        refuse_address(address)
        self.address, self.patience = address.rstrip("/"), patience
        self.served = self._find(model)

    @classmethod
    def of(cls, settings: Teacher) -> "Client":
        """The server that the settings name. Raises ConfigError, EngineError."""
        refuse_address(settings.server, settings.backend)
        return cls(settings.server, settings.server_model)

    def _find(self, model: str) -> Served:
        models = self.get("models").get("data")
        known = {str(each.get("id")): each for each in models or [] if isinstance(each, dict)}
        if not model and len(known) != 1:
            raise ConfigError(
                f"{self.address} serves {len(known)} models ({', '.join(list(known)[:5])}); name one: "
                "teacher.server_model"
            )
        name = model or next(iter(known))
        if name not in known:
            raise ConfigError(
                f"teacher.server_model = {name!r} is not served by {self.address}, which has: {', '.join(known)}"
            )
        limit = known[name].get("max_model_len")
        return Served(name, limit if is_whole(limit, 1) else 0, self._version())

    def _version(self) -> str:
        root = f"{urlsplit(self.address).scheme}://{urlsplit(self.address).netloc}"
        try:
            return str(self._once(f"{root}/version", None, Bound()).get("version", ""))[:40]
        except (OSError, http.client.HTTPException, EngineError, ConfigError, TruncatedError):
            return ""  # not every server has it

    def get(self, path: str) -> dict[str, Any]:
        """The answer to a GET. Raises EngineError, ConfigError."""
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, Any], bound: Bound) -> dict[str, Any]:
        """The answer to a POST of JSON, no more than `bound`. Raises EngineError, ConfigError."""
        return self._ask(path, body, bound)

    def post_bytes(self, path: str, body: bytes, bound: Bound) -> bytes:
        """The answer to a POST of bytes, as it came, no more than `bound`. Raises EngineError, ConfigError."""
        return self._patiently(path, lambda url: self._raw(url, body, bound)).content

    def _ask(self, path: str, body: dict[str, Any] | None, bound: Bound = Bound()) -> dict[str, Any]:  # noqa: B008
        return self._patiently(path, lambda url: self._once(url, body, bound))

    def _patiently(self, path: str, once: Callable[[str], Answer]) -> Answer:
        url, patience = f"{self.address}/{path}", Patience(self.patience)
        while True:
            try:
                return once(url)
            except (OSError, http.client.HTTPException, TruncatedError) as error:
                if not patience.pause(getattr(error, "wait", 0.0)):
                    why = f"{type(error).__name__}: {error}"[:300]
                    raise EngineError(
                        f"{url}: no answer for {self.patience:.0f} s ({why}); see that the server runs, then rerun the "
                        "same command: units that are whole are kept"
                    ) from error

    def _once(self, url: str, body: dict[str, Any] | None, bound: Bound) -> dict[str, Any]:
        return as_object(url, self._raw(url, None if body is None else json.dumps(body).encode(), bound), bound)

    def _raw(self, url: str, data: bytes | None, bound: Bound) -> Raw:
        headers = {"User-Agent": "bytecache", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if key := os.environ.get(KEY, ""):
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(url, data=data, headers=headers)
            with _OPENER.open(request, timeout=SILENCE) as answer:
                return read_bounded(url, answer, bound)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(url, error) from None
        except urllib.error.URLError as error:
            raise ConnectionError(str(error.reason)) from None


_OPENER = staying_opener()


class _PassingError(OSError):
    """The server cannot answer now; `wait` seconds may help."""

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    """What to raise for an answer of failure."""
    words = " ".join(error.read(4096).decode("utf-8", "replace").split())[:400]
    if error.code in _PASSING or error.code >= 500:
        wait = error.headers.get("Retry-After") or ""
        return _PassingError(f"HTTP {error.code}: {words}", min(float(wait), 60.0) if wait.isdecimal() else 0.0)
    if 300 <= error.code < 400:
        there = masked(str(error.headers.get("Location") or "nowhere"))[:200]
        return ConfigError(f"{url}: leads to {there}, where no key and no text is sent; name that address yourself")
    if error.code in (401, 403):
        return ConfigError(f"{url}: access refused (HTTP {error.code}); put the server's key into ${KEY}")
    if error.code == 409:
        return ConfigError(f"{url}: {words}")
    if "logprobs" in words and ("max" in words or "greater" in words):
        return ConfigError(
            f"{url}: {words}; lower teacher.top_k, or start the server with room for it (vLLM: --max-logprobs)"
        )
    return EngineError(f"{url}: HTTP {error.code}: {words}; see the server's log")


def in_order(
    pool: ThreadPoolExecutor, most: int, function: Callable[[Item], Answer], items: Iterable[Item]
) -> Iterator[tuple[Item, Answer]]:
    """Items and answers in order; as many calls under way as the pool has threads, `most` asked for ahead."""
    waiting: deque[tuple[Item, Future[Answer]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) >= most:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def listed_entries(position: dict[str, Any] | None, true: int, k: int) -> Listed:
    """One position of vLLM's `prompt_logprobs`: the k likeliest, whatever the true token.

    Raises TruncatedError where nothing is there, or not the true token.
    """
    if not position or str(true) not in position:
        raise TruncatedError(f"no log-probability of token {true}, which the prompt has there")
    entries = [
        (_id(token), _chance(entry["logprob"]), int(entry.get("rank") or 0)) for token, entry in position.items()
    ]
    # The true token is listed whatever its rank: beyond the k-th it would tell the label.
    return _listed([(token, logp) for token, logp, rank in entries if rank <= k or len(entries) <= k])


def _id(text: str) -> int:
    """The id that a server writes as text. Raises ValueError: int() takes signs and other scripts' digits as well."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"{text[:40]!r} is no token id")
    return int(text)


def _chance(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"{str(value)[:40]!r} is no log-probability")
    return float(value)


@contextmanager
def as_completion(address: str) -> Iterator[None]:
    """What is read inside is a server's answer; raises EngineError where it is not made like one."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise EngineError(
            f"{address}: answers what is no completion ({type(error).__name__}: {str(error)[:120]}); nothing of it is "
            "used, see that it is a completions server"
        ) from error


def _listed(entries: list[tuple[int, float]]) -> Listed:
    ids = np.array([token for token, _ in entries], np.int64)
    logps = np.array([logp for _, logp in entries], np.float64)
    if not len(ids) or np.isnan(logps).any() or logps.max() > MOST_OVER:
        raise EngineError("the server's log-probabilities are no logarithms of probabilities (NaN, or above 0)")
    if math.fsum(np.exp(logps)) > 1 + MOST_OVER * max(1, len(ids)):
        raise EngineError("the server's probabilities of one position add up to more than 1: temperature, or logits?")
    return Listed(ids, logps)


class Spoken:
    """Tokens that a server writes as text, back to ids: "token_id:N", or a text that one token alone has."""

    def __init__(self, token_bytes: list[bytes | None]) -> None:
        self._by_text: dict[str, int | None] = {}
        self.unknown = 0
        for token, piece in enumerate(token_bytes):
            if piece:
                text = piece.decode("utf-8", "replace")
                # Two tokens that look alike (pieces of characters) are neither.
                self._by_text[text] = None if text in self._by_text or "\ufffd" in text else token

    def listed(self, entries: dict[str, float] | None, true: int, k: int) -> Listed:
        """One position of `top_logprobs`; what cannot be told is left unlisted and counted."""
        if not isinstance(entries, dict):
            raise TruncatedError("a position without top_logprobs")
        chances = []
        for text, logp in entries.items():
            token = _id(text[len(_BY_ID) :]) if text.startswith(_BY_ID) else self._by_text.get(text)
            if token is None:
                self.unknown += 1
            else:
                chances.append((token, _chance(logp)))
        if len(chances) > k and true >= 0:
            least = min(chances, key=lambda each: each[1])
            chances = [each for each in chances if each != least or each[0] != true]
        if not chances:
            return Listed(np.zeros(0, np.int64), np.zeros(0))
        return _listed(chances)
