"""Names of processes that tell the living from the dead, on the machine where they run."""

import contextlib
import hashlib
import os
import socket
from pathlib import Path


def machine() -> str:
    """A tag shared exactly by the processes that can see each other's process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def process_name() -> str:
    """`machine-pid-start` of this process. Not cached: a forked child must not pass for its parent."""
    return f"{machine()}-{os.getpid()}-{_process_start(os.getpid()) or 0}"


def has_ended(name: str) -> bool:
    """Whether a name that begins with a `process_name` is that of a process of this machine that is no more.

    False for processes of other machines, and where nothing can be told.
    """
    parts = name.split("-", 3)
    if len(parts) < 3 or parts[0] != machine() or not parts[1].isdigit():
        return False
    try:
        os.kill(int(parts[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    started = _process_start(int(parts[1]))
    if started is None or parts[2] == "0":
        return False  # whoever cannot be told from the living is one of them
    return started != parts[2]


def is_ours(name: str) -> bool:
    """Whether a name that begins with a `process_name` belongs to this machine, so that `has_ended` can tell."""
    parts = name.split("-", 3)
    return len(parts) >= 3 and parts[0] == machine() and parts[1].isdigit()


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks; tells a recycled id from the writer. Empty of a zombie, None unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return "" if Path("/proc/self/stat").exists() else None
    except (OSError, IndexError):
        return None
    return "" if fields[0] == "Z" else fields[19]
