"""Jobs of a few bytes a unit for tests of workers, and real processes to run them in."""

import faulthandler
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bytecache.pipeline.fleet.ledger import Layout
from bytecache.pipeline.fleet.worker import Share, Worker
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units.runner import Job, Task, Tick, Work
from bytecache.schemas.errors import Interrupted
from bytecache.schemas.settings import Fleet

QUICK = Fleet(heartbeat_s=0.1, lease_s=1.0, notice_s=1.0, notice_poll_s=0.05)
LAYOUT = Layout("teacher")
Do = Callable[[int, Callable[[], bool]], None]


def job(n_units: int, do: Do = lambda unit, stop: None, identity: str = "a") -> Job:
    """Units of a few bytes; `do(unit, stop)` happens inside each."""

    def task(index: int) -> Task:
        return Task("teacher", f"unit {index}", f"teacher/{index:03d}.bin", {"unit": index, "identity": identity}, 10)

    @contextmanager
    def open_work(stop: Callable[[], bool]) -> Iterator[Work]:
        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            do(task.inputs["unit"], stop)
            out.write_bytes(f"{task.inputs}".encode() * 10)
            tick({"bytes": 10})
            return {}

        yield work

    return Job("teacher", {"identity": identity}, [10] * n_units, task, open_work)


def run(store: LocalStore, work: Job, settings: Fleet = QUICK) -> Share:
    return Worker(store, work, settings, lambda: False).run()


def marks(store: LocalStore, kind: str) -> list[str]:
    return [key for key in store.list(f"{LAYOUT.root}/units") if key.rpartition(".")[2].startswith(kind)]


def fork(step: Callable[[], Any], seconds: float = 60.0) -> int:
    """Exit code (or minus the signal) of a child that does one step; one that hangs is killed, its stacks on stderr."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
            step()
            code = 0
        except Interrupted:
            code = 75
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    end = time.monotonic() + seconds + 5
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            end += 1000
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])
