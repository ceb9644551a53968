"""Which document of one data set is which of another: the same name, the same bytes, the same split.

Data sets of one text need not have the same shards (units and shards may be of other sizes) nor all documents (each
teacher sets aside what its tokenizer cannot read). So documents are matched one by one, by name and by the hash of
their bytes; documents that are alike in both are taken in their order.

Price: every shard is read once, and 100 bytes of memory a document.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bytecache.schemas.dataset.index import Dataset, ShardEntry
from bytecache.schemas.errors import InputError
from bytecache.schemas.shard.reader import ByteShard
from bytecache.stages.targets.source import load_shard

_SHOWN = 3
Name = tuple[str, str, bytes]
"""Split, name and hash of a document."""


class Place(NamedTuple):
    """A document in a data set: the index of its entry, and its number in that shard."""

    entry: int
    document: int


class Documents:
    """The documents of a data set, by name and text; `kind` of its shards ("text", "chat", "completion")."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.places: dict[Name, list[Place]] = defaultdict(list)
        kinds = set[str]()
        for number, entry in enumerate(dataset.entries):
            shard = load_shard(dataset, entry)
            kinds.add(str(shard.attrs.get("kind", "text")))
            for document, name in enumerate(names_of(entry, shard)):
                self.places[name].append(Place(number, document))
        if len(kinds) > 1:
            raise InputError(f"{dataset.where}: shards of kinds {', '.join(sorted(kinds))}; mix each kind apart")
        self.kind = next(iter(kinds), "text")

    def counts(self) -> Counter[Name]:
        """How often each document is there."""
        return Counter({name: len(places) for name, places in self.places.items()})


def names_of(entry: ShardEntry, shard: ByteShard) -> Iterator[Name]:
    """Split, name and hash of every document of a shard, in order."""
    for number, doc_id in enumerate(shard.doc_id):
        yield entry.split, doc_id, hashlib.sha256(shard.document(number)).digest()[:16]


def common_to(sets: Sequence[Documents], *, partial: bool) -> tuple[Counter[Name], list[str]]:
    """How often each document is in all of the data sets, and a line for each set that has others.

    Args:
        partial: go without what is not in all of them. Raises InputError, with what differs, if not; and where nothing
        is in all, or their kinds differ.
    """
    first = sets[0]
    for other in sets[1:]:
        if other.kind != first.kind:
            raise InputError(
                f"{first.dataset.where} is of kind {first.kind}, {other.dataset.where} of {other.kind}; mix data sets "
                "of one kind"
            )
    common = first.counts()
    for other in sets[1:]:
        common &= other.counts()
    lines = [line for one in sets if (line := _missing_line(one, common, sets))]
    if not common:
        raise InputError(f"no document is in all data sets: {'; '.join(lines)}; name data sets of the same text")
    if lines and not partial:
        raise InputError(
            f"the data sets are not of the same text: {'; '.join(lines)}; mix data sets of one corpus, or add --common "
            f"to take the {sum(common.values())} documents that all have"
        )
    return common, lines


def _missing_line(one: Documents, common: Counter[Name], sets: Sequence[Documents]) -> str:
    """What of a data set is not in all, in words; "" where all is."""
    extra = one.counts() - common
    if not extra:
        return ""
    others = [other for other in sets if other is not one]
    shown = [f"{name[1]!r} ({_why(name, others)})" for name in list(extra)[:_SHOWN]]
    more = ", ..." if len(extra) > _SHOWN else ""
    return f"{one.dataset.where} has {sum(extra.values())} documents that not all have: {', '.join(shown)}{more}"


def _why(name: Name, others: Sequence[Documents]) -> str:
    split, doc_id, _ = name
    for other in others:
        if name in other.places:
            continue
        where = other.dataset.where
        alike = [each for each in other.places if each[1] == doc_id]
        if any(each[2] == name[2] for each in alike):
            return f"of split {split} here, of {alike[0][0]} in {where}"
        return f"other text in {where}" if alike else f"not in {where}"
    return "there more often than in the others"
