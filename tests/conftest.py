"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# numba's and torch's thread pools fight over two cores; tests are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from bytecache.schemas import messages
from tests.support import places
from tests.support.command_line import fake_convert, fake_teacher, world  # noqa: F401 - fixtures for all tests


def wanting_fixtures(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those of the tests that lie in modules which use `places.FIXTURES`."""
    return [item for item in items if hasattr(getattr(item, "module", None), "FIXTURES")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Let the closing line count the tests that had to do without ../shared, where that folder is missing."""
    session = terminalreporter._session
    weakened = wanting_fixtures(session.items) if session and not places.FIXTURES.is_dir() else []
    if weakened:
        terminalreporter.section("without ../shared")
        files = sorted({str(item.path.relative_to(places.ROOT)) for item in weakened})
        terminalreporter.write_line(f"{places.FIXTURES} is missing: real tokenizers and corpora were not tested by")
        terminalreporter.write_line("\n".join(files))
        terminalreporter.stats["without ../shared"] = weakened


@pytest.fixture(autouse=True)
def _secrets_of_this_test_alone():
    """What a test's settings hide is hidden in that test's messages alone."""
    yield
    messages._remembered.clear()


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
