"""Ids are unique, and the same however the corpus is cut into batches."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as some

from bytecache.stages.corpus.document_ids import DocumentIds, hash_ids


def one_by_one(ids: list[str]) -> list[str]:
    """The definition: a document whose id is taken gets the next free number."""
    taken: dict[str, int] = {}
    found = []
    for doc_id in ids:
        name = doc_id
        while name in taken:
            taken[doc_id] += 1
            name = f"{doc_id}#{taken[doc_id]}"
        taken[name] = 1
        found.append(name)
    return found


def in_batches(ids: list[str], cuts: list[int]) -> tuple[list[str], int]:
    names, found = DocumentIds(), []
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for begin, end in pairwise(edges):
        batch = ids[begin:end]
        renamed = names.add(batch, hash_ids(batch))
        found += [renamed.get(at, doc_id) for at, doc_id in enumerate(batch)]
    return found, names.n_renamed


ID = some.sampled_from(["a", "b", "a#2", "a#3", "a#2#2", "b#2", "c"])


@given(some.lists(ID, max_size=30), some.lists(some.integers(0, 40), max_size=6))
def test_batches_do_not_matter(ids: list[str], cuts: list[int]) -> None:
    found, renamed = in_batches(ids, cuts)
    assert found == one_by_one(ids)
    assert len(set(found)) == len(ids)
    assert renamed == sum(one != two for one, two in zip(ids, found, strict=True))


def test_an_id_that_every_document_has() -> None:
    found, renamed = in_batches(["wiki"] * 500, [100, 101, 350])
    assert found == ["wiki", *(f"wiki#{number}" for number in range(2, 501))]
    assert renamed == 499
