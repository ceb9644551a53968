"""Which histories are worth a call of the teacher, by what they carry and how far they are off the canonical tokens."""

import math
from typing import Any

import numpy as np

GROWTH = 3.0
"""How much more a history must carry for every token beyond the depth: what two cuts predict grows alike as they lie
further back."""
MOST_TIMES = 25.0
"""How much more at most: what carries that much is followed on. Two cuts of one text that are about as likely go on
side by side for good; giving one up where it carried 0.8 of the mass, seventeen tokens on in a list of constants, cost
1.5 nats at the next byte."""
FOLLOWED = 40
"""For how many tokens beyond the depth, unless everything is asked for."""
DEEPEST = 200
"""Tokens off the canonical ones at most; a dump counts them in a byte."""

REFERENCE: dict[str, Any] = {"tau": 2e-4, "depth": 8}
"""Effort of reference windows, which have no static rows."""
DROPPED = MOST_TIMES * REFERENCE["tau"]
"""What of a reference's unevaluated mass joins no row. A history that carries more has spelled the same text as the
canonical tokens for `FOLLOWED` tokens; dropping it, whose share may be all but the whole, would be no reference."""


def least_share(tau: float, depth: int, off: np.ndarray) -> np.ndarray:
    """What a history `off` tokens off the canonical ones (int [K]) must carry to be evaluated, float64 [K].

    `tau` as far as `depth` tokens; for every token beyond `GROWTH` times more, up to `MOST_TIMES` tau. Nothing is
    evaluated at depth 0.
    """
    beyond = np.clip(off.astype(np.float64) - depth, 0.0, DEEPEST)
    least = tau * np.minimum(GROWTH**beyond, MOST_TIMES)
    return np.where(off > deepest(tau, depth), np.inf, least)


def deepest(tau: float, depth: int) -> int:
    """Tokens off the canonical ones beyond which nothing is evaluated, whatever it carries."""
    return min(DEEPEST, depth + FOLLOWED if tau > 0.0 else DEEPEST) if depth else 0


def reach(tau: float, depth: int) -> int:
    """How many tokens longer than the canonical ones a history can be.

    The heaviest are followed further, and are not longer for that: they spell the same text in about as many tokens.
    """
    if not depth or not 0.0 < tau < 1.0:
        return deepest(tau, depth) if tau <= 0.0 else 0
    return min(DEEPEST, depth + math.ceil(-math.log(tau) / math.log(GROWTH)) - 1)
