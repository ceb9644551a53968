"""Scratch folders: gone at exit, kept when renamed, a dead owner's swept, a living one's left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.scratch import scratch_folder

ROOT = Path(__file__).parent.parent
OWNER = """
import sys
from pathlib import Path
from stages.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_gone_at_exit_unless_renamed(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        (folder / "x").write_text("x")
        folder.rename(tmp_path / "kept")
    with pytest.raises(RuntimeError), scratch_folder(tmp_path):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_killed_owners_folder_is_swept_by_the_next(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    with scratch_folder(tmp_path):
        assert len(list(tmp_path.iterdir())) == 2  # the living owner's is left alone
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder(tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
