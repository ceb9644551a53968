"""An edition with a real (tiny) teacher: killed in the middle, and finished to what an undisturbed run gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bytecache.schemas.dataset.index import read_dataset
from tests.support.command_line import bytecache
from tests.support.places import ROOT
from tests.support.tiny_models import make_checkpoint

TEXTS = [f"{i}: " + "the student reads the notes as often as it likes, " * (1 + i % 3) for i in range(36)]
CHANGED = [*TEXTS[:10], "changed: " + TEXTS[10], *TEXTS[11:30], *TEXTS[31:], *(f"new {text}" for text in TEXTS)]
"""One document changed, one gone, as many new at the end as there were."""


def write(folder: Path, name: str, keep: str, texts: list[str]) -> Path:
    """Corpus and settings of a run in `folder/name`."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = folder / f"{name}.toml"
    config.write_text(
        f'[run]\ndir = "{folder / name}"\n'
        f'[corpus]\nsource = "{folder / "corpus.jsonl"}"\nunit_bytes = 1000\nheldout_fraction = 0.1\n'
        f'[teacher]\nmodel = "{folder / "model"}"\nbackend = "hf"\nkeep = "{keep}"\nstart = "<|begin|>"\n'
        "context = 128\noverlap = 32\ndepth = 1\ntau = 0.01\nsample_tokens = 0\n[convert]\nshard_bytes = 1000\n"
    )
    return config


def said(config: Path, *commands: str) -> str:
    output = ""
    for command in commands:
        done = bytecache(command, "--config", config)
        assert done.exit_code == 0, (done.output, done.exception)
        output += done.output
    return output


def made(run: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every dump part and shard, by name."""
    files = [*(run / "teacher").glob("*.parquet"), *(run / "targets").glob("*.zarr.zip")]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def kill_in_the_middle(config: Path, run: Path) -> None:
    """`teacher` in a process of its own, killed once two outputs are new."""
    before = len(made(run))
    command = [sys.executable, "-m", "bytecache", "teacher", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(made(run)) < before + 2:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("keep", ["dump", "targets"])
def test_an_edition_that_is_killed_computes_the_rest_once(tmp_path: Path, keep: str) -> None:
    make_checkpoint(tmp_path / "model")
    config, run = write(tmp_path, "run", keep, TEXTS), tmp_path / "run"
    said(config, "plan", "teacher", "convert")
    first = made(run)
    write(tmp_path, "run", keep, CHANGED)
    said(config, "plan")
    kill_in_the_middle(config, run)
    killed = made(run)
    output = said(config, "teacher", "convert")
    second = made(run)
    assert first.items() <= killed.items() <= second.items(), "what was whole is neither made nor touched again"
    assert len(second) > len(killed) > len(first)
    assert "edition 2 of the data set" in output and "files match their hashes" in said(config, "verify")

    alone = write(tmp_path, "alone", keep, CHANGED)
    said(alone, "plan", "teacher", "convert")
    listed = {entry.file: entry.sha256 for entry in read_dataset(run / "targets").entries}
    assert listed == {entry.file: entry.sha256 for entry in read_dataset(tmp_path / "alone" / "targets").entries}
    undisturbed = {name: raw for name, (_, raw) in made(tmp_path / "alone").items()}
    assert undisturbed.items() <= {name: raw for name, (_, raw) in second.items()}.items()
    assert listed.keys() & first.keys(), "an edition shares shards with the one before"
