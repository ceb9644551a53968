"""Static rows that come to carry more than tau: their histories are evaluated and take their place."""

import numpy as np
import pytest

from bytecache.schemas.dump.window import Window, keep_rows
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import Teacher
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary
from tests.support.function_model import function_teacher
from tests.support.histories import histories

EFFORT = {"tau": 0.05, "depth": 2, "static": 0.001}
TEXT = "The teacher reads the text once; the student reads the notes as often as it likes, and the cache is there."


@pytest.fixture
def vocabulary(tiny_checkpoint) -> Vocabulary:
    return load_vocabulary(tiny_checkpoint("bytelevel"))


@pytest.fixture(autouse=True)
def by_share_alone(monkeypatch) -> None:
    """This teacher finds all text absurd, so that the text would bear out nearly everything (test_borne_out.py)."""
    monkeypatch.setattr("bytecache.stages.lattice.effort.BORNE_OUT", np.inf)


def window_of(teacher: Teacher) -> Window:
    ((window,),) = teacher.windows([("d", 0, teacher.vocabulary.encode(TEXT))])
    return window


def test_no_static_row_carries_more_than_tau(vocabulary, monkeypatch):
    """Where static rows stood, real rows of the same histories stand; the rest of the window is as it was."""
    teacher = function_teacher(vocabulary, **EFFORT)
    monkeypatch.setattr("bytecache.stages.teacher.passes.OUTGROWN_PASSES", 0)
    before = window_of(teacher)
    outgrown = Lattice(before).outgrown(tau=EFFORT["tau"], depth=2)
    assert len(outgrown) > 1 and before.row_static[outgrown].all()
    monkeypatch.setattr("bytecache.stages.teacher.passes.OUTGROWN_PASSES", 20)
    after = window_of(teacher)
    assert not len(Lattice(after).outgrown(tau=EFFORT["tau"], depth=2))
    count = len(before.row_start)
    for name in ("row_start", "row_token", "row_parent", "row_depth"):
        np.testing.assert_array_equal(getattr(after, name)[:count], getattr(before, name))
    assert not after.row_static[outgrown].any() and (after.row_static == 1).sum() > 5
    stop = np.cumsum([0, *after.n_stops])
    for row, parent in list(enumerate(after.row_parent))[1:]:
        own = after.stop_token[stop[parent] : stop[parent + 1]] == after.row_token[row]
        assert np.exp(after.row_logp[row]) == pytest.approx(
            float(after.stop_mass[stop[parent] :][: len(own)][own][0]), rel=1e-4
        )
    # No evaluated row extends one that is not.
    evaluated = after.row_static == 0
    assert evaluated[after.row_parent[evaluated][1:]].all()
    # The masses are those of the history: what a teacher that evaluates everything finds.
    deep = window_of(function_teacher(vocabulary, tau=1e-6, depth=4))
    row_of = {history: row for row, history in enumerate(histories(deep))}
    names = histories(after)
    checked = 0
    for row in outgrown:
        if (other := row_of.get(names[row])) is not None:
            assert after.end[row] == deep.end[other] and after.log_norm[row] == deep.log_norm[other]
            checked += 1
    assert checked > 1


def test_a_row_is_outgrown_where_its_mass_stops_as_well(vocabulary):
    """All of a row's mass may leave in a token that ends at once: the share of that token counts too."""
    window = window_of(function_teacher(vocabulary, **EFFORT))
    lattice = Lattice(window)
    row, _ = lattice._stops
    for r in np.flatnonzero(window.row_static):
        largest = max(float(lattice.peaks()[r]), float(lattice._sums.share[row == r].max(initial=0.0)))
        assert (r in lattice.outgrown(tau=largest * 0.999, depth=9)) and largest > 0
        alone = r not in lattice.outgrown(tau=largest * 1.001, depth=9)
        assert alone or (window.row_static[window.row_parent == r] == 1).any()  # or for one that extends it


def test_targets_come_closer(vocabulary, monkeypatch):
    """To those of a teacher that evaluates everything, in the mean over the text."""
    effort = EFFORT | {"tau": 0.01}
    deep = Lattice(window_of(function_teacher(vocabulary, tau=1e-5, depth=6)), drop=1.0).targets()
    error = []
    for passes in (0, 2):
        monkeypatch.setattr("bytecache.stages.teacher.passes.OUTGROWN_PASSES", passes)
        found = Lattice(window_of(function_teacher(vocabulary, **effort))).targets()
        error.append(float(np.abs(found.probs - deep.probs).sum(1).mean()))
    assert error[1] < 0.99 * error[0]  # most of it is of histories that joined: this teacher finds the text absurd


def test_the_certificate_knows_what_production_knows(vocabulary):
    """The marked rows of a reference window give production's targets, outgrown rows included."""
    teacher = function_teacher(vocabulary, **EFFORT)
    teacher.settings = teacher.settings.model_copy(update={"sample_tokens": 200})
    produced: list[Window] = []
    evaluate = teacher.evaluate
    teacher.evaluate = lambda plans, stop: produced.extend(evaluate(plans, stop)) or produced  # type: ignore
    window = teacher.reference_window([("d", 0, vocabulary.encode(TEXT))], "key", lambda: False)
    asked = keep_rows(window, window.row_sampled == 1)
    assert (window.row_sampled == 0).any() and asked.row_static.any() and (asked.row_depth > 1).any()
    assert sorted(histories(asked)) == sorted(histories(produced[0]))
    found, production = Lattice(asked).targets(), Lattice(produced[0]).targets()
    for mine, theirs in zip(found, production, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-7)


def length_of(window: Window, row: int, first_row: int) -> int:
    """Tokens of a row's history."""
    anchor, chain = row, 0
    while window.row_depth[anchor]:
        anchor, chain = int(window.row_parent[anchor]), chain + 1
    return first_row + anchor + 1 + chain


def test_what_an_engine_has_no_room_for_joins_and_is_counted(vocabulary):
    """Branches and outgrown static rows beyond the longest history are left out; nothing is raised."""
    teacher = function_teacher(vocabulary, **EFFORT)
    free = window_of(teacher)
    canonical = int((free.row_depth == 0).sum())
    evaluated = np.flatnonzero((free.row_static == 0) & (free.row_depth > 0))
    lengths = [length_of(free, int(row), 0) for row in evaluated]
    teacher.engine.longest = canonical - 3
    assert max(lengths) > canonical - 3
    bound = window_of(teacher)
    rows = np.flatnonzero((bound.row_static == 0) & (bound.row_depth > 0))
    assert len(rows) and max(length_of(bound, int(row), 0) for row in rows) <= canonical - 3
    assert Lattice(bound).handed().total.sum() > Lattice(free).handed().total.sum()
