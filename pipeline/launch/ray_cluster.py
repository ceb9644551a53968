"""Workers on a Ray cluster, yours or one of this machine: an actor per engine, placed by GPUs.

An actor holds one worker process (and so one engine) and the GPUs Ray gave it. The worker is a process of its own
because engines must be killed whole: a hung one inside the actor would keep Ray's process and the GPU. It dies with the
actor (PR_SET_PDEATHSIG). When Ray loses a node it restarts the actor elsewhere, and the new worker claims what is left.
Ray itself sends its arguments by pickle between its own processes; no file of ours is pickled.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from bytecache.pipeline.launch.command import JobSpec
from bytecache.pipeline.launch.supervise import settle, supervise
from bytecache.schemas.errors import ConfigError, Interrupted, install

POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


class Engine:
    """What an actor does: run one worker to the end, stop it when told."""

    def __init__(self) -> None:
        self._stopping = False

    def run(
        self, command: list[str], cpus: int, notice_s: float, restarts: int, secrets: dict[str, str] | None = None
    ) -> list[int]:
        """Exit codes of the worker, the last one final. The environment is the actor's: Ray has set the GPUs there.

        `secrets`: variables that the worker's environment has besides.
        """
        program = [sys.executable, *command]
        environment = {**os.environ, "OMP_NUM_THREADS": str(cpus), **(secrets or {})}
        try:
            (child,) = supervise(
                program,
                [environment],
                lambda: self._stopping,
                restarts=restarts,
                notice_s=notice_s,
                prepare=_die_with_parent,
            )
        except Interrupted:
            return [Interrupted.exit_code]
        return child.codes

    def stop(self) -> None:
        """Drain: the worker gets its notice."""
        self._stopping = True


def run_on_ray(
    spec: JobSpec, stop: Callable[[], bool], *, address: str = "", restarts: int = 3, **init: Any
) -> list[list[int]]:
    """Run the workers to the end of the stage on the cluster at `address` (empty: one of this machine).

    `init` goes to `ray.init`. Returns the exit codes of each worker. Raises ConfigError (Ray is not installed, or the
    cluster can never place one worker), Interrupted, and BytecacheError when no worker came through.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(f"jobs ray needs {error.name}; {install('ray')}") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address or None, log_to_driver=True, include_dashboard=False, **init)
    try:
        cluster: Any = ray  # its type hints lag behind its options
        total = cluster.cluster_resources()
        if total.get("GPU", 0) < spec.gpus or total.get("CPU", 0) < spec.cpus:
            raise ConfigError(
                f"a worker asks for {spec.gpus} GPUs and {spec.cpus} CPUs; the cluster has "
                f"{total.get('GPU', 0):.0f} and {total.get('CPU', 0):.0f}; lower --gpus or --cpus, or add nodes"
            )
        actor = cluster.remote(
            num_cpus=spec.cpus, num_gpus=spec.gpus, max_restarts=-1, max_task_retries=-1, max_concurrency=2,
            scheduling_strategy="SPREAD",
        )(Engine)  # fmt: skip
        engines = [actor.remote() for _ in range(spec.workers)]
        command = spec.command(("-m", "bytecache"))
        notice = spec.settings.fleet.notice_s
        waiting = [engine.run.remote(command, spec.cpus, notice, restarts, spec.secrets) for engine in engines]
        running = list(waiting)
        while running:
            done, running = ray.wait(running, timeout=POLL_S)
            if done and 0 in [ray.get(ref)[-1] for ref in done]:
                # The stage is settled: workers that Ray has not placed yet (fewer GPUs than workers) are not needed.
                break
            if stop():
                for engine in engines:
                    engine.stop.remote()
                ray.wait(waiting, num_returns=len(waiting), timeout=notice + 5)
                raise Interrupted(f"{spec.workers} workers were stopped by a signal; rerun the same command")
        finished, _ = ray.wait(waiting, num_returns=len(waiting), timeout=notice + 5)
        codes = [list(ray.get(ref)) for ref in finished]
        settle([each[-1] for each in codes])
        return codes
    finally:
        if ours:
            ray.shutdown()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
