"""Quantised weights that vLLM has no kernel for on a CPU, known from a checkpoint's small files.

vLLM itself says it late, in the first step of its engine or never to the point, and not what helps. What is written
here was seen with vLLM 0.32 (tests/stages/engines/test_quantised.py); what is not is left to the engine.
"""

from pathlib import Path

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError
from bytecache.stages.models.device import trunk_dtype
from bytecache.stages.models.fitness import quantisation, quantisation_section


def refuse_without_kernels(folder: Path, settings: st.Teacher) -> None:
    """Raise ConfigError for a checkpoint and a precision that vLLM on a CPU does not compute, with what it does."""
    method = quantisation(folder)
    # Block-wise scales go another way, which was not tried.
    if method == "fp8" and not quantisation_section(folder).get("weight_block_size"):
        raise ConfigError(
            f"teacher.model = {settings.model!r}: its weights are quantised (fp8), for which vLLM has no kernel on a "
            "CPU; take a machine with a GPU, or name the model's own weights"
        )
    if _is_of_four_bits(folder, method) and trunk_dtype(settings, on_cpu=True) == "float32":
        raise ConfigError(
            f"teacher.dtype = {settings.dtype!r}, float32 on a CPU: teacher.model = {settings.model!r} is quantised "
            f'({method}) to integers that vLLM multiplies in 16 bits alone there; set teacher.dtype = "bfloat16"'
        )


def _is_of_four_bits(folder: Path, method: str) -> bool:
    """Whether the weights are packed integers, as GPTQ, AWQ and `pack-quantized` of compressed-tensors have them."""
    section = quantisation_section(folder)
    groups = section.get("config_groups")
    parts = [section, *(groups.values() if isinstance(groups, dict) else ())]
    packed = any(isinstance(part, dict) and part.get("format") == "pack-quantized" for part in parts)
    return method in ("gptq", "awq") or (method == "compressed-tensors" and packed)
