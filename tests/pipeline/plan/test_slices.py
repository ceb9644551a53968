"""Where slices end depends on the documents near by, whoever reads them; sizes stay within their limits."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from bytecache.pipeline.plan.slices import Entry, Slicer, certain_ends, slice_ends

documents = some.lists(some.tuples(some.integers(1, 40), some.integers(0, 60)), max_size=80)
"""(bytes, hash) of each; hashes that are often equal."""


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([size for size, _ in pairs], np.int64), np.array([value for _, value in pairs], np.uint64)


def entries(pairs: list[tuple[int, int]]) -> list[Entry]:
    """Documents with these hashes as the digest's first bytes."""
    return [
        Entry(str(at), b"x" * size, "", value.to_bytes(8, "little") + bytes(24), (0, at))
        for at, (size, value) in enumerate(pairs)
    ]


@given(documents, some.integers(1, 120))
def test_ends_are_the_lowest_hashes_around(pairs: list[tuple[int, int]], least: int) -> None:
    """As the definition says, one document after the other."""
    sizes, hashes = arrays(pairs)
    after = np.cumsum(sizes)
    lowest = [
        all(
            hashes[other] > hashes[at] if other < at else hashes[other] >= hashes[at]
            for other in range(len(pairs))
            if other != at and abs(after[other] - after[at]) < least
        )
        for at in range(len(pairs))
    ]
    known = [least <= after[at] <= after[-1] - least for at in range(len(pairs))]
    assert certain_ends(sizes, hashes, least) == [at + 1 for at in range(len(pairs)) if lowest[at] and known[at]]


@given(documents, some.integers(10, 150))
def test_sizes_are_within_their_limits(pairs: list[tuple[int, int]], unit_bytes: int) -> None:
    sizes, hashes = arrays(pairs)
    edges = [0, *slice_ends(sizes, hashes, unit_bytes, whole=True)]
    assert edges == sorted(set(edges))
    assert edges[-1] == len(pairs)
    slices = [sizes[low:high] for low, high in itertools.pairwise(edges)]
    for at, piece in enumerate(slices):
        assert piece.sum() <= unit_bytes or len(piece) == 1
        # One far below half a unit has a neighbour with a document that it had no room for.
        if piece.sum() < unit_bytes // 2 - sizes.max():
            neighbours = [slices[other].sum() for other in (at - 1, at + 1) if 0 <= other < len(slices)]
            assert not neighbours or max(neighbours) + piece.sum() > unit_bytes


@given(documents, some.integers(10, 150), some.lists(some.integers(0, 80), max_size=4))
@example([(5, 0), (26, 1), (1, 0), (5, 0)], 10, [])  # an end just after a document that is longer than a unit
def test_parts_find_the_ends_that_one_reader_finds(
    pairs: list[tuple[int, int]], unit_bytes: int, borders: list[int]
) -> None:
    """Each part cut without a look at the others, heads and tails joined, against the whole in one array."""
    every = entries(pairs)
    whole = Slicer(unit_bytes, begins=True)
    joined: list[list[Entry]] = []
    edges = [0, *sorted(min(border, len(every)) for border in borders), len(every)]
    for low, high in itertools.pairwise(edges):
        part = Slicer(unit_bytes, begins=False)
        within = [piece for entry in every[low:high] for piece in part.add(entry)] + list(part.slices())
        if part.head is None:
            assert not within
        around = list(whole.join(part))  # of which the last are behind `within`
        before = [piece for piece in around if not within or piece[0].place < within[0][0].place]
        joined += [*before, *within, *around[len(before) :]]
    joined += whole.slices(end=True)
    sizes, hashes = arrays(pairs)
    ends = slice_ends(sizes, hashes, unit_bytes, whole=True)
    assert [piece[-1].place[1] + 1 for piece in joined] == ends
    assert [entry for piece in joined for entry in piece] == every


@given(some.integers(0, 2**32), some.sampled_from(["insert", "delete", "change"]), some.integers(0, 1999))
def test_a_document_that_changes_leaves_all_slices_but_a_few(seed: int, what: str, at: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 300, 2000)
    hashes = generator.integers(0, 2**63, 2000).astype(np.uint64)
    new = (generator.integers(1, 300, 1), generator.integers(0, 2**63, 1).astype(np.uint64))
    tail = at if what == "insert" else at + 1
    count = 0 if what == "delete" else 1
    changed = [
        np.concatenate([old[:at], piece[:count], old[tail:]]) for old, piece in zip((sizes, hashes), new, strict=True)
    ]

    def slices(sizes: np.ndarray, hashes: np.ndarray) -> set[bytes]:
        edges = [0, *slice_ends(sizes, hashes, 3000, whole=True)]
        return {hashes[low:high].tobytes() for low, high in itertools.pairwise(edges)}

    before, after = slices(sizes, hashes), slices(*changed)
    assert len(before) > 80
    assert 1 <= len(before - after) <= 8
    assert len(after - before) <= 8


@pytest.mark.parametrize("begins", [True, False])
def test_few_documents_wait_whatever_they_are(begins: bool) -> None:
    """Documents so alike that no end is certain: cut where they fill a unit, once it is known where one begins."""
    slicer = Slicer(1000, begins=begins)
    pieces: list[list[Entry]] = []
    for at in range(3000):
        pieces += slicer.add(Entry("", b"x" * 10, "", bytes(32), (0, at)))
        if begins:
            assert slicer.n_bytes <= 4000
    assert (slicer.head is None) is not begins
    pieces += slicer.slices(end=True) if begins else []
    assert [len(piece) for piece in pieces] == ([100] * 30 if begins else [])


def test_slices_are_near_two_thirds_of_a_unit() -> None:
    digests = b"".join(hashlib.sha256(b"%d" % at).digest()[:8] for at in range(20_000))
    edges = np.array([0, *slice_ends(np.full(20_000, 100), np.frombuffer(digests, "<u8"), 10_000, whole=True)])
    lengths = 100 * np.diff(edges)
    assert 6000 < lengths.mean() < 8000
    assert lengths.min() >= 5000 - 100
    assert lengths.max() <= 10_000
