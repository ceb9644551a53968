"""Files on the Hugging Face hub by their plain web address, so that they are read as every other web address is.

The hub's own file system believes its server: it takes an answer of any length for the range that it asked for, follows
any redirect, and calls a refusal a fault that may pass. What is read here keeps to the bounds of `http`.
"""

import re
from typing import NamedTuple
from urllib.parse import quote

from bytecache.schemas.errors import ConfigError

_PREFIX = "hf://"
_KINDS = ("datasets", "spaces")
_REFERENCE = re.compile(r"refs/(?:convert/\w+|pr/\d+)(?=/|$)")
"""Revisions that have a slash in their name."""


class HubFile(NamedTuple):
    """Where a file is, and what the hub's own host is told of who asks."""

    address: str
    login: str


def is_hub(url: str) -> bool:
    """Whether it begins with hf://."""
    return url.startswith(_PREFIX)


def switched_off(url: str) -> ConfigError:
    """What is said where the environment forbids to ask the hub."""
    return ConfigError(f"{url}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or name a local copy")


def hub_file(url: str) -> HubFile:
    """The web address of `hf://[datasets/]OWNER/NAME[@REVISION]/PATH`.

    Raises ConfigError for another address and where the hub is switched off; ImportError without its client.
    """
    from huggingface_hub import constants, get_token

    parts = url.removeprefix(_PREFIX).split("/")
    kind = f"{parts.pop(0)}/" if parts[0] in _KINDS else ""
    owner, _, rest = "/".join(parts).partition("/")
    name, at, rest = rest.partition("@")
    if "/" in name:  # the @ is of a file's name
        name, at, rest = f"{name}{at}{rest}", "", ""
    if at:
        special = _REFERENCE.match(rest)
        revision = special[0] if special else rest.partition("/")[0]
        path = rest[len(revision) + 1 :]
    else:
        revision = "main"
        name, _, path = name.partition("/")
    if not (owner and name and revision and path) or owner == "buckets" or ".." in path.split("/"):
        raise ConfigError(
            f"{url}: a place on the hub is hf://datasets/OWNER/NAME[@REVISION][/FOLDER] (or hf://OWNER/NAME for models)"
        )
    if constants.HF_HUB_OFFLINE:
        raise switched_off(url)
    token = get_token()
    base = f"{constants.ENDPOINT.rstrip('/')}/{kind}{quote(owner)}/{quote(name)}"
    return HubFile(f"{base}/resolve/{quote(revision, safe='')}/{quote(path)}", f"Bearer {token}" if token else "")
