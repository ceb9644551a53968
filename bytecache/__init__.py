"""bytecache: an offline teacher cache for byte-level distillation.

A large teacher reads a corpus once; what it says about every next byte is kept as a small data set; any student, with
any tokenizer, trains from it. This module is the face of the package, no code: names load what they need when they are
first asked for, so that `import bytecache` costs next to nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytecache.schemas.dataset.verification import verify_dataset
    from bytecache.schemas.errors import (
        BytecacheError,
        ConfigError,
        EngineError,
        InputError,
        IntegrityError,
        Interrupted,
        StorageError,
    )
    from bytecache.schemas.settings import Settings
    from bytecache.schemas.shard.builder import ShardBuilder
    from bytecache.schemas.shard.reader import read_shard
    from bytecache.stages.loop.batches import collate_rows, step_counts
    from bytecache.stages.loop.loss import ByteLoss
    from bytecache.stages.loop.rows import MixedRows, StudentRows
    from bytecache.stages.loop.trainers import ByteLossMixin
    from bytecache.stages.targets.dataset import ByteTargets
    from bytecache.stages.targets.mixed import MixedTargets
    from bytecache.stages.targets.source import open_dataset

__all__ = [
    "ByteLoss",
    "ByteLossMixin",
    "ByteTargets",
    "BytecacheError",
    "ConfigError",
    "EngineError",
    "InputError",
    "IntegrityError",
    "Interrupted",
    "MixedRows",
    "MixedTargets",
    "Settings",
    "ShardBuilder",
    "StorageError",
    "StudentRows",
    "collate_rows",
    "open_dataset",
    "read_shard",
    "step_counts",
    "verify_dataset",
]

_HOMES = {
    "ByteLoss": "stages.loop.loss",
    "ByteLossMixin": "stages.loop.trainers",
    "MixedRows": "stages.loop.rows",
    "MixedTargets": "stages.targets.mixed",
    "ByteTargets": "stages.targets.dataset",
    "open_dataset": "stages.targets.source",
    "read_shard": "schemas.shard.reader",
    "ShardBuilder": "schemas.shard.builder",
    "verify_dataset": "schemas.dataset.verification",
    "Settings": "schemas.settings",
    "StudentRows": "stages.loop.rows",
    "collate_rows": "stages.loop.batches",
    "step_counts": "stages.loop.batches",
}


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'bytecache' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"bytecache.{_HOMES.get(name, 'schemas.errors')}"), name)
    except ModuleNotFoundError as error:
        refusal = import_module("bytecache.schemas.errors").missing_package(error)
        raise ImportError(f"{name}: {refusal or error}", name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
