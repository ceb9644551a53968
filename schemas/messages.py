"""What a person may be shown: text of strangers without control over the terminal, and without anybody's secrets.

A file name, a document id or an attribute of a shard is a stranger's text. Printed raw, an ESC sequence in it can move
the cursor, rewrite what stands on the screen or fill the clipboard; a bidirectional mark can make a name read as
another. `plain` spells every such character out. A URL may carry a password or a signed token, and libraries repeat
the URL in their errors: `masked` hides the secret parts of every URL in a text, and every secret that was `remember`ed.
Whatever is printed goes through `shown`, which does both.
"""

import re
import unicodedata
from urllib.parse import unquote

MASK = "***"
SECRET_KEYS = frozenset({
    "access_key", "access_token", "accesskey", "accesskeyid", "api_key", "apikey", "auth", "authorization",
    "client_secret", "code", "credential", "id_token", "key", "pass", "passwd", "password", "pwd", "refresh_token",
    "sas", "secret", "secret_key", "sig", "signature", "token", "x-amz-credential", "x-amz-security-token",
    "x-amz-signature", "x-goog-credential", "x-goog-signature",
})  # fmt: skip
"""Names of query parameters whose values are secrets, in lower case."""
_SHORTEST = 4
"""Characters of a secret that is masked wherever it stands; a shorter one would take ordinary words with it."""
# A path made of a URL has one slash.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+:/{1,2})(?P<rest>[^\s'\"<>]*)")
_PARAMETER = re.compile(r"(?P<head>[?&;#](?P<name>[^=&;#\s]+)=)(?P<value>[^&;#\s'\"<>]*)")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_remembered: set[str] = set()


def remember(secret: str) -> None:
    """Mask this text in everything that is shown by this process from now on."""
    if len(secret) >= _SHORTEST:
        _remembered.add(secret)
        _remembered.add(unquote(secret))


def url_secrets(url: str) -> list[str]:
    """The password, and the values of secret parameters, of a URL."""
    match = _URL.fullmatch(url)
    if match is None:
        return []
    authority = re.split(r"[/?#]", match["rest"], maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    name, colon, password = user.partition(":")
    secrets = [password if colon else name] if at else []
    secrets += [m["value"] for m in _PARAMETER.finditer(match["rest"]) if m["name"].lower() in SECRET_KEYS]
    return [secret for secret in secrets if secret]


def public_url(url: str) -> str:
    """A URL without user, password and the values of secret parameters: what may be written to a file."""
    return _URL.sub(lambda match: _open_url(match, "", ""), url)


def masked(text: str) -> str:
    """`text` with the secret parts of every URL in it, and every remembered secret, replaced by a mask."""
    text = _URL.sub(lambda match: _open_url(match, f"{MASK}@", MASK), text)
    text = _BEARER.sub(lambda match: f"{match[1]} {MASK}", text)
    for secret in sorted(_remembered, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def _open_url(match: re.Match[str], user: str, value: str) -> str:
    rest = match["rest"]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(authority) :]
    if "@" in authority:
        authority = user + authority.rpartition("@")[2]

    def hide(parameter: re.Match[str]) -> str:
        return parameter["head"] + (value if parameter["name"].lower() in SECRET_KEYS else parameter["value"])

    return f"{match['scheme']}{authority}{_PARAMETER.sub(hide, tail)}"


def plain(text: str) -> str:
    """`text` with every character that commands a terminal or hides others spelled out; line ends and tabs stay.

    Spelled out are control characters (C0, DEL, C1), bidirectional and other invisible marks, line and paragraph
    separators, and lone surrogates, which stand for bytes of names that are not UTF-8.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or not _commands(char) else _spelled(char) for char in text)


def _commands(char: str) -> bool:
    # Joiners (ZWJ, ZWNJ) belong to the spelling of words and emoji and command nothing.
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d\u00ad"


def _spelled(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte of a name that is not UTF-8
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(text: str) -> str:
    """What is printed for `text`: no control over the terminal, no secret."""
    return plain(masked(text))


def one_line(text: str, limit: int = 2000) -> str:
    """`shown` on one line of at most `limit` characters."""
    line = " ".join(shown(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
