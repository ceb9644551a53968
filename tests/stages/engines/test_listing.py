"""Listed tokens against sums over a dense distribution: everything listed, a prior for the rest, causality."""

import numpy as np
import pytest
import torch

from bytecache.stages.engines.listing import END_TOKEN, Listing, ListingReducer
from bytecache.stages.engines.paths import PathReducer, plan_paths
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary

TEXTS = ["The cache: naïve 日本語,\n\n  indented 12345 isn't.", "a", "    four\n\n\nlines  "]


@pytest.fixture(scope="module", params=["bytelevel", "sentencepiece"])
def vocabulary(request: pytest.FixtureRequest, tiny_checkpoint) -> Vocabulary:
    return load_vocabulary(tiny_checkpoint(request.param))


def rows_of(vocabulary: Vocabulary, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    encoded = vocabulary.encode(text)
    return np.frombuffer(encoded.data, np.uint8), encoded.starts.astype(np.int64), encoded.ids.astype(np.int64)


def random_rows(vocabulary: Vocabulary, count: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal((count, vocabulary.size)) * 3
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def top(p: np.ndarray, k: int) -> Listing:
    ids = np.argsort(-p, axis=1)[:, :k]
    masses = np.take_along_axis(p, ids, axis=1)
    return Listing(np.full(len(p), k, np.int64), ids.reshape(-1), masses.reshape(-1))


def entries(rows: RowMasses) -> dict[tuple[int, int, int], float]:
    """(row, depth, byte) -> mass."""
    out, at = {}, 0
    level = 0
    for row, levels in enumerate(rows.n_levels.tolist()):
        for depth in range(levels):
            for _ in range(rows.fanout[level]):
                out[row, depth, int(rows.entry_byte[at])] = float(rows.entry_mass[at])
                at += 1
            level += 1
    return out


@pytest.mark.parametrize("text", TEXTS)
def test_with_everything_listed_it_is_the_dense_reduction(vocabulary: Vocabulary, text: str) -> None:
    data, starts, tokens = rows_of(vocabulary, text)
    p = random_rows(vocabulary, len(starts), 0)
    listed = ListingReducer(vocabulary, np.ones(vocabulary.size)).reduce(data, starts, tokens, top(p, vocabulary.size))
    dense = PathReducer(vocabulary, top_k=0, floor=0.0).reduce(
        torch.from_numpy(np.log(p)), plan_paths(vocabulary, data, starts), np.append(tokens, -1), where="test"
    )
    assert entries(listed) == pytest.approx(entries(dense), abs=1e-6)
    for name in ("end", "control", "n_levels", "n_stops", "next_logp"):
        np.testing.assert_allclose(getattr(listed, name), getattr(dense, name), atol=1e-5, err_msg=name)
    stops = [
        sorted(zip(r.stop_depth.tolist(), r.stop_token.tolist(), r.stop_mass.tolist(), strict=True))
        for r in (listed, dense)
    ]
    np.testing.assert_allclose(stops[0], stops[1], atol=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_rounded_masses_of_a_whole_vocabulary_leave_nothing_to_spread(vocabulary: Vocabulary, text: str) -> None:
    """What is left of the masses is their rounding, and what is left of the prior too: one is no share of the other."""
    data, starts, tokens = rows_of(vocabulary, text)
    p, prior = random_rows(vocabulary, len(starts), 5), random_rows(vocabulary, 1, 6)[0]
    whole = top(p, vocabulary.size)
    rounded = whole._replace(masses=whole.masses - 4e-8 / vocabulary.size)
    reducer = ListingReducer(vocabulary, prior)
    listed, exact = (entries(reducer.reduce(data, starts, tokens, listing)) for listing in (rounded, whole))
    assert listed == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_unlisted_goes_where_the_prior_says(vocabulary: Vocabulary, text: str, k: int) -> None:
    """An entry is its prefix's mass under listed + T * prior over unlisted tokens; bytes without a list are tail."""
    data, starts, tokens = rows_of(vocabulary, text)
    p, prior = random_rows(vocabulary, len(starts), 1), random_rows(vocabulary, 1, 2)[0]
    listing = top(p, k)
    reducer = ListingReducer(vocabulary, prior)
    found = entries(reducer.reduce(data, starts, tokens, listing))
    control = np.array([not piece for piece in vocabulary.token_bytes])
    control[vocabulary.end_ids] = False
    for row, start in enumerate(starts.tolist()):
        ids = listing.ids[row * k : row * k + k]
        spread = np.where(control, 0.0, prior)
        spread[ids] = 0.0
        full = spread / spread.sum() * (1 - listing.masses[row * k : row * k + k].sum())
        full[ids] += listing.masses[row * k : row * k + k]
        mine = {key[1:]: mass for key, mass in found.items() if key[0] == row}
        assert mine or start == len(data)
        for (depth, byte), mass in mine.items():
            prefix = data[start : start + depth].tobytes() + bytes([byte])
            want = sum(full[i] for i, piece in enumerate(vocabulary.token_bytes) if piece and piece.startswith(prefix))
            assert mass == pytest.approx(want, abs=1e-6), (row, depth, byte)
        listed_next = {vocabulary.token_bytes[i][0] for i in ids if reducer.spelling.kind[i] == 0}  # type: ignore[index]
        own = {int(data[start])} if start < len(data) else set()
        assert {byte for depth, byte in mine if depth == 0} == listed_next | own


def test_an_entry_does_not_depend_on_the_text_that_follows(vocabulary: Vocabulary) -> None:
    one, other = (np.frombuffer(text, np.uint8) for text in (b"the cache", b"the teach"))
    p = random_rows(vocabulary, 1, 3)
    reducer = ListingReducer(vocabulary, random_rows(vocabulary, 1, 4)[0])
    starts = np.zeros(1, np.int64)
    first, second = (entries(reducer.reduce(text, starts, np.zeros(0, np.int64), top(p, 12))) for text in (one, other))
    common = {key for key in first.keys() & second.keys() if key[1] <= 4}
    assert common
    assert {key: first[key] for key in common} == {key: second[key] for key in common}


def test_special_tokens_are_end_and_control(vocabulary: Vocabulary) -> None:
    end_id = int(vocabulary.end_ids[0])
    listing = Listing(
        np.array([3]), np.array([end_id, vocabulary.size + 5, vocabulary.start_id]), np.array([0.5, 0.25, 0.125])
    )
    reducer = ListingReducer(vocabulary, np.ones(vocabulary.size))
    assert reducer.spelling.kind[end_id] == END_TOKEN
    rows = reducer.reduce(np.frombuffer(b"a", np.uint8), np.zeros(1, np.int64), np.zeros(0, np.int64), listing)
    assert rows.end[0] == 0.5
    expected = 0.25 if vocabulary.start_id in vocabulary.end_ids else 0.375
    assert rows.control[0] == pytest.approx(expected)
