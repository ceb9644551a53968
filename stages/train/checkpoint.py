"""Checkpoints: one safetensors file plus a receipt with its sha256; a torn or altered one is never loaded.

Algorithm. Tensors and a JSON state go into `step-NNNNNNNN.safetensors` under a temporary name, fsync, rename; then the
receipt `step-NNNNNNNN.json` (size, sha256) the same way. A checkpoint counts only with a receipt that matches, so a
kill between any two system calls leaves either the new checkpoint or the previous one. The last `KEEP` stay on disk.
Price: model and two moments in float32, 12 bytes a parameter, written and hashed at about 1 GB/s.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bytecache.schemas import strict_json
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.files import (
    NotAFileError,
    file_sha256,
    flush_to_disk,
    put_in_place,
    read_regular,
    scratch_folder,
)

MAX_RECORD = 1 << 16
"""Bytes of the record beside a checkpoint, at most."""
KEEP = 2
"""Checkpoints kept; the older one is the fallback for damage of the newer."""


def _publish(scratch: Path, final: Path) -> None:
    scratch.chmod(0o644)  # safetensors leaves files that nobody but their owner can read
    flush_to_disk(scratch)
    put_in_place(scratch, final)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Commit a checkpoint and prune older ones.

    Args:
        folder: of one training run. step: optimiser steps done. tensors: any names. state: JSON-able.

    Raises:
        StorageError: the disk refused. NotAFileError: something else stands in its place.
    """
    final = folder / f"step-{step:08d}.safetensors"
    try:
        with scratch_folder(folder) as scratch:
            text = json.dumps({**state, "step": step}, sort_keys=True)
            body, receipt = scratch / final.name, scratch / final.with_suffix(".json").name
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, body, metadata={"state": text})
            receipt.write_text(_record(final, step, body.stat().st_size, file_sha256(body)))
            _publish(body, final)
            _publish(receipt, final.with_suffix(".json"))
        for old in sorted(folder.glob("step-*.safetensors"))[:-KEEP]:
            for file in (old.with_suffix(".json"), old):
                if file.is_file():
                    file.unlink(missing_ok=True)
    except NotAFileError:
        raise  # what stands in its place is for `verify --repair`, as the pipeline says
    except OSError as error:
        raise StorageError(f"{final}: cannot write the checkpoint ({error}); free space and rerun") from error
    return final


def _record(path: Path, step: int, size: int, sha256: str) -> str:
    """The one spelling of a checkpoint's receipt."""
    return json.dumps({"file": path.name, "size": size, "sha256": sha256, "step": step}, sort_keys=True)


def verify(path: Path) -> str:
    """The sha256 of a committed checkpoint; IntegrityError where file and receipt disagree or one is missing."""
    try:
        text = read_regular(path.with_suffix(".json"), MAX_RECORD).decode("utf-8")
        receipt = strict_json.loads(text)
        size, expected = int(receipt["size"]), str(receipt["sha256"])
        as_written = text == _record(path, int(path.stem.removeprefix("step-")), size, expected)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: no readable receipt; use an earlier checkpoint or train again") from error
    if not as_written:
        raise IntegrityError(f"{path}: its receipt is not as it was written; use an earlier checkpoint or train again")
    if not path.is_file() or path.stat().st_size != size or file_sha256(path) != expected:
        raise IntegrityError(f"{path}: bytes differ from the receipt; use an earlier checkpoint or train again")
    return expected


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint, verified first (IntegrityError)."""
    verify(path)
    with safe_open(path, framework="pt") as f:
        state = strict_json.loads(f.metadata()["state"])
        return {name: f.get_tensor(name) for name in f.keys()}, state  # noqa: SIM118


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a line about each damaged one that was passed over."""
    refused: list[str] = []
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            verify(path)
            return path, refused
        except IntegrityError as error:
            refused.append(str(error))
    return None, refused
