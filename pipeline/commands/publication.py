"""What `push` publishes beside a data set's own files: its card for the hub, rows to look at, a picture, Croissant.

All of it is made of the index and the shards, the same bytes every time, so that a second push sends nothing. Before
anything is sent, the index is looked through for what belongs to the machine that made it; what is found is refused by
name, since an index cannot be changed without its hash.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from bytecache.schemas import strict_json
from bytecache.schemas.dataset import card, croissant
from bytecache.schemas.dataset.index import DATASET, MANIFEST, Dataset
from bytecache.schemas.dataset.preview import picture, preview_table, stretches
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.files import file_sha256
from bytecache.schemas.shard.reader import read_shard

PREVIEW, PICTURE = "preview", "preview/entropy.svg"
_ROOTS = "home|Users|root|mnt|data|scratch|tmp|work|opt|var|srv|private|fsx|lustre|gpfs"
_PATH = re.compile(rf"(?<![\w:/.])(?:(?:/(?:{_ROOTS})|~)/[^\s\"'<>|]+|[A-Z]:\\[^\s\"'<>|]+)")
"""Absolute paths of a machine; a URL or a word with a slash is none."""
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
"""Tokens of hubs, clouds and forges by their looks."""
_FLEET = ("run", "fleet", "launch")
"""Sections of settings that say where and how something ran."""


def extras(folder: Path, dataset: Dataset, url: str, repository: str, root: str) -> dict[str, bytes]:
    """Path to content of what is published beside the index and the shards; a card that somebody wrote stays theirs.

    Args:
        url: of the data set, as `bytecache` reads it. repository, root: as `croissant.render` wants them.

    Raises:
        ConfigError: something in the index belongs to a machine.
    """
    document = strict_json.parse((folder / DATASET).read_bytes())
    refuse_private(document)
    files: dict[str, bytes] = {}
    previews: dict[str, str] = {}
    for split in sorted(document["splits"], key=lambda name: name != "train"):  # viewers show the first
        entry = next((entry for entry in dataset.split(split) if entry.n_documents), None)
        if entry is None:
            continue
        shown = stretches(read_shard(folder / entry.file))
        previews[split] = f"{PREVIEW}/{split}.parquet"
        files[previews[split]] = preview_table(shown)
        if PICTURE not in files:
            files[PICTURE] = picture(max(shown, key=lambda one: len(one.text)))
    if card.is_ours(folder / card.FILE):
        published = card.Published(url, tuple(previews), PICTURE if PICTURE in files else "")
        files[card.FILE] = card.render(document, published)
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    hashes |= {name: file_sha256(folder / name) for name in (DATASET, MANIFEST)}
    files[croissant.FILE] = croissant.render(document, root, repository, hashes, previews)
    return files


def refuse_private(document: dict[str, Any]) -> None:
    """Refuse an index that says something of the machine it was made on. Raises ConfigError, naming the field."""
    home = os.path.expanduser("~/")  # noqa: PTH111 - Path's raises where there is none
    secrets = [value for name, value in os.environ.items() if re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", name)]
    for name, text in _leaves(document):
        section = name.split(".")
        if section[:2] == ["info", "settings"] and len(section) > 3 and section[2] in _FLEET:
            raise ConfigError(
                f"{DATASET}: {name} says how something ran, not what the data are; convert again without it"
            )
        private = _PATH.search(text) or _TOKEN.search(text)
        if private or (len(home) > 2 and home in text):
            raise ConfigError(
                f"{DATASET}: {name} = {text[:80]!r} names a path or a token of a machine; convert again with another "
                "name; nothing was sent"
            )
        if any(len(secret) >= 8 and secret in text for secret in secrets):
            raise ConfigError(f"{DATASET}: {name} holds a secret of this environment; nothing was sent")


def _leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in _leaves(one, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        return [leaf for number, one in enumerate(value) for leaf in _leaves(one, f"{name}[{number}]")]
    return [(name, value if isinstance(value, str) else json.dumps(value))]
