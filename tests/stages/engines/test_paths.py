"""Path masses against sums over the whole vocabulary, and the device form against the CPU form."""

import numpy as np
import pytest
import torch

from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.stages.engines.paths import PathReducer, plan_paths, range_sums, range_sums_on_device
from bytecache.stages.tokens.vocab import load_vocabulary

TEXT = "the cache, naïve"


@pytest.fixture(scope="module", params=["bytelevel", "sentencepiece"])
def vocabulary(request, tiny_checkpoint):
    return load_vocabulary(tiny_checkpoint(request.param))


def rows_of(vocabulary, seed: int, *, floor: float, spread: float = 8.0):
    data = np.frombuffer(TEXT.encode(), np.uint8)
    starts = np.arange(len(data) + 1, dtype=np.int64)
    logits = torch.randn(len(starts), vocabulary.size, generator=torch.Generator().manual_seed(seed)) * spread
    reducer = PathReducer(vocabulary, top_k=3, floor=floor)
    following = np.full(len(starts), -1, np.int64)
    following[0] = 5
    return logits, data, starts, reducer.reduce(logits, plan_paths(vocabulary, data, starts), following, where="test")


@pytest.mark.parametrize("spread", [1.0, 25.0])
def test_masses_are_sums_over_the_vocabulary(vocabulary, spread):
    """Every entry, stop, END and control mass by definition; relative, down to masses of 1e-30."""
    logits, data, _, rows = rows_of(vocabulary, 0, floor=0.0, spread=spread)
    p = torch.softmax(logits.double(), -1).numpy()
    level = entry = stop = 0
    smallest = 1.0
    for r in range(len(p)):
        end = sum(p[r, i] for i in vocabulary.end_ids)
        assert rows.end[r] == pytest.approx(end, rel=1e-5)
        control = sum(p[r, i] for i, b in enumerate(vocabulary.token_bytes) if not b) - end
        assert rows.control[r] == pytest.approx(control, rel=1e-5, abs=1e-12)
        for depth in range(rows.n_levels[r]):
            prefix = data[r : r + depth].tobytes()
            for _ in range(rows.fanout[level]):
                word = prefix + bytes([rows.entry_byte[entry]])
                expected = sum(p[r, i] for i, b in enumerate(vocabulary.token_bytes) if b and b.startswith(word))
                smallest = min(smallest, expected)
                assert rows.entry_mass[entry] == pytest.approx(expected, rel=2e-5, abs=1e-38)
                entry += 1
            level += 1
        for _ in range(rows.n_stops[r]):
            prefix = data[r : r + rows.stop_depth[stop]].tobytes()
            token = rows.stop_token[stop]
            assert vocabulary.token_bytes[token] == prefix
            assert rows.stop_mass[stop] == pytest.approx(p[r, token], rel=2e-5, abs=1e-38)
            stop += 1
    assert (level, entry, stop) == (len(rows.fanout), len(rows.entry_mass), len(rows.stop_mass))
    assert spread < 2 or smallest < 1e-30
    assert rows.next_logp[0] == pytest.approx(np.log(p[0, 5]), rel=1e-5) and np.isnan(rows.next_logp[1:]).all()
    np.testing.assert_array_equal(rows.topk_id, np.argsort(-p, axis=1)[:, :3])


def test_the_floor_drops_rare_entries_but_never_the_text(vocabulary):
    _, data, starts, whole = rows_of(vocabulary, 1, floor=0.0)
    _, _, _, pruned = rows_of(vocabulary, 1, floor=1e-2)
    assert len(pruned.entry_mass) < len(whole.entry_mass)
    level_offset = np.cumsum([0, *pruned.fanout])
    first = np.cumsum([0, *pruned.n_levels])
    for r in starts[:-1]:
        for depth in range(pruned.n_levels[r] - 1):
            level = first[r] + depth
            listed = pruned.entry_byte[level_offset[level] : level_offset[level + 1]]
            assert data[r + depth] in listed


def test_device_sums_equal_cpu_sums(vocabulary):
    generator = np.random.default_rng(0)
    e = torch.rand(4, vocabulary.size)
    row = np.sort(generator.integers(0, 4, 50))
    lo = generator.integers(0, len(vocabulary.order) - 1, 50).astype(np.int32)
    hi = np.minimum(lo + generator.integers(1, 40, 50), len(vocabulary.order)).astype(np.int32)
    ours = range_sums_on_device(e, torch.from_numpy(vocabulary.order), row, lo, hi)
    np.testing.assert_allclose(ours, range_sums(e.numpy(), vocabulary.order, row, lo, hi), rtol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_refused(vocabulary, bad):
    data = np.frombuffer(b"t", np.uint8)
    starts = np.zeros(1, np.int64)
    logits = torch.zeros(1, vocabulary.size)
    logits[0, 3] = bad
    with pytest.raises(EngineError, match="NaN or Inf logits"):
        PathReducer(vocabulary, top_k=0, floor=0.0).reduce(
            logits, plan_paths(vocabulary, data, starts), np.array([-1]), where="document 'x'"
        )


def test_top_k_above_the_vocabulary_is_refused(vocabulary):
    with pytest.raises(ConfigError, match="exceeds the teacher's vocabulary"):
        PathReducer(vocabulary, top_k=vocabulary.size + 1, floor=0.0)
