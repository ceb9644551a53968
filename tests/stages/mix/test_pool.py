"""Pools against brute force: weights by whole-document likelihoods, products over all symbols, divergences."""

import math

import numpy as np
import pytest

from bytecache.schemas.arrays import SYMBOLS
from bytecache.schemas.errors import ConfigError
from bytecache.stages.mix.mix import Mixing
from bytecache.stages.mix.pool import FLOOR, disagreement, pooled, weights_of


@pytest.fixture
def rows() -> np.ndarray:
    """float64 [3, 40, 257] distributions, peaked and flat."""
    generator = np.random.default_rng(0)
    drawn = generator.gamma(0.05, size=(3, 40, SYMBOLS)) + 1e-12
    return drawn / drawn.sum(-1, keepdims=True)


def brute_posterior(rows: np.ndarray, true: np.ndarray, prior: list[float]) -> np.ndarray:
    """The mixture of the teachers as models of whole documents, from the prefixes' probabilities."""
    out = np.zeros((len(true), SYMBOLS))
    for at in range(len(true)):
        prefix = [prior[t] * math.prod(rows[t, j, true[j]] for j in range(at)) for t in range(len(rows))]
        out[at] = sum(weight * rows[t, at] for t, weight in enumerate(prefix)) / sum(prefix)
    return out


def test_the_posterior_is_the_mixture_of_document_models(rows: np.ndarray) -> None:
    true = np.random.default_rng(1).integers(0, SYMBOLS, 40)
    prior = [0.5, 0.3, 0.2]
    likelihoods = rows[:, np.arange(40), true]
    weights, scores = weights_of("posterior", np.log(prior), likelihoods, np.ones((3, 40), bool))
    mixed = pooled("posterior", rows, weights)
    np.testing.assert_allclose(mixed, brute_posterior(rows, true, prior), atol=1e-12)
    chain = np.log(mixed[np.arange(40), true]).sum()
    whole = math.log(sum(prior[t] * np.exp(np.log(likelihoods[t]).sum()) for t in range(3)))
    assert math.isclose(chain, whole, rel_tol=1e-9), "the chain rule telescopes"
    best = np.log(likelihoods).sum(1) + np.log(prior)
    assert chain >= best.max() - 1e-9
    np.testing.assert_allclose(np.exp(scores - scores.max()), np.exp(best - best.max()), rtol=1e-9)


def test_weights_do_not_see_what_comes(rows: np.ndarray) -> None:
    true = np.random.default_rng(2).integers(0, SYMBOLS, 40)
    changed = true.copy()
    changed[20:] = (changed[20:] + 7) % SYMBOLS
    at, speaks = np.arange(40), np.ones((3, 40), bool)
    before, _ = weights_of("posterior", np.zeros(3), rows[:, at, true], speaks)
    after, _ = weights_of("posterior", np.zeros(3), rows[:, at, changed], speaks)
    np.testing.assert_array_equal(before[:, :21], after[:, :21])
    assert not np.allclose(before[:, 21:], after[:, 21:])


def test_pieces_are_as_the_whole(rows: np.ndarray) -> None:
    true = np.random.default_rng(3).integers(0, SYMBOLS, 40)
    likelihoods, speaks = rows[:, np.arange(40), true], np.ones((3, 40), bool)
    whole, last = weights_of("posterior", np.log([0.2, 0.2, 0.6]), likelihoods, speaks)
    scores, found = np.log([0.2, 0.2, 0.6]), []
    for lo in range(0, 40, 13):
        weights, scores = weights_of("posterior", scores, likelihoods[:, lo : lo + 13], speaks[:, lo : lo + 13])
        found.append(weights)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-12)
    np.testing.assert_allclose(scores, last, rtol=1e-12)


def test_linear_and_logarithmic_pools(rows: np.ndarray) -> None:
    prior = np.array([0.5, 0.3, 0.2])
    weights, _ = weights_of("linear", np.log(prior), np.ones((3, 40)), np.ones((3, 40), bool))
    np.testing.assert_allclose(pooled("linear", rows, weights), sum(w * r for w, r in zip(prior, rows, strict=True)))
    product = math.prod(np.maximum(row, FLOOR) ** weight for weight, row in zip(prior, rows, strict=True))
    np.testing.assert_allclose(pooled("log", rows, weights), product / product.sum(1, keepdims=True), rtol=1e-9)


def test_who_says_nothing_has_no_weight(rows: np.ndarray) -> None:
    speaks = np.ones((3, 40), bool)
    speaks[1, ::2] = False
    speaks[:, 5] = False
    likelihoods = rows[:, np.arange(40), 0]
    for pool in ("linear", "log", "posterior"):
        weights, _ = weights_of(pool, np.log([0.5, 0.3, 0.2]), likelihoods, speaks)
        assert (weights[~speaks] == 0).all()
        np.testing.assert_allclose(weights.sum(0), np.where(speaks.any(0), 1.0, 0.0))
        assert (pooled(pool, rows, weights)[5] == 0).all()
    moved, _ = weights_of("posterior", np.zeros(3), likelihoods, speaks)
    np.testing.assert_allclose(moved[[0, 2], 1], moved[[0, 2], 0] / moved[[0, 2], 0].sum() * moved[[0, 2], 1].sum())


def test_a_zero_is_no_veto() -> None:
    rows = np.zeros((2, 1, SYMBOLS))
    rows[0, 0, 65] = rows[1, 0, 66] = 1.0
    mixed = pooled("log", rows, np.full((2, 1), 0.5))
    np.testing.assert_allclose(mixed.sum(), 1.0)
    np.testing.assert_allclose(mixed[0, 65], mixed[0, 66])


def test_disagreement_is_the_divergence_from_the_middle(rows: np.ndarray) -> None:
    found = disagreement(rows, np.ones((3, 40), bool))
    middle = rows.mean(0)
    brute = np.mean([(row * np.log(row / middle)).sum(1) for row in rows], axis=0)
    np.testing.assert_allclose(found, brute, atol=1e-9)
    assert (found <= math.log(3) + 1e-12).all()
    alone = np.zeros((3, 40), bool)
    alone[1] = True
    np.testing.assert_allclose(disagreement(rows, alone), 0.0, atol=1e-12)


@pytest.mark.parametrize("weights", [(0.5,), (0.5, 0.6), (1.5, -0.5), (0.2, 0.2, 0.6)])
def test_impossible_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        Mixing("linear", (0.5, 0.5), (("*", weights),))
    with pytest.raises(ConfigError, match="one of linear, log, posterior"):
        Mixing("sum", (0.5, 0.5))
