"""Sums of a token distribution over ranges of the byte-sorted vocabulary: what each node of the byte trie offers.

    m(c) = sum of exp(z_v) over tokens v that start with c      (a contiguous range of the sorted vocabulary)

Two forms of the same sums, both direct (never differences), so a mass of 1e-30 keeps its digits. `node_log_probs` is
one compiled pass on a CPU from token logits to the few log-probabilities that a loss reads and to the tokens' own
cross-entropy, and one back, so that there is one exponential and one gradient of the logits; a row is put in byte order
once, and then every range lies together. `node_logits` gives all symbols as [S, 260] from segment sums of torch, on any
device.
Price: a slot at the root reads the vocabulary once, a slot deeper the tokens that still fit: about two passes over
[tokens, vocabulary] forward and two backward; `benchmarks/objective_cost.py` measures it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn
from torch.nn import functional

from bytecache.schemas.arrays import END, I64
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.objective.loss import LOWEST
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

    def numpy(self) -> tuple[Any, ...]:
        """Arguments of the compiled loops."""
        names = ("lo", "hi", "first_child", "byte", "n_equal")
        # Unsigned: an index that cannot be negative needs no check.
        order = self.table("order").numpy().view(np.uint64)
        return (*(self.table(n).numpy() for n in names), order, self.end, self.control)

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


def compiled(device: torch.device) -> bool:
    """Whether `node_log_probs` runs here."""
    return device.type == "cpu"


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


@njit(cache=True)
def _by_row(row, rows):  # type: ignore[no-untyped-def]
    """Slots in order of their row, as (first [rows + 1], slot [S])."""
    first = np.zeros(rows + 1, np.int64)
    for r in row:
        first[r + 1] += 1
    for r in range(rows):
        first[r + 1] += first[r]
    at = first[:-1].copy()
    slot = np.empty(len(row), np.int64)
    for s in range(len(row)):
        slot[at[row[s]]] = s
        at[row[s]] += 1
    return first, slot


@njit(cache=True, fastmath={"reassoc", "nsz"})
def _sum(values, lo, hi):  # type: ignore[no-untyped-def]
    total = 0.0
    for value in values[lo:hi]:  # a slice: its indices cannot be negative, so the loop is vectorised
        total += value
    return total


@njit(cache=True)
def _choose(  # type: ignore[no-untyped-def]
    e, label, first_slot, slots, node, true, first_entry, symbol, first_mass, lo, hi, first_child, byte, n_equal,
    order, end, control, mass, right, listed, log_u, total,
):  # fmt: skip
    """Per slot: masses of what the node offers (ragged), log q of the truth, of the entries and of the bucket.

    Per row: its sum, where it has a label. A row is gathered into byte order once, so every range is contiguous.
    """
    at = np.zeros(HEAD_SYMBOLS, np.int64)
    sorted_ = np.empty(len(order), e.dtype)
    for r in range(len(e)):
        if label[r] >= 0:
            total[r] = _sum(e[r], 0, len(order))
        if first_slot[r] == first_slot[r + 1]:
            continue
        for j in range(len(order)):
            sorted_[j] = e[r, order[j]]
        for i in range(first_slot[r], first_slot[r + 1]):
            s = slots[i]
            n, q = node[s], first_mass[s]
            begin = q
            whole = 0.0
            for c in range(first_child[n], first_child[n + 1]):
                m = _sum(sorted_, lo[c], hi[c])
                mass[q] = m
                at[byte[c]] = q
                whole += m
                q += 1
            for x, a, b in ((STOP, lo[n], lo[n] + n_equal[n]), (END, end, control), (CONTROL, control, len(order))):
                if x != STOP and n != 0:
                    continue
                m = _sum(sorted_, a, b)
                mass[q] = m
                at[x] = q
                whole += m
                q += 1
            right[s] = _log(mass[at[true[s]]] / whole) if whole > 0 else LOWEST
            for k in range(first_entry[s], first_entry[s + 1]):
                listed[k] = _log(mass[at[symbol[k]]] / whole) if whole > 0 else LOWEST
                mass[at[symbol[k]]] *= -1  # marks it as listed
            rest = 0.0
            for k in range(begin, q):
                if mass[k] > 0:
                    rest += mass[k]
            log_u[s] = _log(rest / whole) if whole > 0 else LOWEST


@njit(cache=True)
def _log(x):  # type: ignore[no-untyped-def]
    return np.log(x) if x > 0 else LOWEST


@njit(cache=True)
def _choose_back(  # type: ignore[no-untyped-def]
    g_token, g_right, g_listed, g_u, e, label, first_slot, slots, node, true, first_entry, symbol, first_mass, lo, hi,
    first_child, byte, n_equal, order, end, control, mass, total, out,
):  # fmt: skip
    """d log q(x) / d z_v = e_v ([v in x] / m(x) - 1 / m(node)); the bucket is one x. Token: softmax - label."""
    g = np.zeros(HEAD_SYMBOLS)
    sorted_, grad = np.empty(len(order), e.dtype), np.empty(len(order), e.dtype)
    for r in range(len(e)):
        share = g_token / total[r] if label[r] >= 0 else 0.0
        if first_slot[r] == first_slot[r + 1]:
            for v in range(len(order)):
                out[r, v] = share * e[r, v]
        else:
            for j in range(len(order)):
                sorted_[j] = e[r, order[j]]
                grad[j] = share * sorted_[j]
            for i in range(first_slot[r], first_slot[r + 1]):
                s = slots[i]
                n, q = node[s], first_mass[s]
                whole = rest = 0.0
                for k in range(q, first_mass[s + 1]):
                    whole += abs(mass[k])
                    if mass[k] > 0:
                        rest += mass[k]
                if whole <= 0:
                    continue
                every = g_right[s] + g_u[s]
                for k in range(first_entry[s], first_entry[s + 1]):
                    g[symbol[k]] += g_listed[k]
                    every += g_listed[k]
                g[true[s]] += g_right[s]
                every, shared = every / whole, g_u[s] / rest if rest > 0 else 0.0
                for c in range(first_child[n], first_child[n + 1]):
                    _add(g[byte[c]], mass[q], every, shared, sorted_, grad, lo[c], hi[c])
                    q += 1
                _add(g[STOP], mass[q], every, shared, sorted_, grad, lo[n], lo[n] + n_equal[n])
                if n == 0:
                    _add(g[END], mass[q + 1], every, shared, sorted_, grad, end, control)
                    _add(g[CONTROL], mass[q + 2], every, shared, sorted_, grad, control, len(order))
                for k in range(first_entry[s], first_entry[s + 1]):
                    g[symbol[k]] = 0.0
                g[true[s]] = 0.0
            for j in range(len(order)):
                out[r, order[j]] = grad[j]
        if label[r] >= 0:
            out[r, label[r]] -= g_token


@njit(cache=True)
def _add(given, mass, every, shared, values, grad, lo, hi):  # type: ignore[no-untyped-def]
    m = abs(mass)
    if m == 0:
        return
    value = given / m - every + (shared if mass > 0 else 0.0)
    mine, out = values[lo:hi], grad[lo:hi]
    for j in range(len(mine)):
        out[j] += value * mine[j]


class _Fused(torch.autograd.Function):
    """Token cross-entropy and what the loss reads of `node_logits`, in one pass; no [S, 260] array."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, label: Tensor, row: Tensor, node: Tensor, true: Tensor, slot: Tensor, symbol: Tensor,
        tables: NodeTables,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        peak = z.amax(dim=1, keepdim=True)
        e = (z - peak).exp_()
        first_child = tables.table("first_child")
        offered = first_child[node + 1] - first_child[node] + 1 + 2 * (node == 0)
        first_mass = functional.pad(offered.cumsum(0), (1, 0))
        first_entry = functional.pad(torch.bincount(slot, minlength=row.numel()).cumsum(0), (1, 0))
        first_slot, slots = (torch.from_numpy(a) for a in _by_row(row.numpy(), len(z)))
        mass = torch.empty(int(first_mass[-1]), dtype=torch.float64)
        total = torch.ones(len(z), dtype=torch.float64)
        right, log_u, listed = z.new_empty(row.numel()), z.new_empty(row.numel()), z.new_empty(slot.numel())
        places = (e, label, first_slot, slots, node, true, first_entry, symbol, first_mass)
        found = (mass, right, listed, log_u, total)
        _choose(*(t.numpy() for t in places), *tables.numpy(), *(t.numpy() for t in found))
        learned = label >= 0
        of_label = (z.gather(1, label.clamp_min(0)[:, None]) - peak)[:, 0]
        token = torch.where(learned, total.log() - of_label.double(), 0.0).sum().to(z.dtype)
        ctx.tables = tables
        ctx.save_for_backward(*places, mass, total)
        return token, right, listed, log_u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *places, mass, total = ctx.saved_tensors
        out = torch.empty_like(places[0])
        given = [g.contiguous().numpy() for g in grads[1:]]
        ends = (t.numpy() for t in (mass, total, out))
        _choose_back(float(grads[0]), *given, *(t.numpy() for t in places), *ctx.tables.numpy(), *ends)
        return out, *[None] * 7


def node_log_probs(
    z: Tensor, label: Tensor, row: Tensor, node: Tensor, true: Tensor, slot: Tensor, symbol: Tensor, tables: NodeTables
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of token NLL, and log-probabilities of each slot's truth [S], the entries [E], the unlisted symbols [S].

    As cross-entropy and `node_logits`, on the CPU. label int64 [P], negative where nothing is learned. slot int64 [E]
    ascending, symbol int64 [E]: the teacher's entries, each on something that its node offers.
    """
    found = _Fused.apply(z, label, row, node, true, slot, symbol, tables)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], found)
