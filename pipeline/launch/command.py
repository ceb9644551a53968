"""The command a worker runs, wherever it runs: self-contained, every setting that is not the default spelled out."""

import json
from dataclasses import dataclass
from typing import Literal

from bytecache.pipeline.config_text import secrets_of, sections
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.secrets import Secret
from bytecache.schemas.settings import Settings

Stage = Literal["teacher", "convert", "train"]
STAGES: tuple[Stage, ...] = ("teacher", "convert", "train")


@dataclass(frozen=True)
class JobSpec:
    """What to start: `workers` processes of `stage`, each on `gpus` GPUs (0: CPU) and `cpus` cores of one machine.

    The trainer is one job whatever `workers` says; its GPUs are shared out by torchrun.
    """

    settings: Settings
    stage: Stage
    workers: int
    gpus: int
    cpus: int

    @property
    def name(self) -> str:
        """For job lists: lower case and hyphens, as every scheduler takes."""
        return f"bytecache-{self.stage}"

    @property
    def secrets(self) -> dict[str, str]:
        """Environment variables that a worker takes its secrets from, with their values; only names go to a file."""
        return secrets_of(self.settings)

    def command(self, program: tuple[str, ...] = ("bytecache",)) -> list[str]:
        """The worker's arguments. `program`: how bytecache is called there."""
        options = ["--fresh"] + [part for setting in overrides(self.settings) for part in ("--set", setting)]
        if self.stage != "train":
            return [*program, self.stage, "--worker", *options]
        if self.gpus > 1:
            return ["torchrun", "--standalone", f"--nproc-per-node={self.gpus}", "-m", "bytecache", "train", *options]
        return [*program, "train", *options]


def plan_job(settings: Settings, stage: str, workers: int, gpus: int | None, cpus: int) -> JobSpec:
    """Check and complete what the user asked for; `gpus` None = what the stage needs.

    Raises ConfigError: an unknown stage, no workers, fewer GPUs than the teacher is spread over.
    """
    if stage not in STAGES:
        raise ConfigError(f"--stage {stage}: unknown; stages that jobs run: {', '.join(STAGES)}")
    if workers < 1 or cpus < 1:
        raise ConfigError(f"--workers {workers} --cpus {cpus}: expected at least 1 of each")
    spread = settings.teacher.tensor_parallel
    if gpus is None:
        gpus = {"teacher": spread, "convert": 0, "train": 1}[stage]
    if stage == "teacher" and gpus not in (0, spread):
        raise ConfigError(
            f"--gpus {gpus}: one teacher takes teacher.tensor_parallel = {spread} GPUs; for speed add --workers"
        )
    if stage == "teacher" and spread > 1 and gpus == 0:
        raise ConfigError(f"--gpus 0 with teacher.tensor_parallel = {spread}; a CPU teacher takes 1")
    return JobSpec(settings, stage, 1 if stage == "train" else workers, gpus, cpus)


def overrides(settings: Settings) -> list[str]:
    """`section.key=value` for every setting that differs from its default and holds no secret, in order."""
    differing = []
    # What a worker would have by itself: the training of its student, where that is named.
    named, silent = Settings.defaults_beside(settings.student), Settings()
    for section in sections():
        default, section_settings = (
            getattr(named if section == "train" else silent, section),
            getattr(settings, section),
        )
        for key, value in section_settings:
            if value != getattr(default, key):
                if isinstance(value, Secret):
                    if value.is_secret:
                        continue  # the worker's environment has it, see `JobSpec.secrets`
                    value = value.public
                differing.append(f"{section}.{key}={json.dumps(value) if not isinstance(value, str) else value}")
    return differing


def one_word(option: str, value: str) -> str:
    """`value`, if it is empty or one word: what is put into a line of a job file must not begin another.

    Raises ConfigError.
    """
    if value and (value.split() != [value] or not value.isprintable()):
        raise ConfigError(f"{option} {value!r}: expected one word, without spaces or new lines")
    return value


def needs_shared_run(settings: Settings) -> None:
    """Raises ConfigError for a run folder that machines of a cloud cannot share."""
    if "://" not in settings.run.dir:
        raise ConfigError(
            f"run.dir = {settings.run.dir} is a folder of this machine; workers elsewhere need s3://, gs:// or az://"
        )
