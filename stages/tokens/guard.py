"""Work on strangers' terms (regular expressions, chat templates) in a child with a clock and a memory cap.

A tokenizer's regular expression can take for ever on one text, or end the process that runs it; a chat template is a
program, whose loops and strings have no end of their own. Nothing in this process can stop either, so they run in a
child (`guard_child`) that is given, for every piece of work, so many seconds of processor time and so many bytes
beyond what it has. What goes beyond ends the child; the piece of work then has a reason instead of a result, and a new
child does the rest. The clock counts the child's own processor time: how busy the machine is decides nothing.

Price: a start of the child (0.3 s for a tokenizer, 2 s for a template), then 0.1 ms a call and about 1 ms a MB of text.
"""

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from bytecache.schemas.errors import InputError

WALL = 20
"""Seconds of patience for each second of processor time, and `GRACE` more: for a child that waits instead of works."""
GRACE = 120.0
MOST_DEATHS = 50
"""Ends of a child after which it is not started again: what it is given cannot be used."""
MIB = 1 << 20
CRASHED = "crashed"


class Failure(str):
    """Why a piece of work has no result: a few words, the same for all failures of a kind."""

    __slots__ = ()


class UnopenedError(InputError):
    """The child could not open what it was to work with; `reason`: a few words of why."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what}: {reason} while it was opened; fetch it again or choose another model")
        self.reason = reason


class Limits(NamedTuple):
    """What one piece of work may take: `seconds` of processor time, `memory` bytes beyond what the child has."""

    seconds: float
    memory: int


TO_OPEN = Limits(120.0, 4096 * MIB)
"""What the child may take to open what it works with."""


class Guard:
    """A child that does `call`s, one at a time, started when first needed. `what` names its work in messages.

    `setup`: what the child opens: {"kind": "tokenizer" | "ranks" | "template", ...}, see `guard_child`.
    """

    def __init__(self, what: str, setup: dict[str, Any]) -> None:
        self.what, self._setup = what, setup
        self._child: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._deaths = 0
        self._lock = threading.Lock()

    def call(self, arguments: dict[str, Any], limits: Limits) -> tuple[Any, bytes] | Failure:
        """The child's answer to one piece of work, or why there is none.

        Raises InputError where the child cannot even open what it is to work with, or ended `MOST_DEATHS` times.
        """
        with self._lock:
            answer = self._once(arguments, limits)
            if answer == CRASHED:  # somebody else may have ended it; if the work does, it does so again
                answer = self._once(arguments, limits)
            if isinstance(answer, Failure) and self._child is None:
                self._deaths += 1
                if self._deaths >= MOST_DEATHS:
                    raise InputError(
                        f"{self.what}: {answer} in {self._deaths} documents; it cannot be used on this text, choose "
                        "another model or clean the corpus"
                    )
            return answer

    def _once(self, arguments: dict[str, Any], limits: Limits) -> tuple[Any, bytes] | Failure:
        if self._child is None or self._pid != os.getpid():  # after a fork the child is the other process's
            self._start()
        return self._ask(arguments, limits)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None and self._pid == os.getpid():
            _end(child)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _start(self) -> None:
        # -P: a module of that name in the working directory is not ours.
        command = [sys.executable, "-P", "-m", "bytecache.stages.tokens.guard_child"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._pid = os.getpid()
        opened = self._ask(self._setup, TO_OPEN)
        if isinstance(opened, Failure):
            self.close()
            raise UnopenedError(self.what, opened)

    def _ask(self, arguments: dict[str, Any], limits: Limits) -> tuple[Any, bytes] | Failure:
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        request = json.dumps([limits.seconds, limits.memory, arguments]).encode()
        try:
            send(child.stdin, request)
            if not select.select([child.stdout], [], [], limits.seconds * WALL + GRACE)[0]:
                self.close()
                return Failure("too slow")
            answer, raw = json.loads(receive(child.stdout)), receive(child.stdout)
        except (OSError, EOFError):
            self.close()
            return Failure(_cause(child.returncode))
        return Failure(answer["failure"]) if isinstance(answer, dict) and "failure" in answer else (answer, raw)


def _cause(code: int | None) -> str:
    return "too slow" if code == -signal.SIGXCPU else CRASHED


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up: what it raises then is no Exception."""
    return type(error).__name__ == "PanicException"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Wait a moment for a child that is ending by itself, for its cause; then end it."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        child.wait(1.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# ---- what both sides share


def send(stream: IO[bytes], frame: bytes) -> None:
    """One length-prefixed message."""
    stream.write(struct.pack("<Q", len(frame)))
    stream.write(frame)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """The next message. Raises EOFError where the other side has ended."""
    head = stream.read(8)
    (size,) = struct.unpack("<Q", head) if len(head) == 8 else (0,)
    frame = stream.read(size)
    if len(head) < 8 or len(frame) < size:
        raise EOFError
    return frame


def bound_this_process(limits: Limits) -> None:
    """Give this process so much more processor time and memory from now on; the system ends it where it takes more."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime + limits.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    with Path("/proc/self/statm").open("rb") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


# ---- tokenizers


def tokens_of(guard: Guard, texts: Sequence[str]) -> list[list[int] | Failure]:
    """The tokens of every text, or why it has none, from a child that opened a "tokenizer" or "ranks"."""
    ids: list[list[int] | Failure] = []
    for group in groups(texts):
        answer = guard.call({"texts": group}, encoding_limits(group))
        if isinstance(answer, Failure) and len(group) > 1:
            # One of them did it: each for itself.
            for text in group:
                ids += _split(guard.call({"texts": [text]}, encoding_limits([text])), 1)
        else:
            ids += _split(answer, len(group))
    return ids


def encoding_limits(texts: Sequence[str]) -> Limits:
    """Ten seconds and five a MB, a hundred times what a tokenizer takes; 1 GiB and 400 bytes a character."""
    size = sum(map(len, texts))
    return Limits(10.0 + 5.0 * size / 1e6, 1024 * MIB + 400 * size)


def groups(texts: Sequence[str], most: int = 1 << 20) -> list[list[str]]:
    """Consecutive texts together, until they have `most` characters."""
    together: list[list[str]] = []
    size = most
    for text in texts:
        if size >= most:
            together.append([])
            size = 0
        together[-1].append(text)
        size += len(text)
    return together


def _split(answer: tuple[Any, bytes] | Failure, count: int) -> list[list[int] | Failure]:
    if isinstance(answer, Failure):
        return [Failure(f"tokenizer: {answer}")] * count
    lengths, raw = answer
    ids = np.frombuffer(raw, "<i4")
    ends = np.cumsum(lengths).tolist()
    return [ids[end - length : end].tolist() for length, end in zip(lengths, ends, strict=True)]
