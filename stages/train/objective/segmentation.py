"""How a student's tokenizer cuts, as frequencies on training text: the bridge from a teacher's bytes to its choices.

A teacher says what the next byte is, not whether the student's tokenizer would go on with its token there. Wherever a
token starts and the text reads c (a node of the byte trie, c = w b), the token reaches c, or it has ended after j of
c's bytes; where the text leaves the trie after w, it has ended after j of w's bytes. The shares of these outcomes are
counted over training text. What the text shows too seldom, c takes from its parent, as if `PRIOR` more places had been
seen: a token that had ended by then has ended still, one that had reached the parent ends there as often as tokens of
its length do when a longer one begins with the same bytes, and where the text leaves the trie, the longest token has
it. Bayes' rule (`marginal.py`) needs no more than these. That a share depends on c alone, not on the text before, is
an assumption; `marginal.py` asks the teacher only where it hardly matters.
Of bytes that a teacher does not list it says nothing; they are taken to come as often as in the text at large.
Where the text has left the trie a token's end may still hang on what follows; how often the longest token was not the
one is counted by the byte that the text left with, since a tokenizer that splits text into words first leaves no doubt
at a space, wherever it is.
Price: one walk through the trie per token, about 3 M tokens/s; a float per node and byte of its prefix.
"""

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn

from bytecache.schemas.arrays import F64, I64
from bytecache.stages.tokens.byte_trie import find_child
from bytecache.stages.train.objective.node_sums import NodeTables

PRIOR = 2.0
"""Places that a node's parent counts for."""
DEEP = 16
"""Tokens of this many bytes and more are of one length where the habit of ending early is counted."""


@njit(cache=True)
def _count(text, start, end, doc_end, first_child, byte, base, longest, on, off, leaves):  # type: ignore[no-untyped-def]
    for t in range(len(start)):
        n, d, i = 0, 0, start[t]
        length = end[t] - start[t]
        while True:
            c = find_child(first_child, byte, n, text[i]) if i < doc_end[t] else -1
            if c < 0:
                off[base[n] + min(length, d)] += 1
                leaves[int(length == longest[n]), text[i] if i < doc_end[t] else 256] += 1
                break
            d += 1
            on[base[c] + (length if length < d else 0)] += 1
            n, i = c, i + 1


@njit(cache=True)
def _early_ends(parent, depth, base, on, is_token, often):  # type: ignore[no-untyped-def]
    """often [DEEP + 1]: of tokens that reach a token of so many bytes and could be longer, the share that end there.

    Counted over the nodes that the text reads once: what happens there is what will happen at nodes that it never
    read. At nodes read often a tokenizer that was made from this very text nearly always goes on.
    """
    ended, seen = np.full(len(often), 0.5), np.full(len(often), 1.0)
    for c in range(1, len(parent)):
        up = parent[c]
        if up > 0 and is_token[up] and on[base[c] + depth[up]] + on[base[c]] == 1:
            at = min(depth[up], len(often) - 1)
            ended[at] += on[base[c] + depth[up]]
            seen[at] += 1
    for d in range(len(often)):
        often[d] = ended[d] / seen[d]


@njit(cache=True)
def _shares(parent, depth, base, is_token, longest, often, weight, on, off):  # type: ignore[no-untyped-def]
    """Counts to shares in place, parents first; `longest` [N]: bytes of the longest token that the prefix begins with.

    A node's cells are laid over its parent's: the same outcomes, one of them split.
    """
    for c in range(len(parent)):
        up, d, at = parent[c], depth[c], base[c]
        total = on[at : at + d + 1].sum()
        if c == 0:
            on[at] = 1.0
        else:
            early = often[min(d - 1, len(often) - 1)] if d > 1 and is_token[up] else 0.0
            reached = on[base[up]]
            for j in range(1, d):
                expected = on[base[up] + j] if j < d - 1 else reached * early
                on[at + j] = (on[at + j] + weight * expected) / (total + weight)
            on[at] = (on[at] + weight * reached * (1 - early)) / (total + weight)
        total = off[at : at + d + 1].sum()
        for j in range(d + 1):
            expected = on[at + j] if 0 < j < d else 0.0
            if j == longest[c]:
                expected += on[at]
            off[at + j] = (off[at + j] + weight * expected) / (total + weight)


class Segmentation(nn.Module):
    """Shares of where the token ends, per node; node c of depth D owns D + 1 cells from base[c].

    on [cells]: where the text reads c: cell 0, the token reaches c; cell j < D, it ended after j bytes.
    off [cells]: where the text reads c and then leaves the trie or ends: cell j <= D, the token ended after j bytes.
    rare [N]: where a token has reached c and the next byte is any of the text's, the share that ends at c.
    left [N]: how often the text left the trie at c. habit [257]: where it left with this symbol, the share of tokens
    that were the longest.
    They are parameters without gradient, not buffers, because a run's checkpoint must hold them.
    """

    def __init__(self, tables: NodeTables) -> None:
        super().__init__()
        first_child, byte = tables.walk()
        is_token = tables.table("n_equal").numpy() > 0
        size = is_token.size
        parent = np.concatenate([[0], np.repeat(np.arange(size), np.diff(first_child))])
        depth, longest = np.zeros(size, np.int64), np.zeros(size, np.int64)
        lo, hi, level = 0, 1, 0
        while lo < hi:  # numbered breadth first, so a level is a range
            depth[lo:hi] = level
            longest[lo:hi] = np.where(is_token[lo:hi], level, longest[parent[lo:hi]])
            lo, hi, level = int(first_child[lo]), int(first_child[hi]), level + 1
        base = np.cumsum(depth + 1) - (depth + 1)
        self._counts = np.zeros((2, int((depth + 1).sum())), np.int64)
        self._parent, self._byte, self.depth, self._longest, self._is_token = parent, byte, depth, longest, is_token
        self._bytes = np.full(256, 0.5)
        self._leaves = np.zeros((2, 257), np.int64)
        self.register_buffer("base", torch.from_numpy(base), persistent=False)
        self.register_buffer("longest", torch.from_numpy(longest), persistent=False)
        self.register_buffer("depths", torch.from_numpy(depth), persistent=False)
        cells = self._counts.shape[1]
        self.on, self.off, self.rare, self.left, self.habit = (
            nn.Parameter(torch.zeros(n), requires_grad=False) for n in (cells, cells, size, size, 257)
        )
        self.settle()

    def add(self, tables: NodeTables, text: npt.NDArray[np.uint8], start: I64, end: I64, doc_end: I64) -> None:
        """Count tokens [start, end) of `text` (uint8); `doc_end` int64 is where each token's document ends."""
        _count(
            text, start, end, doc_end, *tables.walk(), self.get_buffer("base").numpy(), self._longest, *self._counts,
            self._leaves,
        )  # fmt: skip
        self._bytes += np.bincount(text, minlength=256)

    @torch.no_grad()
    def settle(self) -> None:
        """Turn counts into shares."""
        base, depth, parent = self.get_buffer("base").cpu().numpy(), self.depth, self._parent
        on, off = self._counts.astype(np.float64)
        often = np.zeros(DEEP + 1)
        _early_ends(parent, depth, base, on, self._is_token, often)
        _shares(parent, depth, base, self._is_token, self._longest, often, PRIOR, on, off)
        frequency = (self._bytes / self._bytes.sum())[self._byte[1:]]

        def over_children(shares: F64) -> F64:
            return np.bincount(parent[1:], weights=frequency * shares, minlength=depth.size).astype(np.float64)

        ends = over_children(on[base[1:] + depth[parent[1:]]])
        ends += (1 - over_children(np.ones_like(frequency))) * off[base + depth]
        rare = np.where(depth > 0, ends / np.maximum(ends + over_children(on[base[1:]]), 1e-9), 0.0)
        left = np.add.reduceat(self._counts[1], base)
        habit = (self._leaves[1] + 0.5) / (self._leaves.sum(0) + 1)
        values_of = ((self.on, on), (self.off, off), (self.rare, rare), (self.left, left), (self.habit, habit))
        for parameter, values in values_of:
            parameter.copy_(torch.from_numpy(values))

    def reaches(self, child: Tensor) -> Tensor:
        """Share of tokens that reach node `child`, where the text does."""
        return self.on[self._base(child)]

    def ended(self, node: Tensor, child: Tensor, length: Tensor) -> Tensor:
        """Share of tokens that ended after `length` bytes, where the text reads `node` and goes on to `child` (-1: to
        nothing in the trie); length at most the depth of `node`."""
        inside = self.on[self._base(child.clamp_min(0)) + length]
        return torch.where(child >= 0, inside, self.off[self._base(node) + length])

    def doubt(self, node: Tensor, symbol: Tensor, length: Tensor) -> Tensor:
        """Where the text reads `node` and leaves the trie with `symbol`: the smaller of the shares of tokens that ended
        after `length` bytes, and that did not. What the text shows too seldom comes from the habit of the symbol."""
        at = self._base(node)
        is_longest = length == self.get_buffer("longest")[node]
        inside = (length > 0) & (length < self.get_buffer("depths")[node])
        expected = torch.where(inside, self.on[at + length], 0.0) + torch.where(is_longest, self.on[at], 0.0)
        seen = (self.off[at + length] * (self.left[node] + PRIOR) - PRIOR * expected).clamp_min(0)
        habit = torch.where(is_longest, self.habit[symbol], 1 - self.habit[symbol])
        share = (seen + PRIOR * habit) / (self.left[node] + PRIOR)
        return torch.minimum(share, 1 - share)

    def _base(self, node: Tensor) -> Tensor:
        return self.get_buffer("base")[node]
