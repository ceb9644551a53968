"""Lattices and the writer beside the engine: the same windows, in the same order, and errors where they belong."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest

from bytecache.schemas.dump.window import keep_rows
from bytecache.schemas.errors import EngineError
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.ahead import Lattices, WriterBeside
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.function_model import function_teacher

TEXTS = ["The teacher reads the text once.", "The student reads the notes as often as it likes.", "the cache", "e"]


@pytest.fixture(scope="module")
def vocabulary(tiny_checkpoint):
    return load_vocabulary(tiny_checkpoint("bytelevel"))


def windows_of(vocabulary, threads: int):
    teacher = function_teacher(vocabulary, tau=0.05, static=0.001)
    teacher.pool = ThreadPoolExecutor(threads) if threads else None
    documents = [(f"d{i}", i, vocabulary.encode(text)) for i, text in enumerate(TEXTS)]
    (group,) = teacher.windows(documents)
    teacher.close()
    return group


def test_threads_change_nothing(vocabulary):
    for one, other in zip(windows_of(vocabulary, 0), windows_of(vocabulary, 3), strict=True):
        assert (one.row_depth > 0).any() or len(one.text) < 3
        for field in fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_lattice_is_of_the_window_as_it_stands(vocabulary, threads):
    windows = windows_of(vocabulary, 0)[:2]
    pool = ThreadPoolExecutor(threads) if threads else None
    lattices = Lattices(windows, pool, lambda number, window, _: (number, len(window.row_start)))
    lattices.change(0, lambda: keep_rows(windows[0], windows[0].row_depth >= 0))
    first, _ = lattices.of(0)
    assert lattices.of(0) == (first, (0, len(windows[0].row_start)))
    windows[0] = keep_rows(windows[0], windows[0].row_depth == 0)
    for number, window in enumerate(windows):
        found = lattices.of(number)[0].deviations(tau=1e-4, depth=3)
        expected = Lattice(window).deviations(tau=1e-4, depth=3)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert len(lattices.of(0)[0].deviations(tau=1e-4, depth=3).row)


@pytest.mark.parametrize("threads", [0, 2])
def test_changes_make_the_list_and_fail_where_they_are_asked_for(vocabulary, threads):
    ready = windows_of(vocabulary, 0)
    windows: list = []
    lattices = Lattices(windows, ThreadPoolExecutor(threads) if threads else None)
    for number, window in enumerate(ready):
        lattices.change(number, lambda window=window: window)
    lattices.settle()
    assert [id(window) for window in windows] == [id(window) for window in ready]

    def fail():
        raise EngineError("the teacher returned NaN")

    def change_and_ask():
        lattices.change(1, fail)
        lattices.of(1)

    with pytest.raises(EngineError, match="NaN"):
        change_and_ask()


class _Shelf:
    def __init__(self, fails_at: int = -1):
        self.taken, self.fails_at = [], fails_at

    def append(self, window):
        if window == self.fails_at:
            raise OSError(28, "No space left on device")
        self.taken.append(window)


def test_windows_are_written_in_order():
    shelf = _Shelf()
    with WriterBeside(shelf) as beside:
        for first in range(0, 40, 4):
            beside.append([*range(first, first + 4)])
    assert shelf.taken == list(range(40))


def write(shelf, groups, failure=None):
    with WriterBeside(shelf) as beside:
        for group in groups:
            beside.append(group)
        if failure:
            raise failure


@pytest.mark.parametrize("groups", [[[0, 1, 2]], [[0, 1, 2], [3], [4]]])
def test_a_full_disk_is_told(groups):
    shelf = _Shelf(fails_at=2)
    with pytest.raises(OSError, match="No space"):
        write(shelf, groups)
    assert 4 not in shelf.taken


def test_a_block_that_fails_says_its_own_error():
    with pytest.raises(KeyError, match="stopped"):
        write(_Shelf(fails_at=0), [[0, 1]], KeyError("stopped"))
