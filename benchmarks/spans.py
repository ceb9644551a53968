"""Where the engine's thread spends its time: the self time of named parts, in CPU seconds of that thread.

A part is a set of functions that are wrapped where they are looked up. The time of a wrapped call is its own, less that
of wrapped calls inside it, so that the parts add up to the thread's time and what no part names is left over. The clock
is the thread's; time that a GPU or another thread takes is in no part.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from bytecache.stages.engines import static, vllm, vllm_worker
from bytecache.stages.engines.paths import PathReducer
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher import passes
from bytecache.stages.teacher.ahead import Lattices
from bytecache.stages.teacher.teacher import Teacher

DEVICE_PARTS = ("layers", "head", "sums")
"""What a GPU would do: the rest is the host's."""


class Spans:
    """Self seconds and calls of parts, by name, of the thread that made this."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._thread = threading.get_ident()
        self._inside: list[float] = []

    def wrap(self, owner: Any, attribute: str, part: str) -> None:
        """Count what `owner.attribute` takes from now on as `part`."""
        setattr(owner, attribute, self._counted(getattr(owner, attribute), part))

    def _counted(self, original: Callable[..., Any], part: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self._inside.append(0.0)
            began = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                took = time.thread_time() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + took - self._inside.pop()
                self.calls[part] = self.calls.get(part, 0) + 1
                if self._inside:
                    self._inside[-1] += took

        return counted

    def forget(self) -> None:
        """Begin at zero."""
        self.seconds, self.calls = {}, {}


def attach(teacher: Teacher, spans: Spans) -> None:
    """Count the parts of an engine that runs in this process: vLLM's, or transformers'."""
    for owner, names, part in (
        (PathReducer, ("_sums_on_cpu",), "sums"),
        (PathReducer, ("_ranges",), "plans"),
        (PathReducer, ("_assemble",), "rows listed"),
        (static, ("plan_paths", "take_plan", "join_plans"), "plans"),
        (static, ("take", "concatenate"), "rows gathered"),
        (static.StaticStates, ("rows", "missing", "_logits"), "static rows"),
        (passes, ("new_window", "extend", "replace_static"), "windows"),
        (passes, ("_branches", "_branch", "static_job"), "histories named"),
        (Lattice, ("deviations", "homeless", "outgrown"), "histories chosen"),
        (Lattices, ("of", "change", "settle"), "lattices"),
    ):
        for name in names:
            spans.wrap(owner, name, part)
    if isinstance(teacher.engine, vllm.VllmEngine):
        _attach_vllm(teacher.engine, spans)
    else:
        _attach_hf(teacher.engine, spans)


def _attach_vllm(engine: Any, spans: Spans) -> None:
    from bytecache.stages.engines import vllm_pass

    worker = engine._engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    spans.wrap(runner, "_model_forward", "layers")
    spans.wrap(vllm_pass, "_copy_blocks", "layers")
    spans.wrap(runner.model, "compute_logits", "head")
    for owner, names, part in (
        (vllm.VllmEngine, ("_step", "_add"), "scheduler"),
        (vllm.VllmEngine, ("_call",), "calls of workers"),
        (vllm, ("job_of", "make_pass", "borrowed_blocks"), "branch passes"),
        (vllm, ("_want_of_branches",), "histories named"),
        (vllm_worker, ("run_pass",), "branch passes"),
        (vllm_worker, ("plan_paths", "plan_between", "join_plans"), "plans"),
        (vllm_worker, ("take", "concatenate"), "rows gathered"),
        (vllm_worker.PathExtension, ("_capture", "_reduce", "bytecache_want", "bytecache_collect"), "hook"),
    ):
        for name in names:
            spans.wrap(owner, name, part)


def _attach_hf(engine: Any, spans: Spans) -> None:
    from bytecache.stages.engines import hf, packed

    spans.wrap(engine.model.model, "forward", "layers")
    spans.wrap(engine.model.get_output_embeddings(), "forward", "head")
    for owner, names, part in (
        (packed, ("run",), "pass"),
        (packed, ("tree", "whole", "new_places"), "trees"),
        (packed, ("_masks", "_visible"), "masks"),
        (packed.KeptWindow, ("grow",), "keys kept"),
        (hf, ("plan_paths",), "plans"),
        (hf, ("concatenate",), "rows gathered"),
    ):
        for name in names:
            spans.wrap(owner, name, part)
