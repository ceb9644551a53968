"""Documents of a data set on the Hugging Face hub, by its id: `hf://datasets/OWNER/NAME[@REVISION][/CONFIG[/SPLIT]]`.

The package `datasets` finds the files and streams their records, whatever the format; nothing is kept on disk. The
revision is resolved to a commit before the first record, since a corpus is read more than once and must not change
between: without one, the commit of that moment. No code of the repository is run: `datasets` no longer can.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from bytecache.schemas.errors import ConfigError, InputError, StorageError

PREFIX = "hf://datasets/"
DEFAULT = "default"
"""Configuration that stands for the one that a repository declares, or for its only one."""


class HubCorpus(NamedTuple):
    """A split of a data set on the hub."""

    repository: str
    revision: str
    config: str
    split: str

    @classmethod
    def parse(cls, source: str) -> "HubCorpus":
        """Raises ConfigError."""
        parts = source.removeprefix(PREFIX).strip("/").split("/")
        if not source.startswith(PREFIX) or not 2 <= len(parts) <= 4 or not all(parts):
            raise ConfigError(
                f"corpus.source = {source!r}: a data set of the hub is {PREFIX}OWNER/NAME[@REVISION][/CONFIG[/SPLIT]]"
            )
        name, _, revision = parts[1].partition("@")
        config, split = [*parts[2:], *(DEFAULT, "train")[len(parts) - 2 :]]
        return cls(f"{parts[0]}/{name}", revision or "main", config, split)

    @property
    def url(self) -> str:
        """The source that parses to this."""
        return f"{PREFIX}{self.repository}@{self.revision}/{self.config}/{self.split}"

    @property
    def name(self) -> str:
        """What ids of documents are made of: no revision, so that they stay the same where the text does."""
        return f"{self.repository}/{self.config}/{self.split}"


def pinned(source: str) -> HubCorpus:
    """The split with its revision resolved to a commit. Raises ConfigError, InputError, StorageError."""
    return _pinned(HubCorpus.parse(source))


@lru_cache(maxsize=16)
def _pinned(corpus: HubCorpus) -> HubCorpus:
    from huggingface_hub import HfApi

    with _said(corpus):
        commit = HfApi().dataset_info(corpus.repository, revision=corpus.revision).sha
    return corpus._replace(revision=commit or corpus.revision)


def records(corpus: HubCorpus) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, record) of a split in its order. Raises ConfigError, InputError, StorageError."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"corpus.source = {corpus.url!r} needs the package {error.name}, which is not installed: install "
            "bytecache[datasets]"
        ) from None
    with _said(corpus):
        config = None if corpus.config == DEFAULT else corpus.config
        stream = load_dataset(corpus.repository, config, split=corpus.split, revision=corpus.revision, streaming=True)
        # Images and sounds stay undecoded: they are refused or left out, never opened.
        yield from enumerate(stream.decode(False) if hasattr(stream, "decode") else stream)


@contextmanager
def _said(corpus: HubCorpus) -> Iterator[None]:
    """What the hub's libraries raise, as a refusal with its remedy."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    connection_errors = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    unreachable: tuple[type[Exception], ...] = (HfHubHTTPError, *connection_errors, TimeoutError, ConnectionError)
    where = f"corpus.source = {corpus.url!r}"
    try:
        yield
    except GatedRepoError:
        raise InputError(
            f"{where}: its owner wants you to agree to terms first; do so on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(f"{where}: no such data set, or a private one; correct the name, or set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise InputError(f"{where}: no revision {corpus.revision!r}; name a branch, a tag or a commit") from None
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, HfHubHTTPError):
            raise StorageError(
                f"{where}: the hub cannot be read ({type(error).__name__}); run the same again"
            ) from error
        # `datasets` says in words which configurations and splits there are.
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: {reason}; name another configuration or split in the source") from error
    except unreachable as error:
        raise StorageError(f"{where}: the hub cannot be read ({type(error).__name__}); run the same again") from error
