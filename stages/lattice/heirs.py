"""Which row stands in for a history that nobody evaluated: the one that ends at the same byte and agrees longest.

Two histories that end at the same byte *agree* in their last c tokens. What they predict grows alike with c, whatever
lies before: of SmolLM2-135M on Python source, where another history above 1e-4 ends at the same byte, the divergence
of the lighter from the one that agrees with it longest was, in nats (mean by what they carry; median)

    c        0      1      2      4      6      9
    mean    0.58   0.10   0.09   0.02   0.008  0.008
    median  0.27   0.045  0.05   0.01   0.004  0.001

and against the teacher as a whole where none ends, 1.3 (5): after a new cut a history disagrees as on the first day,
however long ago it left the canonical tokens. So an orphan joins the row that agrees with it longest (of equals the
heaviest), and what it must carry to be evaluated grows with c (stages/lattice/effort.py). At equal tau that took 8 %
more rows than growth by tokens since the canonical ones on Arabic, for a fifth less divergence, and as many and as
much elsewhere (Gemma-3-270m, SmolLM2-135M; 0.4 to 0.7 kB each).

A static row has seen one token: it agrees in that at most, and stands behind any evaluated row that has it too.
Price: for each stop a walk back over the rows that end where it ends.
"""

import numpy as np
from numba import njit

NOBODY = -1
"""Agreement where no other evaluated row ends at the byte."""
FARTHEST = 32
"""Tokens looked back at most."""


@njit(cache=True, nogil=True)
def heirs(
    row_start: np.ndarray, row_parent: np.ndarray, row_token: np.ndarray, row_logp: np.ndarray, row_static: np.ndarray,
    by_start: np.ndarray, at: np.ndarray, stop_offset: np.ndarray, stop_depth: np.ndarray, stop_token: np.ndarray,
    child: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Of every stop: the row that its history would join, -1 for none, and the agreement with evaluated rows.

    int32 [S] each. The row of the very history is not looked at.
    """
    weight = np.zeros(len(row_start))
    for r in range(1, len(row_start)):
        weight[r] = weight[row_parent[r]] + row_logp[r]
    heir = np.full(len(stop_token), -1, np.int32)
    agreement = np.full(len(stop_token), NOBODY, np.int32)
    for r in range(len(row_start)):
        for s in range(stop_offset[r], stop_offset[r + 1]):
            end = row_start[r] + stop_depth[s]
            best = -1
            for k in range(at[end], at[end + 1]):
                c = by_start[k]
                if c == child[s]:
                    continue
                shared = 0
                if row_token[c] == stop_token[s]:
                    shared = 1 if row_static[c] else 1 + _agreement(r, row_parent[c], row_parent, row_token)
                if not row_static[c]:
                    agreement[s] = max(agreement[s], shared)
                rank = 2 * shared - (row_static[c] == 1 and shared == 1)
                if rank > best or (rank == best and weight[c] > weight[heir[s]]):
                    best = rank
                    heir[s] = c
    return heir, agreement


@njit(cache=True, nogil=True)
def lengths(row_parent: np.ndarray) -> np.ndarray:
    """int64 [R]; tokens of each row's history since the window's first."""
    out = np.zeros(len(row_parent), np.int64)
    for r in range(1, len(row_parent)):
        out[r] = out[row_parent[r]] + 1
    return out


@njit(cache=True, nogil=True)
def _agreement(one: int, other: int, row_parent: np.ndarray, row_token: np.ndarray) -> int:
    """In how many of their last tokens the histories of two rows agree that end at the same byte; about `FARTHEST`."""
    shared = 0
    while shared < FARTHEST and one > 0 and other > 0 and row_token[one] == row_token[other]:
        shared += 1
        one, other = row_parent[one], row_parent[other]
    return shared
