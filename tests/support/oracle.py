"""Brute force: P(next symbol | prefix) by listing every token sequence that spells the text. Tiny inputs only."""

from collections.abc import Callable

import numpy as np

from bytecache.stages.tokens.vocab import Vocabulary


def exact_distributions(
    vocabulary: Vocabulary, next_token: Callable[[tuple[int, ...]], np.ndarray], data: bytes, synthetic: int = 0
) -> np.ndarray:
    """float64 [n+1, 257] by enumeration of all covers; `next_token(history)` gives p(. | history) float64 [size].

    The definition itself (arXiv 2412.03719, equation 5): no ranges, no sharing, no lattice.
    """
    joint = np.zeros(len(data) + 1)
    following = np.zeros((len(data) + 1, 257))
    ends = {int(i) for i in vocabulary.end_ids}

    def visit(history: tuple[int, ...], position: int, weight: float) -> None:
        p = next_token(history) * weight
        joint[position] += weight
        for token, mass in enumerate(p):
            if token in ends:
                following[position, 256] += mass
                continue
            piece = vocabulary.token_bytes[token]
            if not piece:
                continue
            # The token covers every prefix x[:position + d] that it does not end at; it predicts one byte more each.
            for depth in range(len(piece)):
                if piece[:depth] != data[position : position + depth]:
                    break
                if depth:
                    joint[position + depth] += mass
                following[position + depth, piece[depth]] += mass
            else:
                if data[position : position + len(piece)] == piece:
                    visit((*history, token), position + len(piece), mass)

    visit((vocabulary.start_id,), 0, 1.0)
    return (following / joint[:, None])[synthetic:]
