"""Which histories are asked for: all that carry enough, wherever they end."""

import numpy as np
import pytest

from bytecache.schemas.settings import PRESETS
from bytecache.stages.lattice.effort import (
    DEEPEST,
    ENOUGH,
    FOLLOWED,
    MOST_TIMES,
    REFERENCE,
    deepest,
    least_share,
    lightest,
    reach,
    tokens_off,
)
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.writing_model import WritingEngine, write_tokenizer, writing_teacher


@pytest.mark.parametrize("effort", [*PRESETS.values(), REFERENCE])
def test_tau_decides_to_the_depth_and_what_is_heavy_is_always_enough(effort):
    tau, depth = effort["tau"], int(effort["depth"])
    least = least_share(tau, depth, np.arange(1, DEEPEST + 1))
    assert (least[:depth] == tau).all() and (np.diff(least) >= 0).all()
    enough = max(tau, ENOUGH)
    assert (least[: depth + FOLLOWED] <= min(MOST_TIMES * tau, enough)).all()
    assert (least[depth + FOLLOWED :] == enough).all() and 0 < lightest(tau) <= tau
    assert depth <= reach(tau, depth) < 16  # a window keeps as many positions free


def test_tokens_off_are_counted_from_the_last_history_that_carried_enough():
    depth, parent = np.array([0, 0, 1, 2, 3, 4, 1], np.uint8), np.array([-1, 0, 0, 2, 3, 4, 1], np.int32)
    share = np.array([1.0, 0.1, 0.1, ENOUGH + 0.01, 0.1, 0.1, ENOUGH])
    assert tokens_off(depth, parent, share).tolist() == [0, 0, 1, 0, 1, 2, 1]


def test_nothing_is_asked_for_at_depth_0_and_everything_at_tau_0():
    off = np.array([1, 3, DEEPEST, DEEPEST + 1])
    assert np.isinf(least_share(0.01, 0, off)).all() and deepest(0) == reach(0.01, 0) == 0
    assert least_share(0.0, 64, off).tolist() == [0.0, 0.0, 0.0, np.inf]


@pytest.mark.parametrize("static", [0.0, 0.001])
@pytest.mark.parametrize("cut", ["gpt2", "llama3", "qwen"])
def test_no_history_that_carries_enough_is_left(tmp_path, cut, static):
    """Wherever it ends, where the canonical tokens break too; and such there are."""
    vocabulary = load_vocabulary(write_tokenizer(tmp_path, cut))
    effort = {"tau": 0.01, "depth": 2, "static": static}
    teacher = writing_teacher(vocabulary, **effort)
    assert isinstance(teacher.engine, WritingEngine)
    at_breaks = elsewhere = 0
    for seed in range(6):
        text = teacher.engine.write(12, seed).decode()
        ((window,),) = teacher.windows([("d", 0, vocabulary.encode(text))])
        lattice = Lattice(window)
        assert not len(lattice.deviations(tau=0.01, depth=2).row)
        breaks = set(window.row_start[window.row_depth == 0].tolist())
        for row in np.flatnonzero((window.row_depth > 0) & (window.row_static == 0)):
            at_breaks += int(window.row_start[row]) in breaks
            elsewhere += int(window.row_start[row]) not in breaks
        row, position = lattice._stops
        # Counted from the last history that carried enough, one row after the other.
        child, off = lattice._lies.child, np.zeros(len(window.row_start), np.int64)
        for r in range(1, len(off)):
            (stop,) = np.flatnonzero(child == r) if window.row_depth[r] else (0,)
            if window.row_depth[r] and lattice._sums.share[stop] <= ENOUGH:
                off[r] = off[window.row_parent[r]] + 1
        least = least_share(0.01, 2, off + 1)
        unasked = (lattice._lies.child < 0) & (window.row_static[row] == 0) & (position < len(window.text))
        assert (lattice._sums.share[unasked] <= least[row[unasked]]).all()
    assert at_breaks > 5 and elsewhere > 5
