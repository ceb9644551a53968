"""What a teacher's bytes say of a student's tokens, and where they say it for certain.

At the trie node w of a token (`node_sums.py`) the student chooses a child w + b, or to stop. The teacher says P(b), not
where the student's tokenizer cuts; `segmentation.py` knows how often it does. For every byte b, of the places where the
text reads w b, three shares: the token passes w b, stops at w, or ended before w; and a share in which the token before
it ended where it did. By Bayes' rule, with all of them given that the student is at w,

    target(b) ~ P(b) before(b) pass(b),     target(stop) ~ sum_b P(b) before(b) stop(b),     target(other) ~ tail.

A byte that no token continues with is a stop. Of the tail, as much stops as of the text's bytes at large; the rest of
it forms one bucket with unlisted children and control ids. A stop in that bucket would not be learned: what the student
loses there by stopping too rarely it wins back on bytes that nobody lists.

*What the text decides.* Where each share is 0 or 1 the target is the teacher restricted to what the tokenizer can
write, and nothing is assumed. Where a share lies between, the cut hangs on text further on, of which the teacher knows
more than any table: a target made of average shares then pulls the student away from its teacher, by as much as 0.1
bits/byte in all. The mass that hangs so,

    u = sum_b P(b) [min(before, 1 - before) + before (1 - max(pass, stop, neither))],

is known before the next byte is. A choice whose u stays below `TRUST` of the mass that reaches w is *certain*. Of the
others the text is an unbiased witness, and tells more the less it is asked:

- Whether a token is at w at all may hang: the mass of sum_b P(b) min(visit, 1 - visit), visit = before (pass + stop).
  Such a choice is *open*: the text alone decides it. So it does where the bytes have left every token that the one
  before could have been, and its end was still in doubt then: what follows decides that end as much as it decides this
  choice, and no table by bytes says how.
- Else only the cut hangs, and the text corrects it: with x its own next byte,
  target + weight ([what the text chose] - [the shares of x]), a control variate: where the shares are true it is 0 in
  the mean over texts, and where they are not the truth takes their place, while the teacher's P(b) stays. The weight is
  the largest, up to 1, that leaves no negative mass whichever way the text went; it depends on x, not on what was cut.

So the minimum is at the teacher, or near it where neither witness is whole, with or without the tokens' cross-entropy.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bytecache.schemas.arrays import END
from bytecache.stages.train.batches.types import SlotTargets
from bytecache.stages.train.objective.node_sums import NodeTables
from bytecache.stages.train.objective.segmentation import Segmentation
from bytecache.stages.train.objective.symbols import STOP

TRUST = 0.05
"""Share of a choice's mass that may hang on text further on before the text decides the choice."""


class Places(NamedTuple):
    """Where S tokens stand.

    node, depth int64 [S]: the trie node, and bytes from the root to it. passed int64 [S]: where the trie leads from the
    start of the token before along its bytes and this one's so far, -1 where it leads nowhere; length int64 [S]: bytes
    of the token before. following int64 [S]: the text's next symbol. stopped bool [S]: the token ends here. doubt float
    [S]: where `passed` is -1, `Segmentation.doubt` of where the token before ended.
    """

    node: Tensor
    depth: Tensor
    passed: Tensor
    length: Tensor
    following: Tensor
    stopped: Tensor
    doubt: Tensor


class Projected(NamedTuple):
    """Entries on what the nodes offer (children, END, STOP) by slot; certain, open bool [S]: see the module."""

    targets: SlotTargets
    certain: Tensor
    open: Tensor


class _Shares(NamedTuple):
    """What becomes of each entry's mass, float [E] each: the token before ended as it did, this one passes, stops."""

    before: Tensor
    passes: Tensor
    stops: Tensor


def project(targets: SlotTargets, places: Places, tables: NodeTables, cut: Segmentation, trust: float) -> Projected:
    """The teacher's bytes as choices at trie nodes (module docstring).

    Args:
        targets: of S slots, on bytes and END. trust: see `TRUST`; infinite: every choice is certain.

    Returns:
        `Projected`; a slot's entries and tail sum to 1. The tail is 0 where nothing else is offered.
    """
    slot, prob = targets.slot, targets.prob
    shares = _shares(targets, places, tables, cut)
    here = prob * shares.before
    goes, halts = here * shares.passes, here * shares.stops

    def by_slot(values: Tensor) -> Tensor:
        return torch.zeros_like(targets.tail).index_add_(0, slot, values)

    visits = by_slot(goes + halts)
    # The tail shares the fate of the listed mass, so that it stays the same part of the whole.
    tail = targets.tail * visits / by_slot(prob).clamp_min(1e-12)
    ends = tables.table("n_equal")[places.node] > 0
    others = tables.offered(places.node) - ends.long() > by_slot((goes > 0).to(prob.dtype))  # the bucket is not empty
    halted = torch.where(ends, torch.where(others, cut.rare[places.node].to(prob.dtype), 1.0), 0.0)
    neither = (1 - shares.passes - shares.stops).clamp_min(0)
    hangs = here * (1 - torch.maximum(torch.maximum(shares.passes, shares.stops), neither))
    hangs = by_slot(hangs + prob * torch.minimum(shares.before, 1 - shares.before))
    hangs = hangs + tail * torch.minimum(halted, 1 - halted)
    visit = shares.before * (shares.passes + shares.stops)
    allowed = trust * (visits + tail)
    doubtful = places.doubt > trust
    certain = (hangs <= allowed) & (visits > 0) & ~doubtful
    is_open = ~certain & (doubtful | (by_slot(prob * torch.minimum(visit, 1 - visit)) > allowed) | (visits <= 0))
    mass = _Mass(goes, by_slot(halts) + tail * halted, torch.where(others, tail * (1 - halted), 0.0))
    mass = mass.normalised(slot)
    mass = _corrected(mass, ~certain & ~is_open, targets, places, tables, cut).normalised(slot)
    return Projected(_gathered(mass, targets), certain, is_open)


class _Mass(NamedTuple):
    """A slot's target in parts: goes float [E], to the entry's child; stop, rest float [S]."""

    goes: Tensor
    stop: Tensor
    rest: Tensor

    def normalised(self, slot: Tensor) -> "_Mass":
        """Parts that sum to 1 in every slot that has any."""
        total = (self.stop + self.rest).index_add(0, slot, self.goes).clamp_min(1e-12)
        return _Mass(self.goes / total[slot], self.stop / total, self.rest / total)


def _corrected(
    mass: _Mass, wanted: Tensor, targets: SlotTargets, places: Places, tables: NodeTables, cut: Segmentation
) -> _Mass:
    """The text's own cut in the place of the shares of its next byte, for the slots `wanted` (bool [S])."""
    child = tables.child_of(places.node, places.following)
    passes = torch.where(child >= 0, cut.reaches(child.clamp_min(0)), 0.0)
    stops = torch.where(places.node > 0, cut.ended(places.node, child, places.depth), 0.0)
    total = (passes + stops).clamp_min(1e-12)
    passes, stops = passes / total, stops / total
    own = targets.symbol == places.following[targets.slot]
    listed = torch.zeros_like(wanted).index_put((targets.slot[own],), torch.ones_like(own[own]))
    goes = torch.zeros_like(mass.stop).index_add(0, targets.slot[own], mass.goes[own])
    goes = torch.where(listed, goes, mass.rest)
    # As much of the correction as leaves no negative mass, whichever way the text went.
    weight = torch.minimum(goes / passes.clamp_min(1e-12), mass.stop / stops.clamp_min(1e-12)).clamp_max(1.0)
    stop = torch.where(wanted & (child >= 0), weight * (places.stopped.to(total.dtype) - stops), 0.0)
    return _Mass(
        (mass.goes - torch.where(own, stop[targets.slot], 0.0)).clamp_min(0),
        (mass.stop + stop).clamp_min(0),
        (mass.rest - torch.where(listed, 0.0, stop)).clamp_min(0),
    )


def _shares(targets: SlotTargets, places: Places, tables: NodeTables, cut: Segmentation) -> _Shares:
    slot, symbol, prob, _ = targets
    node, depth, passed = places.node[slot], places.depth[slot], places.passed[slot]
    child = tables.child_of(node, symbol)
    root_end = (node == 0) & (symbol == END)
    passes = torch.where(child >= 0, cut.reaches(child.clamp_min(0)), root_end.to(prob.dtype))
    stops = torch.where(node > 0, cut.ended(node, child, depth), 0.0)
    known = passed.clamp_min(0)
    length = torch.where(passed >= 0, places.length[slot], 0)
    before = torch.where(passed >= 0, cut.ended(known, tables.child_of(known, symbol), length), 1.0)
    return _Shares(before, passes, stops)


def _gathered(mass: _Mass, targets: SlotTargets) -> SlotTargets:
    """Entries that have mass, by slot, and the bucket."""
    listed, stopping = torch.nonzero(mass.goes > 0)[:, 0], torch.nonzero(mass.stop > 0)[:, 0]
    slot = torch.cat([targets.slot[listed], stopping])
    symbol = torch.cat([targets.symbol[listed], torch.full_like(stopping, STOP)])
    prob = torch.cat([mass.goes[listed], mass.stop[stopping]])
    slot, by_slot = torch.sort(slot, stable=True)
    return SlotTargets(slot, symbol[by_slot], prob[by_slot], mass.rest)
