"""No head at all: the student's own token logits reduced to byte distributions, so the teacher trains the LM head.

Algorithm. A token v is a path in the byte trie of the student's vocabulary. At the node of w, reached after the first d
bytes of the token, the student chooses between the *children* w + b and, where w is itself a token, to *stop*:

    m(c) = sum of exp(z_v) over tokens v that start with c      (a contiguous range of the byte-sorted vocabulary)
    q(b | w) = m(w + b) / m(w),      q(stop | w) = sum over tokens equal to w of exp(z_v) / m(w)

The product of these choices along the token's path is its probability, so the token's cross-entropy is the sum of the
choices' cross-entropies. Each is replaced, or joined, by KL against what the teacher would choose. The slots carry
log m (symbol 0..255: children, 256: END at the root, 257: stop, 258: ids without bytes at the root), -inf where the
trie has nothing; their softmax is q. One slot more per token asks at the token's own node: stop here, or go on?

*What the teacher would choose.* It says P(b | text), not where the student's tokenizer cuts. That is a property of the
tokenizer and of the text that follows, known as frequencies: among the places where a token starts and the text reads
w b, a share pass(w, b) of the tokens reaches past w + b, a share stop(w, b) is w itself; in the rest the token ended
earlier, which is excluded here. Hence, by Bayes' rule,

    target(b) ~ P(b) pass(w, b),     target(stop) ~ sum_b P(b) stop(w, b),     target(other) ~ tail,

and the first byte of a token is weighted by stop(previous token, b): had the text gone on otherwise, the previous token
would have been another. `Segmentation` counts the shares on training text; a byte that no token continues with is a
stop. Unlisted children, stops and control ids form one bucket with the teacher's tail, as everywhere.
Masses are direct sums of exp(z - max), never differences, so 1e-30 keeps its digits: numba on a CPU, segment sums of
torch on a device. Price: about two passes over [tokens, vocabulary] forward and backward; no parameters.
"""

from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn

from stages.tokens.byte_trie import find_child
from stages.tokens.vocab import Vocabulary
from stages.training.byte_head import END, SYMBOLS
from stages.training.loss import SlotTargets
from stages.training.stream import MicroBatch

STOP = 257
"""The token ends at this node."""
CONTROL = 258
"""Ids that carry no bytes and end no document."""

IntArray = npt.NDArray[np.int64]


class Paths(NamedTuple):
    """Trie path of every id: path[offset[v] + d] is the node of its first d bytes, d = 0 .. its length."""

    offset: IntArray
    path: IntArray


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
def _masses(e, row, node, lo, hi, first_child, byte, n_equal, order, end, control, out):  # type: ignore[no-untyped-def]
    """out[s, symbol] = sum of e[row[s], order[range]] over the symbol's tokens at node[s]; `out` starts as zeros."""
    for s in range(len(row)):
        r, n = row[s], node[s]
        for c in range(first_child[n], first_child[n + 1]):
            mass = 0.0
            for j in range(lo[c], hi[c]):
                mass += e[r, order[j]]
            out[s, byte[c]] = mass
        mass = 0.0
        for j in range(lo[n], lo[n] + n_equal[n]):
            mass += e[r, order[j]]
        out[s, STOP] = mass
        if n == 0:
            mass = 0.0
            for j in range(end, control):
                mass += e[r, order[j]]
            out[s, END] = mass
            mass = 0.0
            for j in range(control, len(order)):
                mass += e[r, order[j]]
            out[s, CONTROL] = mass


@njit(cache=True)
def _spread(g, e, row, node, lo, hi, first_child, byte, n_equal, order, end, control, out):  # type: ignore[no-untyped-def]
    """The transpose: out[row[s], v] += g[s, symbol] e[row[s], v] for every token v of every symbol of every slot."""
    for s in range(len(row)):
        r, n = row[s], node[s]
        for c in range(first_child[n], first_child[n + 1]):
            value = g[s, byte[c]]
            if value != 0.0:
                for j in range(lo[c], hi[c]):
                    out[r, order[j]] += value * e[r, order[j]]
        value = g[s, STOP]
        for j in range(lo[n], lo[n] + n_equal[n]):
            out[r, order[j]] += value * e[r, order[j]]
        if n == 0:
            for j in range(end, control):
                out[r, order[j]] += g[s, END] * e[r, order[j]]
            for j in range(control, len(order)):
                out[r, order[j]] += g[s, CONTROL] * e[r, order[j]]


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

    def walk(self) -> tuple[Any, Any]:
        """(first_child, byte) as arrays."""
        return self.table("first_child").numpy(), self.table("byte").numpy()

    def numpy(self) -> tuple[Any, ...]:
        """Arguments of the compiled loops."""
        names = ("lo", "hi", "first_child", "byte", "n_equal", "order")
        return (*(self.table(n).numpy() for n in names), self.end, self.control)

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
    """Whether the compiled loops run here; elsewhere the same sums are torch segment sums."""
    return device.type == "cpu"


class _NodeLogits(torch.autograd.Function):
    """(z [P, V], row [S], node [S]) -> log masses [S, 260], -inf where a node offers nothing."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, row: Tensor, node: Tensor, tables: NodeTables) -> Tensor:
        peak = z.amax(dim=1, keepdim=True)
        e = torch.exp(z - peak)
        mass = z.new_zeros(row.numel(), SYMBOLS)
        if compiled(z.device):
            _masses(e.numpy(), row.numpy(), node.numpy(), *tables.numpy(), mass.numpy())
        else:
            slot, symbol, lo, hi = tables.pairs(node)
            for cell, pair in _cells(lo, hi):
                value = e[row[slot[pair]], tables.table("order")[cell]]
                mass.view(-1).index_add_(0, slot[pair] * SYMBOLS + symbol[pair], value)
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
        if compiled(e.device):
            _spread(g.numpy(), e.numpy(), row.numpy(), node.numpy(), *tables.numpy(), out.numpy())
        else:
            slot, symbol, lo, hi = tables.pairs(node)
            for cell, pair in _cells(lo, hi):
                at = row[slot[pair]] * e.shape[1] + tables.table("order")[cell]
                value = g[slot[pair], symbol[pair]] * e.view(-1)[at]
                out.view(-1).index_add_(0, at, value.to(out.dtype))
        return out, None, None, None


CELLS = 1 << 24
"""Range elements gathered at once on a device: bounds the scratch to about 600 MB."""


def _cells(lo: Tensor, hi: Tensor) -> Any:
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


class Choices(NamedTuple):
    """What the student's tokens choose, slot by slot; S slots, E entries.

    row int64 [S]: flat position whose logits choose. node int64 [S]. true int64 [S]. weight float32 [S].
    targets: entries on children and END; stops are in the tail. unlisted float32 [S]: the teacher's own tail.
    """

    row: Tensor
    node: Tensor
    true: Tensor
    weight: Tensor
    targets: SlotTargets | None
    unlisted: Tensor | None

    def split(self, rows: int, size: int) -> list["Choices"]:
        """The choices of rows [0, size), [size, 2 size), ..., each with its own row numbers."""
        by_row = torch.argsort(self.row, stable=True)
        edges = torch.arange(0, rows + size, size, device=self.row.device).clamp_max(rows)
        cuts = torch.searchsorted(self.row[by_row].contiguous(), edges).tolist()
        place = torch.empty_like(by_row)
        place[by_row] = torch.arange(by_row.numel(), device=by_row.device)
        if self.targets is not None:
            at, by_slot = torch.sort(place[self.targets.slot], stable=True)
            inner = torch.searchsorted(at, torch.tensor(cuts, device=at.device)).tolist()
        parts = []
        for number, (a, b) in enumerate(pairwise(cuts)):
            mine = by_row[a:b]
            targets = None
            if self.targets is not None:
                entry = by_slot[inner[number] : inner[number + 1]]
                targets = SlotTargets(
                    at[inner[number] : inner[number + 1]] - a, self.targets.symbol[entry], self.targets.prob[entry],
                    self.targets.tail[mine],
                )  # fmt: skip
            unlisted = None if self.unlisted is None else self.unlisted[mine]
            parts.append(
                Choices(
                    self.row[mine] - number * size,
                    self.node[mine],
                    self.true[mine],
                    self.weight[mine],
                    targets,
                    unlisted,
                )
            )
        return parts


class Marginal(nn.Module):
    """The student's token logits as byte choices, with the teacher's targets beside them."""

    def __init__(self, vocabulary: Vocabulary, rows: int) -> None:
        super().__init__()
        self.tables = NodeTables(vocabulary, rows)
        self.segmentation = Segmentation(self.tables)

    def choices(self, micro: MicroBatch, reduction: str) -> Choices:
        """Slots of a micro-batch: every supervised byte, and each token's end where its successor is in the row."""
        tables = self.tables
        ids, labels = micro.input_ids.flatten(), micro.labels.flatten()
        device = labels.device
        depth = torch.repeat_interleave(
            torch.arange(len(micro.slot_counts), device=device), torch.tensor(micro.slot_counts, device=device)
        )
        row, true = micro.slot_token, micro.slot_symbol
        node = tables.node_of(labels[row], depth)
        # Slots of number 0 lead the list: there the teacher also says how the token before could have gone on.
        first = torch.arange(micro.slot_counts[0], device=device)
        place = row[first]
        before = ids[place]
        spelled = tables.length_of(before) > 0
        ended = torch.full_like(row, -1)
        ended[first] = torch.where(spelled, tables.node_of(before, tables.length_of(before)), -1)
        follows = spelled & (place % micro.input_ids.shape[1] > 0) & (labels[(place - 1).clamp_min(0)] == before)
        source = first[follows]
        all_row = torch.cat([row, row[source] - 1])
        all_node = torch.cat([node, ended[source]])
        all_true = torch.cat([true, torch.full_like(source, STOP)])
        weight = torch.ones(all_row.numel(), device=device)
        if reduction == "mean":
            weight = 1 / torch.zeros(ids.numel(), device=device).index_add_(0, all_row, weight)[all_row]
        targets = unlisted = None
        if micro.targets is not None:
            t = micro.targets
            # The end slots repeat the entries of the root slots they look at.
            twin = torch.full_like(row, -1)
            twin[source] = row.numel() + torch.arange(source.numel(), device=device)
            again = twin[t.slot] >= 0
            joined = SlotTargets(
                torch.cat([t.slot, twin[t.slot][again]]), torch.cat([t.symbol, t.symbol[again]]),
                torch.cat([t.prob, t.prob[again]]), torch.cat([t.tail, t.tail[source]]),
            )  # fmt: skip
            unlisted = joined.tail
            targets = self.project(joined, all_node, torch.cat([ended, torch.full_like(source, -1)]))
        return Choices(all_row, all_node, all_true, weight, targets, unlisted)

    def project(self, targets: SlotTargets, node: Tensor, ended: Tensor) -> SlotTargets:
        """The teacher's bytes as choices at trie nodes (module docstring).

        Args:
            targets: of S slots. node: int64 [S]. ended: int64 [S], the node of the token that ended just before a
                root slot; -1 where there is none.

        Returns:
            Entries on children (and END) only; stops are part of the tail. A node without stop and unlisted children
            has tail 0.
        """
        tables, cut = self.tables, self.segmentation
        slot, symbol, prob, tail = targets
        n = node[slot]
        child = tables.child_of(n, symbol)
        at = child.clamp_min(0)
        root_end = (n == 0) & (symbol == END)
        go = torch.where(child >= 0, cut.go[at], root_end.to(prob.dtype))
        halt = torch.where(child >= 0, cut.halt[at], torch.where(root_end, 0.0, cut.off[n]))
        last = ended[slot]
        after = tables.child_of(last.clamp_min(0), symbol)
        stopped = torch.where(after >= 0, cut.halt[after.clamp_min(0)], cut.off[last.clamp_min(0)])
        prob = torch.where(last >= 0, prob * stopped, prob)
        kept, stop = prob * go, torch.zeros_like(tail).index_add_(0, slot, prob * halt)
        listed = torch.zeros_like(tail).index_add_(0, slot, (kept > 0).to(tail.dtype))
        first = tables.table("first_child")
        offered = (first[node + 1] - first[node]) + (node == 0)
        # The root always has a bucket: control ids.
        bucket = (offered > listed) | (tables.table("n_equal")[node] > 0) | (node == 0)
        rest = torch.where(bucket, tail + stop, 0.0)
        total = (rest.clone().index_add_(0, slot, kept)).clamp_min(1e-12)
        use = kept > 0
        return SlotTargets(slot[use], symbol[use], (kept / total[slot])[use], rest / total)
