"""`bytecache jobs ...`: start many workers, here or elsewhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytecache.pipeline.cli.options import Given, injected, refusals, run_stage, takes_settings
from bytecache.pipeline.cli.terminal import say
from bytecache.schemas.files import refuse_output, write_text
from bytecache.schemas.settings import Settings

if TYPE_CHECKING:
    from bytecache.pipeline.context import Context
    from bytecache.pipeline.launch.command import JobSpec

app = typer.Typer(
    name="jobs",
    help=(
        "Start workers: **local** (GPUs of this machine), **ray** (a Ray cluster), or print what **slurm**, "
        "**skypilot** and **kubernetes** start them from.\n\nRun `bytecache plan` first, "
        "once. Workers share the run folder: start, kill and add them at any time."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
WorkersOption = Annotated[int, typer.Option("--workers", "-n", min=1, help="Workers to start.")]
StageOption = Annotated[
    str, typer.Option("--stage", help="teacher, convert or train (one trainer, its GPUs by torchrun).")
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", min=0, help="GPUs per worker; default: what the stage needs; 0 = CPU.")
]
CpusOption = Annotated[int, typer.Option("--cpus", min=1, help="Cores per worker.")]
OutOption = Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default: standard output.")]
RestartsOption = Annotated[int, typer.Option("--restarts", min=0, help="Restarts of a worker that crashes.")]


def _emit(text: str, out: Path | None) -> None:
    if out is None:
        say(text, nl=False)
    else:
        refuse_output(out, "--out")
        write_text(out, text)
        say(f"{out} written")


@dataclass(frozen=True)
class Asked:
    """The options that every launcher takes."""

    stage: str
    workers: int
    gpus: int | None
    cpus: int

    def of(self, settings: Settings) -> "JobSpec":
        """What to start. Raises ConfigError."""
        from bytecache.pipeline.launch.command import plan_job

        return plan_job(settings, self.stage, self.workers, self.gpus, self.cpus)


starts_workers = injected(
    "asked",
    {
        "stage": (StageOption, "teacher"),
        "workers": (WorkersOption, 1),
        "gpus": (GpusOption, None),
        "cpus": (CpusOption, 4),
    },
    Asked,
)


@app.command()
@takes_settings()
@starts_workers
def local(
    given: Given,
    asked: Asked,
    restarts: RestartsOption = 3,
) -> None:
    """Run workers as processes of this machine, each on GPUs of its own, and wait for the end of the stage.

    Reads: the run folder. Writes: the run folder, as the stage does. A worker that crashes is started again.

    Example: bytecache jobs local --workers 8 --run-dir runs/books
    """
    from bytecache.pipeline.launch.local import run_local

    run_stage(given, lambda context: run_local(asked.of(context.settings), context.stop, restarts=restarts))


@app.command()
@takes_settings()
@starts_workers
def ray(
    given: Given,
    asked: Asked,
    restarts: RestartsOption = 3,
    address: Annotated[
        str, typer.Option("--address", help="auto, or the cluster's address; empty = a cluster of this machine.")
    ] = "",
) -> None:
    """Run workers as actors of a Ray cluster, placed by GPUs, and wait for the end of the stage.

    Reads: the run folder, which all nodes must reach. Writes: the same. Ray moves the workers of a node that it loses.

    Example: bytecache jobs ray --address auto --workers 16 --run-dir s3://bucket/books
    """
    from bytecache.pipeline.launch.ray_cluster import run_on_ray

    def command(context: "Context") -> None:
        run_on_ray(asked.of(context.settings), context.stop, address=address, restarts=restarts)

    run_stage(given, command)


@app.command()
@takes_settings()
@starts_workers
def slurm(
    given: Given,
    asked: Asked,
    time_limit: Annotated[str, typer.Option("--time", help="Time limit of a task, as Slurm writes it.")] = "04:00:00",
    partition: Annotated[str, typer.Option("--partition", help="Slurm partition.")] = "",
    setup: Annotated[
        str, typer.Option("--setup", help="Shell lines before the worker, e.g. to activate an environment.")
    ] = "",
    out: OutOption = None,
) -> None:
    """Write a job array for sbatch; preempted tasks go back into the queue by themselves.

    Reads: the configuration. Writes: a script; submit it with sbatch.

    Example: bytecache jobs slurm --workers 32 --run-dir /shared/books --setup ". /shared/venv/bin/activate" | sbatch
    """
    with refusals():
        from bytecache.pipeline.launch.slurm import slurm_script

        spec = asked.of(given.settings(remote=False))
        _emit(slurm_script(spec, time_limit=time_limit, partition=partition, setup=setup), out)


@app.command()
@takes_settings()
@starts_workers
def skypilot(
    given: Given,
    asked: Asked,
    accelerator: Annotated[str, typer.Option("--accelerator", help="GPU by SkyPilot's name.")] = "L4",
    spot: Annotated[bool, typer.Option("--spot/--on-demand", help="Spot machines.")] = True,
    setup: Annotated[
        str, typer.Option("--setup", help="Shell lines that install bytecache; empty = the image has it.")
    ] = "",
    image: Annotated[str, typer.Option("--image", help="Container that has bytecache, as docker:name:tag.")] = "",
    out: OutOption = None,
) -> None:
    """Write a managed spot job for SkyPilot; its first line says how to start one per worker.

    Reads: the configuration; run.dir must be a bucket. Writes: YAML.

    Example: bytecache jobs skypilot --workers 16 --accelerator H100 --image docker:registry/bytecache --run-dir
    s3://bucket/books --out job.yaml
    """
    with refusals():
        import yaml

        from bytecache.pipeline.launch.skypilot import SETUP, launch_lines, skypilot_task

        spec = asked.of(given.settings(remote=False))
        task = skypilot_task(spec, accelerator=accelerator, setup=setup or SETUP, image=image, spot=spot)
        _emit(launch_lines(spec, str(out or "job.yaml")) + yaml.safe_dump(task, sort_keys=False, width=10_000), out)


@app.command()
@takes_settings()
@starts_workers
def kubernetes(
    given: Given,
    asked: Asked,
    image: Annotated[
        str, typer.Option("--image", help="Container image with bytecache installed.")
    ] = "bytecache:latest",
    secret: Annotated[str, typer.Option("--secret", help="Secret with the store's credentials as variables.")] = "",
    namespace: Annotated[str, typer.Option("--namespace", help="Namespace of the job.")] = "",
    memory: Annotated[str, typer.Option("--memory", help="Memory limit of a pod.")] = "32Gi",
    out: OutOption = None,
) -> None:
    """Write an indexed Job for kubectl: equal pods, preempted ones replaced without counting as failures.

    Reads: the configuration; run.dir must be a bucket. Writes: YAML.

    Example: bytecache jobs kubernetes --workers 16 --image registry/bytecache --run-dir s3://b/books --out job.yaml
    """
    with refusals():
        import yaml

        from bytecache.pipeline.launch.kubernetes import kubernetes_job

        spec = asked.of(given.settings(remote=False))
        job = kubernetes_job(spec, image=image, secret=secret, namespace=namespace, memory=memory)
        _emit(yaml.safe_dump(job, sort_keys=False, width=10_000), out)
