"""Launchers: what they start is right, restarts what should be, and the files they write are valid."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.pipeline.config import load_settings
from bytecache.pipeline.launch.command import overrides, plan_job
from bytecache.pipeline.launch.kubernetes import kubernetes_job
from bytecache.pipeline.launch.local import run_local
from bytecache.pipeline.launch.skypilot import skypilot_task
from bytecache.pipeline.launch.supervise import settle, supervise
from bytecache.pipeline.stores import LocalStore
from bytecache.schemas.errors import BytecacheError, ConfigError, Interrupted
from bytecache.schemas.settings import Settings
from tests.support.places import ROOT
from tests.support.tiny_models import make_checkpoint

BUCKET = ["run.dir=s3://bucket/books", "teacher.tau=0.01", "teacher.model=/models/a b", "fleet.notice_s=100"]


def settings(*given: str) -> Settings:
    return load_settings(None, list(given))


def test_the_command_carries_every_setting_that_is_not_the_default() -> None:
    made = settings(*BUCKET, "train.control=false", "corpus.text_field=1", 'teacher.end=<a> "b"')
    assert settings(*overrides(made)) == made
    command = plan_job(made, "teacher", 3, None, 4).command()
    assert command[:3] == ["bytecache", "teacher", "--worker"]
    assert "teacher.model=/models/a b" in command
    assert not any(part.startswith("convert.") for part in command)


def test_gpus_follow_the_stage() -> None:
    spread = settings("teacher.tensor_parallel=4")
    assert plan_job(spread, "teacher", 2, None, 1).gpus == 4
    assert plan_job(spread, "convert", 2, None, 1).gpus == 0
    train = plan_job(spread, "train", 5, 8, 1)
    assert train.workers == 1
    assert train.command()[:3] == ["torchrun", "--standalone", "--nproc-per-node=8"]
    for stage, gpus, words in (
        ("teacher", 2, "tensor_parallel = 4"),
        ("teacher", 0, "tensor_parallel"),
        ("x", None, "--stage x"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan_job(spread, stage, 1, gpus, 1)


def test_gpus_of_one_machine_are_shared_out() -> None:
    spec = plan_job(settings("teacher.tensor_parallel=2"), "teacher", 4, None, 1)
    with pytest.raises(ConfigError, match="need 8; this machine shows 6"):
        run_local(spec, lambda: False, visible=[str(number) for number in range(6)])


def script(folder: Path, text: str) -> list[str]:
    path = folder / "worker.py"
    path.write_text("import os, sys, time, signal\nfrom pathlib import Path\nhere = Path(sys.argv[1])\n" + text)
    return [sys.executable, str(path), str(folder)]


def test_crashes_are_started_again_and_refusals_are_not(tmp_path: Path) -> None:
    command = script(
        tmp_path,
        "number = os.environ['NUMBER']\n"
        "log = here / number\n"
        "count = len(log.read_text()) if log.exists() else 0\n"
        "log.write_text('x' * (count + 1))\n"
        "if number == '0': sys.exit(2)\n"
        "if number == '1' and count == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if number == '1' and count == 1: sys.exit(5)\n"
        "if number == '2': sys.exit(6)\n",
    )
    environments = [{**os.environ, "NUMBER": str(number)} for number in range(3)]
    children = supervise(command, environments, lambda: False, restarts=2, pause_s=0.01)
    assert [child.codes for child in children] == [[2], [-signal.SIGKILL, 5, 0], [6, 6, 6]]
    settle([child.code for child in children if child.code is not None])
    with pytest.raises(BytecacheError, match="exit codes 2, 6"):
        settle([2, 6])
    with pytest.raises(Interrupted):
        settle([75, 2])


def test_a_stop_is_passed_on_and_nothing_outlives_it(tmp_path: Path) -> None:
    """One worker drains with 75, the other is deaf, has a child of its own, and is killed with it."""
    command = script(
        tmp_path,
        "import subprocess\n"
        "deaf = os.environ['NUMBER'] == '1'\n"
        "def drain(*_):\n"
        "    (here / 'drained').write_text('')\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else drain)\n"
        "if deaf:\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    (here / 'pids').write_text(f'{os.getpid()} {child.pid}')\n"
        "(here / f'ready-{int(deaf)}').write_text('')\n"
        "time.sleep(60)\n",
    )
    environments = [{**os.environ, "NUMBER": str(number)} for number in range(2)]
    ready = lambda: all((tmp_path / f"ready-{n}").exists() for n in range(2))  # noqa: E731
    with pytest.raises(Interrupted):
        supervise(command, environments, ready, notice_s=1.0)
    assert (tmp_path / "drained").exists()
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert _ends(pid)


def _ends(pid: int) -> bool:
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


JOB_SCHEMA = {  # the parts of batch/v1 Job that we rely on, closed so that a misspelt key fails
    "type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "batch/v1"}, "kind": {"const": "Job"},
        "metadata": {"properties": {"name": {"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}}},
        "spec": {
            "additionalProperties": False,
            "required": ["completionMode", "completions", "parallelism", "template"],
            "properties": {
                "completionMode": {"const": "Indexed"}, "completions": {"type": "integer", "minimum": 1},
                "parallelism": {"type": "integer"}, "backoffLimitPerIndex": {"type": "integer"},
                "podFailurePolicy": {"properties": {"rules": {"type": "array", "maxItems": 20, "items": {
                    "additionalProperties": False, "required": ["action"], "properties": {
                        "action": {"enum": ["Ignore", "FailJob", "FailIndex", "Count"]},
                        "onExitCodes": {"required": ["operator", "values"]},
                        "onPodConditions": {"items": {"required": ["type", "status"]}}}}}}},
                "template": {"properties": {"spec": {"required": ["restartPolicy", "containers"], "properties": {
                    "restartPolicy": {"const": "Never"},  # podFailurePolicy demands it
                    "containers": {"items": {"required": ["name", "image", "command"], "properties": {
                        "command": {"items": {"type": "string"}},
                        "env": {"items": {"required": ["name", "value"], "properties": {"value": {"type": "string"}}}},
                    }}}}}}},
            },
        },
    },
}  # fmt: skip
TASK_SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "resources", "setup", "run"],
    "properties": {
        "name": {"type": "string"}, "num_nodes": {"const": 1}, "setup": {"type": "string"}, "run": {"type": "string"},
        "envs": {"additionalProperties": {"type": "string"}},
        "resources": {"additionalProperties": False, "properties": {
            "accelerators": {"pattern": "^[A-Za-z0-9-]+:[1-9][0-9]*$"}, "cpus": {"pattern": r"^\d+\+$"},
            "use_spot": {"type": "boolean"}, "image_id": {"type": "string"},
            "job_recovery": {"additionalProperties": False, "properties": {
                "max_restarts_on_errors": {"type": "integer"},
                "recover_on_exit_codes": {"type": "array", "items": {"maximum": 255}}}}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("stage", ["teacher", "convert", "train"])
def test_kubernetes_jobs_are_valid(stage: str) -> None:
    made = settings(*BUCKET, "teacher.tensor_parallel=2")
    job = yaml.safe_load(yaml.safe_dump(kubernetes_job(plan_job(made, stage, 8, None, 4), image="r/b:1", secret="s3")))
    jsonschema.validate(job, JOB_SCHEMA)
    pod = job["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > made.fleet.notice_s
    assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == (stage != "convert")


@pytest.mark.parametrize("stage", ["teacher", "convert", "train"])
def test_skypilot_tasks_are_valid(stage: str) -> None:
    task = skypilot_task(plan_job(settings(*BUCKET), stage, 8, None, 4), accelerator="H100")
    jsonschema.validate(task, TASK_SCHEMA)
    assert ("accelerators" in task["resources"]) == (stage != "convert")


def test_the_schema_of_kubernetes_agrees() -> None:
    official = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    made = settings(*BUCKET, "teacher.tensor_parallel=2")
    for stage in ("teacher", "convert", "train"):
        job = kubernetes_job(plan_job(made, stage, 8, None, 4), image="r/b:1", secret="s3", namespace="n")
        official.validate(job, "1.31", strict=True)
        with pytest.raises(official.ValidationError):
            official.validate({**job, "spec": {**job["spec"], "completion": 8}}, "1.31", strict=True)


def test_the_schema_of_skypilot_agrees() -> None:
    """Where skypilot is installed; it brings half a cloud with it, so nothing installs it for this."""
    schemas = pytest.importorskip("sky.utils.schemas", reason="needs skypilot")
    for stage in ("teacher", "convert", "train"):
        task = skypilot_task(plan_job(settings(*BUCKET), stage, 8, None, 4), accelerator="H100")
        jsonschema.validate(task, schemas.get_task_schema())
        jsonschema.validate(task["resources"], schemas.get_resources_schema())


def test_clouds_need_a_run_folder_that_they_can_share() -> None:
    for make in (lambda spec: kubernetes_job(spec, image="i"), skypilot_task):
        with pytest.raises(ConfigError, match="is a folder of this machine"):
            make(plan_job(settings(), "teacher", 1, 0, 1))


def test_the_commands_write_what_they_say(tmp_path: Path) -> None:
    given = ["--workers", "3", *[part for setting in BUCKET for part in ("--set", setting)]]
    for name in ("skypilot", "kubernetes"):
        result = CliRunner().invoke(app, ["jobs", name, *given, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        assert yaml.safe_load((tmp_path / name).read_text())
    assert "seq 3" in (tmp_path / "skypilot").read_text().splitlines()[0]
    result = CliRunner().invoke(app, ["jobs", "slurm", *given])
    assert "#SBATCH --array=0-2\n" in result.stdout
    assert "'teacher.model=/models/a b'" in result.stdout


STUBS = {
    # As Slurm does: reads the array from the script's comments, runs every task, here at the same time.
    "sbatch": """import os, re, subprocess, sys
text = open(sys.argv[1]).read()
lines = [line[len('#SBATCH --'):] for line in text.splitlines() if line.startswith('#SBATCH --')]
options = dict(line.partition('=')[::2] for line in lines)
first, last = map(int, options['array'].split('-'))
tasks = []
for number in range(first, last + 1):
    env = {**os.environ, 'SLURM_ARRAY_JOB_ID': '7', 'SLURM_ARRAY_TASK_ID': str(number)}
    log = open(options['output'].replace('%A', '7').replace('%a', str(number)), 'w')
    tasks.append(subprocess.Popen(['bash', sys.argv[1]], env=env, stdout=log, stderr=subprocess.STDOUT))
sys.exit(max(task.wait() for task in tasks))
""",
    "srun": """import os, sys
rest = sys.argv[1:]
while rest[0].startswith('-'): rest.pop(0)
os.execvp(rest[0], rest)
""",
    "scontrol": "import sys; open('requeued', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stub commands on PATH; `bytecache` is this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    forward = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom bytecache.pipeline.cli import main\nmain()\n"
    for name, text in {**STUBS, "bytecache": forward}.items():
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_preempted_slurm_task_goes_back_into_the_queue(slurm: Path, tmp_path: Path) -> None:
    """Task 1 is preempted, task 2 refuses its configuration."""
    (slurm / "bytecache").write_text(
        f"#!{sys.executable}\nimport os, sys\nsys.exit({{'1': 75, '2': 2}}.get(os.environ['SLURM_ARRAY_TASK_ID'], 0))\n"
    )
    result = CliRunner().invoke(app, ["jobs", "slurm", "--workers", "3", "--out", "job.sh", "--setup", "echo ready"])
    assert result.exit_code == 0, result.output
    assert subprocess.run(["sbatch", "job.sh"], timeout=60).returncode == 2
    assert (tmp_path / "requeued").read_text() == "requeue 7_1\n"
    assert (tmp_path / "bytecache-teacher-7_0.log").read_text() == "ready\n"


# With real workers


TEXTS = [f"{i}: " + "the student reads the notes as often as it likes, " * (1 + i % 3) for i in range(60)]


@pytest.fixture
def planned(tmp_path: Path) -> list[str]:
    """Settings of a small run that is planned, for a folder called `run`."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    make_checkpoint(tmp_path / "teacher")
    given = [
        f"run.dir={tmp_path / 'run'}", f"corpus.source={tmp_path / 'corpus.jsonl'}",
        f"teacher.model={tmp_path / 'teacher'}", "corpus.unit_bytes=1000",
        "teacher.backend=hf", "teacher.context=128", "teacher.overlap=32",
    ]  # fmt: skip
    options = [part for setting in given for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 0, result.output
    return options


def units_done(tmp_path: Path) -> tuple[int, int]:
    store = LocalStore(tmp_path / "run")
    plan = json.loads(store.read_bytes("plan/plan.json"))
    return len(list(store.list("receipts/teacher"))), len(plan["sizes"])


def assert_whole(tmp_path: Path, options: list[str]) -> None:
    done, total = units_done(tmp_path)
    assert done == total > 4
    result = CliRunner().invoke(app, ["teacher", *options])
    assert "nothing to do" in result.output, result.output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_slurm_array_of_real_workers(slurm: Path, planned: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["jobs", "slurm", "--workers", "2", "--gpus", "0", "--cpus", "1", "--out", "job.sh", *planned]
    )
    assert result.exit_code == 0, result.output
    done = subprocess.run(["sbatch", "job.sh"], timeout=240)
    assert done.returncode == 0, "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert_whole(tmp_path, planned)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_local_workers_one_of_them_killed(planned: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bytecache", "jobs", "local", "--workers", "2", "--gpus", "0", "--cpus", "1"]
    process = subprocess.Popen(
        [*command, *planned, "--set", "fleet.lease_s=3", "--set", "fleet.heartbeat_s=0.5"], cwd=ROOT
    )
    workers: list[int] = []
    while process.poll() is None and not (workers and units_done(tmp_path)[0]):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(child) for child in children]
        time.sleep(0.02)
    os.kill(workers[0], signal.SIGKILL)
    assert process.wait(timeout=240) == 0
    assert_whole(tmp_path, planned)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ray_actors_one_of_them_killed(planned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real Ray cluster of this machine. An actor's worker is killed; its supervisor starts another."""
    from bytecache.pipeline.launch.ray_cluster import run_on_ray

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = load_settings(None, [*planned[1::2], "fleet.lease_s=3", "fleet.heartbeat_s=0.5"])
    spec = plan_job(made, "teacher", 2, 0, 1)
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            for place in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = place.read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"--worker" in words and f"run.dir={tmp_path / 'run'}".encode() in words and units_done(tmp_path)[0]:
                    killed.append(int(place.parent.name))
                    os.kill(killed[0], signal.SIGKILL)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    codes = run_on_ray(spec, lambda: False, num_cpus=2, num_gpus=0, object_store_memory=80 * 2**20)
    assert any(-signal.SIGKILL in each for each in codes)
    assert_whole(tmp_path, planned)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ray_refuses_what_it_could_never_place() -> None:
    from bytecache.pipeline.launch.ray_cluster import run_on_ray

    spec = plan_job(settings("teacher.tensor_parallel=2"), "teacher", 1, None, 1)
    with pytest.raises(ConfigError, match="asks for 2 GPUs and 1 CPUs; the cluster has 1 and 1"):
        run_on_ray(spec, lambda: False, num_cpus=1, num_gpus=1, object_store_memory=80 * 2**20)
