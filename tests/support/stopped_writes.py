"""A process that ends, as by a kill, right after one of its writes to a run folder on this machine."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.stores import LocalStore

_WRITES = ("put_if_absent", "put_json_if_absent", "replace", "replace_text", "delete", "move")
DAMAGE = re.compile(r"damage|altered|missing|repair|not as it was|is not whole", re.IGNORECASE)
"""Words that a run which was only killed does not deserve."""


class Killed(BaseException):
    """What nothing handles."""


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Stop the process, as it were, once so many writes to the run are done; returns what was written."""
    done: list[str] = []
    depth = 0

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: LocalStore, key: str, *rest: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = method(self, key, *rest)
            finally:
                depth -= 1
            if not depth:  # one write may be made of another
                done.append(key)
                if len(done) == after:
                    raise Killed(key)
            return result

        return write

    for name in _WRITES:
        monkeypatch.setattr(LocalStore, name, watched(getattr(LocalStore, name)))
    return done


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file that is not hidden."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
