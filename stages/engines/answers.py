"""What a server sends back: no more than the question can have asked for, whole, and JSON where JSON was asked for.

An answer's size is a stranger's choice, and its JSON costs a multiple of it once it is parsed: three bytes may be a
list of their own. So the question says how many bytes and how many values an answer can have (`Bound`), and more is
refused before it is read or parsed. What arrives whole and is no JSON (a start page, a proxy's message) is a refusal:
asking again would bring it again. What broke off is asked for again.
"""

import http.client
import re
from typing import Any, NamedTuple

from bytecache.schemas import strict_json
from bytecache.schemas.errors import EngineError
from bytecache.schemas.messages import one_line

CHUNK = 1 << 20
ENTRY = 192
"""Bytes of JSON of one listed token, on average, at most: 60 to 80 are usual, and every character may be escaped."""
VALUES = 8
"""JSON values of one listed token: its id, its object of three fields, and the room to say it twice."""
ROW = 1 << 16
"""Bytes of a row of path masses, on average, at most; some hundred are usual."""


class Bound(NamedTuple):
    """The most that an answer can be; each has room beside what was asked for, for names and numbers of its own."""

    size: int = 1 << 22
    """Bytes."""
    values: int = 1 << 18
    """JSON values."""

    @classmethod
    def of_listing(cls, tokens: int, k: int) -> "Bound":
        """Of k log-probabilities, the true token's and one more at each token of a prompt."""
        entries = (tokens + 1) * (k + 2)
        return cls(cls().size + ENTRY * entries, cls().values + VALUES * entries)

    @classmethod
    def of_rows(cls, count: int) -> "Bound":
        """Of rows of path masses."""
        return cls(cls().size + ROW * count)


class TruncatedError(Exception):
    """An answer that breaks off or does not cover the prompt."""


class Raw(NamedTuple):
    """An answer as it came."""

    content: bytes
    kind: str
    """Its content type, without parameters; empty where the server says none."""
    is_whole: bool
    """Known to be: the length that was announced has come, or the last chunk."""


def read_bounded(url: str, answer: http.client.HTTPResponse, bound: Bound) -> Raw:
    """All of an answer. Raises EngineError where it is more than `bound`, as soon as that is known."""
    announced = answer.length
    chunked = bool(answer.chunked)
    content = bytearray()
    if (announced or 0) <= bound.size:
        while piece := answer.read(min(CHUNK, bound.size + 1 - len(content))):
            content += piece
            if len(content) > bound.size:
                break
    if len(content) > bound.size or (announced or 0) > bound.size:
        raise EngineError(
            f"{url}: the answer is longer than {bound.size} bytes, more than was asked for; nothing of it is used, see "
            "that it is the server you mean"
        )
    whole = chunked or (announced is not None and len(content) == announced)
    return Raw(bytes(content), answer.headers.get_content_type() if "Content-Type" in answer.headers else "", whole)


def as_object(url: str, raw: Raw, bound: Bound) -> dict[str, Any]:
    """The JSON object that an answer is.

    Raises EngineError for whatever else arrives whole, TruncatedError for what may have been cut.
    """
    content = raw.content
    if strict_json.most_values(content) > bound.values:
        raise EngineError(
            f"{url}: the answer has more than {bound.values} values, more than was asked for; nothing of it is used, "
            "see that it is the server you mean"
        )
    try:
        document = strict_json.loads(content)
    except ValueError:
        if raw.is_whole or raw.kind in ("text/html", "application/xhtml+xml"):
            raise EngineError(
                f"{url}: answers {_said(raw)}, not JSON; is it the address of a completions API "
                "(http://127.0.0.1:8000/v1)?"
            ) from None
        raise TruncatedError(f"{len(content)} bytes that are no whole JSON") from None
    if not isinstance(document, dict):
        raise EngineError(f"{url}: answers a {type(document).__name__}, not an object; is it a completions server?")
    return document


def _said(raw: Raw) -> str:
    """A short description of what is no JSON."""
    if not raw.content.strip():
        return "nothing"
    text = raw.content[:2000].decode("utf-8", "replace")
    title = re.search(r"<title>([^<]{1,80})", text, re.IGNORECASE)
    return f"{raw.kind or 'bytes of no type'} ({one_line(title[1] if title else text, 60)!r})"
