"""Commands that do no heavy work load no heavy library, and a run that is done is looked at without any."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bytecache.pipeline.config_text import render_template
from tests.support.small_run import small_settings

HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "vllm", "peft", "accelerate")
OF_SHARDS = ("numba", "zarr", "pandas")
"""What shards are read and written with: a second and 100 MB, where nobody opens one."""
RUN_ALL = """
import contextlib, io, json, sys
from bytecache.pipeline.cli import app

loaded = {}
for arguments in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            app(arguments)
            code = 0
        except SystemExit as leaving:
            code = leaving.code
    name = " ".join(arguments)
    loaded[name] = [code, printed.getvalue(), sorted(set(json.loads(sys.argv[2])) & set(sys.modules))]
print(json.dumps(loaded))
"""


def commands(folder: Path, every: list[list[str]]) -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, output and heavy modules of each command, one after the other in one process: modules add up."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(every), json.dumps(HEAVY + OF_SHARDS)],
        cwd=folder, capture_output=True, text=True, timeout=400, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_finished_run_is_looked_at_and_repeated_without_a_heavy_library(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, documents=40)
    (tmp_path / "pipeline.toml").write_text(render_template(settings))
    subprocess.run(
        [sys.executable, "-m", "bytecache", "run"], cwd=tmp_path, check=True, capture_output=True, timeout=300
    )
    (shard, *_) = sorted(tmp_path.glob("run/targets/*.zarr.zip"))
    (part, *_) = sorted(tmp_path.glob("run/teacher/*.parquet"))
    bucket = ["--run-dir", "s3://bucket/run"]
    every = [
        ["config"], ["jobs", "slurm"], ["jobs", "skypilot", *bucket], ["jobs", "kubernetes", *bucket],
        ["status"], ["status", "--json"], ["verify"], ["inspect", str(shard)], ["inspect", str(part)],
        ["plan"], ["teacher"], ["convert"], ["train"], ["evaluate"], ["export"],
    ]  # fmt: skip
    for name, (code, printed, heavy) in commands(tmp_path, every).items():
        assert code == 0, name
        assert set(heavy) <= set(OF_SHARDS), name
        if name in ("teacher", "convert", "train", "evaluate", "export"):
            assert "nothing to do" in printed, name
    for name, (_, _, heavy) in commands(tmp_path, [["status"], ["convert"], ["train"], ["evaluate"]]).items():
        assert heavy == [], name
    # `run` looks at the student's tokenizer before it begins, with the one library that takes no time to load.
    code, printed, heavy = commands(tmp_path, [["run"]])["run"]
    assert (code, set(heavy) - {"tokenizers"}) == (0, set())
    assert "run: nothing to do" in printed


def test_the_command_line_alone_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    every = [["config"], ["jobs", "slurm", "--run-dir", "run"], ["status", "--run-dir", "run"]]
    for name, (code, _, heavy) in commands(tmp_path, every).items():
        assert (code, heavy) == (0, []), name
