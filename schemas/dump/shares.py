"""How a dump codes the masses of a level, and which of them are worth listing.

A *level* of a row is a prefix w of the text from the row's start. Its mass divides into *shares*: of every next byte,
of every token that ends with w (a stop), of END at a row's start, and of what is unlisted. Where the row is read, its
cell holds some part h of P(text so far), so a share q that is off by d moves a target by h d. Divergence grows with
the square of that over h q: the same everywhere where the *roots* of h q have one step. That is the coding:

    share = (code - 1)^2 2^scale / step^2        scale of the row: floor(-log2 of the most that a cell of it holds)

The step follows from the divergence that a dump may add (`step_of`), and so does the floor: a byte to which all cells
together give less than `LISTED` / step^2 of P(text so far) costs more bits than it is worth and joins what is unlisted
(`pooling`). The largest share of a level is *implied*, 1 less all others, so that a near certain byte needs no finer
code. Two kinds of share are worth more than their own position, because all that follows is a part of them: the text's
own next byte where it is improbable, and tokens that another row goes on from. They get a code in the domain of
logarithms instead (`RARE`).

Price: `benchmarks/dump_rate_distortion.py`.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F64, U8, U16

IMPLIED = 0
"""Code of the share that is 1 less all others of its level."""
RARE = 1
"""Code of a share that stands in the window's list of rare ones."""
END_IMPLIED = 65535
"""Code of END where its share is the implied one; 0 is a share of 0 there."""
MOST_PER_NAT = 1024
"""Codes of a rare share, exp(-code / per nat), per nat: half a step, at most so many; `NO_SHARE` is a share of 0."""
NO_SHARE = 65535
LEAST_STEP, MOST_STEP = 16, 32_768
LISTED = 2.25
"""Least share of P(text so far) that is listed, over 1 / step^2."""
LEAST_ROOT = 0.5
"""Root of a share, in steps, that rounds to 1."""
FINE = 32
"""Roots below this many steps are too coarse for the text's own next byte."""
LEAST_IMPLIED = 0.03
"""A smaller share is never implied: the errors of the others would be too large beside it."""
REFERENCE_STEP = 8192
"""Of reference windows, which are what others are measured by."""
MOST_SCALE = 40


def step_of(divergence: float) -> int:
    """Codes from 0 to a share of 1, for a divergence in nats per byte of text; 0 asks for all that the codes hold."""
    wanted = math.sqrt(DIVERGENCE_STEPS / divergence) if divergence > 0.0 else MOST_STEP
    return int(min(max(round(wanted), LEAST_STEP), MOST_STEP))


DIVERGENCE_STEPS = 2.25
"""Divergence times step^2, nats: what a shard's KL grows by at `convert.precision` = "default", for SmolLM2 on prose;
at "precise" it is four times as much (`benchmarks/dump_rate_distortion.py`)."""


class Scale(NamedTuple):
    """What codes of a row mean."""

    unit: float
    """the share of code 2"""
    per_nat: float
    """codes of a rare share per nat"""


class Level(NamedTuple):
    """Scratch of one level: its shares in the order of the file (END, stops, entries), and what they are coded as."""

    share: F64
    """float64; of the level's mass"""
    kind: U8
    """uint8; 0 ordinary, `GOES_ON` or `HAS_ROW`"""
    code: U16
    """uint16"""
    rare: U16
    """uint16; the codes of rare shares, in order"""


GOES_ON, HAS_ROW = 1, 2
"""Kinds of shares: the text's own next byte, coded finely; a token that a row goes on from, exactly."""


def scales(peak: F64, step: int) -> U8:
    """The scale of every row, uint8 [R]; `peak` float64 [R], the most that a cell of the row holds."""
    most = max(0, min(MOST_SCALE, int(2 * math.log2(step / 8.0))))
    with np.errstate(divide="ignore"):
        wanted = np.floor(-np.log2(np.minimum(peak, 1.0)))
    scaled: U8 = np.clip(wanted, 0, most).astype(np.uint8)
    return scaled


@njit(cache=True, nogil=True, inline="always")
def scale_of(code: int, step: int) -> Scale:
    """What codes of a row with the scale `code` mean."""
    root = np.float64(step)
    return Scale(2.0 ** np.float64(code) / (root * root), min(np.floor(root / 2), np.float64(MOST_PER_NAT)))


@njit(cache=True, nogil=True)
def rare_code(share: float, per_nat: float) -> int:
    """The code of a rare share."""
    if share <= 0.0:
        return NO_SHARE
    return min(max(int(np.rint(-math.log(share) * per_nat)), 0), NO_SHARE - 1)


@njit(cache=True, nogil=True)
def rare_share(code: int, per_nat: float) -> float:
    """The share of a rare code."""
    return 0.0 if code == NO_SHARE else math.exp(-np.float64(code) / per_nat)


@njit(cache=True, nogil=True)
def rest_code(share: float, unit: float) -> int:
    """The code of what is unlisted beside an implied share; never that of nothing.

    A writer that lists down to a floor cannot know that nothing else is possible, and a tail of zero is infinitely far
    from the least one.
    """
    return min(max(1, int(np.rint(2.0 * math.sqrt(max(0.0, share) / unit)))), 65535)


@njit(cache=True, nogil=True)
def rest_share(code: int, unit: float) -> float:
    """The share of a code of what is unlisted."""
    return np.float64(code) * np.float64(code) * unit / 4.0


@njit(cache=True, nogil=True)
def code_level(level: Level, n: int, scale: Scale) -> tuple[int, int]:
    """Codes of the n listed shares of a level; returns how many are rare, and the code of what is unlisted.

    The largest share is implied if the others leave it about as much.
    """
    top = -1
    listed = 0.0
    for k in range(n):
        listed += level.share[k]
        if top < 0 or level.share[k] > level.share[top]:
            top = k
    rest = rest_code(1.0 - listed, scale.unit)
    if top >= 0 and level.share[top] >= LEAST_IMPLIED:
        rares, total = _code_all(level, n, scale, top)
        left = 1.0 - total - rest_share(rest, scale.unit)
        if abs(left - level.share[top]) < 0.5 * level.share[top]:
            return rares, rest
    rares, _ = _code_all(level, n, scale, -1)
    return rares, 0


@njit(cache=True, nogil=True)
def _code_all(level: Level, n: int, scale: Scale, top: int) -> tuple[int, float]:
    """Codes of all shares but the implied `top`; returns how many are rare, and the sum of what all decode to."""
    rares = 0
    total = 0.0
    unit, per_nat = scale
    for k in range(n):
        root = int(math.sqrt(level.share[k] / unit) + 0.5)
        if k == top:
            level.code[k] = IMPLIED
        elif level.kind[k] == HAS_ROW or root < 1 or (level.kind[k] == GOES_ON and root < FINE):
            level.code[k] = RARE
            level.rare[rares] = rare_code(level.share[k], per_nat)
            total += rare_share(level.rare[rares], per_nat)
            rares += 1
        else:
            level.code[k] = root + 1
            total += root * root * unit
    return rares, total
