"""Imports every architecture that vLLM registers; prints JSON: how many, and why the others do not import.

python -m tests.support.vllm_architectures
"""

import importlib
import json
import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.model_executor.models.registry import ModelRegistry


def reason(error: BaseException) -> str:
    """The module that is missing, at the end of the chain of causes, or the error's first line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return getattr(error, "name", None) or str(error).splitlines()[0]


def main() -> None:
    """Import all."""
    broken: dict[str, str] = {}
    for name, model in ModelRegistry.models.items():
        try:
            getattr(importlib.import_module(model.module_name), model.class_name)
        except Exception as error:
            broken[name] = reason(error)
    print(json.dumps({"registered": len(ModelRegistry.models), "broken": broken}))


if __name__ == "__main__":
    main()
