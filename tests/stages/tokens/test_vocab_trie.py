"""The byte trie against brute force."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecache.stages.tokens.byte_trie import Trie, build_trie, longest_match, sort_tokens

TOKENS = st.lists(
    st.none() | st.text("ab\u00ff", min_size=1, max_size=5).map(lambda s: s.encode("latin-1")), max_size=30
)


def prefixes(trie: Trie) -> list[bytes]:
    """The byte string of every node, from its parent's."""
    found = [b""] * len(trie.lo)
    for node in range(len(trie.lo)):
        for child in range(trie.first_child[node], trie.first_child[node + 1]):
            assert child > node, "breadth first: a child comes after its parent"
            found[child] = found[node] + bytes([trie.byte[child]])
    return found


def check(tokens: list[bytes | None]) -> None:
    order = sort_tokens(tokens)
    trie = build_trie(tokens, order)
    pairs = [(tokens[i] or b"", i) for i in order.tolist()]
    assert pairs == sorted((data, i) for i, data in enumerate(tokens) if data)
    found = prefixes(trie)
    expected = {b""} | {data[:n] for data, _ in pairs for n in range(1, len(data) + 1)}
    assert sorted(found) == sorted(expected)
    assert [len(p) for p in found] == sorted(len(p) for p in found)
    counts = Counter(data for data, _ in pairs)
    for node, prefix in enumerate(found):
        inside = [k for k, (data, _) in enumerate(pairs) if data.startswith(prefix)]
        assert list(range(trie.lo[node], trie.hi[node])) == inside
        assert trie.n_equal[node] == counts[prefix]
        equal = pairs[trie.lo[node] : trie.lo[node] + trie.n_equal[node]]
        assert all(data == prefix for data, _ in equal)
        children = trie.byte[trie.first_child[node] : trie.first_child[node + 1]].tolist()
        assert children == sorted(set(children))
    assert trie.first_child[-1] == len(trie.lo)
    assert [a.dtype for a in trie] == [np.int32] * 4 + [np.uint8]


@settings(max_examples=150, deadline=None)
@given(tokens=TOKENS)
def test_invariants(tokens: list[bytes | None]) -> None:
    check(tokens)


@pytest.mark.parametrize(
    "tokens", [[], [None], [b"a"], [b"a", b"a"], [b"\x00", b"\x00\x00"], [b"x" * 1024, b"x", None]]
)
def test_edges(tokens: list[bytes | None]) -> None:
    check(tokens)


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS, text=st.text("ab\u00ff", max_size=20))
def test_longest_match(tokens: list[bytes | None], text: str) -> None:
    data = text.encode("latin-1")
    order = sort_tokens(tokens)
    trie = build_trie(tokens, order)
    expected, at = [], 0
    while at < len(data):
        fits = [(-len(t), i) for i, t in enumerate(tokens) if t and data.startswith(t, at)]
        if not fits:
            break
        length, best = min(fits)
        expected.append(best)
        at -= length
    assert longest_match(trie, order, np.frombuffer(data, dtype=np.uint8)).tolist() == expected
