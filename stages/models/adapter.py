"""A LoRA adapter on a teacher: merged once into an ordinary checkpoint, which every engine then sees.

The base is loaded in float32, peft puts the adapter on it and merges it, and what is saved is what the engine would
compute with: float32 on a CPU, the checkpoint's own precision on a GPU, or what `teacher.dtype` says. The saved
checkpoint is loaded again and its logits are compared with those of the adapter beside its base: a merge that peft
cannot do (tied embeddings, a layer of a kind it does not know) is refused, not passed on. So nothing of an engine's own
support for adapters is needed, and none of its limits (vLLM's: no adapter on the output embedding) apply.

Adapters come as safetensors alone. Price: the base in float32 in memory once or twice, and a copy of it on disk, in
`models` of the cache folder.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from bytecache.schemas import strict_json
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.files import cache_folder, file_sha256, make_folder, read_regular, scratch_folder
from bytecache.schemas.settings import Teacher
from bytecache.stages.models.device import trunk_dtype
from bytecache.stages.models.fitness import quantisation
from bytecache.stages.models.soundness import MAX_CONFIG

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MARKER = "bytecache-adapter.json"
_BASE = "base_model_name_or_path"
DIFFERENCE = 1e-3
"""By how much of the largest a logit may change between the adapter beside its base and the merged checkpoint, in
float32; sixteen-bit weights are compared with `HALF`."""
HALF = 0.1
_BESIDE = ("*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt")
"""Files of the base that a merged checkpoint takes over, unless saving wrote its own."""


def adapter_identity(adapter: Path) -> dict[str, str]:
    """sha256 of an adapter's two files. Raises InputError where one is missing, or it is of another form."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            other = ", ".join(sorted(file.name for file in adapter.glob("adapter_model*"))) or "nothing like it"
            raise InputError(
                f"teacher.adapter = {str(adapter)!r}: {name} is missing (it has {other}); give a folder as "
                "peft's save_pretrained writes it, with safe_serialization"
            )
    return {name: file_sha256(adapter / name) for name in (CONFIG, WEIGHTS)}


def merged(base: Path, weights: dict[str, str], adapter: Path, settings: Teacher) -> Path:
    """The folder of the checkpoint with the adapter merged, made if it is not there; `weights`: hashes of the base's.

    Raises ConfigError for a quantised base, InputError for an adapter that does not fit it or cannot be merged.
    """
    if method := quantisation(base):
        raise ConfigError(
            f"teacher.model = {settings.model!r}: its weights are quantised ({method}), an adapter cannot be merged "
            "into them; name the unquantised weights that the adapter was trained on"
        )
    dtype = trunk_dtype(settings, on_cpu=not torch.cuda.is_available())
    made_of = {"base": weights, "adapter": adapter_identity(adapter), "dtype": dtype}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "models" / f"adapter-{key[:32]}"
    if _is_whole(folder):
        return folder
    make_folder(folder.parent)
    with scratch_folder(folder.parent) as scratch:
        _merge(base, adapter, scratch, dtype, f"teacher.adapter = {settings.adapter!r}")
        _take_over(base, scratch)
        record = {"made_of": made_of, "files": {file.name: file_sha256(file) for file in scratch.iterdir()}}
        (scratch / MARKER).write_text(json.dumps(record, indent=1, sort_keys=True))
        if folder.exists():
            shutil.rmtree(folder)  # it was not whole
        scratch.chmod(0o755)
        scratch.rename(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        record = strict_json.loads(read_regular(folder / MARKER, MAX_CONFIG))
        return bool(record["files"]) and all(
            file_sha256(folder / name) == sha256 for name, sha256 in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _merge(base: Path, adapter: Path, out: Path, dtype: str, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        ).eval()

    model = load(base)
    own = model.config.get_text_config().dtype
    try:
        model = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # peft and torch have a kind for everything that does not fit
        raise InputError(
            f"{name} does not fit its base ({' '.join(str(error).split())[:300]}); name the weights that it was "
            f"trained on: {_trained_on(adapter)}"
        ) from error
    _refuse_unused(model, adapter, name)
    ids = torch.arange(2, 34).remainder(model.get_input_embeddings().weight.shape[0])[None]
    with torch.inference_mode():
        wanted = model.eval()(input_ids=ids).logits
    plain = model.merge_and_unload()
    stored = own if dtype == "auto" and own is not None else getattr(torch, dtype, torch.float32)
    plain.to(stored).save_pretrained(out, safe_serialization=True)
    del model, plain
    with torch.inference_mode():
        logits = load(out)(input_ids=ids).logits
    difference = float((logits - wanted).abs().max() / wanted.abs().max())
    limit = DIFFERENCE if stored == torch.float32 else HALF
    if not difference <= limit:
        raise InputError(
            f"{name}: merging it changes logits by {difference:.3g} of the largest (limit {limit:g}); merge it with "
            "the software that made it, and give the merged checkpoint as teacher.model"
        )


def _refuse_unused(model: Any, adapter: Path, name: str) -> None:
    """Raise InputError where the adapter's file holds weights that the model did not take, or lacks some."""
    from safetensors import safe_open

    with safe_open(adapter / WEIGHTS, "pt") as opened:
        stored = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 - not a mapping
    taken = {key.replace(".default", "").replace(".modules_to_save", "") for key in model.state_dict()}
    unused = sorted(key for key in stored if key not in taken and key.replace(".base_layer", "") not in taken)
    missing = sorted(key for key in taken if "lora_" in key and key not in stored)  # peft draws them at random
    if unused or missing:
        what = f"{len(unused)} of its {len(stored)} weights have no place in its base" if unused else (
            f"{len(missing)} weights that its configuration asks for are not in its file"
        )  # fmt: skip
        raise InputError(
            f"{name}: {what} (the first: {(unused or missing)[0]}); name the weights that it was trained on: "
            f"{_trained_on(adapter)}, or fetch the adapter again"
        )


def _trained_on(adapter: Path) -> str:
    try:
        return str(strict_json.loads(read_regular(adapter / CONFIG, MAX_CONFIG)).get(_BASE) or "its maker did not say")
    except (OSError, ValueError, AttributeError):
        return "its configuration cannot be read"


def _take_over(base: Path, out: Path) -> None:
    """Tokenizer, template and the like; what lists or describes weights is the merged checkpoint's own."""
    for pattern in _BESIDE:
        for file in base.glob(pattern):
            if file.is_file() and not (out / file.name).exists() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, out / file.name)
