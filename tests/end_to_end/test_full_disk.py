"""A disk that is really full, then read-only, then neither: clear refusals, and the run is finished all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.pipeline.config_text import render_template
from bytecache.schemas.files import file_sha256
from tests.support.places import ROOT
from tests.support.small_run import small_settings

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
STEPS = """
set -u
mount -t tmpfs -o size=300k none "$DISK" || exit 99
try() {
    "$PYTHON" -m bytecache "$@" --config "$CONFIG" --run-dir "$DISK/run" 2>&1 | grep -v '^{'
    echo "exit ${PIPESTATUS[0]}"
}
try plan
try teacher --worker
mount -o remount,size=50m "$DISK" && mount -o remount,ro "$DISK"
try teacher --worker
mount -o remount,rw "$DISK"
try teacher --worker
cd "$DISK/run" && sha256sum teacher/*.parquet
find .tmp -type f
"""


def mounts() -> bool:
    """Whether this machine lets us mount something of our own."""
    try:
        return not subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="no mounts in a user namespace here")
def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, documents=40)
    teacher = settings.teacher.model_copy(update={"sample_tokens": 0})
    (tmp_path / "pipeline.toml").write_text(render_template(settings.model_copy(update={"teacher": teacher})))
    disk = tmp_path / "disk"
    disk.mkdir()
    variables = {"DISK": str(disk), "CONFIG": str(tmp_path / "pipeline.toml"), "PYTHON": sys.executable}
    done = subprocess.run(
        [*UNSHARE, "bash", "-c", STEPS], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, full, read_only, rest, hashes = done.stdout.split("exit ")
    codes = [int(part.splitlines()[0]) for part in (full, read_only, rest, hashes)]
    assert codes == [0, 6, 6, 0], done.stdout
    assert "the disk is full; free space" in full
    assert "the file system is read-only" in read_only and str(disk) in read_only
    assert "this worker made" in rest
    elsewhere = ["--config", variables["CONFIG"], "--run-dir", str(tmp_path / "whole")]
    for stage in ("plan", "teacher"):
        assert CliRunner().invoke(app, [stage, *elsewhere]).exit_code == 0
    parts = sorted((tmp_path / "whole" / "teacher").glob("*.parquet"))
    assert hashes.splitlines()[1:] == [f"{file_sha256(part)}  teacher/{part.name}" for part in parts]


TRAIN_STEPS = """
set -u
mount -t tmpfs -o size=60m none "$DISK" || exit 99
try() {
    "$PYTHON" -m bytecache "$@" --run-dir "$DISK/run" 2>&1 | grep -v '^{'
    echo "exit ${PIPESTATUS[0]}"
}
cp -r "$MADE" "$DISK/run"
for room in 20 250; do
    mount -o remount,size=$(($(du -sk "$DISK" | cut -f1) + room))k "$DISK"
    try train
    mount -o remount,size=60m "$DISK"
    rm -rf "$DISK/run/train"
done
try train
cd "$DISK/run" && sha256sum train/distilled-*/step-00000012.safetensors
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not mounts(), reason="no mounts in a user namespace here")
def test_a_disk_that_fills_up_in_training(tmp_path: Path) -> None:
    """Room for nothing, then for the student but no checkpoint: exit code 6 with the remedy, as in every stage."""
    settings = small_settings(tmp_path, documents=40)
    teacher = settings.teacher.model_copy(update={"sample_tokens": 0})
    (tmp_path / "pipeline.toml").write_text(render_template(settings.model_copy(update={"teacher": teacher})))
    config = ["--config", str(tmp_path / "pipeline.toml"), "--run-dir", str(tmp_path / "made")]
    for stage in ("plan", "teacher", "convert"):
        assert CliRunner().invoke(app, [stage, *config]).exit_code == 0
    disk = tmp_path / "disk"
    disk.mkdir()
    variables = {"DISK": str(disk), "MADE": str(tmp_path / "made"), "PYTHON": sys.executable}
    done = subprocess.run(
        [*UNSHARE, "bash", "-c", TRAIN_STEPS], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    nothing, student, whole, hashes = done.stdout.split("exit ")
    codes = [int(part.splitlines()[0]) for part in (student, whole, hashes)]
    assert codes == [6, 6, 0], done.stdout
    for text in (nothing, student):
        assert "the disk is full; free space" in text and "Traceback" not in text
    assert CliRunner().invoke(app, ["train", "--run-dir", str(tmp_path / "made")]).exit_code == 0
    (checkpoint,) = (tmp_path / "made").glob("train/distilled-*/step-00000012.safetensors")
    assert hashes.split()[1] == file_sha256(checkpoint)
