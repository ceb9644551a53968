"""Sums of a token distribution over ranges of the byte-sorted vocabulary: what each node of the byte trie offers.

    m(c) = sum of exp(z_v) over tokens v that start with c      (a contiguous range of the sorted vocabulary)

All sums are direct, never differences, so a mass of 1e-30 keeps its digits. `node_logits` gives all symbols as [S, 260]
from segment sums of torch, on any device; `choices.py` is the same on a CPU for the few symbols that a loss reads.
Price: a slot at the root reads the vocabulary once, a slot deeper the tokens that still fit.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn

from bytecache.schemas.arrays import END, I64
from bytecache.stages.tokens.byte_trie import find_child
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.objective.symbols import CONTROL, HEAD_SYMBOLS, STOP


class Paths(NamedTuple):
    """Trie path of every id: path[offset[v] + d] is the node of its first d bytes, d = 0 .. its length."""

    offset: I64
    path: I64


def token_paths(vocabulary: Vocabulary) -> Paths:
    """Paths of all ids; an id without bytes has the root alone."""
    trie, order = vocabulary.trie, vocabulary.order
    lengths = np.array([len(t) if t else 0 for t in vocabulary.token_bytes], np.int64)
    offset = np.concatenate([[0], np.cumsum(lengths + 1)])
    path = np.zeros(offset[-1], np.int64)
    width = (trie.hi - trie.lo).astype(np.int64)
    node = np.repeat(np.arange(len(width)), width)
    depth = np.zeros(len(width), np.int64)
    parent = np.repeat(np.arange(len(width)), np.diff(trie.first_child))
    for child, up in enumerate(parent.tolist(), start=1):
        depth[child] = depth[up] + 1
    within = np.arange(node.size) - np.repeat(np.cumsum(width) - width, width)
    token = order[np.repeat(trie.lo.astype(np.int64), width) + within]
    path[offset[token] + depth[node]] = node
    return Paths(offset, path)


@njit(cache=True)
def _children(first_child: I64, byte: npt.NDArray[Any], node: I64, symbol: I64) -> I64:
    """int64: the child of each node by each symbol, -1 where there is none."""
    child = np.full(len(node), -1, np.int64)
    for i in range(len(node)):
        if symbol[i] < END:
            child[i] = find_child(first_child, byte, node[i], symbol[i])
    return child


class NodeTables(nn.Module):
    """The byte trie of a student's vocabulary, ready for mass sums; N nodes, V ids.

    `order` holds the ids sorted by bytes, then the END ids, then ids without bytes (rows of the head beyond the
    tokenizer included), so that every symbol of every node is one range of it.
    """

    def __init__(self, vocabulary: Vocabulary, rows: int) -> None:
        """`rows`: width of the student's logits."""
        super().__init__()
        trie = vocabulary.trie
        silent = np.ones(rows, bool)
        silent[vocabulary.order] = False
        silent[vocabulary.end_ids] = False
        self.end = len(vocabulary.order)
        self.control = self.end + len(vocabulary.end_ids)
        order = np.concatenate([vocabulary.order, vocabulary.end_ids, np.flatnonzero(silent)]).astype(np.int64)
        paths = token_paths(vocabulary)
        tables: dict[str, npt.NDArray[Any]] = {
            "lo": trie.lo, "hi": trie.hi, "first_child": trie.first_child, "byte": trie.byte, "n_equal": trie.n_equal,
            "order": order, "offset": paths.offset, "path": paths.path,
        }  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table.astype(np.int64)), persistent=False)
        # A child's key is unique and ascending, since children are numbered by parent, then byte.
        parent = np.repeat(np.arange(len(trie.lo)), np.diff(trie.first_child))
        self.register_buffer("child_key", torch.from_numpy(parent * 256 + trie.byte[1:]), persistent=False)

    def table(self, name: str) -> Tensor:
        """A registered table, int64."""
        return self.get_buffer(name)

    def node_of(self, token: Tensor, depth: Tensor) -> Tensor:
        """Node of the first `depth` bytes of each token; depth at most the token's length."""
        return self.table("path")[self.table("offset")[token] + depth]

    def length_of(self, token: Tensor) -> Tensor:
        """Bytes of each token, 0 for ids without."""
        offset = self.table("offset")
        return offset[token + 1] - offset[token] - 1

    def child_of(self, node: Tensor, symbol: Tensor) -> Tensor:
        """The child of each node by each symbol, -1 where there is none (END is nobody's child)."""
        if node.device.type == "cpu":
            return torch.from_numpy(_children(*self.walk(), node.numpy(), symbol.numpy()))
        keys = self.table("child_key")
        wanted = node * 256 + symbol
        at = torch.searchsorted(keys, wanted).clamp_max(keys.numel() - 1)
        return torch.where((keys[at] == wanted) & (symbol < END), at + 1, -1)

    def offered(self, node: Tensor) -> Tensor:
        """How many symbols each node offers: children, STOP where it is a token, END and CONTROL at the root."""
        first = self.table("first_child")
        return first[node + 1] - first[node] + (self.table("n_equal")[node] > 0) + 2 * (node == 0)

    def walk(self) -> tuple[Any, Any]:
        """(first_child, byte) as arrays."""
        return self.table("first_child").numpy(), self.table("byte").numpy()

    def pairs(self, node: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(slot, symbol, lo, hi) of every symbol that each node offers, int64 [Q] each."""
        first = self.table("first_child")
        count = first[node + 1] - first[node]
        slot = torch.repeat_interleave(torch.arange(node.numel(), device=node.device), count)
        child = torch.arange(slot.numel(), device=node.device) - (count.cumsum(0) - count)[slot] + first[node][slot]
        every = torch.arange(node.numel(), device=node.device)
        stop_lo = self.table("lo")[node]
        root = every[node == 0]
        columns = [
            (slot, self.table("byte")[child], self.table("lo")[child], self.table("hi")[child]),
            (every, torch.full_like(every, STOP), stop_lo, stop_lo + self.table("n_equal")[node]),
            (root, torch.full_like(root, END), root * 0 + self.end, root * 0 + self.control),
            (root, torch.full_like(root, CONTROL), root * 0 + self.control, root * 0 + self.table("order").numel()),
        ]
        slots, symbols, los, his = (torch.cat(c) for c in zip(*columns, strict=True))
        return slots, symbols, los, his


class _NodeLogits(torch.autograd.Function):
    """(z [P, V], row [S], node [S]) -> log masses [S, 260], -inf where a node offers nothing."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, row: Tensor, node: Tensor, tables: NodeTables) -> Tensor:
        peak = z.amax(dim=1, keepdim=True)
        e = torch.exp(z - peak)
        mass = z.new_zeros(row.numel(), HEAD_SYMBOLS)
        slot, symbol, lo, hi = tables.pairs(node)
        for cell, pair in _cells(lo, hi):
            value = e[row[slot[pair]], tables.table("order")[cell]]
            mass.view(-1).index_add_(0, slot[pair] * HEAD_SYMBOLS + symbol[pair], value)
        ctx.tables = tables
        ctx.save_for_backward(e, row, node, mass)
        return mass.log() + peak[row]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        e, row, node, mass = ctx.saved_tensors
        tables: NodeTables = ctx.tables
        # d log m / d z_v = e_v / m; a symbol without mass has no gradient.
        g = torch.where(mass > 0, grads[0].to(torch.float64) / mass.to(torch.float64), 0.0)
        out = torch.zeros_like(e)
        slot, symbol, lo, hi = tables.pairs(node)
        for cell, pair in _cells(lo, hi):
            at = row[slot[pair]] * e.shape[1] + tables.table("order")[cell]
            value = g[slot[pair], symbol[pair]] * e.view(-1)[at]
            out.view(-1).index_add_(0, at, value.to(out.dtype))
        return out, None, None, None


CELLS = 1 << 24
"""Range elements gathered at once on a device: bounds the scratch to about 600 MB."""


def _cells(lo: Tensor, hi: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(index into `order`, pair) of every element of every range, in pieces of at most about `CELLS`."""
    width = hi - lo
    ends = width.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    edges = torch.arange(0, total + CELLS, CELLS, device=lo.device).clamp_max(total)
    cuts = torch.searchsorted(ends, edges, right=False).tolist()
    cuts[0], cuts[-1] = 0, len(width)
    for a, b in pairwise(cuts):
        w = width[a:b]
        pair = torch.repeat_interleave(torch.arange(a, b, device=lo.device), w)
        within = torch.arange(pair.numel(), device=lo.device) - (w.cumsum(0) - w)[pair - a]
        yield lo[pair] + within, pair


def node_logits(z: Tensor, row: Tensor, node: Tensor, tables: NodeTables) -> Tensor:
    """Log masses of what each node offers under each row's token distribution, unnormalised.

    Args:
        z: float [P, V] token logits, float32 or float64. row: int64 [S] into z. node: int64 [S] trie nodes.

    Returns:
        [S, 260] as `z`; softmax over the symbols is the student's choice at the node.
    """
    return cast(Tensor, _NodeLogits.apply(z, row, node, tables))  # type: ignore[no-untyped-call]
