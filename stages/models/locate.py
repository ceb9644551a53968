"""Where a model lies: a name or a folder to a folder with its files, without loading any of it."""

from pathlib import Path

from bytecache.schemas import settings as st
from bytecache.schemas.errors import InputError
from bytecache.schemas.files import cache_folder, file_sha256, local_path
from bytecache.stages.models.soundness import refuse_unsound


def resolve_model(settings: st.Teacher) -> Path:
    """The teacher's checkpoint folder, see `locate`; with an adapter the merged one (`stages.models.adapter`)."""
    base = locate(
        settings.model, "teacher.model", revision=settings.revision, trust_remote_code=settings.trust_remote_code,
        weights=not settings.is_remote,
    )  # fmt: skip
    if not settings.adapter or settings.is_remote:  # a server's weights are its own matter
        return base
    from bytecache.stages.models.adapter import merged

    return merged(base, weights_identity(base), locate(settings.adapter, "teacher.adapter"), settings)


def locate(
    model: str, setting: str, *, revision: str = "", trust_remote_code: bool = False, weights: bool = True
) -> Path:
    """The folder of a model: a folder, a hub snapshot, or a builtin converted once into the cache.

    Args:
        setting: names it in messages, as `teacher.model`. trust_remote_code: fetch a checkpoint's code as well.
        weights: fetch more than a tokenizer.

    Raises InputError where there is none, StorageError where the cache cannot be written.
    """
    if model.startswith("builtin:"):
        from bytecache.stages.models.builtin import materialise_builtin

        return materialise_builtin(model.removeprefix("builtin:"), cache_folder() / "models")
    folder = local_path(model)
    if folder.is_dir():
        refuse_unsound(folder, f"{setting} = {model!r}")
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"{setting} = {model!r}: no such folder; give a checkpoint folder, a hub id or builtin:NAME")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
    wanted += ["*.safetensors"] if weights else []
    wanted += ["*.py"] if trust_remote_code else []
    try:
        folder = Path(snapshot_download(model, revision=revision or None, allow_patterns=wanted))
    except Exception as error:
        raise InputError(
            f"{setting} = {model!r} is no folder and cannot be fetched from the hub ({type(error).__name__}); "
            "check the name and the network, or give a checkpoint folder"
        ) from error
    refuse_unsound(folder, f"{setting} = {model!r}")
    return folder


def model_name(settings: st.Teacher) -> str:
    """The teacher's name for strangers: a hub id or builtin name, or the last part of a folder's path."""
    return public_name(settings.model)


def public_name(model: str) -> str:
    """A hub id or builtin name as it is, the last part of a folder's path; nothing of nothing."""
    folder = local_path(model)
    if model and folder.is_dir():
        return folder.resolve().name
    # A folder of another machine is named alike here, where it is not.
    return folder.name if model.startswith((".", "/", "~")) or model.count("/") > 1 else model


def blob_sha256(file: Path) -> str:
    """The hash that a hub's blob behind `file` is named by; empty where it has another name."""
    name = file.resolve().name
    return name if len(name) == 64 and all(digit in "0123456789abcdef" for digit in name) else ""


def tokenizer_identity(folder: Path) -> dict[str, str]:
    """sha256 of configuration and tokenizer files of a folder, which need hold no weights."""
    return _hashes(_described_by(folder))


def _described_by(folder: Path) -> list[Path]:
    named = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tekken.json")
    return [*folder.glob("*.tiktoken"), *(folder / name for name in named)]


def _hashes(files: list[Path]) -> dict[str, str]:
    return {file.name: blob_sha256(file) or file_sha256(file) for file in sorted(files) if file.is_file()}


def weights_identity(folder: Path) -> dict[str, str]:
    """sha256 of weights, configuration and tokenizer files of a checkpoint; hub blobs are named by their hash."""
    out = _hashes([*folder.glob("*.safetensors"), *_described_by(folder)])
    if not any(name.endswith(".safetensors") for name in out):
        raise InputError(
            f"{folder}: no *.safetensors weights; save the model with save_pretrained(safe_serialization=True)"
        )
    return out
