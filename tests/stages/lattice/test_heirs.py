"""Who stands in for a history that nobody evaluated: the row that agrees with it in most of its last tokens."""

import numpy as np
import pytest

from bytecache.schemas.dump.rows import keep_rows
from bytecache.schemas.dump.window import Window
from bytecache.stages.lattice.heirs import FARTHEST, NOBODY
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary
from tests.support.histories import histories
from tests.support.writing_model import WritingEngine, write_tokenizer, writing_teacher


@pytest.fixture(scope="module", params=["gpt2", "qwen"])
def vocabulary(request, tmp_path_factory) -> Vocabulary:
    return load_vocabulary(write_tokenizer(tmp_path_factory.mktemp("heirs"), request.param))


def windows_of(vocabulary: Vocabulary, texts: int, tokens: int = 12, **effort: float) -> list[Window]:
    teacher = writing_teacher(vocabulary, **effort)
    assert isinstance(teacher.engine, WritingEngine)
    found = []
    for seed in range(texts):
        text = teacher.engine.write(tokens, seed).decode()
        ((window,),) = teacher.windows([("d", 0, vocabulary.encode(text))])
        found.append(window)
    return found


def weights_of(window: Window) -> np.ndarray:
    """log p of every row's history, nats."""
    weight = np.zeros(len(window.row_start))
    for row in range(1, len(weight)):
        weight[row] = weight[window.row_parent[row]] + window.row_logp[row]
    return weight


def agreement_of(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """In how many of their last tokens two histories are the same."""
    shared = 0
    while shared < min(len(one), len(other)) and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return shared


@pytest.mark.parametrize("static", [0.0, 0.001])
def test_the_heir_is_the_row_that_agrees_longest(vocabulary, static):
    """Of every stop, by comparing whole histories one by one."""
    agreements = []
    for window in windows_of(vocabulary, 3, tau=0.01, depth=3, static=static):
        lattice, names, weight = Lattice(window), histories(window), weights_of(window)
        rows, positions = lattice._stops
        for stop, (row, position) in enumerate(zip(rows, positions, strict=True)):
            own = (*names[row], int(window.stop_token[stop]))
            best, agreement = (-1.0, -np.inf, -1), NOBODY
            for other in np.flatnonzero(window.row_start == position):
                if other == lattice._lies.child[stop]:
                    continue
                shared: float = agreement_of(own, names[other])
                if window.row_static[other]:
                    shared = min(shared, 0.5)  # it has seen its last token alone
                else:
                    agreement = max(agreement, int(shared))
                best = max(best, (shared, weight[other], int(other)))
            assert lattice._lies.heir[stop] == best[2]
            assert lattice._lies.agreement[stop] == agreement <= FARTHEST
            agreements.append(agreement)
    assert min(agreements) == NOBODY and max(agreements) > 3


def test_what_agrees_as_far_as_the_teacher_remembers_may_join(vocabulary):
    """A teacher that reads three tokens says the same after two histories that agree in three: nothing is lost."""
    assert WritingEngine.memory == 3
    moved: dict[bool, list[float]] = {True: [], False: []}
    for window in windows_of(vocabulary, 12, tokens=6, tau=1e-6, depth=60):
        lattice, weight = Lattice(window), weights_of(window)
        whole = lattice.targets().probs
        heavy = np.flatnonzero((lattice._lies.child >= 0) & (lattice._sums.share > 3e-3))
        for stop in heavy[window.row_depth[lattice._lies.child[heavy]] > 0][:30]:
            if weight[lattice._lies.heir[stop]] < weight[lattice._lies.child[stop]]:
                continue  # of a lighter one too little was evaluated to carry both
            without = np.ones(len(window.row_start), bool)
            without[lattice._lies.child[stop]] = False
            for row in range(lattice._lies.child[stop] + 1, len(without)):  # and what extends it
                without[row] &= without[window.row_parent[row]]
            error = np.abs(Lattice(keep_rows(window, without)).targets().probs - whole).max()
            moved[bool(lattice._lies.agreement[stop] >= WritingEngine.memory)].append(float(error))
    assert len(moved[True]) >= 2 and max(moved[True]) < 1e-4
    assert np.mean(moved[False]) > 1e-3  # the test can fail: the others are missed
