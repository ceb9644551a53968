"""Children of the torture: forks of a process that has imported what a run imports and has no thread but its own.

A fork copies one thread and the state of every lock, so nothing is forked while another thread lives: `start` refuses
and names it (Arrow's allocator, BLAS and tqdm start some; `ENVIRONMENT` keeps the first two from it). tqdm's own lock
is a semaphore that forks *share*: a worker killed with the semaphore in hand stops all others for ever, which is how an
earlier harness came to hang after 800 kills. Every child gets a lock of its own instead.

No wait here is without an end. Whoever is late is told to write the stacks of its threads (`faulthandler`), is killed,
and what it wrote comes back as the reason; so does what a child wrote that left in a way it should not.

Price: 10 ms a fork.
"""

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytecache.schemas.errors import BytecacheError, IntegrityError

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""For the process that forks, before it starts: its libraries read these when they load."""
FAULT = 99
"""Exit code of a child that ended with an error that is no refusal of ours."""
_POLL_S, _DUMP_S = 0.005, 2.0
_TAIL = 4000


@dataclass(frozen=True)
class Child:
    """A forked process; what it says goes to `log`."""

    pid: int
    name: str
    log: Path

    def poll(self) -> int | None:
        """Its exit code (minus the signal that ended it), or None while it runs."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def said(self) -> str:
        """The last of what it wrote, in one line."""
        raw = self.log.read_bytes()[-_TAIL:] if self.log.is_file() else b""
        return " | ".join(line for line in raw.decode("utf-8", "replace").splitlines() if line.strip()) or "nothing"

    def give_up(self) -> str:
        """Have it write its stacks, and kill it; returns what it said."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            end = time.monotonic() + _DUMP_S
            before = -1
            while time.monotonic() < end and before != (before := self.log.stat().st_size):
                time.sleep(_DUMP_S / 4)
            os.kill(self.pid, signal.SIGKILL)
        end = time.monotonic() + _DUMP_S
        while self.poll() is None and time.monotonic() < end:  # one that hangs in the kernel is left behind
            time.sleep(_POLL_S)
        return self.said()


def start(function: Callable[[], Any], name: str, log: Path) -> Child:
    """A child that does one thing and leaves with the exit code of the command line.

    Raises IntegrityError if this process has other threads: their locks would stay locked in the child.
    """
    others = _other_threads()
    if others:
        raise IntegrityError(f"torture: not forked, since this process has threads beside its own: {', '.join(others)}")
    sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        pid = os.fork()
        if not pid:
            _live(function, sink)
    finally:
        os.close(sink)
    return Child(pid, name, log)


def answer(function: Callable[[], Any], name: str, log: Path, seconds: float) -> Any:
    """What `function` returns (JSON), worked out in a child.

    Raises IntegrityError, with what the child said, if it failed or was not done in time.
    """
    place = log.with_suffix(".json")
    child = start(lambda: place.write_text(json.dumps(function())), name, log)
    end = time.monotonic() + seconds
    while (code := child.poll()) is None:
        if time.monotonic() > end:
            raise IntegrityError(f"torture: {name} was not done after {seconds:.0f} s; it said: {child.give_up()}")
        time.sleep(_POLL_S)
    if code:
        raise IntegrityError(f"torture: {name} ended with code {code}; it said: {child.said()}")
    found = json.loads(place.read_text())
    place.unlink()
    log.unlink()
    return found


def _live(function: Callable[[], Any], sink: int) -> None:
    """What a child does from its birth to its end."""
    code = FAULT
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        faulthandler.enable(2)
        faulthandler.register(signal.SIGUSR1, 2, all_threads=True)
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            tqdm.set_lock(threading.RLock())
        function()
        code = 0
    except BytecacheError as error:
        code = error.exit_code
        os.write(2, f"{error}\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _other_threads() -> list[str]:
    found = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            if task.name != str(os.getpid()):
                found.append((task / "comm").read_text().strip())
    return found
