"""What a client may ask of the extension in a server: numbers that point into its own text, and nothing else."""

from typing import Any

import numpy as np
import pytest

from bytecache.stages.engines.vllm_serve import check_rows, check_static


def window() -> dict[str, Any]:
    return {
        "tokens": np.array([0, 5, 9], np.int32), "text": np.zeros(4, np.uint8), "starts": np.array([0, 2, 4]),
        "following": np.array([5, 9, -1]), "first": np.array([0]),
    }  # fmt: skip


def branches() -> dict[str, Any]:
    one = window()
    del one["first"]
    more = {"anchor": np.array([0, 2]), "length": np.array([1, 2]), "chain": np.array([1, 2, 3], np.int32)}
    return one | more


def static() -> dict[str, Any]:
    return {
        "text": np.zeros(5, np.uint8), "size": np.array([2, 3]), "token": np.array([1, 2, 3], np.int32),
        "start": np.array([2, 0, 3]), "count": np.array([1, 2]),
    }  # fmt: skip


def test_what_is_right_passes() -> None:
    check_rows(window(), 10)
    check_rows(branches(), 10)
    check_static(static(), 10)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokens", np.array([0, 10, 1], np.int32)), ("tokens", np.array([-1, 1, 1], np.int32)),
        ("following", np.array([5, 10, -1])), ("starts", np.array([-1, 2, 4])), ("starts", np.array([0, 2, 5])),
        ("text", np.zeros(4, np.int64)), ("starts", np.zeros((3, 1), np.int64)), ("anchor", np.array([0, 3])),
        ("anchor", np.array([0])), ("length", np.array([4, -1])), ("chain", np.array([1, 2, 10], np.int32)),
        ("chain", np.array([1, 2], np.int32)), ("text", np.zeros(4, np.float32)),
    ],
)  # fmt: skip
def test_rows_that_point_elsewhere_are_refused(name: str, values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"points outside|go together|dimensions"):
        check_rows(branches() | {name: values}, 10)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("token", np.array([1, 2, 10], np.int32)), ("start", np.array([3, 0, 3])), ("start", np.array([0, 0, -1])),
        ("size", np.array([2, 2])), ("count", np.array([1, 1])), ("count", np.array([3])), ("size", np.array([6, -1])),
    ],
)  # fmt: skip
def test_static_jobs_that_point_elsewhere_are_refused(name: str, values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"points outside|go together"):
        check_static(static() | {name: values}, 10)
