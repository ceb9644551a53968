"""Codes of what a row lists and of its tail: the rounding that costs least. No I/O.

Codes are rounded to multiples of a coarse step where that divergence is small beside what finer ones would cost. The
implied symbol is 1 minus all the rest, so every error is its error as well; it keeps at least half of its value
(normally within a percent), hence is > 0, and a tail > 0 never gets code 0.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F64, PLACE
from bytecache.schemas.loops import inner_loop
from bytecache.schemas.shard.blocks import Rows
from bytecache.schemas.shard.codes import TAIL, VALUE
from bytecache.schemas.shard.worth import Row, Scratch

FINE_TAIL = 20.0
"""A tail leaves the multiples of its step where that spares more than so many bits are worth."""
_TAILS = 64


class Steps(NamedTuple):
    """What codes are multiples of, the nats that a bit is worth, and the unit in which `mass` counts."""

    value: int
    tail: int
    rate: float
    unit: float


class Rounded(NamedTuple):
    """The codes of a row: that of its tail, how many symbols have one, and what went wrong with the others."""

    tail_mass: float
    """what was not chosen"""
    tail_code: int
    n_listed: int
    n_refused: int
    """chosen symbols that no code fits"""
    error: float
    """of all codes together"""


@njit(cache=True, nogil=True, inline="always", error_model="numpy")
def _round_code(
    root: float, step: int, highest: int, p: float, power: int, error: float, top: float, inverse_top: float
) -> tuple[int, float]:
    """The multiple of `step` next to 256 * root, `highest` at most, that errs least on p and on the implied symbol.

    `power` 2 or 4; `error` summed so far; `top` the implied symbol's true mass. Returns the code, and `error` with its
    own; code 0: none above zero leaves the implied symbol half of its value.
    """
    below = int(root * 256.0) & -step
    low, high = min(below, highest), min(below + step, highest)
    low_value, high_value = (low / 256.0) * (low / 256.0), (high / 256.0) * (high / 256.0)
    if power == 4:
        low_value, high_value = low_value * low_value, high_value * high_value
    low_off, high_off = low_value - p, high_value - p
    low_after, high_after = error + low_off, error + high_off
    low_cost = low_off * low_off / max(low_value, p) + low_after * low_after * inverse_top
    high_cost = high_off * high_off / max(high_value, p) + high_after * high_after * inverse_top
    low_cost = np.inf if low < 1 or low_after > 0.5 * top else low_cost
    high_cost = np.inf if high_after > 0.5 * top else high_cost
    if low_cost == np.inf and high_cost == np.inf:
        return 0, error
    higher = high_cost < low_cost
    return high if higher else low, high_after if higher else low_after


@njit(cache=True, nogil=True, inline="always", error_model="numpy")
def _tail_code(t: float, step: int, rate: float, top: float) -> int:
    """Code of an unlisted mass t: a multiple of `step`, or the next code where that is worth its bits; 0 = none is."""
    code = 0
    if t > 0.0:
        root, inverse_top = math.sqrt(math.sqrt(t)), 1.0 / top
        code, _ = _round_code(root, step, 254, t, 4, 0.0, top, inverse_top)
        off = TAIL[code] - t
        if code == 0 or off * off / max(t, TAIL[code]) + off * off / top > FINE_TAIL * rate:
            code, _ = _round_code(root, 1, 254, t, 4, 0.0, top, inverse_top)
            code = max(1, code)
    return code


@inner_loop
def round_row(n_chosen: int, tail_mass: float, row: Row, rows: Rows, steps: Steps, scratch: Scratch) -> Rounded:
    """Codes of a row's tail and of its chosen symbols: `coded`, their values, and `spots`.

    Where no code leaves the implied symbol enough, a symbol stays unlisted.
    """
    rank, listed, chosen, coded, spots = (
        scratch.rank, scratch.listed, scratch.chosen, scratch.coded, scratch.spots
    )  # fmt: skip
    prob, first, step, top = rows.prob, row.top + PLACE(1), steps.value, row.implied
    tail_code = _tail_code(tail_mass, steps.tail, steps.rate, top)
    error = TAIL[tail_code] - tail_mass if tail_mass > 0.0 else 0.0
    refused = 0
    inverse_top = 1.0 / top
    for j in range(PLACE(n_chosen)):
        k = PLACE(chosen[j])
        p = float(prob[first + k])
        code, error = _round_code(math.sqrt(p), step, 256 - step, p, 2, error, top, inverse_top)
        if code == 0:
            listed[k] = 0
            error -= p
            refused += 1
            continue
        place = PLACE(np.int64(j) - refused)
        chosen[place] = np.int64(k)
        coded[place] = VALUE[code]
        spots[place] = np.int64(rank[k]) << 8 | code
    return Rounded(tail_mass, tail_code, n_chosen - refused, refused, error)


@njit(cache=True, nogil=True)
def tail_rises(step: int) -> F64:
    """float64 [65], by 64 * tail: what rounding a tail up to the next multiple of `step` may add to it."""
    rises = np.empty(_TAILS + 1)
    for k in range(_TAILS + 1):
        rises[k] = (((k + 1) / _TAILS) ** 0.25 + step / 256.0) ** 4 - (k + 1) / _TAILS
    return rises


@njit(cache=True, nogil=True, inline="always")
def surely_fits(n_chosen: int, chosen_mass: float, tail_mass: float, implied: float, step: int, rises: F64) -> bool:
    """Whether no code of a row can be refused (see `_round_code`), so that there is no need to round it.

    Even all of them rounded up leave the implied symbol half of its value: sum of (sqrt(p) + step)^2 - p, with sum of
    sqrt(p) <= sqrt(n * sum of p).
    """
    unit = (step / 256.0) ** 2
    most = step / 128.0 * math.sqrt(n_chosen * max(0.0, chosen_mass)) + (n_chosen + 1) * unit
    return bool(most + rises[PLACE(tail_mass * float(_TAILS))] < 0.499 * implied)
