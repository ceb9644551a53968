"""Branches that are evaluated before anybody asks for them: the same windows, in fewer passes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest

from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.function_model import FunctionEngine, function_teacher

TEXTS = ["The teacher reads the text once.", "The student reads the notes as often as it likes.", "the cache", "e"]


@pytest.fixture(scope="module")
def vocabulary(tiny_checkpoint):
    return load_vocabulary(tiny_checkpoint("bytelevel"))


class Counting(FunctionEngine):
    """Counts what it is asked for."""

    def __init__(self, *args, most: int, **options):
        super().__init__(*args, **options)
        self.pass_room, self.calls, self.asked = most, 0, 0

    def foresees(self, prompt):
        return True

    def score_branches(self, jobs):
        jobs = list(jobs)
        assert all(branches for _, branches in jobs)
        self.calls += 1
        self.asked += sum(len(branches) for _, branches in jobs)
        return super().score_branches(jobs)


def evaluated(vocabulary, most: int, threads: int = 0, longest: int = 1 << 30):
    teacher = function_teacher(vocabulary, tau=0.01, static=0.001)
    engine = teacher.engine = Counting(vocabulary, floor=0.0, spread=1.0, most=most)  # all cuts are about as likely
    engine.longest = longest
    teacher.pool = ThreadPoolExecutor(threads) if threads else None
    (group,) = teacher.windows([(f"d{i}", i, vocabulary.encode(text)) for i, text in enumerate(TEXTS)])
    teacher.close()
    return group, engine


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("longest", [1 << 30, 20])
def test_windows_are_the_same_to_the_bit_in_fewer_passes(vocabulary, threads, longest):
    plain, one_by_one = evaluated(vocabulary, 0, threads, longest)
    foreseen, engine = evaluated(vocabulary, 200, threads, longest)
    for ours, theirs in zip(foreseen, plain, strict=True):
        for field in fields(ours):
            np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name), err_msg=field.name)
    assert engine.calls < 0.7 * one_by_one.calls
    assert one_by_one.asked <= engine.asked < 1.5 * one_by_one.asked
    assert one_by_one.asked == sum(int(((w.row_depth > 0) & (w.row_static == 0)).sum()) for w in plain)
