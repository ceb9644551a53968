"""The teacher stage: documents to windows of evaluated histories, whatever the engine.

How a long document is cut into windows: stages.teacher.windows; how the rows of a group of windows are chosen:
stages.teacher.passes.

Memory is bounded by the groups of windows (`GROUP_TOKENS`) in flight, two at most, whatever the corpus or the length of
a document (whose tokens alone are held whole).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.dump.parquet import DumpWriter
from bytecache.schemas.dump.window import Window, keep_rows
from bytecache.schemas.files import cache_folder
from bytecache.stages.engines.engine import GROUP_TOKENS, Engine
from bytecache.stages.engines.paths import PathReducer
from bytecache.stages.fidelity.measuring import noise_between
from bytecache.stages.fidelity.noise import Noise, described
from bytecache.stages.lattice.effort import REFERENCE
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.teacher.ahead import WriterBeside, spare_threads
from bytecache.stages.teacher.float32 import exact_settings, refuse_other_vocabulary
from bytecache.stages.teacher.identity import (
    AUTO_CONTEXT,
    fit_context,
    identity_of,
    longest_history,
    vocabulary_of,
)
from bytecache.stages.teacher.inputs import Inputs, read_inputs
from bytecache.stages.teacher.passes import Group, in_turns, static_job
from bytecache.stages.teacher.sinks import Part, Sink
from bytecache.stages.teacher.windows import (
    LEAD,
    WindowPlan,
    deviations_of,
    extend,
    new_window,
    plan_stretch,
    plan_windows,
)
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary


class Teacher:
    """An engine with its vocabulary; turns encoded documents into windows."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, settings: st.Teacher, identity: dict[str, Any]) -> None:
        self.engine, self.vocabulary, self.settings = engine, vocabulary, settings
        self._identity = identity
        self._exact: Teacher | None = None
        named = ("weights", "vocabulary", "static_contexts", "versions", "dtype", "device", "head_dtype")
        kept = {name: identity.get(name) for name in named} | {"backend": settings.backend}
        name = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]
        self._static_folder = cache_folder() / "static" / name
        engine.load_static(self._static_folder)
        threads = spare_threads()
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="lattice") if threads > 0 else None

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
        groups = (self._group(some, [], stop) for some in _groups(plans))
        for group in in_turns(groups, s, self.engine.in_flight):
            yield group.windows

    def evaluate(self, plans: list[WindowPlan], stop: Callable[[], bool] = lambda: False) -> list[Window]:
        """The windows of a group of plans: canonical rows, branches in passes, static rows for what is left."""
        group = self._group(plans, [], stop)
        group.evaluate(self.settings)
        return group.windows

    def _group(self, plans: Sequence[WindowPlan], windows: list[Window], stop: Callable[[], bool]) -> Group:
        return Group(self.engine, plans, windows, stop, self.pool)

    def branch(
        self, plans: list[WindowPlan], windows: list[Window], stop: Callable[[], bool], *, tau: float, depth: int
    ) -> None:
        """Add branches to the windows of `plans` until the lattice asks for none (see `least_share`)."""
        self._group(plans, windows, stop).branch(tau, depth)

    def reference_window(
        self, documents: Sequence[tuple[str, int, Encoded]], key: str, stop: Callable[[], bool]
    ) -> Window:
        """A stretch of a unit as production evaluates it and, marked by `row_sampled`, to near exactness.

        Which one: the byte that a hash of the unit's key falls on, and `sample_tokens` tokens from there.
        """
        plan, position = self._reference_plan(documents, key)
        (known,) = self.evaluate([plan], stop)
        static = known.row_static == 1
        window = keep_rows(known, ~static)
        asked = len(window.row_depth)
        self.branch([plan], [window], stop, **REFERENCE)
        # Production's static rows come last: what they extend first.
        place = np.where(static, -1, np.cumsum(~static) - 1)
        while (place < 0).any():
            row = np.flatnonzero((place < 0) & (place[known.row_parent] >= 0))
            deviations = deviations_of(known, row)._replace(row=place[known.row_parent[row]].astype(np.int32))
            place[row] = len(window.row_start) + np.arange(len(row))
            (rows,) = self.engine.score_static([static_job(known, deviations)])
            extend(window, deviations, rows, static=True)
        window.row_sampled = ((np.arange(len(window.row_depth)) < asked) | (window.row_static == 1)).astype(np.uint8)
        window.reference, window.doc_position = True, position
        return window

    def _reference_plan(self, documents: Sequence[tuple[str, int, Encoded]], key: str) -> tuple[WindowPlan, int]:
        """The stretch of a unit's reference window, and where in its document it begins."""
        s = self.settings
        ends = np.cumsum([len(encoded.data) - encoded.synthetic for _, _, encoded in documents])
        drawn = int(hashlib.sha256(f"reference {key}".encode()).hexdigest(), 16) % max(1, int(ends[-1]))
        which = min(int(np.searchsorted(ends, drawn, side="right")), len(documents) - 1)  # all of them may be empty
        doc_id, index, encoded = documents[which]
        position = drawn - (int(ends[which - 1]) if which else 0)
        stretch = plan_stretch(
            doc_id, encoded, position, s.sample_tokens,
            start_id=self.vocabulary.start_id, context=s.context, overlap=s.overlap,
        )  # fmt: skip
        return stretch.plan._replace(doc_index=index), len(encoded.context) + stretch.first

    def _noise_of(
        self, documents: Sequence[tuple[str, int, Encoded]], key: str, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        """For the part's metadata: how far this teacher is from the float32 model on the reference's stretch."""
        s = self.settings
        if not documents or not s.noise or not s.sample_tokens:
            return {}
        if self._exact is None:
            self._exact = open_teacher(exact_settings(s))
            refuse_other_vocabulary(self.vocabulary, self._exact.vocabulary, s)
        plan, _ = self._reference_plan(documents, key)
        windows = [new_window(plan, rows) for rows in self.engine.score([plan.prompt])]
        self.branch([plan], windows, stop, **REFERENCE)
        (exact,) = self._exact.evaluate([plan], stop)
        noise = Noise()
        noise.add(noise_between(exact, windows[0]))
        noise.against = described(self._exact.identity())
        return {"noise": noise.state()}

    def add_static(self, windows: list[Window], stop: Callable[[], bool]) -> int:
        """Give static rows to positions where histories end and no row does; returns how many."""
        return self._group([], windows, stop).add_static(self.settings.static)

    def dump_unit(
        self,
        slice_path: Path,
        out_path: Path,
        unit_key: str,
        stop: Callable[[], bool],
        tick: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """Evaluate one slice of the corpus into one dump part; see `evaluate_unit`."""

        def open_part(meta: dict[str, Any]) -> Sink:
            return Part(DumpWriter(out_path, meta, self.settings.rounding))

        return self.evaluate_unit(slice_path, unit_key, open_part, stop, tick)

    def evaluate_unit(
        self,
        slice_path: Path,
        unit_key: str,
        open_sink: Callable[[dict[str, Any]], Sink],
        stop: Callable[[], bool],
        tick: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """Evaluate one slice of the corpus; its windows go into what `open_sink` gives for a dump part's metadata.

        Documents that the tokenizer cannot reproduce byte for byte are set aside: counted by reason, the first
        hundred named. `tick` receives {"bytes", "tokens", "branches"} after every group. Raises Interrupted when
        `stop()` says so; what the sink has is then incomplete and must not be kept.
        """
        self.engine.forget()
        # A window needs room for the context, and for rows before and after its seam.
        room = self.settings.context - 4 * LEAD
        inputs = read_inputs(slice_path, self.vocabulary, resolve_model(self.settings), max_context=room)
        counts: dict[str, Any] = {
            "documents": 0, "bytes": 0, "tokens": 0, "branches": 0, "static": 0, "windows": 0, "canonical_nll": 0.0,
            "set_aside": {}, "set_aside_documents": [],
        }  # fmt: skip
        documents = _readable(inputs, counts)
        sink = open_sink({
            **self._noise_of(documents, unit_key, stop),
            "teacher": self._identity, "unit": unit_key, "vocabulary": self.vocabulary.describe(),
            "kind": inputs.kind, "ends": inputs.ends,
            "reference": {**REFERENCE, "tokens": self.settings.sample_tokens, "selection": "hash of the unit's key"},
        })  # fmt: skip
        with WriterBeside(sink) as beside:
            for group in self.windows(documents, stop):
                beside.append(group)
                done = _done(group)
                for window in group:
                    counts["documents"] += window.is_last
                    counts["windows"] += 1
                    counts["canonical_nll"] += window.canonical_nll
                for name, value in done.items():
                    counts[name] += value
                tick(done)
        if documents and self.settings.sample_tokens:
            sink.append(self.reference_window(documents, unit_key, stop))
        sink.close()
        self.save_static()
        return counts

    def save_static(self) -> None:
        """Keep new static states for later runs of the same teacher, if they are worth a file."""
        self.engine.save_static(self._static_folder)

    def close(self) -> None:
        """Let the engine go."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        self.engine.close()
        if self._exact is not None:
            self._exact.close()


def _readable(inputs: Inputs, counts: dict[str, Any]) -> list[tuple[str, int, Encoded]]:
    """The documents that the tokenizer can reproduce: id, index, tokens; the others are counted."""
    documents = []
    for index, encoded in enumerate(inputs.documents):
        if isinstance(encoded, Misfit):
            reasons = counts["set_aside"]
            reasons[encoded.reason] = reasons.get(encoded.reason, 0) + 1
            if len(counts["set_aside_documents"]) < 100:
                counts["set_aside_documents"].append([inputs.ids[index], encoded.reason])
        else:
            documents.append((inputs.ids[index], index, encoded))
    return documents


def _done(group: Sequence[Window]) -> dict[str, Any]:
    """Bytes, tokens, branches and static rows of a group."""
    done = {"bytes": 0, "tokens": 0, "branches": 0, "static": 0}
    for window in group:
        canonical, static = int((window.row_depth == 0).sum()), int(window.row_static.sum())
        done["bytes"] += len(window.text) - window.score_start
        done["tokens"] += canonical
        done["static"] += static
        done["branches"] += len(window.row_depth) - canonical - static
    return done


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


def _open_server(settings: st.Teacher, folder: Path, vocabulary: Vocabulary, windows: tuple[int, int]) -> Teacher:
    from bytecache.stages.engines.served import Opened, ServedEngine
    from bytecache.stages.engines.server import ServerEngine
    from bytecache.stages.engines.server_client import Client

    client = Client.of(settings)
    settings = settings.model_copy(update={"context": windows[0], "overlap": windows[1]})
    engine: Engine
    if settings.backend == "vllm-server":
        opened = Opened(client, settings)
        engine = ServedEngine(opened, vocabulary, settings, longest_history(settings, folder))
        identity = identity_of(settings, folder, vocabulary, windows, client.served, opened.told)
    else:
        engine = ServerEngine(client, vocabulary, settings)
        identity = identity_of(settings, folder, vocabulary, windows, client.served)
    return Teacher(engine, vocabulary, settings, identity)


def open_teacher(settings: st.Teacher, *, automatic_context: int = AUTO_CONTEXT) -> Teacher:
    """Load the vocabulary and start the engine. Raises InputError, ConfigError or EngineError with the remedy."""
    settings = settings.resolved()
    folder = resolve_model(settings)
    vocabulary = vocabulary_of(settings, folder)
    context, overlap = fit_context(settings, folder, automatic_context)
    if settings.is_remote:
        return _open_server(settings, folder, vocabulary, (context, overlap))
    identity = identity_of(settings, folder, vocabulary, (context, overlap))
    settings = settings.model_copy(update={"context": context, "overlap": overlap})
    reducer = PathReducer(vocabulary, top_k=settings.top_k, floor=settings.floor)
    engine: Engine
    if settings.backend == "vllm":
        from bytecache.stages.engines.vllm import VllmEngine

        engine = VllmEngine(folder, reducer, settings, longest=longest_history(settings, folder))
    else:
        from bytecache.stages.engines.hf import HfEngine

        engine = HfEngine(folder, reducer, settings)
        engine.longest = longest_history(settings, folder)  # as vLLM's: both make the same rows
    return Teacher(engine, vocabulary, settings, identity)
