"""Workers as processes of this machine, each with GPUs of its own; for one box with several GPUs, or many cores."""

import os
import sys
from collections.abc import Callable

from bytecache.pipeline.launch.command import JobSpec
from bytecache.pipeline.launch.supervise import settle, supervise
from bytecache.schemas.errors import ConfigError

PROGRAM = (sys.executable, "-m", "bytecache")


def run_local(spec: JobSpec, stop: Callable[[], bool], *, visible: list[str] | None = None, restarts: int = 3) -> None:
    """Run the workers to the end of the stage. `visible`: ids of this machine's GPUs (None: as the environment says).

    Raises ConfigError (more workers than there are GPUs for), Interrupted, and BytecacheError when none came through.
    """
    ids = visible_gpus() if visible is None else visible
    if spec.gpus and len(ids) < spec.workers * spec.gpus:
        raise ConfigError(
            f"--workers {spec.workers} on {spec.gpus} GPUs each need {spec.workers * spec.gpus}; this machine "
            f"shows {len(ids)} (--gpus 0 for CPU workers)"
        )
    environments = []
    for number in range(spec.workers):
        environment = {**os.environ, **spec.secrets}
        if spec.gpus:
            mine = ids[number * spec.gpus : (number + 1) * spec.gpus]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        if spec.cpus:
            environment.setdefault("OMP_NUM_THREADS", str(spec.cpus))
        environments.append(environment)
    children = supervise(
        spec.command(PROGRAM), environments, stop, restarts=restarts, notice_s=spec.settings.fleet.notice_s
    )
    settle([child.code for child in children if child.code is not None])


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [part for part in listed.split(",") if part.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
