"""The child of `beside`: weighs, codes and converts the windows that it is sent.

Messages, each JSON and bytes that belong to it: `shard` begins one (answer: that it has begun), `part` a unit of it,
`window` is one of the unit's, `end` its end, `write` asks for the shard (answer: its counts). What goes wrong is
answered at once, and the rest of that shard is not worked on. Nothing is written but the shard.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bytecache.schemas import settings as st
from bytecache.schemas.dump.parquet import as_stored
from bytecache.schemas.errors import BytecacheError
from bytecache.stages.convert.beside import read_message, window_of
from bytecache.stages.convert.convert import Conversion
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.tokens.guard import send


class _Shard:
    """A shard under way."""

    def __init__(self, message: dict[str, Any]) -> None:
        self._out, self._attrs = Path(message["out"]), message["attrs"]
        self._conversion = Conversion(st.Convert(**message["settings"]), lambda: False, lambda _: None)
        self._divergence = 0.0

    def take(self, message: dict[str, Any], raw: bytes) -> dict[str, Any] | None:
        """Work on one message; returns what is to be answered, if anything is."""
        if message["do"] == "part":
            self._divergence = message["divergence"]
            self._conversion.begin_part(message["name"], message["meta"])
        elif message["do"] == "window":
            window = window_of(message, raw)
            weights = None if window.reference else Lattice(window).weights()
            self._conversion.add(as_stored(window, weights, self._divergence))
        elif message["do"] == "end":
            self._conversion.end_part()
        else:
            return {"counts": self._conversion.write(self._out, self._attrs)}
        return None


def main() -> None:
    """Work on messages until there are no more."""
    # A Ctrl-C and a notice are the parent's business; when it is gone the pipe ends, and so do we.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    shard: _Shard | None = None
    while True:
        try:
            message, raw = read_message(sys.stdin.buffer)
        except EOFError:
            return
        answer: dict[str, Any] | None = None
        try:
            if message["do"] == "shard":
                shard, answer = None, {"begun": message["out"]}
                shard = _Shard(message)
            elif shard is not None:
                answer = shard.take(message, raw)
        except BytecacheError as error:
            shard, answer = None, {"error": type(error).__name__, "message": str(error)}
        except Exception as error:
            words = " ".join(str(error).split())[:500]
            shard, answer = None, {"error": "EngineError", "message": f"{type(error).__name__}: {words}"}
        if answer is not None:
            send(answers, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
