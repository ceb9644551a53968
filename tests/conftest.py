"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# numba's and torch's thread pools fight over two cores; tests are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from tests.support.command_line import fake_convert, fake_teacher, world  # noqa: F401 - fixtures for all tests


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Factory of tiny random checkpoints, one folder per family and shape."""
    from tests.support.tiny_models import make_checkpoint

    made: dict[tuple, Path] = {}

    def make(family: str = "bytelevel", **kwargs) -> Path:
        key = (family, *sorted(kwargs.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family=family, **kwargs)
        return made[key]

    return make
