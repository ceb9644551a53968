"""What a checkpoint's small files say of whether it can be used, before a weight of it is read."""

from pathlib import Path
from typing import Any

from bytecache.schemas import strict_json
from bytecache.schemas.errors import ConfigError, InputError

QUANTISED = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""Files beside a config.json by which older tools say that weights are quantised."""


def quantisation(folder: Path) -> str:
    """How the weights of a checkpoint are quantised ("gptq", "awq", "bitsandbytes" ...); empty where they are not.

    Raises InputError for a config.json that cannot be read.
    """
    section = _read(folder / "config.json").get("quantization_config")
    if isinstance(section, dict):
        return str(section.get("quant_method") or "of a kind it does not name")
    if section is not None:
        return "of a kind it does not name"
    for name in QUANTISED:
        if (folder / name).is_file():
            return str(_read(folder / name).get("quant_method") or f"as its {name} says")
    return ""


def quantisation_section(folder: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says of its quantisation; empty where it says nothing that can be read."""
    section = _read(folder / "config.json").get("quantization_config")
    return section if isinstance(section, dict) else {}


def refuse_quantised_teacher(folder: Path, model: str, backend: str) -> None:
    """Raise ConfigError for quantised weights under `hf`, which computes every weight in float32 or half precision."""
    method = quantisation(folder) if backend == "hf" else ""
    if method:
        raise ConfigError(
            f"teacher.model = {model!r}: its weights are quantised ({method}), which teacher.backend = 'hf' does not "
            'compute with; set teacher.backend = "vllm", or name the model\'s own weights'
        )


def refuse_unfit_student(folder: Path, where: str) -> None:
    """Raise InputError for a checkpoint that could be read and not trained, or trained and not saved."""
    if method := quantisation(folder):
        raise InputError(
            f"{where}: its weights are quantised ({method}) and cannot be trained; name the model's own weights"
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{where}: no *.safetensors weights in {folder}; save the model with "
            "save_pretrained(safe_serialization=True)"
        )
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    from transformers import GenerationConfig

    settings = _read(file)
    try:
        GenerationConfig.from_dict(settings).validate(strict=True)
    except Exception as error:  # whatever the library makes of strange values
        reason = " ".join(str(error).replace("\n", " ").split())[:300]
        raise InputError(
            f"{where}: its generation_config.json contradicts itself, no model can be saved with it ({reason}); "
            "correct it, for example by do_sample = true where there is a temperature, or delete it"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = strict_json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not an object; fetch it again")
    return content
