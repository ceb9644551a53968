"""Which histories are worth a call of the teacher: by what they carry, and how far another agrees with them."""

import math
from typing import Any

import numpy as np

GROWTH = 3.0
"""How much more a history must carry for every token beyond the depth in which another that ends at the same byte
agrees with it: what they predict grows alike (stages/lattice/heirs.py)."""
MOST_TIMES = 25.0
"""How much more at most."""
DEEPEST = 200
"""Tokens off the canonical ones at most; a dump counts them in a byte."""

REFERENCE: dict[str, Any] = {"tau": 2e-4, "depth": 8}
"""Effort of reference windows, which have no static rows."""
DROPPED = MOST_TIMES * REFERENCE["tau"]
"""What of a reference's unevaluated mass joins no row. A history that carries more agrees with one that was evaluated
in many tokens; dropping it, whose share may be all but the whole, would be no reference."""


def least_share(tau: float, depth: int, agreement: np.ndarray, *, off: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """What a history must carry to be evaluated, float64 [K].

    agreement: int [K], in how many of its last tokens an evaluated history that ends at the same byte agrees, -1 where
    none ends there. off: int [K], tokens since it left the canonical ones. longer: int [K], how many tokens more than
    the canonical ones it has. `tau` where they agree in fewer than `depth` tokens; from there on `GROWTH` times more
    for every token, up to `MOST_TIMES` tau. Nothing is evaluated at depth 0, nor what a window has no room for.
    """
    beyond = np.clip(agreement.astype(np.float64) + 1.0 - depth, 0.0, DEEPEST)
    least = tau * np.minimum(GROWTH**beyond, MOST_TIMES)
    return np.where((off > deepest(depth)) | (longer > reach(tau, depth)), np.inf, least)


def deepest(depth: int) -> int:
    """Tokens off the canonical ones beyond which nothing is evaluated, whatever it carries."""
    return DEEPEST if depth else 0


def reach(tau: float, depth: int) -> int:
    """How many tokens longer than the canonical ones a history can be: a window keeps as many positions free.

    A text cut finer costs probability with every token. (A digit at a time through a page of numbers it may not.)
    """
    if not depth or not 0.0 < tau < 1.0:
        return DEEPEST if depth and tau <= 0.0 else 0
    return min(DEEPEST, depth + math.ceil(-math.log(tau) / math.log(3)) - 1)
