"""How a student's tokenizer cuts, as frequencies on training text: the bridge from a teacher's bytes to its choices.

A teacher says what the next byte is, not whether the student's tokenizer would go on with its token there. Wherever a
token starts and the text reads c (a node of the byte trie, c = w b), the token reaches c, or it has ended after j of
c's bytes; where the text leaves the trie after w, it has ended after j of w's bytes. The shares of these outcomes are
counted over training text, with half an observation more of each outcome that the vocabulary allows. Bayes' rule
(`marginal.py`) needs no more than these. That a share depends on c alone, not on the text before, is an assumption.
Of bytes that a teacher does not list it says nothing; they are taken to come as often as in the text at large.
Price: one walk through the trie per token, about 3 M tokens/s; a float per node and byte of its prefix.
"""

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn

from bytecache.schemas.arrays import F64, I64
from bytecache.stages.tokens.byte_trie import find_child
from bytecache.stages.train.objective.node_sums import NodeTables


@njit(cache=True)
def _count(text, start, end, doc_end, first_child, byte, base, on, off):  # type: ignore[no-untyped-def]
    for t in range(len(start)):
        n, d, i = 0, 0, start[t]
        length = end[t] - start[t]
        while True:
            c = find_child(first_child, byte, n, text[i]) if i < doc_end[t] else -1
            if c < 0:
                off[base[n] + min(length, d)] += 1
                break
            d += 1
            on[base[c] + (length if length < d else 0)] += 1
            n, i = c, i + 1


class Segmentation(nn.Module):
    """Shares of where the token ends, per node; node c of depth D owns D + 1 cells from base[c].

    on [cells]: where the text reads c: cell 0, the token reaches c; cell j < D, it ended after j bytes.
    off [cells]: where the text reads c and then leaves the trie or ends: cell j <= D, the token ended after j bytes.
    rare [N]: where a token has reached c and the next byte is any of the text's, the share that ends at c.
    They are parameters without gradient, not buffers, because a run's checkpoint must hold them.
    """

    def __init__(self, tables: NodeTables) -> None:
        super().__init__()
        first_child, _ = tables.walk()
        is_token = tables.table("n_equal").numpy() > 0
        size = is_token.size
        parent = np.concatenate([[0], np.repeat(np.arange(size), np.diff(first_child))])
        depth = np.zeros(size, np.int64)
        lo, hi, level = 0, 1, 0
        while lo < hi:  # numbered breadth first, so a level is a range
            depth[lo:hi] = level
            lo, hi, level = int(first_child[lo]), int(first_child[hi]), level + 1
        base = np.cumsum(depth + 1) - (depth + 1)
        possible = np.zeros((2, int((depth + 1).sum())), bool)
        possible[0, base] = True
        node, up = np.arange(size), np.arange(size)
        while node.size:
            possible[0, base[node] + depth[up]] |= is_token[up] & (depth[up] < depth[node]) & (depth[up] > 0)
            possible[1, base[node] + depth[up]] |= is_token[up]
            keep = up > 0
            node, up = node[keep], parent[up[keep]]
        self._counts = np.zeros(possible.shape, np.int64)
        self._possible = possible
        self._owner = np.repeat(np.arange(size), depth + 1)
        self._parent, self._byte, self._depth = parent[1:], tables.walk()[1][1:], depth
        self._bytes = np.full(256, 0.5)
        self.register_buffer("base", torch.from_numpy(base), persistent=False)
        cells = possible.shape[1]
        self.on, self.off, self.rare = (nn.Parameter(torch.zeros(n), requires_grad=False) for n in (cells, cells, size))
        self.settle()

    def add(self, tables: NodeTables, text: npt.NDArray[np.uint8], start: I64, end: I64, doc_end: I64) -> None:
        """Count tokens [start, end) of `text` (uint8); `doc_end` int64 is where each token's document ends."""
        _count(text, start, end, doc_end, *tables.walk(), self.get_buffer("base").numpy(), *self._counts)
        self._bytes += np.bincount(text, minlength=256)

    @torch.no_grad()
    def settle(self) -> None:
        """Turn counts into shares."""
        on, off = (self._shares(c, p) for c, p in zip(self._counts, self._possible, strict=True))
        base, depth = self.get_buffer("base").cpu().numpy(), self._depth
        often = (self._bytes / self._bytes.sum())[self._byte]

        def over_children(shares: F64) -> F64:
            return np.bincount(self._parent, weights=often * shares, minlength=depth.size).astype(np.float64)

        ends = over_children(on[base[1:] + depth[self._parent]])
        ends += (1 - over_children(np.ones_like(often))) * off[base + depth]
        rare = np.where(depth > 0, ends / np.maximum(ends + over_children(on[base[1:]]), 1e-9), 0.0)
        for parameter, values in ((self.on, on), (self.off, off), (self.rare, rare)):
            parameter.copy_(torch.from_numpy(values))

    def _shares(self, counts: I64, possible: npt.NDArray[np.bool_]) -> F64:
        observed = counts + 0.5 * possible
        total = np.bincount(self._owner, weights=observed)
        return cast(F64, observed / np.maximum(total, 1e-9)[self._owner])

    def reaches(self, child: Tensor) -> Tensor:
        """Share of tokens that reach node `child`, where the text does."""
        return self.on[self._base(child)]

    def ended(self, node: Tensor, child: Tensor, length: Tensor) -> Tensor:
        """Share of tokens that ended after `length` bytes, where the text reads `node` and goes on to `child` (-1: to
        nothing in the trie); length at most the depth of `node`."""
        inside = self.on[self._base(child.clamp_min(0)) + length]
        return torch.where(child >= 0, inside, self.off[self._base(node) + length])

    def _base(self, node: Tensor) -> Tensor:
        return self.get_buffer("base")[node]
