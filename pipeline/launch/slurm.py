"""A Slurm job array: one task per worker, put back in the queue when it was preempted (exit code 75).

`--signal` gives the worker SIGTERM before the time limit, `--requeue` covers nodes that Slurm takes away by itself. The
workers share the run folder, so tasks may start, end and repeat in any order. `set -u` comes after the set-up, since
the hooks of environments (conda, modules) read variables that are not set.
"""

import math
import re
import shlex

from bytecache.pipeline.launch.command import JobSpec, one_word
from bytecache.schemas.errors import ConfigError, Interrupted

TIME_LIMIT = re.compile(r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE")


def slurm_script(spec: JobSpec, *, time_limit: str, partition: str = "", setup: str = "") -> str:
    """The script for `sbatch`. `time_limit`: as Slurm writes it; `setup`: shell lines before the worker.

    Raises ConfigError: a time limit that Slurm does not know, a partition that is not one word.
    """
    if not TIME_LIMIT.fullmatch(one_word("--time", time_limit)):
        raise ConfigError(f"--time {time_limit!r}: expected minutes, H:M:S, D-H, D-H:M:S or UNLIMITED, as Slurm has it")
    notice = max(60, math.ceil(spec.settings.fleet.notice_s) + 5)  # Slurm may be a minute late
    options = [
        f"--job-name={spec.name}",
        f"--array=0-{spec.workers - 1}",
        "--ntasks=1",
        f"--cpus-per-task={spec.cpus}",
        *([f"--gpus-per-task={spec.gpus}"] if spec.gpus else []),
        *([f"--partition={one_word('--partition', partition)}"] if partition else []),
        f"--time={time_limit}",
        "--requeue",
        "--open-mode=append",
        f"--signal=TERM@{notice}",
        f"--output={spec.name}-%A_%a.log",
    ]
    return "\n".join([
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in options),
        *([setup] if setup else []),
        "set -u",
        *(f': "${{{name}:?a secret of the configuration; set it where you call sbatch}}"' for name in spec.secrets),
        f"export OMP_NUM_THREADS={spec.cpus}",
        # A step does not inherit the cores of its job (Slurm 22.05 and later).
        f"srun --ntasks=1 --cpus-per-task={spec.cpus} {shlex.join(spec.command())}",
        "code=$?",
        f'if [ "$code" -eq {Interrupted.exit_code} ]; then',
        "    # Preempted or out of time: everything whole is kept, the same task goes on later.",
        '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        "    exit 0",
        "fi",
        'exit "$code"',
        "",
    ])  # fmt: skip
