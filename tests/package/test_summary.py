"""The closing line of a test run counts what could not be tested for want of ../shared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

MODULE = "from tests.support.places import FIXTURES\n\n\ndef test_something() -> None:\n    assert True\n"


def closing_line(folder: Path, *options: str) -> str:
    """The last line of a run of one test of a checkout at `folder`."""
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "tests/test_one.py"]
    done = subprocess.run(
        call, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_closing_line_counts_tests_without_shared(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "tests").mkdir(parents=True)
    for name in ("bytecache", "schemas", "stages", "pipeline", "tests/support", "tests/conftest.py", "pyproject.toml"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "tests" / "test_one.py").write_text(MODULE)
    # Found through its link, places.py still names the repository that it lies in: it is copied.
    (checkout / "tests" / "support").unlink()
    (checkout / "tests" / "support").mkdir()
    for path in (ROOT / "tests" / "support").glob("*.py"):
        (checkout / "tests" / "support" / path.name).write_bytes(path.read_bytes())
    assert "1 passed, 1 without ../shared" in closing_line(checkout)
    assert "1 passed, 1 without ../shared" in closing_line(checkout, "-n", "1")
    (tmp_path / "shared" / "fixtures").mkdir(parents=True)
    said = closing_line(checkout)
    assert "1 passed" in said and "shared" not in said
