"""The certificate's figures: formulas against loops, sums that merge in any grouping."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as some

from bytecache.stages.fidelity.certificate import Fidelity, summary_line
from bytecache.stages.fidelity.divergence import divergence, even_weights, kl_spread, spread_tail
from bytecache.stages.fidelity.measure import Measure


def rows(seed: int, m: int, listed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probs = np.zeros((m, 257), np.float32)
    tail = np.zeros(m, np.float32)
    for i in range(m):
        mass = rng.dirichlet(np.ones(listed + 1) * 0.3)
        probs[i, rng.choice(257, listed, replace=False)] = mass[:-1]
        tail[i] = 1 - probs[i].sum()
    return np.maximum(probs, 0), np.maximum(tail, 0)


def test_formulas_equal_their_definition():
    p, p_tail = rows(1, 20, 9)
    q, q_tail = rows(2, 20, 5)
    symbol = np.random.default_rng(3).integers(0, 257, 20)
    found = divergence(p, p_tail, q, q_tail, symbol)
    for i in range(20):
        unlisted = int((q[i] == 0).sum())
        a = [float(x) + (float(p_tail[i]) / unlisted if y == 0 else 0) for x, y in zip(p[i], q[i], strict=True)]
        b = [float(y) or float(q_tail[i]) / unlisted for y in q[i]]
        assert sum(a) == pytest.approx(1, abs=1e-5) and sum(b) == pytest.approx(1, abs=1e-5)
        kl = sum(x * math.log(x / max(y, 1e-12)) for x, y in zip(a, b, strict=True) if x > 0)
        middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        jsd = sum(v * math.log(v / m) / 2 for d in (a, b) for v, m in zip(d, middle, strict=True) if v > 0)
        rest = float(p_tail[i]) + sum(float(x) for x, y in zip(p[i], q[i], strict=True) if y == 0)
        bucket = rest * math.log(rest / float(q_tail[i])) + sum(
            float(x) * math.log(float(x) / float(y)) for x, y in zip(p[i], q[i], strict=True) if y > 0 and x > 0
        )
        assert found.kl[i] == pytest.approx(kl, rel=1e-6)
        assert found.kl_bucket[i] == pytest.approx(bucket, rel=1e-4)
        assert found.jsd[i] == pytest.approx(jsd, rel=1e-5)
        assert found.leak[i] == pytest.approx(math.log2(max(b[symbol[i]], 1e-12) / max(a[symbol[i]], 1e-12)), rel=1e-6)


@hypothesis_settings(max_examples=30, deadline=None)
@given(some.integers(0, 999), some.integers(1, 256), some.integers(1, 256))
def test_bounds(seed, listed_p, listed_q):
    p, p_tail = rows(seed, 4, listed_p)
    q, q_tail = rows(seed + 1, 4, listed_q)
    found = divergence(p, p_tail, q, q_tail, np.zeros(4, int))
    assert (found.kl >= 0).all() and (found.kl_bucket >= 0).all()
    assert (found.jsd >= 0).all() and (found.jsd <= math.log(2) + 1e-6).all()  # rows sum to 1 in float32
    same = divergence(p, p_tail, p, p_tail, np.zeros(4, int))
    assert same.kl.max() < 1e-12 and same.kl_bucket.max() < 1e-7 and not same.leak.any()
    np.testing.assert_allclose(spread_tail(p, p_tail, even_weights(q > 0)).sum(1), 1, atol=1e-5)
    everything = np.ones_like(q, bool)
    np.testing.assert_allclose(spread_tail(p, p_tail, even_weights(everything)).sum(1), 1, atol=1e-5)


def test_a_format_may_say_how_its_tail_is_spread():
    p, q = np.zeros((1, 257), np.float32), np.zeros((1, 257), np.float32)
    p[0, :3], q[0, 0] = (0.5, 0.4, 0.1), 0.5
    weights = np.zeros((1, 257))
    weights[0, 1:3] = 0.8, 0.2
    nothing, half = np.zeros(1, np.float32), np.full(1, 0.5, np.float32)
    assert divergence(p, nothing, q, half, np.array([1]), weights).kl[0] == pytest.approx(0, abs=1e-7)
    assert divergence(p, nothing, q, half, np.array([1])).kl[0] > 1


def test_leak_is_positive_where_the_stored_row_knows_what_follows():
    p, q = np.zeros((1, 257), np.float32), np.zeros((1, 257), np.float32)
    p[0, :2], q[0, :2] = (0.5, 0.5), (0.9, 0.1)
    nothing = np.zeros(1, np.float32)
    assert divergence(p, nothing, q, nothing, np.array([0])).leak[0] == pytest.approx(math.log2(1.8))
    assert divergence(p, nothing, q, nothing, np.array([1])).leak[0] == pytest.approx(math.log2(0.2))


def test_a_stored_zero_costs_much_but_not_infinity():
    p, q = np.zeros((1, 257), np.float32), np.zeros((1, 257), np.float32)
    p[0, 0], q[0, 1] = 1.0, 1.0
    nothing = np.zeros(1, np.float32)
    assert kl_spread(p, nothing, q, nothing)[0] == pytest.approx(math.log(1e12))


def test_measures_merge_in_any_grouping_and_p99_is_an_upper_bound():
    rng = np.random.default_rng(0)
    pieces = [rng.lognormal(-8, 3, size) for size in (50, 700, 1, 400)]
    whole, first, second = Measure(), Measure(), Measure()
    for i, piece in enumerate(pieces):
        whole.add(piece)
        (first if i < 2 else second).add(piece)
    second.merge(json.loads(json.dumps(first.state())))
    assert second.histogram == whole.histogram
    values = np.concatenate(pieces)
    squared = float(sum(len(piece) ** 2 for piece in pieces))
    found = second.summary(len(values), len(pieces), squared)
    assert found == whole.summary(len(values), len(pieces), squared)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert found["max"] == pytest.approx(values.max(), rel=1e-5)
    exact = np.sort(values)[::-1][len(values) // 100]
    assert exact <= found["p99"] <= exact * 10 ** (1 / 40) * 1.0001
    # The ratio estimator's own formula, over windows.
    mean = values.mean()
    spread = sum((piece.sum() - mean * len(piece)) ** 2 for piece in pieces)
    assert found["stderr"] == pytest.approx(math.sqrt(spread * 4 / 3) / len(values), rel=1e-4)


def test_states_of_another_version_are_refused():
    with pytest.raises(ValueError, match="version 99"):
        Fidelity([{"version": 99}])
    assert Fidelity([None, None]).state() is None
    assert Fidelity().certificate({}, {}) is None
    assert "not measured" in summary_line(None)
