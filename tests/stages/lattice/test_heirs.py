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


def windows_of(vocabulary: Vocabulary, texts: int, **effort: float) -> list[Window]:
    teacher = writing_teacher(vocabulary, **effort)
    assert isinstance(teacher.engine, WritingEngine)
    found = []
    for seed in range(texts):
        text = teacher.engine.write(12, seed).decode()
        ((window,),) = teacher.windows([("d", 0, vocabulary.encode(text))])
        found.append(window)
    return found


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
    for window in windows_of(vocabulary, 4, tau=0.005, depth=3, static=static):
        lattice, names = Lattice(window), histories(window)
        weight = np.zeros(len(names))
        for row in range(1, len(names)):
            weight[row] = weight[window.row_parent[row]] + window.row_logp[row]
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
    joined = lost = 0
    for window in windows_of(vocabulary, 8, tau=1e-4, depth=60):
        lattice = Lattice(window)
        row_of_stop = lattice._lies.child
        leaf = ~np.isin(np.arange(len(window.row_start)), window.row_parent)
        for stop in np.flatnonzero(row_of_stop >= 0):
            row = row_of_stop[stop]
            if not leaf[row] or window.row_depth[row] == 0 or lattice._sums.share[stop] < 1e-3:
                continue
            without = Lattice(keep_rows(window, np.arange(len(window.row_start)) != row))
            moved = np.abs(without.targets().probs - lattice.targets().probs).max()
            if lattice._lies.agreement[stop] >= WritingEngine.memory:
                assert moved < 1e-5
                joined += 1
            else:
                lost += moved > 1e-4
    assert joined > 3 and lost > 3  # the test can fail: the others are missed
