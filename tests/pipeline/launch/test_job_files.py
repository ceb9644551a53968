"""The files that start workers elsewhere, run as far as a machine without those services allows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.pipeline.config import load_settings
from bytecache.pipeline.launch.command import plan_job
from bytecache.pipeline.launch.kubernetes import kubernetes_job
from bytecache.pipeline.launch.skypilot import SETUP, launch_lines, skypilot_task
from bytecache.pipeline.launch.slurm import slurm_script
from bytecache.schemas.errors import ConfigError

AWKWARD = [
    "run.dir=s3://bucket/a b", "teacher.end=<a> \"b\" 'c' `id` $HOME ${HOME} $(HF_HOME) $(id) \\n # %s",
    "corpus.attribution=one\ntwo\n\n#SBATCH --array=0-99\nexit 7", "corpus.license=a: b\n- c",
    "dataset.name=naïve 日本",
]  # fmt: skip
RECORD = """import json, os, sys
with open(os.environ['RECORD'], 'a') as file:
    file.write(json.dumps([sys.argv[1:], os.environ.get('OMP_NUM_THREADS'), os.environ.get('CORES')]) + '\\n')
"""
SRUN = """import os, sys
rest = sys.argv[1:]
options = {}
while rest[0].startswith('-'):
    name, _, value = rest.pop(0).partition('=')
    options[name] = value
os.environ['CORES'] = options.get('--cpus-per-task', '1')  # a step does not inherit the job's
os.execvp(rest[0], rest)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a bytecache and a torchrun that write down how they were called; returns where."""
    for name, text in (("bytecache", RECORD), ("torchrun", RECORD), ("srun", SRUN)):
        (tmp_path / name).write_text(f"#!{sys.executable}\n{text}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "record"


def calls(record: Path) -> list[list[object]]:
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.parametrize(("stage", "gpus"), [("teacher", 0), ("convert", 0), ("train", 2)])
def test_slurm_calls_the_worker_with_every_setting_and_core(machine: Path, stage: str, gpus: int) -> None:
    spec = plan_job(load_settings(None, AWKWARD), stage, 2, gpus, 3)
    (machine.parent / "job.sh").write_text(slurm_script(spec, time_limit="1-00:00:00", partition="spot"))
    assert subprocess.run(["bash", "-n", "job.sh"]).returncode == 0
    subprocess.run(["bash", "job.sh"], check=True, timeout=60)
    assert calls(machine) == [[spec.command()[1:], "3", "3"]]
    # sbatch reads options up to the first command, so none of the settings can add one.
    lines = (machine.parent / "job.sh").read_text().split("\n")
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any("array=0-99" in line for line in lines[:first])


def test_hooks_of_environments_may_read_variables_that_are_not_set(machine: Path) -> None:
    """As conda's and the module system's do; what comes after them is strict."""
    (machine.parent / "activate").write_text('export LOADED="$LOADED:$NOT_SET_BY_ANYONE"\n')
    spec = plan_job(load_settings(None, []), "teacher", 1, 0, 1)
    script = slurm_script(spec, time_limit="01:00:00", setup=". ./activate\necho $ALSO_NOT_SET")
    done = subprocess.run(["bash", "-c", script], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(calls(machine)) == 1
    assert script.index("ALSO_NOT_SET") < script.index("set -u") < script.index("srun")


@pytest.mark.parametrize(("stage", "gpus"), [("teacher", 1), ("train", 4)])
def test_skypilot_runs_the_worker_with_every_setting(machine: Path, stage: str, gpus: int) -> None:
    spec = plan_job(load_settings(None, AWKWARD), stage, 2, gpus, 3)
    text = launch_lines(spec, "job.yaml") + yaml.safe_dump(skypilot_task(spec), sort_keys=False, width=10_000)
    task = yaml.safe_load(text)
    for part in ("setup", "run"):
        subprocess.run(["bash", "-c", task[part]], check=True, timeout=60, env={**os.environ, **task["envs"]})
    assert calls(machine) == [[spec.command()[1:], "3", None]]


def test_skypilot_says_what_is_missing_where_nothing_was_installed(machine: Path) -> None:
    """The default installs nothing: the package is in no index."""
    (machine.parent / "bytecache").unlink()
    empty = {**os.environ, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", SETUP], timeout=60, capture_output=True, text=True, env=empty)
    assert done.returncode == 1 and "--setup" in done.stderr and "--image" in done.stderr
    given = ["--set", "run.dir=s3://b/c", "--image", "docker:r/bytecache:1", "--setup", "pip install /mnt/b.whl\necho"]
    result = CliRunner().invoke(app, ["jobs", "skypilot", *given])
    task = yaml.safe_load(result.stdout)
    assert task["resources"]["image_id"] == "docker:r/bytecache:1" and task["setup"] == "pip install /mnt/b.whl\necho"


def expanded(part: str, environment: dict[str, str]) -> str:
    """What the kubelet makes of a word of a command: $(NAME) by the container's variables, $$ by $ before a bracket."""

    def replace(found: re.Match[str]) -> str:
        if found[0].startswith("$$"):
            return found[0][1:]
        return environment.get(found[1], found[0])

    return re.sub(r"\$?\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)", replace, part)


def test_kubernetes_calls_the_worker_with_every_setting(machine: Path) -> None:
    spec = plan_job(load_settings(None, AWKWARD), "teacher", 2, 1, 3)
    job = yaml.safe_load(yaml.safe_dump(kubernetes_job(spec, image="r/b:1"), sort_keys=False, width=10_000))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    command = [expanded(part, environment) for part in container["command"]]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, **environment})
    assert calls(machine) == [[[*spec.command()[1:], "--set", "run.scratch=/scratch"], "3", None]]


@pytest.mark.parametrize(("launcher", "option"), [
    ("slurm", "--time"), ("slurm", "--partition"), ("skypilot", "--accelerator"), ("skypilot", "--image"),
    ("kubernetes", "--image"), ("kubernetes", "--secret"), ("kubernetes", "--namespace"), ("kubernetes", "--memory"),
])  # fmt: skip
@pytest.mark.parametrize("value", ["a\n#SBATCH --array=0-9", "a b", "a\x1b[2J", " a"])
def test_an_option_that_could_begin_another_line_is_refused(launcher: str, option: str, value: str) -> None:
    command = ["jobs", launcher, "--set", "run.dir=s3://b/c", option, value]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == ConfigError.exit_code, result.output
    assert option in result.stderr and "one word" in result.stderr


@pytest.mark.parametrize(("value", "is_known"), [
    ("90", True), ("90:30", True), ("4:00:00", True), ("1-12", True), ("1-12:30", True), ("1-12:30:00", True),
    ("UNLIMITED", True), ("4h", False), ("1:2:3:4", False), ("1-", False), ("x", False), ("", False),
])  # fmt: skip
def test_a_time_limit_is_one_that_slurm_knows(value: str, is_known: bool) -> None:
    result = CliRunner().invoke(app, ["jobs", "slurm", "--set", "run.dir=s3://b/c", "--time", value])
    assert (result.exit_code == 0) is is_known, result.output
    assert f"#SBATCH --time={value}\n" in result.stdout if is_known else "as Slurm has it" in result.stderr


def test_a_file_name_cannot_leave_its_comment() -> None:
    spec = plan_job(load_settings(None, ["run.dir=s3://b/c"]), "convert", 1, None, 1)
    with pytest.raises(ConfigError, match="--out"):
        launch_lines(spec, "job\nrm -rf x.yaml")
    assert launch_lines(spec, "my job.yaml").count("\n") == 1
