"""How far stored distributions are from a reference, per position: KL, JSD, leakage. Arrays in, arrays out, float64.

A row is 257 listed probabilities and a tail that sum to 1. Two readings of a tail, because none is the truth:

    spread   both tails are spread over the symbols that the stored row does not list: evenly, or by the `weights` that
             the format gives (over all 257 evenly where the row lists all). The same on both sides, or a mere
             difference in listing would count as distance. The rows become distributions p, q over 257 symbols:
             KL = sum p ln(p / q),  JSD = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2
    bucket   what the stored row does not list is one more symbol, on both sides: what a trainer that uses listed
             symbols and one rest bucket can notice

q is never taken below `TINY`, so that a stored zero costs 27 nats and not infinity. KL runs from the reference to
the stored row, in nats per position, that is per byte of text (and per END).
"""

from typing import NamedTuple

import numpy as np

TINY = 1e-12
"""Smallest probability that a stored row is taken to give."""


class Divergence(NamedTuple):
    """Per position; m of them."""

    kl: np.ndarray
    """float64 [m]; KL(reference || stored), tails spread; nats."""
    kl_bucket: np.ndarray
    """float64 [m]; the same over listed symbols and one bucket for the rest; nats."""
    jsd: np.ndarray
    """float64 [m]; Jensen-Shannon divergence, tails spread; nats, at most ln 2."""
    leak: np.ndarray
    """float64 [m]; log2 stored(true symbol) - log2 reference(true symbol), tails spread: bits given to what comes next
    beyond what a reader of the text so far can know. Above zero the targets leak, below they lose."""


def even_weights(listed: np.ndarray) -> np.ndarray:
    """float64 [m, 257], rows sum to 1: even over the symbols that are not `listed`, over all where all are."""
    unlisted = ~listed
    unlisted[listed.all(axis=1)] = True
    weights: np.ndarray = unlisted / unlisted.sum(axis=1, keepdims=True)
    return weights


def spread_tail(probs: np.ndarray, tail: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Distributions float64 [m, 257] of rows `probs` [m, 257] and `tail` [m], the tail shared out by `weights`."""
    return probs.astype(np.float64) + weights * tail.astype(np.float64)[:, None]


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    ratio = np.log(np.maximum(p, TINY**2) / np.maximum(q, TINY))
    divergence: np.ndarray = np.maximum(np.where(p > 0, p * ratio, 0.0).sum(axis=1), 0.0)
    return divergence


def kl_spread(
    reference: np.ndarray,
    reference_tail: np.ndarray,
    stored: np.ndarray,
    stored_tail: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """KL(reference || stored) with tails spread, nats, float64 [m]; rows [m, 257], tails [m]."""
    shares = even_weights(stored > 0) if weights is None else weights
    return _kl(spread_tail(reference, reference_tail, shares), spread_tail(stored, stored_tail, shares))


def divergence(
    reference: np.ndarray,
    reference_tail: np.ndarray,
    stored: np.ndarray,
    stored_tail: np.ndarray,
    symbol: np.ndarray,
    weights: np.ndarray | None = None,
) -> Divergence:
    """Compare m rows: `reference`, `stored` [m, 257], their tails [m], `symbol` int [m] the text's own next symbols.

    `weights` float [m, 257]: how the format spreads a row's tail; default: evenly over unlisted symbols.
    """
    listed = stored > 0
    shares = even_weights(listed) if weights is None else weights
    p, q = spread_tail(reference, reference_tail, shares), spread_tail(stored, stored_tail, shares)
    middle = (p + q) / 2
    at = np.arange(len(symbol))
    leak = np.log2(np.maximum(q[at, symbol], TINY)) - np.log2(np.maximum(p[at, symbol], TINY))
    p_listed, q_listed = np.where(listed, reference, 0.0), np.where(listed, stored, 0.0).astype(np.float64)
    p_rest = reference_tail.astype(np.float64) + np.where(listed, 0.0, reference).sum(axis=1, dtype=np.float64)
    bucket = _kl(
        np.column_stack([p_listed.astype(np.float64), p_rest]), np.column_stack([q_listed, stored_tail.astype(float)])
    )
    return Divergence(_kl(p, q), bucket, (_kl(p, middle) + _kl(q, middle)) / 2, leak)
