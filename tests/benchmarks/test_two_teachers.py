"""The study of two teachers: what its figures say of passages whose bits are known."""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import two_teachers
from benchmarks.two_teachers import MIXTURES, TEACHERS, bits_of_passages, interval, summary
from tests.pipeline.commands.test_mix import TEXTS, make_set


def passage(size: int, smollm2: float, gemma: float, mixed: float) -> dict:
    bits = dict(zip(TEACHERS, (smollm2, gemma), strict=True)) | dict.fromkeys(MIXTURES, mixed)
    return {"bytes": size, "bits": bits}


def test_differences_are_to_the_teacher_that_is_better_of_all() -> None:
    figures = summary({"a": passage(100, 100.0, 90.0, 80.0), "b": passage(300, 300.0, 330.0, 290.0)})
    assert figures["teachers"] == {"smollm2": 1.0, "gemma": 1.05} and figures["bytes"] == 400
    assert figures["oracle"] == pytest.approx(390 / 400) and figures["gemma_better"] == 1
    mixture = figures["mixtures"]["posterior 0.5, 0.5"]
    assert mixture["bits_per_byte"] == pytest.approx(370 / 400) and mixture["to_the_better"] == pytest.approx(-30 / 400)
    assert mixture["passages_gained"] == 2


def test_an_interval_is_of_passages_and_chooses_the_better_teacher_in_each_draw() -> None:
    sizes = np.full(40, 1000.0)
    teachers = np.stack([np.full(40, 1000.0), np.full(40, 1100.0)])
    assert interval(teachers[0] - 50, teachers, sizes) == [-0.05, -0.05], "no spread where all passages agree"
    spread = np.random.default_rng(1).normal(0, 100, 40)
    low, high = interval(teachers[0] + spread, teachers, sizes)
    expected = 2 * 1.96 * spread.std() / math.sqrt(40) / 1000
    assert 0.8 * expected < high - low < 1.2 * expected
    # Each teacher is better by 100 bits on every other passage: a draw's better one is ahead of their mean.
    torn = np.stack([np.where(np.arange(40) % 2, 1000.0, 1100.0), np.where(np.arange(40) % 2, 1100.0, 1000.0)])
    low, high = interval(torn.mean(0), torn, sizes)
    assert low >= 0 and high > 0.01


def test_bits_are_those_of_the_text_and_temperature_one_changes_nothing(tmp_path: Path) -> None:
    plain = bits_of_passages(make_set(tmp_path / "set", 1, sure=0.6))
    several = bits_of_passages(tmp_path / "set", (1.0, 1e6))
    assert plain.keys() == TEXTS.keys()
    for name, (bits, size) in plain.items():
        assert size == len(TEXTS[name]) and several[name][0][0] == pytest.approx(bits[0], rel=1e-6)
        assert several[name][0][1] == pytest.approx(size * math.log2(257), rel=1e-3), "heat makes all symbols alike"
        assert bits[0] < size * -math.log2(0.5), "the set gives the true symbol six tenths, at least"


def test_every_draw_is_the_same_every_time() -> None:
    bits, sizes = np.arange(5.0), np.full(5, 10.0)
    teachers = np.stack([bits + 1, bits + 2])
    assert interval(bits, teachers, sizes) == interval(bits, teachers, sizes)
    assert two_teachers.DRAWS >= 1000
