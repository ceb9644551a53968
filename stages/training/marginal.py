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
No parameters are trained. Price: `node_sums.py`; the shares assume that a cut depends on no more than w and b.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stages.tokens.vocab import Vocabulary
from stages.training.byte_head import END
from stages.training.loss import SlotTargets
from stages.training.node_sums import STOP, NodeTables
from stages.training.segmentation import Segmentation
from stages.training.stream import MicroBatch


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
            Entries on children (and END) only, by slot; stops are part of the tail. A node that offers nothing else has
            tail 0.
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
        use = torch.nonzero(kept > 0)[:, 0]
        use = use[torch.argsort(slot[use], stable=True)]
        return SlotTargets(slot[use], symbol[use], (kept[use] / total[slot[use]]), rest / total)
