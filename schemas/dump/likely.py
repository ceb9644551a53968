"""The k most likely tokens of the canonical rows, as columns.

The same tokens are likely again and again. Those that a window listed before stand in order, the most frequent ones
first; a token is its place there, or the next of the tokens that are listed by id. As with the bytes of an entry
(`orders`), the order is learned by writer and reader alike. A log-probability is how much less likely a token is than
the one before it.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F32, I32, I64, U8, U16
from bytecache.schemas.dump.ranking import Ranking, listed_again
from bytecache.schemas.dump.window import Window
from bytecache.schemas.loops import inner_loop

STEPS_PER_NAT = 16
"""Codes of a log-probability."""
LAST_PLACE = 65_535
"""Tokens beyond so many are listed by id again."""
_EVER = -1
"""Times: however often a token is listed, it counts."""


class TopK(NamedTuple):
    """The columns; N = C k tokens of C canonical rows."""

    topk_rank: U16
    """uint16 [N]; 1 more than the place in the order, 0 for the next of `topk_token`"""
    topk_token: I32
    """int32 [listed]"""
    topk_code: U16
    """uint16 [N]; 16 times what a token's -log p is more than that before it, modulo 2^16 should it be less"""


def _new_ranking(n: int) -> Ranking:
    """Of n tokens at most; one is a number, in the order in which they were listed by id."""
    item, place, times = np.zeros((3, n), np.int64)
    return Ranking(item, place, times, np.zeros(n + 2, np.int64))


@inner_loop
def _append(ranking: Ranking, number: int) -> None:
    """A token that was not listed before, behind all others."""
    ranking.item[number] = ranking.place[number] = number
    listed_again(ranking, 0, number, _EVER)


@njit(cache=True, nogil=True)
def _ranks(ids: I64, distinct: int, ranking: Ranking, rank: U16, listed: I64) -> int:
    """Fill ranks, and which of `ids` [N], numbers below `distinct`, are listed by id; returns how many."""
    known = np.full(distinct, -1, np.int64)
    count = 0
    for n in range(len(ids)):
        number = known[ids[n]]
        if number >= 0 and ranking.place[number] < LAST_PLACE:
            rank[n] = ranking.place[number] + 1
            listed_again(ranking, 0, number, _EVER)
        else:
            known[ids[n]], listed[count] = count, n
            _append(ranking, count)
            count += 1
    return count


@njit(cache=True, nogil=True)
def _tokens(rank: U16, listed: I32, ranking: Ranking, out: I32) -> bool:
    """Fill the tokens of all ranks; returns whether there are as many as the ranks say."""
    count = 0
    for n in range(len(rank)):
        if rank[n] > count or (rank[n] == 0 and count == len(listed)):
            return False
        if rank[n] == 0:
            out[n] = listed[count]
            _append(ranking, count)
            count += 1
        else:
            number = ranking.item[rank[n] - 1]
            out[n] = listed[number]
            listed_again(ranking, 0, number, _EVER)
    return count == len(listed)


def pack_top_k(window: Window) -> TopK:
    """The columns of a window's canonical rows."""
    k = len(window.topk_id) // len(window.row_start)
    canonical = np.flatnonzero(window.row_depth == 0)
    ids, logp = (x.reshape(len(window.row_start), k)[canonical] for x in (window.topk_id, window.topk_logp))
    return pack_lists(ids, logp)


def pack_lists(ids: I32, logp: F32) -> TopK:
    """The columns of lists of tokens [C, k] and their log-probabilities."""
    codes = np.rint(np.clip(logp.astype(np.float64) * -STEPS_PER_NAT, 0.0, 65535.0)).astype(np.int64)
    distinct, number = np.unique(ids, return_inverse=True)
    rank, listed = np.zeros(ids.size, np.uint16), np.zeros(ids.size, np.int64)
    count = _ranks(number.reshape(-1), len(distinct), _new_ranking(ids.size), rank, listed)
    code = np.diff(codes, axis=1, prepend=0).astype(np.uint16).reshape(-1)
    return TopK(rank, ids.reshape(-1)[listed[:count]].astype(np.int32), code)


def unpack_top_k(row_depth: U8, columns: TopK) -> tuple[I32, F32]:
    """Ids and log-probabilities of every row, int32 and float32 [R k]; zeros in all but canonical rows.

    Raises ValueError where the columns are not those of as many rows.
    """
    rank, listed, codes = columns
    canonical = np.flatnonzero(row_depth == 0)
    k = len(rank) // len(canonical)
    if len(rank) != k * len(canonical) or len(codes) != len(rank):
        raise ValueError("its top k has not as many tokens in every row")
    ids = np.zeros(len(rank), np.int32)
    if not _tokens(rank, listed, _new_ranking(len(rank)), ids):
        raise ValueError("its top k names tokens that it does not list")
    all_ids, logp = np.zeros((len(row_depth), k), np.int32), np.zeros((len(row_depth), k), np.float32)
    if k:
        all_ids[canonical] = ids.reshape(-1, k)
        logp[canonical] = np.cumsum(codes.reshape(-1, k), axis=1, dtype=np.uint16) / np.float32(-STEPS_PER_NAT)
    return all_ids.reshape(-1), logp.reshape(-1)
