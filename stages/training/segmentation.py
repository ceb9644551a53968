"""How a student's tokenizer cuts, as frequencies on training text: the bridge from a teacher's bytes to its choices.

Algorithm. A teacher says what the next byte is, not whether the student's tokenizer would go on with its token there.
Wherever a token starts and the text reads c (a node of the byte trie, c = w b), the token passes c, or is w, or had
ended before. Counting the three over training text gives, per node, the shares that Bayes' rule needs (`marginal.py`).
Price: one walk through the trie per token, 3 M tokens/s; three floats per node.
"""

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import nn

from stages.tokens.byte_trie import find_child
from stages.training.node_sums import IntArray, NodeTables


@njit(cache=True)
def _count(text, start, end, doc_end, first_child, byte, read, passed, stopped, off, off_stopped):  # type: ignore[no-untyped-def]
    for t in range(len(start)):
        n, d, i = 0, 0, start[t]
        length = end[t] - start[t]
        while True:
            c = find_child(first_child, byte, n, text[i]) if i < doc_end[t] else -1
            if c < 0:
                off[n] += 1
                off_stopped[n] += d == length
                break
            read[c] += 1
            passed[c] += d < length
            stopped[c] += d == length
            n, d, i = c, d + 1, i + 1


class Segmentation(nn.Module):
    """How the student's tokenizer cuts: per trie node c = w b, shares of the places where a token starts and reads w b.

    go [N]: the token passes c. halt [N]: the token is w. off [N]: per node w, the token is w where the text ends or
    goes on with a byte that w has no child for. Before any count: one half each after a token, else what is possible.
    They are parameters without gradient, not buffers, because a run's checkpoint must hold them.
    """

    def __init__(self, tables: NodeTables) -> None:
        super().__init__()
        is_token = tables.table("n_equal").numpy() > 0
        self._counts = np.zeros((5, is_token.size), np.int64)
        first_child = tables.table("first_child").numpy()
        # Children of a token: there the tokenizer has a choice.
        self._choice = np.concatenate([[False], np.repeat(is_token, np.diff(first_child))])
        self._is_token = is_token
        self.go, self.halt, self.off = (nn.Parameter(torch.zeros(is_token.size), requires_grad=False) for _ in range(3))
        self.settle()

    def add(
        self, tables: NodeTables, text: npt.NDArray[np.uint8], start: IntArray, end: IntArray, doc_end: IntArray
    ) -> None:
        """Count tokens [start, end) of `text` (uint8); `doc_end` int64 is where each token's document ends."""
        _count(text, start, end, doc_end, *tables.walk(), *self._counts)

    @torch.no_grad()
    def settle(self) -> None:
        """Turn counts into shares, each with one more observation of the average."""
        read, passed, stopped, off, off_stopped = self._counts
        chosen = passed[self._choice].sum(), stopped[self._choice].sum()
        share = (chosen[0] + 1) / (chosen[0] + chosen[1] + 2)
        go = (passed + np.where(self._choice, share, 1.0)) / (read + 1)
        halt = (stopped + np.where(self._choice, 1 - share, 0.0)) / (read + 1)
        for parameter, value in (
            (self.go, go),
            (self.halt, halt),
            (self.off, (off_stopped + self._is_token) / (off + 1)),
        ):
            parameter.copy_(torch.from_numpy(value))
