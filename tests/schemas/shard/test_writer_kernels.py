"""The writer's kernels beside plain Python: sparse rows are dense rows, sorting sorts, logarithms are logarithms."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.schemas.shard.logarithms import sum_logs
from bytecache.schemas.shard.prior import MAX_CODE, Prior
from bytecache.schemas.shard.sorting import PADDING, sort_distinct
from tests.support.shard_cases import natural_rows, random_rows


def sparse(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row, symbol = np.nonzero(probs)
    return np.bincount(row, minlength=len(probs)), symbol.astype(np.int16), probs[row, symbol]


def written(path: Path, builder: ShardBuilder) -> bytes:
    builder.end_document("d")
    builder.write(path, {})
    return path.read_bytes()


@given(
    seed=st.integers(0, 2**32),
    sharpness=st.sampled_from([0.0, 0.3, 1.0, 3.0, 8.0, 30.0]),
    tail_exponent=st.sampled_from([-0.01, -1.0, -5.0, -12.0]),
    prune=st.sampled_from([0.0, 1e-3, 0.1]),
)
@settings(max_examples=30, deadline=None)
def test_sparse_rows_make_the_shard_that_dense_ones_make(
    seed: int, sharpness: float, tail_exponent: float, prune: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    probs, tail = random_rows(seed, 60, sharpness, tail_exponent, True)
    text = np.arange(59, dtype=np.uint8)
    dense, other = ShardBuilder(prune), ShardBuilder(prune)
    dense.append(text, probs, tail)
    for lo, hi in ((0, 25), (25, 60)):
        other.append_sparse(text[lo:hi], *sparse(probs[lo:hi]), tail[lo:hi])
    assert written(folder / "a", dense) == written(folder / "b", other)


def test_many_rows_in_pieces_of_any_size_make_the_same_shard(tmp_path: Path) -> None:
    text, probs, tail = natural_rows(3000)
    whole, pieces = ShardBuilder(), ShardBuilder()
    whole.append(text, probs, tail)
    for lo in range(0, len(tail), 700):
        pieces.append_sparse(text[lo : lo + 700], *sparse(probs[lo : lo + 700]), tail[lo : lo + 700])
    assert written(tmp_path / "a", whole) == written(tmp_path / "b", pieces)


@pytest.mark.parametrize(("value", "why"), [(np.nan, "must be within"), (-0.1, "must be within"), (0.7, "sum to")])
def test_a_bad_sparse_row_is_refused_and_nothing_of_its_piece_kept(tmp_path: Path, value: float, why: str) -> None:
    good = np.array([2], np.int64), np.array([5, 9], np.int16), np.array([0.5, 0.5], np.float32)
    builder = ShardBuilder()
    builder.append_sparse(np.array([5], np.uint8), *good, np.zeros(1, np.float32))
    bad = np.array([2, 2]), np.tile(good[1], 2), np.array([0.5, 0.5, value, 0.5], np.float32)
    with pytest.raises(IntegrityError, match=rf"row 1 of this piece .*position 2.*{why}"):
        builder.append_sparse(np.array([5, 5], np.uint8), *bad, np.zeros(2, np.float32))
    for symbols in ([9, 5], [5, 5], [5, 257]):
        with pytest.raises(ValueError, match="must ascend"):
            builder.append_sparse(
                np.array([5], np.uint8), good[0], np.array(symbols, np.int16), good[2], np.zeros(1, np.float32)
            )
    with pytest.raises(ValueError, match="as many entries"):
        builder.append_sparse(np.array([5], np.uint8), good[0] + 1, *good[1:], np.zeros(1, np.float32))
    assert builder.n_positions == 1
    end = np.array([1]), np.array([256], np.int16), np.array([1.0], np.float32)
    builder.append_sparse(np.zeros(0, np.uint8), *end, np.zeros(1, np.float32))
    fresh = ShardBuilder()
    fresh.append_sparse(np.array([5], np.uint8), *good, np.zeros(1, np.float32))
    fresh.append_sparse(np.zeros(0, np.uint8), *end, np.zeros(1, np.float32))
    assert written(tmp_path / "a", builder) == written(tmp_path / "b", fresh)


@pytest.mark.parametrize("n", [*range(20), 31, 32, 33, 257])
def test_sort_distinct_sorts(n: int) -> None:
    for seed in range(30):
        values = np.random.default_rng(seed).permutation(10 * n + 1)[:n].astype(np.int64)
        room = np.append(values, np.full(-n % PADDING or PADDING, -1, np.int64))
        sort_distinct(room, np.empty_like(room), n)
        assert room[:n].tolist() == sorted(values.tolist())


@pytest.mark.parametrize("n", [0, 1, 4, 5, 1000])
def test_sums_of_logarithms(n: int) -> None:
    rng = np.random.default_rng(n)
    times, x = rng.random(n), np.exp(rng.normal(0, 20, n))
    exact = math.fsum(t * math.log(v) for t, v in zip(times, x, strict=True))
    room = np.zeros(4)
    assert sum_logs(np.append(times, room), np.append(x, room), n, np.empty(n + 4)) == pytest.approx(
        exact, rel=1e-12, abs=1e-12
    )


def test_totals_of_weights_are_correctly_rounded_sums() -> None:
    code = np.random.default_rng(0).integers(0, MAX_CODE + 1, (50, 257)).astype(np.uint8)
    prior = Prior(np.arange(-1, 49), np.zeros(50, np.uint8), code)
    assert prior.totals().tolist() == [math.fsum(row) for row in prior.weights()]
