"""SkyPilot managed spot jobs: one small job per worker, recovered by SkyPilot wherever spot machines are to be had.

Not one job of many nodes: SkyPilot starts those together and stops all when one is preempted, while workers need each
other for nothing. `launch_lines` starts the same file once per worker.
"""

import shlex
from typing import Any

from bytecache.pipeline.launch.command import JobSpec, needs_shared_run
from bytecache.schemas.errors import Interrupted

SETUP = "pip install 'bytecache[gpu,remote]'"


def skypilot_task(
    spec: JobSpec, *, accelerator: str = "", setup: str = SETUP, spot: bool = True, retries: int = 3
) -> dict[str, Any]:
    """The task file as an object. `accelerator`: SkyPilot's name of a GPU (H100, L4); empty with `spec.gpus` = 0.

    Raises ConfigError: the run folder is a path of this machine.
    """
    needs_shared_run(spec.settings)
    resources: dict[str, Any] = {
        "cpus": f"{spec.cpus}+",
        "use_spot": spot,
        # 75: the worker drained on a notice before SkyPilot saw the machine go. Without it that would be a failure.
        "job_recovery": {"max_restarts_on_errors": retries, "recover_on_exit_codes": [Interrupted.exit_code]},
    }
    if spec.gpus:
        resources["accelerators"] = f"{accelerator or 'L4'}:{spec.gpus}"
    return {
        "name": spec.name,
        "num_nodes": 1,
        "resources": resources,
        "envs": {"OMP_NUM_THREADS": str(spec.cpus)},
        # Values come with `sky jobs launch --secret NAME`, from the environment there.
        **({"secrets": dict.fromkeys(spec.secrets)} if spec.secrets else {}),
        "setup": setup,
        # exec: SIGTERM must reach the worker, not a shell that waits for it.
        "run": f"exec {shlex.join(spec.command())}",
    }


def launch_lines(spec: JobSpec, file: str) -> str:
    """Shell that starts every worker from one task file."""
    secrets = "".join(f" --secret {name}" for name in spec.secrets)
    loop = (
        f"for i in $(seq {spec.workers}); do sky jobs launch -y -d{secrets} -n {spec.name}-$i {shlex.quote(file)}; done"
    )
    return f"# {loop}\n"
