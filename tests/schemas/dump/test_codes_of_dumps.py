"""What a dump learns as it goes (orders of bytes and tokens, spellings), and what it puts together before it codes."""

import numpy as np
import pytest

from bytecache.schemas.dump import likely
from bytecache.schemas.dump.likely import TopK, pack_lists, unpack_top_k
from bytecache.schemas.dump.orders import (
    MOST_TIMES,
    byte_at,
    context_of,
    in_sequence,
    learn,
    new_orders,
    own_place,
    rank_of,
    sort,
)
from bytecache.schemas.dump.pooling import Cells, pooled
from bytecache.schemas.dump.ranking import Ranking, listed_again
from bytecache.schemas.dump.shares import Level, code_level, rest_share, scale_of
from bytecache.schemas.dump.spellings import is_empty, new_spellings, note, slot_of, token_at

TEXT = np.frombuffer(b"abcab", np.uint8)


@pytest.mark.parametrize(("kind", "first", "most"), [(np.uint8, 60, 20), (np.int64, 0, -1)])
def test_what_is_listed_again_changes_places_with_the_first_that_was_as_often(kind, first, most):
    """Beside the rule in words, TOKEN_DUMP 4 and 7: with numbers of any width, at any place, up to `most` times."""
    item = np.tile(np.arange(30), 4).astype(kind)
    ranking = Ranking(item, item.copy(), np.zeros(120, kind), np.zeros(400, np.uint16))
    order, times = list(range(30)), [0] * 30
    for listed in (np.random.default_rng(3).geometric(0.1, 2000) % 30).tolist():
        listed_again(ranking, first, listed, most)
        if times[listed] != most:
            there, ahead = order.index(listed), [times[x] for x in order].index(times[listed])
            order[there], order[ahead] = order[ahead], listed
            times[listed] += 1
    one = slice(first, first + 30)
    assert ranking.item[one].tolist() == order and ranking.times[one].tolist() == times
    assert max(times) > 100 or most == max(times)


def test_an_order_is_by_how_often_bytes_were_listed():
    """TOKEN_DUMP 4."""
    orders, draw, context = new_orders(TEXT), np.random.default_rng(0), 3 * 256
    for byte in draw.geometric(0.05, 4000) % 256:
        orders.listed[0] = byte
        learn(orders, context, 1)
    one, next_one = slice(context, context + 256), slice(context + 256, context + 512)
    times = orders.ranking.times[one][orders.ranking.item[one]].astype(int)
    assert (np.diff(times) <= 0).all() and times[0] > times[100] and times.max() <= MOST_TIMES
    np.testing.assert_array_equal(orders.ranking.place[one][orders.ranking.item[one]], np.arange(256))
    np.testing.assert_array_equal(orders.ranking.item[next_one], np.arange(256))


@pytest.mark.parametrize("i", range(len(TEXT) + 1))
def test_the_sequence_begins_with_the_texts_own_byte(i):
    """TOKEN_DUMP 4."""
    orders = new_orders(TEXT)
    context = context_of(orders, TEXT, i, 1)
    orders.listed[:7] = list(b"xyzzy b")
    learn(orders, context, 7)
    own = own_place(orders, context, TEXT, i)
    sequence = [byte_at(orders, context, own, place) for place in range(256)]
    before = orders.ranking.item[context : context + 256].tolist()
    expected = before if i == len(TEXT) else [int(TEXT[i]), *(b for b in before if b != TEXT[i])]
    assert sequence == expected
    assert [in_sequence(orders, context, own, byte) for byte in sequence] == list(range(256))


def test_places_among_the_listed_bytes_are_those_of_a_sort():
    orders, draw = new_orders(TEXT), np.random.default_rng(2)
    for count in (1, 2, 63, 64, 65, 255, 256):
        listed = draw.permutation(256)[:count]
        orders.listed[:count] = listed
        sort(orders, count)
        ranks = [rank_of(orders.bits, orders.lower, int(byte)) for byte in listed]
        assert ranks == np.argsort(np.argsort(listed)).tolist()


def test_contexts_are_the_byte_before_and_whether_a_row_begins():
    contexts = {context_of(new_orders(TEXT), TEXT, i, depth) for i in range(6) for depth in (0, 1, 2)}
    assert len(contexts) == 2 * 4  # nothing, a, b and c before


def test_a_spelling_is_found_where_the_same_bytes_are():
    spellings = new_spellings(3)
    slot = slot_of(spellings, TEXT, 0, 2)
    assert is_empty(spellings, slot)
    note(spellings, slot, 0, 2, 77)
    assert slot_of(spellings, TEXT, 3, 2) == slot and token_at(spellings, slot) == 77
    for start, length in ((0, 1), (0, 3), (1, 2)):
        assert is_empty(spellings, slot_of(spellings, TEXT, start, length))


def lists(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    ids = np.stack([draw.permutation(60)[:k] for _ in range(rows)]).astype(np.int32) * 1000
    return ids, -np.sort(draw.exponential(3.0, (rows, k)), axis=1).astype(np.float32)


def test_the_top_k_comes_back_with_few_ids(monkeypatch):
    """TOKEN_DUMP 7."""
    ids, logp = lists(50, 7)
    columns = pack_lists(ids, logp)
    assert len(columns.topk_token) == len(np.unique(ids)) and columns.topk_rank.max() <= 60
    found, back = unpack_top_k(np.zeros(50, np.uint8), columns)
    np.testing.assert_array_equal(found.reshape(ids.shape), ids)
    np.testing.assert_allclose(back.reshape(ids.shape), logp, atol=1 / 32)
    monkeypatch.setattr(likely, "LAST_PLACE", 5)
    likely._ranks.recompile()
    try:
        short = pack_lists(ids, logp)
        assert short.topk_rank.max() <= 5 and len(short.topk_token) > len(columns.topk_token)
        found, _ = unpack_top_k(np.zeros(50, np.uint8), short)
        np.testing.assert_array_equal(found.reshape(ids.shape), ids)
    finally:
        monkeypatch.undo()
        likely._ranks.recompile()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (TopK(np.array([0, 3], np.uint16), np.array([5], np.int32), np.zeros(2, np.uint16)), "does not list"),
        (TopK(np.array([0, 0], np.uint16), np.array([5], np.int32), np.zeros(2, np.uint16)), "does not list"),
        (TopK(np.array([0, 1], np.uint16), np.array([5, 6], np.int32), np.zeros(2, np.uint16)), "does not list"),
        (TopK(np.array([0, 1, 1], np.uint16), np.array([5], np.int32), np.zeros(3, np.uint16)), "as many tokens"),
    ],
)
def test_a_top_k_of_no_lists_is_refused(columns, words):
    with pytest.raises(ValueError, match=words):
        unpack_top_k(np.zeros(2, np.uint8), columns)


def test_what_light_rows_leave_out_is_listed_once_together():
    """Five rows at the text's first byte give 30 bytes less than the floor each; the text's own byte is 200."""
    bytes_ = np.tile(np.append(np.arange(30), 200).astype(np.uint8), 5)
    mass = np.tile(np.append(np.geomspace(0.001, 0.01, 30), 0.8).astype(np.float32), 5)
    cells = Cells(
        np.array([200], np.uint8), np.zeros(5, np.int32), np.ones(5, np.int32), np.full(5, 31, np.uint16), bytes_, mass,
        np.full(5, 0.2),
    )  # fmt: skip
    out = pooled(cells, 0.003)
    assert cells.entry_mass is mass and (mass[30::31] == out[30::31]).all()
    total, exact = (0.2 * np.bincount(bytes_, values)[:30] for values in (out, mass))
    assert (total <= exact + 1e-7).all() and (exact - total < 0.003).all() and total.sum() > 0.5 * exact.sum()
    assert (out.reshape(5, 31).sum(1) <= mass.reshape(5, 31).sum(1) + 1e-6).all()
    listed = 0.2 * out[(out > 0) & (bytes_ != 200)]
    assert (listed > 0.003 - 1e-8).all() and len(listed) <= 60


def test_what_is_unlisted_beside_an_implied_share_is_never_nothing():
    """A tail of zero is infinitely far from the least one. TOKEN_DUMP 4."""
    scale = scale_of(0, 150)
    for shares in ([0.9999999, 1e-7], [0.6, 0.4], [1.0]):
        n = len(shares)
        level = Level(np.array(shares), np.zeros(n, np.uint8), np.zeros(n, np.uint16), np.zeros(n, np.uint16))
        _, rest = code_level(level, n, scale)
        assert 0.0 < rest_share(rest, scale.unit) < 2e-5
    level = Level(np.array([0.5, 0.3]), np.zeros(2, np.uint8), np.zeros(2, np.uint16), np.zeros(2, np.uint16))
    assert abs(rest_share(code_level(level, 2, scale)[1], scale.unit) - 0.2) < 0.01
