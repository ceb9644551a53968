"""No head at all: the student's own token logits reduced to byte distributions, so the teacher trains the LM head.

Algorithm. A token v is a path in the byte trie of the student's vocabulary. At the node of w, reached after the first d
bytes of the token, the student chooses between the *children* w + b and, where w is itself a token, to *stop*:

    m(c) = sum of exp(z_v) over tokens v that start with c      (a contiguous range of the byte-sorted vocabulary)
    q(b | w) = m(w + b) / m(w),      q(stop | w) = sum over tokens equal to w of exp(z_v) / m(w)

The product of these choices along the token's path is its probability, so the token's cross-entropy is the sum of the
choices' cross-entropies. Each is replaced, or joined, by KL against what the teacher would choose. The slots carry
log m (symbol 0..255: children, 256: END at the root, 257: stop, 258: ids without bytes at the root); their softmax is
q. One slot more per token asks at the token's own node: stop here, or go on?

*What the teacher would choose.* It says P(b | text), not where the student's tokenizer cuts. That is a property of the
tokenizer and of the text that follows, known as frequencies: among the places where a token starts and the text reads
w b, a share pass(w, b) of the tokens reaches past w + b, a share stop(w, b) is w itself; in the rest the token ended
earlier, which is excluded here. Hence, by Bayes' rule,

    target(b) ~ P(b) pass(w, b),     target(stop) ~ sum_b P(b) stop(w, b),     target(other) ~ tail,

and every P(b) is first weighted by the share of places where the token before ended where it did, given its bytes, w
and b: had the text gone on otherwise, that token would have been another. `segmentation.py` counts the shares; a byte
that no token continues with is a stop. Of the tail, as much stops as of the text's bytes at large; the rest of it forms
one bucket with unlisted children and control ids. A stop in that bucket would not be learned: what the student loses
there by stopping too rarely it wins back on bytes that nobody lists. No parameters are trained. Price: `node_sums.py`;
the shares assume that a cut depends on no more than w and b.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bytecache.schemas.arrays import END
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.batches.types import MicroBatch, SlotTargets
from bytecache.stages.train.objective.node_sums import STOP, NodeTables
from bytecache.stages.train.objective.segmentation import Segmentation


class Choices(NamedTuple):
    """What the student's tokens choose, slot by slot; S slots, E entries.

    row int64 [S]: flat position whose logits choose. node int64 [S]. true int64 [S]. weight float32 [S].
    targets: entries on children, END and STOP. unlisted float32 [S]: the teacher's own tail.
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
        """`rows`: width of the student's logits."""
        super().__init__()
        self.tables = NodeTables(vocabulary, rows)
        self.segmentation = Segmentation(self.tables)

    def choices(self, micro: MicroBatch, reduction: str) -> Choices:
        """Slots of a micro-batch: every supervised byte, and each token's end where its successor is in the row."""
        tables = self.tables
        ids, labels = micro.input_ids.flatten(), micro.labels.flatten()
        device = labels.device
        row, true = micro.slot_token, micro.slot_symbol
        counts = torch.tensor(micro.slot_counts, device=device)
        depth = torch.repeat_interleave(torch.arange(len(micro.slot_counts), device=device), counts)
        node = tables.node_of(labels[row], depth)
        # The token before, and where the trie leads from its end along the bytes of this one: -1 once it leads nowhere.
        length = tables.length_of(ids)
        walk = torch.where(length > 0, tables.node_of(ids, length), -1)
        passed = torch.full_like(row, -1)
        for slots in torch.split(torch.arange(row.numel(), device=device), micro.slot_counts):
            at = walk[row[slots]]
            passed[slots] = at
            walk[row[slots]] = torch.where(at >= 0, tables.child_of(at.clamp_min(0), true[slots]), -1)
        # Slots of number 0 lead the list: there the teacher also says how the token before could have gone on.
        first = torch.arange(micro.slot_counts[0], device=device)
        place = row[first]
        before = ids[place]
        follows = (length[place] > 0) & (place % micro.input_ids.shape[1] > 0)
        follows &= labels[(place - 1).clamp_min(0)] == before
        source = first[follows]
        end_row = row[source] - 1
        all_row = torch.cat([row, end_row])
        all_node = torch.cat([node, tables.node_of(before[follows], length[place[follows]])])
        all_depth = torch.cat([depth, length[place[follows]]])
        all_true = torch.cat([true, torch.full_like(source, STOP)])
        all_passed = torch.cat([passed, walk[end_row]])
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
            targets = self.project(joined, all_node, all_depth, all_passed, length[all_row])
        return Choices(all_row, all_node, all_true, weight, targets, unlisted)

    def project(self, targets: SlotTargets, node: Tensor, depth: Tensor, passed: Tensor, length: Tensor) -> SlotTargets:
        """The teacher's bytes as choices at trie nodes (module docstring).

        Args:
            targets: of S slots. node, depth: int64 [S], where the token stands. passed: int64 [S], where the trie
                leads from the token before along this one's bytes; -1 where it leads nowhere. length: int64 [S],
                bytes of the token before.

        Returns:
            Entries on what the nodes offer, by slot: children, END, STOP. The tail is 0 where nothing else is offered.
        """
        tables, cut = self.tables, self.segmentation
        slot, symbol, prob, tail = targets
        at = node[slot]
        child = tables.child_of(at, symbol)
        root_end = (at == 0) & (symbol == END)
        go = torch.where(child >= 0, cut.reaches(child.clamp_min(0)), root_end.to(prob.dtype))
        halt = torch.where(at > 0, cut.ended(at, child, depth[slot]), 0.0)
        known = passed[slot].clamp_min(0)
        stopped = cut.ended(known, tables.child_of(known, symbol), torch.where(passed[slot] >= 0, length[slot], 0))
        prob = torch.where(passed[slot] >= 0, prob * stopped, prob)
        kept, stop = prob * go, torch.zeros_like(tail).index_add_(0, slot, prob * halt)
        listed = torch.zeros_like(tail).index_add_(0, slot, (kept > 0).to(tail.dtype))
        # The tail shares the fate of the listed mass, so that it stays the same part of the whole.
        seen = torch.zeros_like(tail).index_add_(0, slot, targets.prob)
        used = kept + prob * halt
        tail = tail * torch.zeros_like(tail).index_add_(0, slot, used) / seen.clamp_min(1e-12)
        ends = tables.table("n_equal")[node] > 0
        others = tables.offered(node) - ends.long() > listed  # something is left for the bucket
        halted = torch.where(ends, torch.where(others, cut.rare[node].to(prob.dtype), 1.0), 0.0)
        stop = stop + tail * halted
        rest = torch.where(others, tail * (1 - halted), 0.0)
        goes, stops = torch.nonzero(kept > 0)[:, 0], torch.nonzero(stop > 0)[:, 0]
        slot = torch.cat([slot[goes], stops])
        symbol = torch.cat([symbol[goes], torch.full_like(stops, STOP)])
        prob = torch.cat([kept[goes], stop[stops]])
        total = rest.index_add(0, slot, prob).clamp_min(1e-12)
        slot, by_slot = torch.sort(slot, stable=True)
        return SlotTargets(slot, symbol[by_slot], prob[by_slot] / total[slot], rest / total)
