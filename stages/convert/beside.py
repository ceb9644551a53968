"""Conversion in a process of its own, beside an engine: windows go in as they are evaluated, a shard comes out.

The engine's thread hands a window over and goes on; weighing it, coding it as a dump would (so that the shard is the
one that a conversion of the dump makes, to the byte) and converting it are the child's. A pipe that is full makes the
engine wait, so memory is bounded. The child ends when the pipe does: a kill of the parent leaves nothing behind.

Price: `benchmarks/targets_only.py`.
"""

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from bytecache.schemas import errors
from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import EngineError
from bytecache.stages.tokens.guard import receive, send

PLAIN = ("doc_id", "doc_index", "score_start", "is_last", "reference", "doc_position")
"""Members of a window that are no arrays."""
UNUSED = ("topk_id", "topk_logp", "log_norm")
"""What no conversion reads."""
ARRAYS = tuple(field.name for field in fields(Window) if field.name not in PLAIN + UNUSED)
_WAIT_S = 0.2
"""Between looks at whether the work was stopped, while the last windows are converted."""


class ConversionBeside:
    """A child that converts; one shard at a time. For every shard `begin`, then for every unit of it `part`, `finish`.

    Raises whatever the conversion raises, at the latest in `finish`; EngineError where the child ended.
    """

    def __init__(self, settings: st.Convert) -> None:
        # -P: a module of that name in the working directory is not ours.
        command = [sys.executable, "-P", "-m", "bytecache.stages.convert.beside_child"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._settings = settings

    def begin(self, out_path: Path, attrs: dict[str, Any]) -> None:
        """Begin a shard; what was sent of one before that was not finished is forgotten."""
        settings = self._settings.model_dump(mode="json")
        self._send({"do": "shard", "out": str(out_path), "attrs": attrs, "settings": settings})
        # A complaint about the shard that was given up is answered by now.
        while self._receive() != {"begun": str(out_path)}:
            pass

    def part(self, name: str, meta: dict[str, Any], divergence: float) -> "PartBeside":
        """Begin a unit; `meta` as a dump part's, `divergence` as its writer's."""
        self._send({"do": "part", "name": name, "meta": meta, "divergence": divergence})
        return PartBeside(self._send)

    def finish(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """Wait for the shard; returns its counts (see `convert_units`). Raises Interrupted when `stop()` says so."""
        self._send({"do": "write"})
        while not self._answered(_WAIT_S):
            if stop():
                raise errors.Interrupted("stopped while converting; rerun the same command to continue")
        counts: dict[str, Any] = self._checked(self._receive())["counts"]
        return counts

    def close(self) -> None:
        """End the child."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._child.kill()
        self._child.wait()

    def _answered(self, seconds: float) -> bool:
        assert self._child.stdout is not None
        return bool(select.select([self._child.stdout], [], [], seconds)[0])

    def _send(self, header: dict[str, Any], raw: bytes = b"") -> None:
        if header["do"] != "shard" and self._answered(0.0):
            self._checked(self._receive())
        try:
            assert self._child.stdin is not None
            send(self._child.stdin, json.dumps(header, default=np.generic.item).encode())
            send(self._child.stdin, raw)
        except OSError as error:
            raise self._gone() from error

    def _receive(self) -> dict[str, Any]:
        try:
            assert self._child.stdout is not None
            answer: dict[str, Any] = json.loads(receive(self._child.stdout))
        except EOFError as error:
            raise self._gone() from error
        return answer

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer:
            kind = getattr(errors, answer["error"], EngineError)
            raise kind(answer["message"])
        return answer

    def _gone(self) -> EngineError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1.0)
        return EngineError(
            f"the conversion beside the engine ended with status {self._child.returncode}; its last words are above, "
            "for want of memory there are none: rerun the same command"
        )


class PartBeside:
    """Takes the windows of a unit, like a writer of a dump part."""

    def __init__(self, send_message: Callable[[dict[str, Any], bytes], None]) -> None:
        self._send = send_message

    def append(self, window: Window) -> None:
        """Hand a window over."""
        arrays = {name: np.ascontiguousarray(getattr(window, name)) for name in ARRAYS}
        header = {
            "do": "window",
            "plain": {name: getattr(window, name) for name in PLAIN},
            "arrays": {name: [values.dtype.str, len(values)] for name, values in arrays.items()},
        }
        self._send(header, b"".join(values.tobytes() for values in arrays.values()))

    def close(self) -> None:
        """The unit has no more windows."""
        self._send({"do": "end"}, b"")


def window_of(header: dict[str, Any], raw: bytes) -> Window:
    """The window that was handed over."""
    members: dict[str, Any] = dict(header["plain"])
    at = 0
    for name, (dtype, length) in header["arrays"].items():
        members[name] = np.frombuffer(raw, dtype, length, at)
        at += members[name].nbytes
    rows = len(members["row_start"])
    return Window(
        **members, log_norm=np.zeros(rows, np.float32), topk_id=np.zeros(0, np.int32), topk_logp=np.zeros(0, np.float32)
    )


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """The next header and what belongs to it. Raises EOFError where the other side has ended."""
    header: dict[str, Any] = json.loads(receive(stream))
    return header, receive(stream)
