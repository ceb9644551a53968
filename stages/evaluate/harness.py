"""The exported checkpoint under lm-eval-harness: a plain Hugging Face model as any other, measured by others' code.

Optional: the package lm-eval is imported only when asked for. Tasks are names of the harness or the path of a task's
YAML file. Price: the harness's own; a checkpoint is loaded once for all tasks.
"""

from pathlib import Path
from typing import Any

import torch

from bytecache.schemas.errors import ConfigError, InputError
from bytecache.stages.student.tokenizer_files import open_kept


def measure(checkpoint: Path, tasks: list[str], *, limit: int = 0, batch_size: int = 8) -> dict[str, dict[str, Any]]:
    """Run tasks on an exported checkpoint.

    Args:
        checkpoint: folder that `export` wrote. tasks: names, or paths of YAML files. limit: examples a task; 0 = all.

    Returns:
        {task: {metric: value}}; standard errors are metrics of their own.

    Raises:
        ConfigError: lm-eval is not installed. InputError: a task it does not know or cannot fetch.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("--lm-eval needs the package lm-eval; pip install lm-eval") from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise InputError(f"--lm-eval {missing}: no such task file; check the path")
    names = [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in tasks]
    manager = TaskManager(include_path=[str(folder) for folder in {file.resolve().parent for file in files}] or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"--lm-eval {unknown[0]}: no task of that name (a file must be named after its task)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # AutoTokenizer, which the harness would take, builds another tokenizer for some architectures.
        model = HFLM(
            pretrained=str(checkpoint), tokenizer=open_kept(checkpoint), dtype="float32", trust_remote_code=False,
            device=device, batch_size=batch_size,
        )  # fmt: skip
        answer = simple_evaluate(model=model, tasks=names, task_manager=manager, limit=limit or None, log_samples=False)
    except (OSError, ConnectionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--lm-eval {','.join(tasks)}: {reason}; check the task and the network") from error
    return {task: _numbers(values) for task, values in answer["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {name.removesuffix(",none"): value for name, value in sorted(numbers.items())}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """{run: what `measure` returned} as a Markdown table, one column a run."""
    rows = sorted({(task, metric) for result in results.values() for task in result for metric in result[task]})
    lines = ["| lm-eval-harness | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for task, metric in rows:
        values = [result.get(task, {}).get(metric) for result in results.values()]
        shown = " | ".join("" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"| {task}, {metric} | {shown} |")
    return "\n".join(lines) + "\n"
