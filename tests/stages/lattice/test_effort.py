"""Which histories are asked for: all that carry enough, wherever they end."""

import numpy as np
import pytest

from bytecache.schemas.settings import PRESETS
from bytecache.stages.lattice.effort import DEEPEST, MOST_TIMES, REFERENCE, deepest, least_share, reach
from bytecache.stages.lattice.heirs import NOBODY
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.writing_model import WritingEngine, write_tokenizer, writing_teacher


def least(effort: dict[str, float], agreement: np.ndarray, off: int = 1, longer: int = 0) -> np.ndarray:
    like = np.ones_like(agreement)
    return least_share(effort["tau"], int(effort["depth"]), agreement, off=off * like, longer=longer * like)


@pytest.mark.parametrize("effort", [*PRESETS.values(), REFERENCE])
def test_tau_decides_until_histories_agree_in_depth_tokens(effort):
    tau, depth = effort["tau"], int(effort["depth"])
    asked = least(effort, np.arange(NOBODY, 60))
    assert (asked[: depth + 1] == tau).all() and (np.diff(asked[depth:20]) >= 0).all() and asked[depth + 1] > tau
    assert asked.max() == MOST_TIMES * tau
    assert np.isfinite(least(effort, np.array([0]), off=DEEPEST)).all()
    assert np.isinf(least(effort, np.array([0]), off=DEEPEST + 1)).all()
    # No longer than the room that a window keeps.
    assert depth <= reach(tau, depth) < 16
    assert np.isfinite(least(effort, np.array([0]), longer=reach(tau, depth))).all()
    assert np.isinf(least(effort, np.array([0]), longer=reach(tau, depth) + 1)).all()


def test_nothing_is_asked_for_at_depth_0_and_everything_at_tau_0():
    agreement = np.array([NOBODY, 0, 5, 40])
    assert np.isinf(least({"tau": 0.01, "depth": 0}, agreement)).all() and deepest(0) == reach(0.01, 0) == 0
    assert (least({"tau": 0.0, "depth": 64}, agreement, off=DEEPEST, longer=DEEPEST) == 0).all()


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
        unasked = (lattice._lies.child < 0) & (window.row_static[row] == 0) & (position < len(window.text))
        assert (lattice._sums.share <= least(effort, lattice._lies.agreement))[unasked].all()
    assert at_breaks > 5 and elsewhere > 5
