"""The context prior: its tree against a direct definition, its weights against float64 arithmetic, its stored form."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecache.schemas.shard import prior as priors
from bytecache.schemas.shard.prior import Prior


def context_of(prior: Prior, node: int) -> bytes:
    """The bytes before a position that belongs to this node."""
    out = b""
    while node:
        out += bytes([prior.byte[node]])
        node = int(prior.parent[node])
    return out


def documents(seed: int, n_documents: int, letters: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 400, n_documents)
    texts = [np.append(rng.integers(97, 97 + letters, n), 0).astype(np.uint8) for n in lengths]
    return np.concatenate(texts), np.cumsum([0, *(lengths + 1)]).astype(np.int64)


@given(seed=st.integers(0, 1000), n_documents=st.integers(1, 12), letters=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_positions_belong_to_the_longest_frequent_context_of_their_document(
    seed: int, n_documents: int, letters: int
) -> None:
    text, start = documents(seed, n_documents, letters)
    prior = priors.grow(text, start, np.ones(len(text), bool))
    seen: Counter[bytes] = Counter()
    before = []
    for lo, hi in itertools.pairwise(start):
        for i in range(lo, hi):
            before.append([text[max(lo, i - back) : i].tobytes() for back in range(min(i - lo, 3) + 1)])
            seen.update(before[-1][1:])
    often = {context for context, count in seen.items() if count >= priors.MINIMUM[len(context)]}
    assert {context_of(prior, k) for k in range(1, len(prior.parent))} == often
    nodes = priors.find_nodes(text, start, prior.child(), 0, len(text))
    for node, candidates in zip(nodes.tolist(), before, strict=True):
        assert context_of(prior, node) == max((c for c in candidates if c in often), key=len, default=b"")
    lo, hi = len(text) // 3, 2 * len(text) // 3
    assert (priors.find_nodes(text, start, prior.child(), lo, hi) == nodes[lo:hi]).all()


def test_the_most_frequent_contexts_are_kept_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    text, start = documents(3, 12, 3)
    whole = priors.grow(text, start, np.ones(len(text), bool))
    monkeypatch.setattr(priors, "NODES", 8)
    few = priors.grow(text, start, np.ones(len(text), bool))
    assert len(whole.parent) > 8 == len(few.parent)
    assert (few.parent == whole.parent[:8]).all() and (few.byte == whole.byte[:8]).all()


def test_weights_are_masses_mixed_with_the_parents() -> None:
    text, start = documents(1, 8, 3)
    tree = priors.grow(text, start, np.ones(len(text), bool))
    nodes = priors.find_nodes(text, start, tree.child(), 0, len(text))
    probs = np.random.default_rng(0).dirichlet(np.full(257, 0.05), len(text))
    mass = np.zeros((len(tree.parent), 257), np.int64)
    np.add.at(mass, nodes, (probs * priors.UNIT).astype(np.int64))
    prior = priors.weigh(tree, mass)
    depth = [len(context_of(tree, k)) for k in range(len(tree.parent))]
    share = np.zeros((len(tree.parent), 257))
    total = mass / priors.UNIT
    for k in sorted(range(1, len(depth)), key=lambda k: -depth[k]):
        total[tree.parent[k]] += total[k]
    for k in sorted(range(len(depth)), key=lambda k: depth[k]):
        above = 1e-3 / 257 if k == 0 else priors.BACKOFF * share[tree.parent[k]]
        share[k] = (total[k] + above) / (total[k] + above).sum()
        exact = np.minimum(-2 * np.log2(share[k] / share[k].max()), priors.MAX_CODE)
        assert np.abs(prior.code[k] - exact).max() < 0.5 + 1e-9
    assert np.allclose(prior.weights(), 2.0 ** (prior.code / -2.0), rtol=1e-15)


def test_stored_form_comes_back_and_ranks_invert_the_order() -> None:
    text, start = documents(2, 10, 4)
    tree = priors.grow(text, start, np.ones(len(text), bool))
    code = np.random.default_rng(1).integers(0, 61, tree.code.shape).astype(np.uint8)
    prior = Prior(tree.parent, tree.byte, code)
    again = priors.check_prior(prior.parent, prior.byte, priors.pack_code(prior))
    assert (again.code == code).all()
    order = prior.order().astype(np.int64)
    ranks = priors.ranks(prior.order())
    assert (np.take_along_axis(ranks, order, 1) == np.arange(257)).all()
    sorted_codes = np.take_along_axis(code, order, 1).astype(int)
    assert (np.diff(sorted_codes * 1000 + order) > 0).all()
