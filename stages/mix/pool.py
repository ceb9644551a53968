"""Pooling: what several teachers say of a position as one distribution. Pure arithmetic on dense rows.

Each teacher's row is a distribution over the 257 symbols (its tail shared out as its shard's prior weighs it, SPEC 3.5)
and each has a weight at each position:

    linear      p(b) = sum_t w_t p_t(b)
    log         p(b) proportional to prod_t p_t(b) ^ w_t
    posterior   linear, with w_t at position i proportional to w_t(0) * prod_{j < i} p_t(x_j), the product over the
                document's bytes before i

A posterior's weights depend on the past alone, so the mixture stays causal; it is the Bayesian mixture of the teachers
as models of whole documents: -log P(document) is within -log w_t(0) of the best teacher's. Source: Genest and Zidek
1986 ("Combining probability distributions") for the pools, de Finetti's mixture for the weights.

A row that says nothing (its tail is 1) has no weight at its position, and no teacher's posterior moves where one of
them says nothing. Price: 257 doubles a position and teacher; a few microseconds each.
"""

import numpy as np
import numpy.typing as npt

from bytecache.schemas.arrays import F64, SYMBOLS

Bools = npt.NDArray[np.bool_]
POOLS = ("linear", "log", "posterior")
FLOOR = 2.0**-32 / SYMBOLS
"""Least probability in a logarithmic pool: the smallest tail that a shard can say, shared among all symbols. A zero
in a shard means "less than that", and must not be a veto."""
LEAST = 1e-300
"""Of what is taken the logarithm of; no more than a guard."""


def weights_of(pool: str, scores: F64, likelihoods: F64, speaks: Bools) -> tuple[F64, F64]:
    """The teachers' weights at n consecutive positions of a document, and the scores behind the last of them.

    Args:
        pool: one of `POOLS`. scores: float64 [T], logarithms of the weights at the first position, up to a constant.
        likelihoods: float64 [T, n], what each says of the true symbol. speaks: bool [T, n].

    Returns:
        float64 [T, n], each column summing to 1 (0 where nobody speaks); float64 [T], to go on with.
    """
    before = np.repeat(scores[:, None], likelihoods.shape[1] + 1, axis=1)
    if pool == "posterior":
        moved = np.where(speaks.all(0), np.log(np.maximum(likelihoods, LEAST)), 0.0)
        before[:, 1:] += np.cumsum(moved, axis=1)
    score = np.where(speaks, before[:, :-1], -np.inf)
    best = score.max(0)
    weights = np.exp(score - np.where(np.isfinite(best), best, 0.0))
    total = weights.sum(0)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), before[:, -1]


def pooled(pool: str, rows: F64, weights: F64) -> F64:
    """float64 [n, 257]: rows float64 [T, n, 257] pooled with weights float64 [T, n]; zeros where all weights are 0."""
    if pool != "log":
        linear: F64 = np.einsum("tns,tn->ns", rows, weights)
        return linear
    scores = np.einsum("tns,tn->ns", np.log(np.maximum(rows, FLOOR)), weights)
    scores = np.exp(scores - scores.max(1, keepdims=True))
    log: F64 = scores / scores.sum(1, keepdims=True) * (weights.sum(0) > 0)[:, None]
    return log


def disagreement(rows: F64, speaks: Bools) -> F64:
    """float64 [n]: Jensen-Shannon divergence in nats of the teachers that speak, each with equal weight.

    Whatever the pool: a posterior that has settled on one teacher would call every disagreement small.
    """
    count = np.maximum(speaks.sum(0), 1)
    share = speaks / count
    middle = np.einsum("tns,tn->ns", rows, share)

    def entropy(each: F64) -> F64:
        with np.errstate(divide="ignore", invalid="ignore"):
            nats: F64 = -np.where(each > 0, each * np.log(each), 0.0).sum(-1)
        return nats

    divergence: F64 = np.maximum(entropy(middle) - (entropy(rows) * share).sum(0), 0.0)
    return divergence
