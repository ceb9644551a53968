"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# numba's and torch's thread pools fight over two cores; tests are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from bytecache.schemas import messages
from tests.support import places
from tests.support.command_line import fake_convert, fake_teacher, kept_runs, world  # noqa: F401 - fixtures for all tests

WITHOUT_SHARED = "without ../shared"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Mark the reports of a test whose module uses `places.FIXTURES`, where that folder is missing."""
    if hasattr(getattr(item, "module", None), "FIXTURES") and not places.FIXTURES.is_dir():
        item.user_properties.append((WITHOUT_SHARED, str(item.path.relative_to(places.ROOT))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Let the closing line count the tests that had to do without ../shared, where that folder is missing."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "nodeid")]
    weakened = {
        report.nodeid: report for report in reports if WITHOUT_SHARED in dict(getattr(report, "user_properties", ()))
    }
    if weakened:
        files = sorted({dict(report.user_properties)[WITHOUT_SHARED] for report in weakened.values()})
        terminalreporter.section(WITHOUT_SHARED)
        terminalreporter.write_line(f"{places.FIXTURES} is missing: real tokenizers and corpora were not tested by")
        terminalreporter.write_line("\n".join(files))
        terminalreporter.stats[WITHOUT_SHARED] = list(weakened.values())


@pytest.fixture(autouse=True)
def _secrets_of_this_test_alone():
    """What a test's settings hide is hidden in that test's messages alone."""
    yield
    messages._remembered.clear()


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel was given outlives a killed process, and no test cuts the power: nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


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
