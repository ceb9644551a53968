"""The context prior of a shard: what usually follows the last few bytes, learned from the shard's own targets.

A tree of contexts. The root is the empty context; a node extends its parent's context by one byte further back, at
most three. A position belongs to the deepest node that its preceding bytes (within its document) reach. Each node
has one weight per symbol, 2 ** (-code / 2): relative, never zero. The weights spread the unlisted mass of a
position over its unlisted symbols, and their order gives the ranks under which symbols are listed.

Learning: `SAMPLE` positions at the start of a shard, contexts seen at least `MINIMUM[depth]` times before positions
that say something, the most frequent first, at most `NODES` of them. A node's masses are mixed with its parent's
distribution, worth `BACKOFF` positions. All sums are sequential or of integers, so equal targets give equal tables on
every machine.

Price: 1.5 KiB of memory a node while reading, 10 to 40 bytes in the file; 4 ns a position to find its node.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bytecache.schemas.arrays import F64, I16, I64, PLACE, SYMBOLS, U8

DEPTH = 3
NODES = 4096
MAX_CODE = 60
"""Weights span 2 ** -30 .. 1."""
SAMPLE = 1 << 20
"""Positions that a writer learns a prior from."""
MINIMUM = (0, 24, 100, 200)
BACKOFF = 3.0
UNIT = 1 << 24
"""Fixed-point unit of summed probabilities."""

_ROOT_HALF = 0.7071067811865476
WEIGHT: F64 = np.array([2.0 ** -(c // 2) * (_ROOT_HALF if c % 2 else 1.0) for c in range(MAX_CODE + 1)])
"""float64 [61]: the weight of each code."""
INVERSE: F64 = 1.0 / WEIGHT
# Every weight is a whole number of 2 ** -30, or that many times the root.
_WHOLE: I64 = np.array([0 if c % 2 else 2 ** (30 - c // 2) for c in range(MAX_CODE + 1)])
_ROOTS: I64 = np.array([2 ** (30 - c // 2) if c % 2 else 0 for c in range(MAX_CODE + 1)])
# Ratios below which the next code is nearer: 2 ** (-(c + 1/2) / 2) = 2 ** -(c // 2) * 2 ** (-1/4 or -3/4).
_EDGE: F64 = np.array(
    [2.0 ** -(c // 2) * (0.5946035575013605 if c % 2 else 0.8408964152537145) for c in range(MAX_CODE)]
)


class Prior(NamedTuple):
    """K nodes, node 0 the empty context, a parent always before its children."""

    parent: I64
    """int64 [K]: -1 for the root"""
    byte: U8
    """uint8 [K]: the byte before the parent's context; 0 for the root"""
    code: U8
    """uint8 [K, 257]: weight 2 ** (-code / 2) of each symbol"""

    def child(self) -> I16:
        """int16 [K + 1, 256]: node reached from a node by one more byte of context; K: none, which leads to none."""
        out = np.full((len(self.parent) + 1, 256), len(self.parent), np.int16)
        out[self.parent[1:], self.byte[1:]] = np.arange(1, len(self.parent))
        return out

    def weights(self) -> F64:
        """float64 [K, 257]."""
        return WEIGHT[self.code]

    def totals(self) -> F64:
        """float64 [K]: the sums of each node's weights, exact and then rounded (as math.fsum has them)."""
        root = int(_ROOT_HALF * 2**53)
        sums = zip(_WHOLE[self.code].sum(1).tolist(), _ROOTS[self.code].sum(1).tolist(), strict=True)
        return np.array([((whole << 53) + roots * root) / 2**83 for whole, roots in sums])

    def order(self) -> I16:
        """int16 [K, 257]: symbols by descending weight, ties by symbol."""
        return np.argsort(self.code, axis=1, kind="stable").astype(np.int16)


def ranks(order: I16) -> I16:
    """int16 [K, 257]: the place of each symbol in `order`."""
    out = np.empty_like(order)
    np.put_along_axis(out, order.astype(np.int64), np.arange(SYMBOLS, dtype=np.int16)[None], axis=1)
    return out


def flat_prior() -> Prior:
    """The prior of a shard without positions: all symbols alike."""
    return Prior(np.array([-1], np.int64), np.zeros(1, np.uint8), np.zeros((1, SYMBOLS), np.uint8))


def pack_code(prior: Prior) -> U8:
    """uint8 [257 K]: the codes as stored, symbol by symbol, each node's minus its parent's (mod 256)."""
    code = prior.code.copy()
    code[1:] -= prior.code[prior.parent[1:]]
    return np.ascontiguousarray(code.T).reshape(-1)


def check_prior(parent: I64, byte: U8, code: U8) -> Prior:
    """The prior of stored columns (`code` as `pack_code` makes it).

    Raises ValueError, the column's name first, for what is no tree with weights.
    """
    n = len(parent)
    if not 1 <= n <= NODES:
        raise ValueError(f"prior_parent has {n} nodes, must have 1..{NODES}")
    if len(byte) != n:
        raise ValueError(f"prior_byte has {len(byte)} nodes, but `prior_parent` has {n}")
    if len(code) != n * SYMBOLS:
        raise ValueError(f"prior_code has {len(code)} weights, expected {n} x {SYMBOLS}")
    if parent[0] != -1 or (parent[1:] < 0).any() or (parent[1:] >= np.arange(1, n)).any():
        raise ValueError("prior_parent is no tree: the first node is the root, -1, and parents precede their children")
    depth = np.zeros(n, np.int64)
    for node in range(1, n):
        depth[node] = depth[parent[node]] + 1
    if depth.max() > DEPTH:
        raise ValueError(f"prior_parent has contexts of {depth.max()} bytes, at most {DEPTH}")
    if byte[0] != 0 or len(np.unique(parent[1:] * 256 + byte[1:])) != n - 1:
        raise ValueError("prior_byte names a context twice")
    code = np.ascontiguousarray(code.reshape(SYMBOLS, n).T)
    for node in range(1, n):
        code[node] += code[parent[node]]
    if code.max() > MAX_CODE:
        raise ValueError(f"prior_code holds {code.max()}, at most {MAX_CODE}")
    return Prior(parent, byte, code)


@njit(cache=True, nogil=True)
def find_block(text: U8, doc_start: I64, child: I16, document: int, lo: int, hi: int, node: I16) -> int:
    """Put the nodes of positions lo..hi into `node`; position lo is in `document` or a later one. Returns hi - 1's.

    All three steps are taken before the deepest that led somewhere is chosen: no branch to guess wrong.
    """
    none = child.shape[0] - 1
    i = lo
    while i < hi:
        while document + 1 < doc_start.shape[0] and doc_start[document + 1] <= i:
            document += 1
        first = doc_start[document]
        stop = hi
        if document + 1 < doc_start.shape[0]:
            stop = min(hi, doc_start[document + 1])
        while i < min(stop, first + DEPTH):
            deepest = 0
            for back in range(1, i - first + 1):
                deeper = child[deepest, text[i - back]]
                if deeper == none:
                    break
                deepest = deeper
            node[i - lo] = deepest
            i += 1
        for j in range(i, stop):
            here = PLACE(j)
            one = child[0, text[here - PLACE(1)]]
            two = child[PLACE(one), text[here - PLACE(2)]]
            three = child[PLACE(two), text[here - PLACE(3)]]
            two = two if two != none else one
            three = three if three != none else two
            node[j - lo] = three if three != none else 0
        i = stop
    return document


@njit(cache=True, nogil=True)
def find_nodes(text: U8, doc_start: I64, child: I16, lo: int, hi: int) -> I16:
    """int16 [hi - lo]: node of each position; `doc_start` ascending: where documents begin (an open one included)."""
    out = np.empty(hi - lo, np.int16)
    find_block(text, doc_start, child, np.searchsorted(doc_start, lo, side="right") - 1, lo, hi, out)
    return out


@njit(cache=True, nogil=True)
def _count(text: U8, doc_start: I64, known: NDArray[np.bool_], group: I64, depth: int, counts: I64) -> None:
    """Add the contexts of `depth` bytes of known positions to int64 `counts` [groups, 256].

    `group` int64 [256 ** (depth - 1)]: the row of the bytes before the farthest one, nearest first; -1: not counted.
    """
    for document in range(doc_start.shape[0]):
        stop = doc_start[document + 1] if document + 1 < doc_start.shape[0] else text.shape[0]
        for i in range(doc_start[document] + depth, stop):
            key = np.int64(0)
            for back in range(1, depth):
                key = key << 8 | np.int64(text[i - back])
            if known[i] and group[key] >= 0:
                counts[group[key], text[i - depth]] += 1


def grow(text: U8, doc_start: I64, known: NDArray[np.bool_]) -> Prior:
    """The tree of frequent contexts of `known` [n] positions, weights still all alike.

    `text` [n]: documents with their END positions.
    """
    contexts: list[tuple[int, int, int]] = []  # (-count, depth, key); key = bytes before, nearest in the high digits
    parents = np.zeros(1, np.int64)  # keys; what is too rare has no children, since MINIMUM grows with the depth
    for depth in range(1, DEPTH + 1):
        group = np.full(256 ** (depth - 1), -1, np.int64)
        group[parents] = np.arange(len(parents))
        counts = np.zeros((len(parents), 256), np.int64)
        _count(text, doc_start, known, group, depth, counts)
        row, last = np.nonzero(counts >= MINIMUM[depth])
        parents = parents[row] << 8 | last
        contexts += zip((-counts[row, last]).tolist(), [depth] * len(parents), parents.tolist(), strict=True)
    # Most frequent first; a parent is at least as frequent and less deep, so it always precedes its children.
    nodes = {(0, 0): 0}
    parent, byte = [-1], [0]
    for _, depth, context in sorted(contexts):
        if (depth - 1, context >> 8) in nodes and len(parent) < NODES:
            nodes[depth, context] = len(parent)
            parent.append(nodes[depth - 1, context >> 8])
            byte.append(context & 255)
    return Prior(np.array(parent, np.int64), np.array(byte, np.uint8), np.zeros((len(parent), SYMBOLS), np.uint8))


@njit(cache=True, nogil=True, error_model="numpy")
def _mix(parent: I64, mass: I64, edge: F64, code: U8) -> None:
    """Fill `code` from the summed masses int64 [K, 257] of the positions at each node; `mass` is summed up the tree."""
    n_nodes = parent.shape[0]
    for node in range(n_nodes - 1, 0, -1):
        for s in range(SYMBOLS):
            mass[parent[node], s] += mass[node, s]
    share = np.empty((n_nodes, SYMBOLS))
    ratio = np.empty(1)
    ratio_bits = ratio.view(np.int64)
    for node in range(n_nodes):
        total = 0.0
        biggest = 0.0
        for s in range(SYMBOLS):
            above = 1.0 / SYMBOLS if node == 0 else share[parent[node], s]
            worth = 1e-3 if node == 0 else BACKOFF
            value = mass[node, s] / float(UNIT) + worth * above
            share[node, s] = value
            total += value
            biggest = max(biggest, value)
        for s in range(SYMBOLS):
            ratio[0] = share[node, s] / biggest
            # Its exponent says which codes are too small; few are left to try.
            c = max(0, min(MAX_CODE, 2 * (1022 - (ratio_bits[0] >> 52))))
            while c < MAX_CODE and ratio[0] < edge[c]:
                c += 1
            code[node, s] = c
            share[node, s] /= total


def weigh(tree: Prior, mass: I64) -> Prior:
    """The tree with weights from int64 [K, 257] masses (in 1 / UNIT) of the positions that belong to each node."""
    code = np.empty_like(tree.code)
    _mix(tree.parent, mass.copy(), _EDGE, code)
    return Prior(tree.parent, tree.byte, code)
