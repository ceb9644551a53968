"""Which histories are worth a call of the teacher, by what they carry and how far they are off the canonical tokens."""

import math

import numpy as np

GROWTH = 3.0
"""How much more a history must carry for every token beyond the depth.

Two cuts of one text that are about as likely go on side by side for good, unless one is given up; what they predict
grows alike as they lie further back. With 2.0 in its place `exact` asks for 8 % more rows on Python's manual, and KL is
a tenth lower; with a hard end at the depth, a cut that carried 0.56 of the mass was given up after four tokens."""
DEEPEST = 200
"""Tokens off the canonical ones at most; a dump counts them in a byte."""


def least_share(tau: float, depth: int, off: np.ndarray) -> np.ndarray:
    """What a history `off` tokens off the canonical ones (int [K]) must carry to be evaluated, float64 [K].

    `tau` as far as `depth` tokens, `GROWTH` times more for every token beyond. Nothing is evaluated at depth 0.
    """
    beyond = np.clip(off.astype(np.float64) - depth, 0.0, DEEPEST)
    with np.errstate(over="ignore"):
        least = tau * GROWTH**beyond
    return np.where(off > (DEEPEST if depth else 0), np.inf, least)


def reach(tau: float, depth: int) -> int:
    """How many tokens off the canonical ones a history can be and still be evaluated."""
    if not depth or tau >= 1.0:
        return 0
    return DEEPEST if tau <= 0.0 else min(DEEPEST, depth + math.ceil(-math.log(tau) / math.log(GROWTH)) - 1)
