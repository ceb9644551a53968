"""`push` and `pull`: a data set to the Hugging Face hub and back, whole, checked and resumable.

A push sends what the index lists and nothing else of the folder: shards first, in commits of bounded size, then in one
last commit the manifest, the card and dataset.json, so that a reader never meets an index of shards that are not there.
With the last go files for people and search engines that are made of the rest (`publication`).
What the hub holds already, by content hash, is not sent again; so a push that broke off goes on where it was. The
index of another data set is replaced only where that is asked for.

A pull fetches shards by their hashes, then writes the index; what lies in the folder whole is kept.
Price: one listing of the repository, and the bytes that are missing at the other end.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bytecache.pipeline.commands import publication
from bytecache.pipeline.stores.hub_session import asking, hub_session
from bytecache.schemas import strict_json
from bytecache.schemas.dataset.card import FILE as CARD
from bytecache.schemas.dataset.card import render as render_card
from bytecache.schemas.dataset.index import (
    DATASET,
    MANIFEST,
    MAX_JSON,
    MAX_MANIFEST,
    Dataset,
    parse_index,
    read_dataset,
)
from bytecache.schemas.dataset.verification import check_shard, verify_dataset
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError, StorageError
from bytecache.schemas.files import file_sha256, local_path, make_folder, replace_file
from bytecache.stages.targets.source import Access, fetch_bytes, fetch_file, open_dataset

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hf://datasets/"
Files = dict[str, Path | bytes]
"""Path in the data set's place to content."""
INDEX = (MANIFEST, CARD, DATASET)
"""Files of the last commit, beside the shards."""
COMMIT_BYTES = 4 << 30
"""Shards of one commit: what a broken push has to say again is the commit, not the bytes."""
COMMIT_FILES = 100
MAX_CARD = 1 << 20
MAX_LISTED, LISTING_S = 1 << 20, 600.0
"""Files of a repository, and seconds that listing them may take: a hub of junk has always one page more."""


class HubPlace(NamedTuple):
    """A folder of a data set repository on the hub."""

    repository: str
    revision: str
    folder: str

    @classmethod
    def parse(cls, url: str) -> "HubPlace":
        """`hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`. Raises ConfigError."""
        parts = url.removeprefix(PREFIX).strip("/").split("/")
        if not url.startswith(PREFIX) or len(parts) < 2 or not all(parts) or ".." in parts:
            raise ConfigError(
                f"{url}: a data set is pushed to hf://datasets/OWNER/NAME[@REVISION][/FOLDER]; elsewhere the "
                "files of the folder can be copied as they are"
            )
        name, _, revision = parts[1].partition("@")
        return cls(f"{parts[0]}/{name}", revision or "main", "/".join(parts[2:]))

    def path(self, name: str) -> str:
        """Where a file of the data set lies in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    def addresses(self, endpoint: str) -> tuple[str, str]:
        """URLs of the repository, and of what lies at this place in it."""
        repository = f"{endpoint.rstrip('/')}/datasets/{self.repository}"
        return repository, f"{repository}/resolve/{self.revision}/{self.folder}".rstrip("/")


class Pushed(NamedTuple):
    """What a push did."""

    sent: int
    present: int
    removed: int
    n_bytes: int
    strangers: list[str]
    """Files of the folder that are no part of the data set, hence not sent."""


class _Held(NamedTuple):
    """A file in the repository: its length, and its sha256 or, for small text files, git's hash of it."""

    size: int
    sha256: str
    git: str

    def equals(self, content: Path | bytes, known: str = "") -> bool:
        """Whether this is the content. `known`: its sha256, where somebody has just taken it."""
        if self.size != _length(content):
            return False
        if not self.sha256:
            return self.git == _git_hash(content if isinstance(content, bytes) else content.read_bytes())
        if isinstance(content, bytes):
            return self.sha256 == hashlib.sha256(content).hexdigest()
        return self.sha256 == (known or file_sha256(content))


def _length(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def push(
    folder: Path, url: str, *, private: bool = False, replace: bool = False, private_redirects: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Pushed:  # fmt: skip
    """Send the data set in `folder` to the hub.

    Args:
        private: whether a repository that does not exist yet becomes private.
        replace: put it in the place of another data set there; shards that only the other one lists are removed.
        private_redirects: go to private addresses, too, where the hub sends the request (`schemas.web`).
        say: told every commit.

    Raises:
        ConfigError: `url` is no place on the hub, or another data set lies there.
        IntegrityError: the folder is not whole.
        StorageError: the hub refuses or cannot be reached.
    """
    place = HubPlace.parse(url)
    faults = verify_dataset(folder)
    if faults:
        raise IntegrityError(
            f"{folder}: {len(faults)} problems, the first: {faults[0].file}: {faults[0].detail}; `bytecache verify` "
            "lists them, nothing was sent"
        )
    dataset = read_dataset(folder)
    with hub_session(private_redirects=private_redirects) as api:
        extras = publication.extras(folder, dataset, url.rstrip("/"), *place.addresses(str(api.endpoint)))
        with asking(url):
            api.create_repo(place.repository, repo_type="dataset", private=private, exist_ok=True)
        held = _listing(api, place, url)
        obsolete = _obsolete(_there(held, url, place, Access(private_redirects)), held, dataset, url, replace)
        shards: Files = {entry.file: folder / entry.file for entry in dataset.entries}
        known = {entry.file: entry.sha256 for entry in dataset.entries}
        index: Files = {name: folder / name for name in INDEX if (folder / name).is_file()}
        index |= extras
        missing = _not_held(shards, held, known)
        for number, batch in enumerate(_batches(missing)):
            _commit(api, place, url, batch, [], f"{dataset_name(dataset)}: shards, part {number + 1}")
            say(f"push: {len(batch)} shards, {sum(map(_length, batch.values())) / 2**20:.1f} MiB")
        if missing:
            _refuse_lost(_not_held(shards, _listing(api, place, url), known), url)
        changed = _not_held(index, held, known)
        if changed or obsolete:
            _commit(api, place, url, changed, obsolete, f"{dataset_name(dataset)}: {len(shards)} shards")
            _refuse_lost(_not_held(shards | index, _listing(api, place, url), known), url)
    sent = missing | changed
    return Pushed(
        sent=len(sent),
        present=len(shards) + len(index) - len(sent),
        removed=len(obsolete),
        n_bytes=sum(map(_length, sent.values())),
        strangers=sorted(path.name for path in folder.iterdir() if path.name not in shards | index),
    )


def _not_held(files: Files, held: dict[str, _Held], known: dict[str, str]) -> Files:
    """Files that the repository lacks, or has otherwise. `known`: name to sha256, of those that were just hashed."""
    return {
        name: content
        for name, content in files.items()
        if name not in held or not held[name].equals(content, known.get(name, ""))
    }


def _refuse_lost(lost: Files, url: str) -> None:
    """A commit that was accepted is not yet a commit of what was sent. Raises StorageError."""
    if lost:
        raise StorageError(
            f"{url}: the hub accepted the commit, and lists {len(lost)} of its files otherwise or not at all "
            f"({', '.join(sorted(lost)[:3])}); see that no .gitattributes or .gitignore there names them, then run the "
            "same again"
        )


def dataset_name(dataset: Dataset) -> str:
    """What commits call a data set."""
    return str(dataset.info.get("name") or "byte targets")


def pull(
    place: str, folder: Path, say: Callable[[str], None] = lambda _: None, *, private_redirects: bool = False
) -> tuple[int, int]:
    """Make `folder` a whole copy of the data set at `place`, a folder or any URL that can be read.

    `private_redirects`: follow a redirect to a private address, too. Of no file more is taken than the index says that
    it has, of the files of the index no more than a fixed bound each.

    Returns (shards fetched, shards that were there). Raises ConfigError where `folder` holds another data set,
    IntegrityError or StorageError when something cannot be had whole; a second call goes on from there.
    """
    access = Access(private_redirects)
    dataset = open_dataset(place, private_redirects=private_redirects)
    where = place.rstrip("/")
    _refuse_other(folder, dataset)
    _refuse_colliding(dataset)
    make_folder(folder)
    fetched = present = 0
    for entry in dataset.entries:
        path = folder / entry.file
        if check_shard(path, entry) is None:
            present += 1
            continue
        fetch_file(f"{where}/{entry.file}", path, entry.size, entry.sha256, access)
        fetched += 1
        say(f"pull: {entry.file}, {entry.size / 2**20:.1f} MiB")
    # The index comes last: a folder with dataset.json is a data set.
    replace_file(folder / MANIFEST, fetch_bytes(f"{where}/{MANIFEST}", MAX_MANIFEST, access))
    document = fetch_bytes(f"{where}/{DATASET}", MAX_JSON, access)
    try:
        card = fetch_bytes(f"{where}/{CARD}", MAX_CARD, access)
    except IntegrityError as error:
        say(f"pull: no card can be had ({error}); one is made of the index")
        card = render_card(strict_json.parse(document))
    replace_file(folder / CARD, card)
    replace_file(folder / DATASET, document)
    faults = verify_dataset(folder)
    if faults:
        raise IntegrityError(f"{folder}: {faults[0].file}: {faults[0].detail}; run the same command again")
    return fetched, present


def _refuse_colliding(dataset: Dataset) -> None:
    """Raises IntegrityError for names that are one file where a file system knows no case."""
    seen: dict[str, str] = {}
    for entry in dataset.entries:
        other = seen.setdefault(entry.file.casefold(), entry.file)
        if other != entry.file:
            raise IntegrityError(
                f"{dataset.where}: lists {other} and {entry.file}, which differ in case alone and are one file on some "
                "systems; nothing was fetched: ask its maker"
            )


def _refuse_other(folder: Path, dataset: Dataset) -> None:
    if not (folder / DATASET).exists():
        return
    try:
        other = read_dataset(folder)
    except IntegrityError:
        return  # a damaged copy is made whole
    if other.entries != dataset.entries:
        raise ConfigError(f"{folder} holds another data set ({dataset_name(other)}); choose a new folder")


def _listing(api: "HfApi", place: HubPlace, url: str) -> dict[str, _Held]:
    """Files of the place by their path in it. Raises StorageError, also where the listing does not end."""
    from huggingface_hub.errors import EntryNotFoundError

    held: dict[str, _Held] = {}
    end = time.monotonic() + LISTING_S
    with asking(url):
        try:
            tree = api.list_repo_tree(
                place.repository, place.folder or None, recursive=True, repo_type="dataset", revision=place.revision
            )
            for number, item in enumerate(tree):
                if number >= MAX_LISTED or time.monotonic() > end:
                    raise StorageError(
                        f"{url}: the hub's listing does not end ({number} entries, at most {MAX_LISTED} in "
                        f"{LISTING_S:.0f} s); choose another repository"
                    )
                name, file = _listed(item, place)
                if file is not None and held.setdefault(name, file) != file:
                    raise StorageError(f"{url}: the hub lists {name[:200]!r} twice, with other content; run it again")
        except EntryNotFoundError:
            return {}
    return held


def _listed(item: Any, place: HubPlace) -> tuple[str, _Held | None]:
    """An entry of a listing: its path in the place, and what it is where it is a file."""
    from huggingface_hub.hf_api import RepoFile

    name = item.path.removeprefix(f"{place.folder}/") if place.folder else item.path
    if not isinstance(item, RepoFile):
        return name, None
    return name, _Held(item.size, item.lfs.sha256 if item.lfs else "", item.blob_id)


def _there(held: dict[str, _Held], url: str, place: HubPlace, access: Access) -> Dataset | None:
    """The data set that lies there, if one does that can be read."""
    if DATASET not in held:
        return None
    where = url.rstrip("/")
    try:
        document = fetch_bytes(f"{where}/{DATASET}", MAX_JSON, access)
        return parse_index(
            Path(place.folder), url, document, lambda: fetch_bytes(f"{where}/{MANIFEST}", MAX_MANIFEST, access)
        )
    except IntegrityError:
        return None


def _obsolete(there: Dataset | None, held: dict[str, _Held], dataset: Dataset, url: str, replace: bool) -> list[str]:
    """Shards there that only another data set lists. Raises ConfigError where one lies there and may not go."""
    if there is None or there.entries == dataset.entries:
        return []
    if not replace:
        raise ConfigError(
            f"{url} holds another data set ({dataset_name(there)}, {len(there.entries)} shards); choose another "
            "place or revision, or give --replace"
        )
    listed = {entry.file for entry in dataset.entries}
    return [entry.file for entry in there.entries if entry.file not in listed and entry.file in held]


def _batches(files: Files) -> Iterator[Files]:
    batch: Files = {}
    size = 0
    for name, content in files.items():
        length = _length(content)
        if batch and (size + length > COMMIT_BYTES or len(batch) == COMMIT_FILES):
            yield batch
            batch, size = {}, 0
        batch[name] = content
        size += length
    if batch:
        yield batch


def _commit(api: "HfApi", place: HubPlace, url: str, files: Files, removed: list[str], message: str) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(place.path(name), content) for name, content in files.items()]
    operations += [CommitOperationDelete(place.path(name)) for name in removed]
    with asking(url):
        api.create_commit(
            place.repository, operations, commit_message=message, repo_type="dataset", revision=place.revision
        )


def _git_hash(data: bytes) -> str:
    """Git's name of a blob: how the hub identifies small files."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def data_set_folder(place: str, run_dir: str) -> Path:
    """The folder of a data set: the one named, a run's `targets`, or the configured run's. Raises InputError."""
    folder = local_path(place or run_dir)
    for candidate in (folder, folder / "targets"):
        if (candidate / DATASET).is_file():
            return candidate
    raise InputError(f"{folder} holds no {DATASET}, nor does its folder targets; run `bytecache convert` first")
