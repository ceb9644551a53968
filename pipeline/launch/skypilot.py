"""SkyPilot managed spot jobs: one small job per worker, recovered by SkyPilot wherever spot machines are to be had.

Not one job of many nodes: SkyPilot starts those together and stops all when one is preempted, while workers need each
other for nothing. `launch_lines` starts the same file once per worker.
"""

import shlex
from typing import Any

from bytecache.pipeline.launch.command import JobSpec, needs_shared_run, one_word
from bytecache.schemas.errors import ConfigError, Interrupted

SETUP = (
    "command -v bytecache || { echo 'bytecache is not installed on this machine: write the job again with --setup, "
    "shell lines that install it, or with --image, an image that has it' >&2; exit 1; }"
)
"""Where the user names none: bytecache is in no package index, so there is nothing that could be installed unasked."""


def skypilot_task(
    spec: JobSpec, *, accelerator: str = "", setup: str = SETUP, image: str = "", spot: bool = True, retries: int = 3
) -> dict[str, Any]:
    """The task file as an object.

    Args:
        accelerator: SkyPilot's name of a GPU (H100, L4); empty with `spec.gpus` = 0. setup: shell lines that install
            bytecache. image: a container that has it, as `docker:registry/name:tag`.

    Raises ConfigError: the run folder is a path of this machine, or an accelerator or image that is not one word.
    """
    needs_shared_run(spec.settings)
    one_word("--accelerator", accelerator)
    resources: dict[str, Any] = {
        "cpus": f"{spec.cpus}+",
        "use_spot": spot,
        # 75: the worker drained on a notice before SkyPilot saw the machine go. Without it that would be a failure.
        "job_recovery": {"max_restarts_on_errors": retries, "recover_on_exit_codes": [Interrupted.exit_code]},
    }
    if image:
        resources["image_id"] = one_word("--image", image)
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
    """Shell that starts every worker from one task file, as a comment. Raises ConfigError for a name with new lines."""
    if not file.isprintable():
        raise ConfigError(f"--out {file!r}: a file name with new lines or control characters; choose another")
    secrets = "".join(f" --secret {name}" for name in spec.secrets)
    loop = (
        f"for i in $(seq {spec.workers}); do sky jobs launch -y -d{secrets} -n {spec.name}-$i {shlex.quote(file)}; done"
    )
    return f"# {loop}\n"
