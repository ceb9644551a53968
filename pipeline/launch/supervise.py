"""Keep worker processes alive: restart what crashed, leave what refused, pass on a stop.

What an exit code asks for: 0 is done; 75 (preempted) and 1 to 4 (a refusal that a restart repeats) stay; a signal, an
engine's (5) or a store's (6) failure is tried again, `restarts` times per worker with a growing pause. A stop is
passed on as SIGTERM, and as SIGKILL when the notice period is over: units are safe either way.
"""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bytecache.schemas.errors import BytecacheError, EngineError, Interrupted, StorageError

POLL_S = 0.1
_LOGGER = logging.getLogger("bytecache")
_AGAIN = (EngineError.exit_code, StorageError.exit_code)


@dataclass
class Child:
    """One worker: its process, how often it was restarted, when it may start again."""

    number: int
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    not_before: float = 0.0
    code: int | None = None
    codes: list[int] = field(default_factory=list)


def supervise(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    stop: Callable[[], bool],
    *,
    restarts: int = 3,
    notice_s: float = 120.0,
    pause_s: float = 2.0,
    prepare: Callable[[], None] | None = None,
) -> list[Child]:
    """Run one worker per environment to its end; returns them, each with its last exit code and all of them.

    `prepare` runs in each new process before the command.

    Raises Interrupted if `stop()` became true; every worker has ended by then.
    """
    children = [Child(number, environment) for number, environment in enumerate(environments)]
    try:
        while any(child.code is None for child in children):
            if stop():
                _end(children, notice_s)
                raise Interrupted(f"{len(children)} workers were stopped by a signal; rerun the same command")
            for child in children:
                if child.code is None:
                    _step(child, command, restarts, pause_s, prepare)
            time.sleep(POLL_S)
    finally:
        _end(children, 0.0)
    return children


def _step(
    child: Child, command: Sequence[str], restarts: int, pause_s: float, prepare: Callable[[], None] | None
) -> None:
    if child.process is None:
        if time.monotonic() >= child.not_before:
            # A group of its own: an engine's helpers end with it, and a Ctrl-C reaches it once, through us.
            child.process = subprocess.Popen(
                command, env=dict(child.environment), start_new_session=True, preexec_fn=prepare
            )
        return
    code = child.process.poll()
    if code is None:
        return
    _kill_group(child.process)
    child.process = None
    child.codes.append(code)
    if (code < 0 or code in _AGAIN) and child.restarts < restarts:
        child.restarts += 1
        child.not_before = time.monotonic() + pause_s * 2 ** (child.restarts - 1)
        _LOGGER.warning("worker %d ended with code %d; restart %d of %d", child.number, code, child.restarts, restarts)
    else:
        child.code = code


def _end(children: Sequence[Child], notice_s: float) -> None:
    alive = [child for child in children if child.process is not None and child.process.poll() is None]
    if notice_s:
        for child in alive:
            assert child.process is not None
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + notice_s
        while time.monotonic() < deadline and any(c.process and c.process.poll() is None for c in alive):
            time.sleep(POLL_S)
    for child in children:
        if child.process is not None:
            _kill_group(child.process)
            child.process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever a worker left behind would hold its GPU."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def settle(codes: Sequence[int]) -> None:
    """Raise for the worst of the workers' exit codes, unless one of them saw the whole stage done (0)."""
    if 0 in codes or not codes:
        return
    if Interrupted.exit_code in codes:
        raise Interrupted("the workers were told to stop; rerun the same command to go on")
    shown = ", ".join(str(code) for code in codes)
    raise BytecacheError(f"no worker came to the end (exit codes {shown}; their own messages are above)")
