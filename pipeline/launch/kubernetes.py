"""A Kubernetes Job of equal, indexed pods on spot nodes (batch/v1, Kubernetes 1.31 or later).

A pod that was preempted (exit code 75, or a node that goes away) is replaced and not counted as a failure; a refusal
that every pod would repeat (configuration, input, integrity: 2, 3, 4) fails the whole job at once; engine and storage
failures are tried again, a few times per index. The first index that sees the stage settled does not end the others:
each finds nothing left and ends by itself.
"""

import math
from typing import Any

from bytecache.pipeline.launch.command import JobSpec, needs_shared_run, one_word
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError, Interrupted

SCRATCH = "/scratch"


def kubernetes_job(
    spec: JobSpec, *, image: str, secret: str = "", namespace: str = "", memory: str = "32Gi", retries: int = 3
) -> dict[str, Any]:
    """The Job as an object, for `kubectl apply -f -`. `secret`: holds the store's credentials as environment variables.

    Raises ConfigError: the run folder is a path of this machine, or settings hold secrets and no `secret` is named.
    """
    needs_shared_run(spec.settings)
    options = {"--image": image, "--secret": secret, "--namespace": namespace, "--memory": memory}
    for option, value in options.items():
        one_word(option, value)
    if spec.secrets and not secret:
        raise ConfigError(
            f"settings hold secrets, which are written to no file: put {', '.join(spec.secrets)} into a secret of the "
            "cluster and name it with --secret"
        )
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": spec.name, **({"namespace": namespace} if namespace else {})},
        "spec": {
            "completionMode": "Indexed",
            "completions": spec.workers,
            "parallelism": spec.workers,
            "backoffLimitPerIndex": retries,
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": {"metadata": {"labels": {"app": spec.name}}, "spec": _pod(spec, image, secret, memory)},
        },
    }


def _failure_rules() -> list[dict[str, Any]]:
    """What of a pod's end is no failure, and what ends the whole job."""
    refusals = [ConfigError.exit_code, InputError.exit_code, IntegrityError.exit_code]
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [Interrupted.exit_code]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": refusals}},
    ]


def _pod(spec: JobSpec, image: str, secret: str, memory: str) -> dict[str, Any]:
    """One worker in its container, with a scratch volume of the node."""
    limits: dict[str, Any] = {"memory": memory}
    if spec.gpus:
        limits["nvidia.com/gpu"] = spec.gpus
    container: dict[str, Any] = {
        "name": "worker",
        "image": image,
        # The kubelet puts variables in the place of $(NAME).
        "command": [part.replace("$(", "$$(") for part in (*spec.command(), "--set", f"run.scratch={SCRATCH}")],
        "env": [{"name": "OMP_NUM_THREADS", "value": str(spec.cpus)}, {"name": "HF_HOME", "value": f"{SCRATCH}/hub"}],
        "resources": {"requests": {"cpu": str(spec.cpus)}, "limits": limits},
        "volumeMounts": [{"name": "scratch", "mountPath": SCRATCH}],
    }
    volumes: list[dict[str, Any]] = [{"name": "scratch", "emptyDir": {}}]
    if secret:
        container["envFrom"] = [{"secretRef": {"name": secret}}]
    if spec.gpus > 1:  # tensor parallelism shares tensors through /dev/shm, 64 MiB by default
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    return {
        "restartPolicy": "Never",
        # The kubelet kills after this: the worker's own notice must fit in.
        "terminationGracePeriodSeconds": math.ceil(spec.settings.fleet.notice_s) + 5,
        "tolerations": [{"operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": volumes,
    }
