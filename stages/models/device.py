"""What of the machine enters a teacher's numbers: device, precision that it makes of `auto`, the head's precision."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bytecache.schemas import settings as st
from bytecache.schemas.errors import InputError

CPU_TOKENS, GPU_TOKENS = 512, 8192
"""Tokens computed at once where teacher.max_batched_tokens = 0: enough to keep the device busy, and memory small."""


def device_kind() -> str:
    """`cpu`, or the GPU's name: half-precision numbers depend on the kernels that it chooses."""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def batched_tokens(settings: st.Teacher, *, on_cpu: bool) -> int:
    """Tokens that the engine computes at once."""
    return settings.max_batched_tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS)


def trunk_dtype(settings: st.Teacher, *, on_cpu: bool) -> str:
    """The trunk's precision; `auto` is float32 on a CPU, the checkpoint's own (also called `auto`) on a GPU."""
    return "float32" if settings.dtype == "auto" and on_cpu else settings.dtype


def head_is_quantised(folder: Path) -> bool:
    """Whether the output embedding of a checkpoint is stored in integers or eight-bit floats. Raises InputError."""
    parts = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    owner, _, part = name.rpartition(".")
                    if owner.rpartition(".")[2] == "lm_head":
                        parts.add(part)
                        if part == "weight" and opened.get_slice(name).get_dtype() not in ("F64", "F32", "F16", "BF16"):
                            return True
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the weights in {folder} are damaged ({file.name}: {error}); fetch the checkpoint again"
            ) from error
    return bool(parts - {"weight", "bias"})


def own_dtype(folder: Path) -> str:
    """The precision that a checkpoint's configuration states, `float32` where it states none."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        stated = part.get("dtype") or part.get("torch_dtype")
        if stated:
            return str(stated).removeprefix("torch.")
    return "float32"
