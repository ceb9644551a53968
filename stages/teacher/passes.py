"""The passes of a group of windows: their canonical rows, branches, static rows where nothing else stands.

Pass 0 runs every window's canonical tokens once. The passes after it ask the lattice which unevaluated histories hold
more of their prefix than `least_share` says (`tau`, and beyond `depth` tokens off the canonical ones ever more),
wherever they end, and evaluate those as one batch. Static rows (stages.engines.static) then stand in where nothing
else does. Where the text goes on as a static row said and others did not, as at a name that nobody expects, that
row comes to carry more than `tau` after all: its history is evaluated too, and takes its place. (1 to 2 % more rows;
at the same tau it took KL from 0.0078 to 0.0046 on Python's manual at `balanced`, and from 0.00058 to 0.00008 on CJK
at `exact` with Gemma-3-270m.)
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import compress, islice
from typing import NamedTuple

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import ConfigError, Interrupted
from bytecache.stages.engines.engine import Branch, Engine
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.engines.static import StaticJob
from bytecache.stages.lattice.effort import deepest
from bytecache.stages.lattice.lattice import STATIC_PASSES, Deviations, Lattice
from bytecache.stages.teacher.ahead import Lattices
from bytecache.stages.teacher.foreseen import Foreseen, Histories, Order, Sight
from bytecache.stages.teacher.windows import WindowPlan, chain_of, extend, new_window, replace_static

OUTGROWN_PASSES = 2
"""How often static rows that carry more than tau are replaced: the second finds a tenth of the first, a third none."""
_DONE = object()
MAX_BRANCHES = 200_000
"""Branches of one window in one pass: tau = 0 asks for every way to cut the text, exponential in its length."""


class Choice(NamedTuple):
    """What a window lacks by its lattice: branches, or where there are none static rows."""

    effort: tuple[float, int, float]
    """tau, depth, and the share of static rows."""
    deviations: Deviations
    branches: list[Branch]
    """Those of the deviations."""
    order: Order
    """What of them the engine is asked for."""
    homeless: Deviations | None
    """None: not looked for."""


class Group:
    """Windows that are evaluated together, by one engine.

    `windows` are those of `plans`, or the first of them; each pass adds to them. Every pass raises Interrupted as soon
    as a window is done after `stop()` turned true.
    """

    def __init__(
        self, engine: Engine, plans: Sequence[WindowPlan], windows: list[Window], stop: Callable[[], bool],
        pool: ThreadPoolExecutor | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.plans, self.windows, self.stop = engine, plans, windows, stop
        self._effort = (1.0, 0, 0.0)
        self._foreseen: defaultdict[int, Foreseen] = defaultdict(Foreseen)
        self._room = 0
        self._lattices = Lattices(windows, pool, self._choose, self._go_on)

    def evaluate(self, settings: st.Teacher) -> None:
        """All passes."""
        for _ in self.steps(settings):
            pass

    def steps(self, settings: st.Teacher) -> Iterator[None]:
        """All passes, with a break wherever the next one waits for lattices: the engine may do something else there."""
        self._effort = settings.tau, settings.depth, settings.static
        self.canonical()
        yield
        self._lattices.settle()
        for _ in range(OUTGROWN_PASSES):
            yield from self._fill(settings)
            if not self._replace_outgrown(settings):
                break
            yield
        else:
            yield from self._fill(settings)
        self._lattices.settle()

    def canonical(self) -> None:
        """The rows of the windows' own tokens."""
        scored = zip(self.plans, self.engine.score([plan.prompt for plan in self.plans]), strict=True)
        for number, (plan, rows) in enumerate(scored):
            self._change(number, partial(new_window, plan, rows))

    def _fill(self, settings: st.Teacher) -> Iterator[None]:
        """Branches above `tau`, and static rows where even so none ends."""
        yield from self._branch_steps(settings.tau, settings.depth)
        for _ in range(STATIC_PASSES if settings.static > 0 else 0):
            if not self._add_static(settings.static):
                break
            yield

    def branch(self, tau: float, depth: int) -> None:
        """Branches in passes, each one token longer, until the lattice asks for none (see `least_share`)."""
        self._effort = tau, depth, 0.0
        for _ in self._branch_steps(tau, depth):
            pass
        self._lattices.settle()

    def _branch_steps(self, tau: float, depth: int) -> Iterator[None]:
        growing = list(range(len(self.windows)))
        for _ in range(deepest(depth)):
            growing = self._branch_once(growing, tau, depth)
            if not growing:
                break
            yield
        self._lattices.settle()
        self._foreseen.clear()
        self._room = 0

    def _branch_once(self, growing: list[int], tau: float, depth: int) -> list[int]:
        """One pass of branch evaluation of the windows `growing`; returns which of them asked for anything."""
        asked = {number: self._chosen(number, tau, depth) for number in growing}
        asked = {number: choice for number, choice in asked.items() if choice.branches}
        # The next pass will be about as wide.
        width = sum(int((choice.order.place >= 0).sum()) for choice in asked.values())
        self._room = max(0, self.engine.pass_room - width) // max(1, len(asked))
        jobs = [(self.plans[number].prompt, choice.order.asked) for number, choice in asked.items()]
        for (number, choice), answer in zip(asked.items(), self.engine.score_branches(jobs), strict=True):
            self._change(number, partial(self._grown, number, self.windows[number], choice, answer))
        return list(asked)

    def _grown(self, number: int, window: Window, choice: Choice, answer: RowMasses) -> Window:
        """A window with the branches of a choice; what of the answer nobody has asked for yet is remembered."""
        extend(window, choice.deviations, choice.order.rows(answer))
        self._foreseen[number].keep(choice.order, answer)
        return window

    def _go_on(self, window: Window, choice: Choice) -> bool:
        """Give a window the branches that it lacks if all of them are known: no pass need wait for that."""
        if not choice.branches or choice.order.asked:
            return False
        extend(window, choice.deviations, choice.order.rows(None))
        return True

    def _chosen(self, number: int, tau: float, depth: int) -> Choice:
        lattice, choice = self._lattices.of(number)
        if choice is None or choice.effort[:2] != (tau, depth):
            self._effort = tau, depth, self._effort[2]
            choice = self._choose(number, self.windows[number], lattice)
        return choice

    def _choose(self, number: int, window: Window, lattice: Lattice) -> Choice:
        """What a window lacks, in whichever thread walked its lattice."""
        tau, depth, share = effort = self._effort
        deviations = lattice.deviations(tau=tau, depth=depth)
        branches = _branches(self.plans[number], window, deviations, tau) if len(deviations.row) else []
        fits = self._fits(branches)
        if not all(fits):
            deviations, branches = Deviations(*(column[fits] for column in deviations)), [*compress(branches, fits)]
        homeless = lattice.homeless(share=share) if share > 0.0 and not branches else None
        order = self._order(number, window, lattice, deviations, branches)
        return Choice(effort, deviations, branches, order, homeless)

    def _order(
        self, number: int, window: Window, lattice: Lattice, deviations: Deviations, branches: list[Branch]
    ) -> Order:
        """What the engine is asked for, with what will probably be asked for next."""
        wanted = Histories(branches, deviations.share.astype(np.float64), lattice.off[deviations.row] + 1)
        room = self._room if branches and self.engine.foresees(self.plans[number].prompt) else 0
        sight = Sight(window, lattice, self._effort[:2], room=room, longest=self.engine.longest)
        return self._foreseen[number].order(wanted, sight)

    def _fits(self, branches: Sequence[Branch]) -> list[bool]:
        """Which histories the engine has room for.

        Others, cuts that stay finer than the canonical one to the end of a full window, join rows as light ones do, and
        the bound counts them with those.
        """
        return [branch.n_tokens <= self.engine.longest for branch in branches]

    def add_static(self, share: float) -> int:
        """Give static rows to positions where histories of more than `share` end and no row does; returns how many."""
        added = self._add_static(share)
        self._lattices.settle()
        return added

    def _add_static(self, share: float) -> int:
        asked = {number: self._homeless(number, share) for number in range(len(self.windows))}
        asked = {number: homeless for number, homeless in asked.items() if len(homeless.row)}
        jobs = [static_job(self.windows[number], homeless) for number, homeless in asked.items()]
        for (number, homeless), rows in zip(asked.items(), self.engine.score_static(jobs), strict=True):
            self._extend(number, homeless, rows, static=True)
        return sum(len(homeless.row) for homeless in asked.values())

    def _homeless(self, number: int, share: float) -> Deviations:
        lattice, choice = self._lattices.of(number)
        if choice is None or choice.homeless is None or choice.effort[2] != share:
            return lattice.homeless(share=share)
        return choice.homeless

    def _replace_outgrown(self, settings: st.Teacher) -> int:
        """Replace static rows that came to carry more than `tau` by the rows of their histories; returns how many."""
        outgrown = {
            number: self._lattices.of(number)[0].outgrown(tau=settings.tau, depth=settings.depth)
            for number in range(len(self.windows))
        }
        replaced: dict[int, np.ndarray] = {}
        jobs = []
        for number, row in outgrown.items():
            plan, window = self.plans[number], self.windows[number]
            ends = zip(window.row_parent[row], window.row_token[row], window.row_start[row], strict=True)
            branches = [_branch(plan, window, *end) for end in ends]
            fits = self._fits(branches)
            if any(fits):
                replaced[number] = row[fits]
                jobs.append((plan.prompt, [*compress(branches, fits)]))
        for (number, row), rows in zip(replaced.items(), self.engine.score_branches(jobs), strict=True):
            self._change(number, partial(replace_static, self.windows[number], row, rows))
        return sum(map(len, replaced.values()))

    def _extend(self, number: int, deviations: Deviations, rows: RowMasses, *, static: bool = False) -> None:
        window = self.windows[number]

        def extended() -> Window:
            extend(window, deviations, rows, static=static)
            return window

        self._change(number, extended)

    def _change(self, number: int, make: Callable[[], Window]) -> None:
        """A window gets what the pass gives it, and its lattice is walked, while the engine goes on."""
        self._lattices.change(number, make)
        if self.stop():
            raise Interrupted("stopped inside a unit of teacher work; rerun the same command to continue")


def in_turns(groups: Iterable[Group], settings: st.Teacher, most: int) -> Iterator[Group]:
    """Evaluate groups, `most` of them a pass each in turn; they come out whole and in order.

    While the engine is busy with one, threads walk the lattices of the others. The passes of a group are the same
    whatever else is in flight.
    """
    waiting = iter(groups)
    running: list[tuple[Group, Iterator[None]]] = []
    done: set[Group] = set()
    while True:
        running += [(group, group.steps(settings)) for group in islice(waiting, most - len(running))]
        if not running:
            return
        for group, steps in running:
            if group not in done and next(steps, _DONE) is _DONE:
                done.add(group)
        while running and running[0][0] in done:
            group, _ = running.pop(0)
            done.remove(group)
            group.engine.release([plan.prompt for plan in group.plans])
            yield group


def _branch(plan: WindowPlan, window: Window, row: int, token: int, position: int) -> Branch:
    """The history of `row` and then `token`, which ends at byte `position`."""
    anchor, chain = chain_of(window, int(row), int(token))
    return Branch(plan.prompt.first_row + anchor, chain, int(position))


def _branches(plan: WindowPlan, window: Window, deviations: Deviations, tau: float) -> list[Branch]:
    """Raises ConfigError where one window would need more than `MAX_BRANCHES` of them."""
    if len(deviations.row) > MAX_BRANCHES:
        raise ConfigError(
            f"teacher.tau = {tau:g} asks for {len(deviations.row)} branches in one window of "
            f"document {window.doc_id!r}, the limit is {MAX_BRANCHES}: raise tau or lower teacher.depth"
        )
    ends = zip(deviations.row, deviations.token, deviations.position, strict=True)
    return [_branch(plan, window, *end) for end in ends]


def static_job(window: Window, homeless: Deviations) -> StaticJob:
    """The static rows of some histories of a window."""
    return StaticJob(f"document {window.doc_id!r}", window.text, homeless.token, homeless.position.astype("int64"))
