"""Which histories are worth a call of the teacher, by what they carry and how far they are off the canonical tokens.

Two rules, and one is enough. By its share: what joins another row unasked costs its share times what the two cuts say
differently (`least_share`). By the text after it: a history that carries 0.003 of the mass, and alone foresaw the
words that came, carries nearly all of it there; where what is known gives the text ahead next to nothing, such a one
is looked for (`borne_out`). By share alone whole words were wrong, by up to a nat a byte, wherever a light cut had
foreseen them, and no tau that is affordable finds such a cut. What is asked for because of the text ahead was light
until that text came, so it moves what is said before by no more than it carries there.
"""

import math
from typing import Any

import numpy as np
from numba import njit

RULE = 4
"""Version of what this file says, part of a teacher's identity: by another, equal settings ask for other rows. 1 asked
for no history because of the text after it; 2 for 25 times tau of those far off the canonical tokens, whatever carried
the mass there; 3 looked two tokens ahead, however short they were."""
GROWTH = 3.0
"""How much more a history must carry for every token beyond the depth: what two cuts predict grows alike as they lie
further back."""
MOST_TIMES = 8.0
"""How much more at most: what carries that much is followed on. Two cuts of one text that are about as likely go on
side by side for good, in a list of constants for one. With 25 in its place a cut of 0.02 was given up, and single
positions of source code were a quarter of a nat wrong at `exact`, which is most of what such text had of error."""
ENOUGH = 0.2
"""The share that is always enough: with 0.5 in its place a cut of an indented comment, about as likely as the canonical
one, was given up for fifteen tokens. A history that carries as much is as good as the canonical one: tokens off are
counted from it on (`tokens_off`)."""
FOLLOWED = 40
"""For how many tokens beyond the depth less than `ENOUGH` may be enough. Not more: two cuts go on side by side for
good, and the lighter of them costs a row a token."""
DEEPEST = 200
"""Tokens off the canonical ones at most; a dump counts them in a byte."""

AHEAD = 2
"""Canonical tokens after a light history by which the text may bear it out: a cut of one word may foresee the word
after the next."""
AHEAD_BYTES = 8
"""Bytes of text by which it may at least. Where tokens are short, two of them are two or three bytes, in scripts that
the vocabulary spells in bytes: a cut of 0.0014 carried 0.99 six bytes on, unseen, and all that followed was wrong, of
one stretch of Persian in ten a hundredth of a nat a byte at `exact`. Twice as many bytes ask for twice as many rows."""
BORNE_OUT = 100.0
"""Share of a light history over the known probability of the text ahead from which on it is evaluated."""
LIGHT_PER_TOKEN = 4
"""Such histories that are evaluated within one canonical token, the heaviest. In random letters no cut foresees what
follows, and all would be looked at, many rows for every token."""

REFERENCE: dict[str, Any] = {"tau": 2e-4, "depth": 8}
"""Effort of reference windows, which have no static rows."""
DROPPED = MOST_TIMES * REFERENCE["tau"]
"""What of a reference's unevaluated mass joins no row. A history that carries more has spelled the same text as the
canonical tokens for `FOLLOWED` tokens; dropping it, whose share may be all but the whole, would be no reference."""


@njit(cache=True)
def tokens_off(depth: np.ndarray, parent: np.ndarray, share: np.ndarray) -> np.ndarray:
    """How many tokens each row is off one that counts as canonical, int64 [R].

    Such are the canonical rows, and all that carried more than `ENOUGH` of the mass where they ended: where the
    canonical cut is the odd one, the other carries nearly all of it, and what leaves that is a deviation of one token,
    not of fifty.

    Args:
        depth: [R], tokens off the canonical ones; 0: a canonical row. parent: [R], always an earlier row.
        share: float64 [R], of each row where it ended.
    """
    off = np.zeros(len(depth), np.int64)
    for r in range(len(depth)):
        if depth[r] > 0 and share[r] <= ENOUGH:
            off[r] = off[parent[r]] + 1
    return off


def least_share(tau: float, depth: int, off: np.ndarray) -> np.ndarray:
    """What a history `off` tokens off (`tokens_off`, int [K]) must carry to be evaluated, float64 [K].

    `tau` as far as `depth` tokens; for every token beyond `GROWTH` times more, up to `MOST_TIMES` tau or `ENOUGH`.
    Nothing is evaluated at depth 0.
    """
    beyond = np.clip(off.astype(np.float64) - depth, 0.0, DEEPEST)
    enough = max(tau, ENOUGH) if tau > 0.0 else 0.0
    least = np.minimum(tau * np.minimum(GROWTH**beyond, MOST_TIMES), enough)
    least = np.where(beyond > FOLLOWED, enough, least)
    return np.where(off > deepest(depth), np.inf, least)


def borne_out(share: np.ndarray, ahead: np.ndarray, tau: float) -> np.ndarray:
    """Which histories the text may bear out, however light they are, bool [K].

    `share` of each, `ahead` the probability that is known for the text after it, `AHEAD` canonical tokens and
    `AHEAD_BYTES`. Where that is small the text goes on as the known histories did not foresee, and one that foresaw it
    comes to carry share / ahead of it at most.
    """
    is_borne_out: np.ndarray = (share > BORNE_OUT * ahead) & (share > lightest(tau))
    return is_borne_out


def lightest(tau: float) -> float:
    """The share that any evaluated history carries more than: tau squared, or a reference's tau where that is more.

    0.03 asks for what carries 0.0009, 0.3 for hardly any.
    """
    return min(tau, max(tau * tau, float(REFERENCE["tau"])))


def deepest(depth: int) -> int:
    """Tokens off the canonical ones beyond which nothing is evaluated, whatever it carries."""
    return DEEPEST if depth else 0


def reach(tau: float, depth: int) -> int:
    """How many tokens longer than the canonical ones a history can be.

    The heaviest are followed further, and are not longer for that: they spell the same text in about as many tokens.
    """
    if not depth or not 0.0 < tau < 1.0:
        return deepest(depth) if tau <= 0.0 else 0
    return min(DEEPEST, depth + math.ceil(-math.log(lightest(tau)) / math.log(GROWTH)) - 1)
