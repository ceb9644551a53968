"""Worlds where the teacher is the truth: a student that reaches its objective has the teacher's own bits."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bytecache.stages.train.batches.stream import Row, collate
from bytecache.stages.train.objective.loss import Divergence
from bytecache.stages.train.objective.marginal import Marginal, MarginalTerm
from bytecache.stages.train.objective.oracle import oracle_excess
from tests.support.tiny_worlds import World, make_world

WORLDS = [
    (1, "abc", 4),
    (1, "abcd", 12),
    (2, "abc", 12),
    (2, "abcd", 30),
    (3, "abc", 30),
    (2, "abcd ", 30),
    (3, "abc ", 80),
]
LENGTH = 200_000
ENOUGH = 0.01
"""Bits/byte that an objective may cost a student that reaches it."""


@pytest.fixture(scope="module", params=WORLDS, ids=lambda w: f"order {w[0]} of {w[1]!r}, {w[2]} merges")
def world(request) -> World:
    return make_world(*request.param, n=LENGTH)


def observed(world: World, trust: float | None = None) -> Marginal:
    """The objective's view of a world's tokenizer, counted on its training text."""
    term = MarginalTerm(world.vocabulary, world.vocabulary.size, Divergence())
    term.observe(world.train)
    if trust is not None:
        term.marginal.trust = trust
    return term.marginal


@pytest.mark.slow
def test_a_student_that_hits_its_targets_has_its_teachers_bits(world):
    result = oracle_excess(observed(world), world.heldout)
    assert abs(result.bits_per_byte) <= ENOUGH
    assert 0.2 < result.certain_share <= 1 and not result.skipped
    # The measure's own reference sums to the teacher's bits whatever the tokenizer does.
    assert abs(result.closure_bits_per_byte) < 1e-3


class Choices:
    """Every choice of a split: its node, the tokens before it, what was chosen, and weights for what a student learns.

    node, true int64 [S]; contexts: list of int64 [S], from no token before it to three. slot, symbol int64, prob [E].
    open bool [S].
    """

    def __init__(self, marginal: Marginal, reader) -> None:
        columns: list[list[np.ndarray]] = [[] for _ in range(8)]
        base = 0
        source = reader[0]
        edges = [0, *(1 + np.flatnonzero(np.diff(source.row))).tolist(), len(source.row)]
        for first, last in pairwise(edges):
            micro = collate([Row(source, first, last)], with_targets=True, byte_reduction="sum", limit=64)
            choices = marginal.choices(micro, "sum")
            ids = np.concatenate([[0, 0], micro.input_ids[0].numpy()])
            row = choices.row.numpy()
            found = (
                choices.node, choices.true, ids[row + 2], ids[row + 1], ids[row], choices.open,
                choices.targets.slot + base,
                torch.stack([choices.targets.symbol.double(), choices.targets.prob.double()]),
            )  # fmt: skip
            for column, values in zip(columns, found, strict=True):
                column.append(np.asarray(values))
            base += len(row)
        node, true, one, two, three, is_open, slot = (np.concatenate(c) for c in columns[:7])
        both = np.concatenate(columns[7], axis=1)
        self.node, self.true, self.open, self.slot = node, true, is_open, slot
        self.symbol, self.prob = both[0].astype(np.int64), both[1]
        self.contexts = [one * 0, one, one * 1000 + two, (one * 1000 + two) * 1000 + three]

    def text(self, weight: float):
        """What cross-entropy learns from."""
        return np.arange(len(self.node)), self.true, np.full(len(self.node), weight)

    def term(self, weight: float):
        """What the term learns from: its targets, and the text of open choices."""
        left = np.flatnonzero(self.open)
        return (
            np.concatenate([self.slot, left]), np.concatenate([self.symbol, self.true[left]]),
            np.concatenate([self.prob, np.ones(len(left))]) * weight,
        )  # fmt: skip


def optimum(learned: Choices, lessons: list, judged: Choices, text_bytes: int, tokens: int = 3) -> float:
    """Bits/byte on `judged` of the best table of choices by node and up to so many tokens before, in closed form.

    Fewer tokens before it back it up where there was little to learn from.
    """
    slot, symbol, weight = (np.concatenate(c) for c in zip(*lessons, strict=True))
    p = np.full(len(judged.node), 1 / 8)
    for known, asked in zip(learned.contexts[: tokens + 1], judged.contexts, strict=False):
        keys = (known * 100_003 + learned.node)[slot]
        wanted = asked * 100_003 + judged.node
        cells, place = np.unique(keys * 300 + symbol, return_inverse=True)
        mass = np.bincount(place, weights=weight)
        rows, row = np.unique(cells // 300, return_inverse=True)
        total = np.bincount(row, weights=mass)

        def look(table, values, at):
            i = np.searchsorted(table, at).clip(max=len(table) - 1)
            return np.where(table[i] == at, values[i], 0.0)

        p = (look(cells, mass, wanted * 300 + judged.true) + 0.3 * p) / (look(rows, total, wanted) + 0.3)
    return float(-np.log2(p).sum()) / text_bytes


@pytest.mark.slow
def test_the_optimum_with_the_teacher_is_no_farther_from_the_truth_than_without(world):
    """Tables of choices by context, which can represent nearly anything, at the minimum of each objective."""
    marginal = observed(world)
    learned, judged = Choices(marginal, world.train), Choices(marginal, world.heldout)
    size = sum(world.heldout.positions) - len(world.heldout[0].shard.doc_id)
    # A student that sees one token back cannot be its teacher, but has little left to chance: a bias would show.
    for tokens in (1, 3):
        alone = optimum(learned, [learned.text(1.0)], judged, size, tokens)
        both = optimum(learned, [learned.text(0.5), learned.term(0.5)], judged, size, tokens)
        teacher = optimum(learned, [learned.term(1.0)], judged, size, tokens)
        assert world.bits - 0.001 < both <= alone + 0.001
        assert teacher <= alone + 0.002


@pytest.mark.slow
def test_trusting_average_shares_everywhere_would_be_seen():
    """The same two measures on an objective that takes every choice from the teacher, as if cuts were certain."""
    world = make_world(2, "abcd", 30, n=LENGTH)
    biased = observed(world, trust=float("inf"))
    assert oracle_excess(biased, world.heldout).bits_per_byte > 3 * ENOUGH
    learned, judged = Choices(biased, world.train), Choices(biased, world.heldout)
    honest = observed(world)
    better = Choices(honest, world.train)
    size = sum(world.heldout.positions) - len(world.heldout[0].shard.doc_id)
    # One token before it leaves little to chance, so what is left is the objective's own.
    wrong = optimum(learned, [learned.term(1.0)], judged, size, tokens=1)
    assert wrong > optimum(better, [better.term(1.0)], judged, size, tokens=1) + 3 * ENOUGH
