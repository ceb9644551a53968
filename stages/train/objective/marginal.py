"""No head at all: the student's own token logits reduced to byte distributions, so the teacher trains the LM head.

Algorithm. A token v is a path in the byte trie of the student's vocabulary. At the node of w, reached after the first d
bytes of the token, the student chooses between the *children* w + b and, where w is itself a token, to *stop*:

    m(c) = sum of exp(z_v) over tokens v that start with c      (a contiguous range of the byte-sorted vocabulary)
    q(b | w) = m(w + b) / m(w),      q(stop | w) = sum over tokens equal to w of exp(z_v) / m(w)

The product of these choices along the token's path is its probability, so the token's cross-entropy is the sum of the
choices' cross-entropies. A choice is learned from the teacher as far as its bytes say what the tokenizer would do, and
from the text for the rest (`projection.py`): so the term is whole without the token's cross-entropy, and has the same
minimum.
The slots carry log m (symbol 0..255: children, 256: END at the root, 257: stop, 258: ids without bytes at the root);
their softmax is q. One slot more per token asks at the token's own node: stop here, or go on? Its teacher is the
position after the token; where that is not in the row, the text decides.
No parameters are trained. Price: `choices.py`.
"""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.types import MicroBatch, SlotTargets
from bytecache.stages.train.objective.choices import compiled, node_log_probs
from bytecache.stages.train.objective.loss import Divergence, LossParts, byte_terms, diverge
from bytecache.stages.train.objective.node_sums import NodeTables, node_logits
from bytecache.stages.train.objective.projection import TRUST, Places, project
from bytecache.stages.train.objective.segmentation import Segmentation
from bytecache.stages.train.objective.symbols import STOP
from bytecache.stages.train.objective.term import ByteTerm, Work, token_nll, tokens_alone

COUNTED_POSITIONS = 4_000_000
"""Training text, in positions, that the tokenizer's cuts are counted on."""


class Choices(NamedTuple):
    """What the student's tokens choose, slot by slot; S slots, E entries.

    row int64 [S]: flat position whose logits choose. node int64 [S]. true int64 [S]. weight float32 [S].
    targets: entries on children, END and STOP. unlisted float32 [S]: the teacher's own tail. certain, open bool [S]:
    the teacher alone or the text alone decides (`projection.py`); open ones have no targets.
    """

    row: Tensor
    node: Tensor
    true: Tensor
    weight: Tensor
    targets: SlotTargets | None
    unlisted: Tensor | None
    certain: Tensor | None
    open: Tensor | None

    def split(self, rows: int, size: int) -> list["Choices"]:
        """The choices of rows [0, size), [size, 2 size), ..., each with its own row numbers."""
        by_row = torch.argsort(self.row, stable=True)
        edges = torch.arange(0, rows + size, size, device=self.row.device).clamp_max(rows)
        cuts = torch.searchsorted(self.row[by_row].contiguous(), edges).tolist()
        place = torch.empty_like(by_row)
        place[by_row] = torch.arange(by_row.numel(), device=by_row.device)
        at = by_slot = torch.zeros(0, dtype=torch.int64)
        inner = [0] * len(cuts)
        if self.targets is not None:
            at, by_slot = torch.sort(place[self.targets.slot], stable=True)
            inner = torch.searchsorted(at, torch.tensor(cuts, device=at.device)).tolist()
        parts = []
        for number, (a, b) in enumerate(pairwise(cuts)):
            mine = by_row[a:b]
            targets = None
            if self.targets is not None:
                span = slice(inner[number], inner[number + 1])
                entry = by_slot[span]
                targets = SlotTargets(
                    at[span] - a, self.targets.symbol[entry], self.targets.prob[entry], self.targets.tail[mine]
                )
            parts.append(
                Choices(
                    self.row[mine] - number * size, self.node[mine], self.true[mine], self.weight[mine], targets,
                    None if self.unlisted is None else self.unlisted[mine],
                    None if self.certain is None else self.certain[mine],
                    None if self.open is None else self.open[mine],
                )
            )  # fmt: skip
        return parts


class _Walk(NamedTuple):
    """Where the trie leads from the start of the token before.

    node int64: -1 once it leads nowhere. doubt float32: since then `Segmentation.doubt` of where that token ended.
    """

    node: Tensor
    doubt: Tensor


class _Ends(NamedTuple):
    """Slots at tokens' own nodes, X of them; `source`: the first slot of the token after, -1 where there is none.

    row, node, depth, source int64 [X].
    """

    row: Tensor
    node: Tensor
    depth: Tensor
    source: Tensor

    def following(self, symbol: Tensor) -> Tensor:
        """The text's next symbol [X], from those of the slots; -1 where it is not in the row."""
        if not symbol.numel():
            return torch.full_like(self.source, -1)
        return torch.where(self.source >= 0, symbol[self.source.clamp_min(0)], -1)


class Marginal(nn.Module):
    """The student's token logits as byte choices, with the teacher's targets beside them.

    Args:
        rows: width of the student's logits. trust: see `projection.TRUST`.
    """

    def __init__(self, vocabulary: Vocabulary, rows: int, trust: float = TRUST) -> None:
        super().__init__()
        self.tables = NodeTables(vocabulary, rows)
        self.segmentation = Segmentation(self.tables)
        self.trust = trust

    def choices(self, micro: MicroBatch, reduction: str) -> Choices:
        """Slots of a micro-batch: every supervised byte, and each supervised token's end."""
        tables = self.tables
        row, counts = micro.slot_token, torch.tensor(micro.slot_counts, device=micro.labels.device)
        depth = torch.repeat_interleave(torch.arange(len(counts), device=row.device), counts)
        node = tables.node_of(micro.labels.flatten()[row], depth)
        bytes_walk, ends_walk = self._walk(micro)
        ends = self._ends(micro)
        length = tables.length_of(micro.input_ids.flatten())
        stopped = torch.zeros(row.numel() + ends.row.numel(), dtype=torch.bool, device=row.device)
        stopped[row.numel() :] = True
        places = Places(
            torch.cat([node, ends.node]), torch.cat([depth, ends.depth]),
            torch.cat([bytes_walk.node, ends_walk.node[ends.row]]), torch.cat([length[row], length[ends.row]]),
            torch.cat([micro.slot_symbol, ends.following(micro.slot_symbol)]), stopped,
            torch.cat([bytes_walk.doubt, ends_walk.doubt[ends.row]]),
        )  # fmt: skip
        rows = torch.cat([row, ends.row])
        true = torch.cat([micro.slot_symbol, torch.full_like(ends.row, STOP)])
        weight = torch.ones(rows.numel(), device=rows.device)
        if reduction == "mean":
            weight = 1 / torch.zeros(micro.labels.numel(), device=rows.device).index_add_(0, rows, weight)[rows]
        if micro.targets is None:
            return Choices(rows, places.node, true, weight, None, None, None, None)
        joined, known = _with_ends(micro.targets, ends)
        projected = project(joined, places, tables, self.segmentation, self.trust)
        is_open = projected.open | ~known
        taught = ~is_open[projected.targets.slot]
        slot, symbol, prob, tail = projected.targets
        targets = SlotTargets(slot[taught], symbol[taught], prob[taught], torch.where(is_open, 0.0, tail))
        return Choices(rows, places.node, true, weight, targets, joined.tail, projected.certain & known, is_open)

    def _walk(self, micro: MicroBatch) -> tuple[_Walk, _Walk]:
        """The walk from the token before along this one's bytes: before each slot [S], and after each row [P]."""
        ids = micro.input_ids.flatten()
        length = self.tables.length_of(ids)
        walk = torch.where(length > 0, self.tables.node_of(ids, length), -1)
        row, symbol = micro.slot_token, micro.slot_symbol
        passed, child = torch.full_like(row, -1), torch.full_like(row, -1)
        # Most of the numbers that a token may have bytes for have none in any of them.
        counts = [count for count in micro.slot_counts if count]
        numbered = torch.split(torch.arange(row.numel(), device=row.device), counts)
        for slots in numbered:
            at = walk[row[slots]]
            passed[slots] = at
            child[slots] = torch.where(at >= 0, self.tables.child_of(at.clamp_min(0), symbol[slots]), -1)
            walk[row[slots]] = child[slots]
        leaves = (passed >= 0) & (child < 0)
        leaving = self.segmentation.doubt(passed.clamp_min(0), symbol, torch.where(passed >= 0, length[row], 0))
        doubt, doubted = torch.zeros(walk.numel(), device=walk.device), torch.zeros(row.numel(), device=row.device)
        for slots in numbered:
            before = doubt[row[slots]]
            doubted[slots] = before
            doubt[row[slots]] = torch.where(leaves[slots], leaving[slots], before)
        return _Walk(passed, doubted), _Walk(walk, doubt)

    def _ends(self, micro: MicroBatch) -> _Ends:
        ids, labels = micro.input_ids.flatten(), micro.labels.flatten()
        row = torch.nonzero((labels >= 0) & (self.tables.length_of(labels.clamp_min(0)) > 0))[:, 0]
        depth = self.tables.length_of(labels[row])
        # Slots of number 0 lead the list: there the teacher also says how the token before could have gone on.
        first = torch.full((labels.numel() + 1,), -1, device=row.device)
        first[micro.slot_token[: micro.slot_counts[0]]] = torch.arange(micro.slot_counts[0], device=row.device)
        following = (row + 1).clamp_max(labels.numel() - 1)
        joined = (following > row) & (following % micro.input_ids.shape[1] > 0) & (ids[following] == labels[row])
        if micro.position_ids is not None:  # packed rows begin anew
            joined &= micro.position_ids.flatten()[following] > 0
        source = torch.where(joined, first[following], -1)
        return _Ends(row, self.tables.node_of(labels[row], depth), depth, source)


def _with_ends(targets: SlotTargets, ends: _Ends) -> tuple[SlotTargets, Tensor]:
    """Targets of the bytes' slots, then of the ends', which repeat those of the slots they look at; who has any."""
    slots = targets.tail.numel()
    has = ends.source >= 0
    twin = torch.full_like(targets.tail, -1, dtype=torch.int64)
    twin[ends.source[has]] = slots + torch.nonzero(has)[:, 0]
    again = twin[targets.slot] >= 0
    joined = SlotTargets(
        torch.cat([targets.slot, twin[targets.slot][again]]), torch.cat([targets.symbol, targets.symbol[again]]),
        torch.cat([targets.prob, targets.prob[again]]),
        torch.cat([targets.tail, torch.where(has, targets.tail[ends.source.clamp_min(0)], 0.0)]),
    )  # fmt: skip
    return joined, torch.cat([torch.ones_like(targets.tail, dtype=torch.bool), has])


class MarginalTerm(ByteTerm):
    """`Marginal` in an objective.

    Args:
        rows: width of the student's logits. trust: see `projection.TRUST`.
    """

    slots = 64

    def __init__(self, vocabulary: Vocabulary, rows: int, divergence: Divergence, trust: float = TRUST) -> None:
        super().__init__()
        self.marginal = Marginal(vocabulary, rows, trust)
        self.divergence = divergence

    @property
    def tables(self) -> NodeTables:
        """The student's vocabulary as a trie."""
        return self.marginal.tables

    def observe(self, reader: ShardReader) -> None:
        """Count the tokenizer's cuts on the first shards, at most `COUNTED_POSITIONS`; same data, same counts."""
        seen = 0
        for number, positions in enumerate(reader.positions):
            if seen and seen + positions > COUNTED_POSITIONS:
                break
            source = reader[number]
            real = source.ids != reader.end_id
            self.marginal.segmentation.add(
                self.tables, np.asarray(source.shard.text), source.start[real], source.end[real],
                np.asarray(source.shard.doc_start, np.int64)[1:][source.row[real]] - 1,
            )  # fmt: skip
            seen += positions
        self.marginal.segmentation.settle()

    def prepare(self, micro: MicroBatch, reduction: str) -> Choices | None:
        """The choices of a micro-batch; where FSDP holds the counts of cuts in shards, only `work` sees them whole."""
        if isinstance(self.marginal.segmentation.on, DTensor):
            return None
        return self.marginal.choices(micro, reduction)

    def work(self, micro: MicroBatch, reduction: str, *, measure: bool) -> Choices | None:
        """The choices; without targets none, the bytes' CE being the tokens', unless they are measured.

        A measured divergence is of certain choices alone, so that a student that is its teacher has none.
        """
        if measure:
            choices = self.marginal.choices(micro, reduction)
            return choices if choices.certain is None else choices._replace(open=~choices.certain)
        if micro.targets is None:
            return None
        ready: Choices | None = micro.prepared
        return ready or self.marginal.choices(micro, reduction)

    def of_logits(self, z: Tensor, label: Tensor, work: Work) -> LossParts:
        """Token CE, byte CE (which it equals), divergence of the choices that are taught and CE of open ones."""
        assert isinstance(work, Choices)
        if work.row.numel() == 0:
            return tokens_alone(z, label)
        kind, temperature, _ = self.divergence
        if work.targets is not None and temperature == 1 and compiled(z.device):
            asked = (work.row, work.node, work.true, work.targets.slot, work.targets.symbol)
            token, right, listed, log_u = node_log_probs(z, label, *asked, self.tables)
            return self._parts(token, -right, diverge(listed, log_u, work.targets, kind), work)
        token = token_nll(z, label)
        scores = node_logits(z, work.row, work.node, self.tables)
        if work.targets is None:
            ce = functional.cross_entropy(scores, work.true, reduction="none")
            return self._parts(token, ce, torch.zeros_like(ce), work)
        offered = self.tables.offered(work.node)
        terms = byte_terms(scores, work.true, work.targets, divergence=kind, temperature=temperature, symbols=offered)
        return self._parts(token, *terms, work)

    def _parts(self, token: Tensor, ce: Tensor, apart: Tensor, work: Choices) -> LossParts:
        """Sums from the CE and the divergence of each choice, float [S]."""
        if work.open is None or work.unlisted is None:
            nothing = torch.zeros_like(token)
            return LossParts(token, (ce * work.weight).sum(), nothing, nothing)
        weight = self.divergence.weights(work.weight, work.unlisted)
        kl = torch.where(work.open, 0.0, apart) * weight
        left = torch.where(work.open, ce, 0.0) * work.weight
        return LossParts(token, (ce * work.weight).sum(), kl.sum(), left.sum())

    def byte_scores(self, logits: Tensor, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `ByteTerm.byte_scores`: the choices of tokens at trie nodes."""
        choices = self.marginal.choices(replace(micro, targets=None), "sum")
        return node_logits(logits.flatten(0, 1).float(), choices.row, choices.node, self.tables), choices.true
