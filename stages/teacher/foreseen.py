"""Branches that will probably be asked for after others, and what was evaluated of them before anybody asked.

Where two cuts of a text go on side by side, each token of the other cut is a branch that extends the one before it, and
a pass for every token reads all weights for a few rows. But what such a chain reads is known: it is the text. So

    a run         after a branch that ends where a canonical token begins, those that follow it along the canonical
                  tokens, as long as the chain at most, are evaluated in the same pass
    what leaves   once the rows of a run are there, what they say of the text ahead is: other cuts that leave it, and
                  the run's own continuation, are evaluated in the next pass

as far as their shares would be enough (stages.lattice.effort), the heaviest first, and no more than fill a pass up to
the width that costs as much as one of a few (`Engine.pass_room`). A run's shares are those that it would have if it
said the same as the canonical tokens; the others' follow from its rows' masses and from the lattice as it stands.

A row that nobody asks for never enters a window. So the rows of a window, and their order, do not depend on what is
foreseen here; the number of passes does.
"""

import math
from typing import NamedTuple

import numpy as np

from bytecache.schemas.dump.window import Window
from bytecache.stages.engines.engine import Branch
from bytecache.stages.engines.rows import RowMasses, concatenate, take
from bytecache.stages.lattice.effort import DEEPEST, ENOUGH, deepest, least_share
from bytecache.stages.lattice.lattice import Lattice

LEAST_CANONICAL = 0.05
"""Share of the canonical history below which it does not say how another one goes on."""
LONGEST_RUN = 16
"""Tokens of a run at most."""
MOST_LOG = 500.0
"""Nats that text counts at most when its probability divides a mass: exp of it is a number."""
Place = tuple[int, tuple[int, ...]]
"""A history of a window: anchor and chain."""


class Histories(NamedTuple):
    """Branches, and what is thought of them; B of them."""

    branches: list[Branch]
    share: np.ndarray
    """float64 [B]; of P(text so far), where each ends."""
    off: np.ndarray
    """int64 [B]; tokens off one that counts as canonical."""


class Known(NamedTuple):
    """The row of a branch that nobody has asked for yet."""

    row: RowMasses
    start: int
    """Byte where it ends."""
    stops: list[tuple[int, int, float]]
    """Token, byte where it ends and mass of the histories that extend it along the text."""


class Order(NamedTuple):
    """Branches of a window, of which some are known."""

    asked: list[Branch]
    """What the engine is asked for: those that are not, and what will probably be asked for next."""
    place: np.ndarray
    """int64 [B]; of each branch in `asked`, -1 for those that are known."""
    known: list[Known | None]
    """[B]; the others' rows."""

    def rows(self, answer: RowMasses | None) -> RowMasses:
        """The rows of the branches; `answer`: those of `asked`, None where there are none."""
        known = [one.row for one in self.known if one is not None]
        if answer is None or not known:
            return concatenate(known) if answer is None else take(answer, self.place)
        fresh = self.place >= 0
        parts = [take(answer, self.place[fresh]), *known]
        return take(concatenate(parts), np.argsort(np.append(np.flatnonzero(fresh), np.flatnonzero(~fresh))))


class Sight:
    """What a window says of branches to come, as it stands."""

    def __init__(self, window: Window, lattice: Lattice, effort: tuple[float, int], *, room: int, longest: int) -> None:
        """`effort`: tau and depth. `room`: branches that may be foreseen. `longest`: tokens of a history."""
        self.room = room
        self._window, self._lattice, self._effort = window, lattice, effort
        self._longest, self._deepest = longest, deepest(effort[1])
        self.least: list[float] = least_share(*effort, np.arange(DEEPEST + 2)).tolist() if room > 0 else []
        self.logp: list[float] = lattice.logp.tolist() if room > 0 else []
        # The next window answers for what ends with this one's text.
        self.end = len(window.text) - (not window.is_last)

    def holds(self, anchor: int, length: int) -> bool:
        """Whether a chain may be so long."""
        return length <= self._deepest and anchor + 1 + length <= self._longest

    def runs(self, histories: Histories) -> list[list[Branch]]:
        """The canonical tokens after each, as far as they will probably be asked for, as branches."""
        runs: list[list[Branch]] = [[] for _ in histories.branches]
        if not runs:
            return runs
        w = self._window
        count, row = self._run_lengths(histories)
        for number in np.flatnonzero(count).tolist():
            span = slice(int(row[number]) + 1, int(row[number] + count[number]) + 1)
            anchor, chain, _ = histories.branches[number]
            tokens, starts = w.row_token[span].tolist(), w.row_start[span].tolist()
            runs[number] = [Branch(anchor, (*chain, *tokens[: k + 1]), start) for k, start in enumerate(starts)]
        return runs

    def afforded(
        self, runs: list[list[Branch]], share: np.ndarray, extra: Histories, extra_runs: list[list[Branch]]
    ) -> tuple[list[list[Branch]], list[list[Branch] | None]]:
        """What of the runs after some branches of `share`, and of extra branches with theirs, there is room for.

        Those of the heaviest first; None for an extra branch that finds none.
        """
        room = self.room
        affordable: list[list[Branch]] = [[] for _ in runs]
        with_extra: list[list[Branch] | None] = [None for _ in extra_runs]
        for number in np.argsort(-np.concatenate([share, extra.share]), kind="stable").tolist():
            if room <= 0:
                break
            if number < len(runs):
                affordable[number] = runs[number][:room]
                room -= len(affordable[number])
            else:
                run = extra_runs[number - len(runs)][: room - 1]
                with_extra[number - len(runs)] = run
                room -= 1 + len(run)
        return affordable, with_extra

    def _run_lengths(self, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each run, and the canonical row that ends where it begins; int64 [B]."""
        w, lattice = self._window, self._lattice
        begins = w.row_start[: int((w.row_depth == 0).sum())]
        position = np.array([branch.start for branch in histories.branches])
        length = np.array([len(branch.chain) for branch in histories.branches])
        anchor = np.array([branch.anchor for branch in histories.branches])
        row = np.minimum(np.searchsorted(begins, position), len(begins) - 1)
        canonical = lattice.ended[: len(begins)].copy()
        canonical[0] = 1.0
        last = int(np.searchsorted(begins, self.end, side="right")) - 1
        room = np.minimum(np.minimum(length, LONGEST_RUN), last - row)
        room = np.minimum(room, np.minimum(self._deepest - length, self._longest - anchor - 1 - length))
        going = (begins[row] == position) & (canonical[row] > LEAST_CANONICAL)
        carried, off, count = histories.share, histories.off, np.zeros(len(row), np.int64)
        for step in range(1, int(room.max()) + 1):
            off = np.where(carried > ENOUGH, 0, off) + 1
            carried = histories.share * canonical[np.minimum(row + step, len(begins) - 1)] / canonical[row]
            going = going & (step <= room) & (carried > least_share(*self._effort, off))
            if not going.any():
                break
            count += going
        return count, row


class Foreseen:
    """What was evaluated of one window before it was asked for."""

    def __init__(self) -> None:
        self._known: dict[Place, Known] = {}

    def order(self, wanted: Histories, sight: Sight) -> Order:
        """What to ask an engine for: what is wanted and not known, and what will probably be asked for next."""
        known = [self._known.get((branch.anchor, branch.chain)) for branch in wanted.branches]
        fresh = np.array([one is None for one in known], bool)
        place = np.full(len(known), -1, np.int64)
        asked: list[Branch] = []
        if not fresh.any():
            return Order(asked, place, known)
        if sight.room <= 0:
            place[fresh] = np.arange(int(fresh.sum()))
            return Order([b for b, one in zip(wanted.branches, known, strict=True) if one is None], place, known)
        ones = Histories(
            [branch for branch, is_fresh in zip(wanted.branches, fresh, strict=True) if is_fresh],
            wanted.share[fresh], wanted.off[fresh],
        )  # fmt: skip
        extra = self._leaving(wanted, sight)
        runs, extra_runs = sight.afforded(sight.runs(ones), ones.share, extra, sight.runs(extra))
        place_of = []
        for branch, run in zip(ones.branches, runs, strict=True):
            place_of.append(len(asked))
            asked += [branch, *run]
        place[fresh] = place_of
        for branch, affordable in zip(extra.branches, extra_runs, strict=True):
            asked += [branch, *affordable] if affordable is not None else []
        return Order(asked, place, known)

    def _leaving(self, wanted: Histories, sight: Sight) -> Histories:
        """Histories that extend known ones, of those that are wanted now, and are not known."""
        found: list[tuple[Branch, float, int]] = []
        stack = [
            (branch.anchor, branch.chain, 2 * LONGEST_RUN, share, off)
            for branch, share, off in zip(wanted.branches, wanted.share.tolist(), wanted.off.tolist(), strict=True)
        ]
        while stack:
            anchor, chain, room, share, off = stack.pop()
            node = self._known.get((anchor, chain))
            if node is None or not room or not sight.holds(anchor, len(chain) + 1):
                continue
            off = 1 if share > ENOUGH else off + 1
            for token, at, mass in node.stops:
                carried = share * mass * math.exp(min(sight.logp[node.start] - sight.logp[at], MOST_LOG))
                if carried <= sight.least[off] or at > sight.end:
                    continue
                longer = (*chain, token)
                if (anchor, longer) in self._known:
                    stack.append((anchor, longer, room - 1, carried, off))
                else:
                    found.append((Branch(anchor, longer, at), carried, off))
        branches, shares, offs = zip(*found, strict=True) if found else ((), (), ())
        return Histories(list(branches), np.array(shares, np.float64), np.array(offs, np.int64))

    def keep(self, order: Order, answer: RowMasses) -> None:
        """Take the rows of `order.asked` that nobody has asked for yet."""
        not_yet = np.ones(len(order.asked), bool)
        not_yet[order.place[order.place >= 0]] = False
        index = np.flatnonzero(not_yet)
        if not len(index):
            return
        rows = take(answer, index)
        ends = np.cumsum(rows.n_stops).tolist()
        token, depth, mass = rows.stop_token.tolist(), rows.stop_depth.tolist(), rows.stop_mass.tolist()
        begin = 0
        for number, (at, end) in enumerate(zip(index.tolist(), ends, strict=True)):
            anchor, chain, start = order.asked[at]
            stops = [(token[k], start + depth[k], mass[k]) for k in range(begin, end)]
            self._known[anchor, chain] = Known(take(rows, np.array([number])), start, stops)
            begin = end
