"""What takes the windows of a unit as they are evaluated: a dump part, or a conversion beside the engine."""

from typing import Protocol

from bytecache.schemas.dump.parquet import DumpWriter
from bytecache.schemas.dump.window import Window
from bytecache.stages.lattice.lattice import Lattice


class Sink(Protocol):
    """Takes the windows of a unit."""

    def append(self, window: Window) -> None:
        """The next window; the last may be a reference window."""

    def close(self) -> None:
        """There are no more."""


class Part:
    """A dump part as a sink: its writer wants to know what the parts of a window weigh."""

    def __init__(self, writer: DumpWriter) -> None:
        self._writer = writer
        self.close = writer.close

    def append(self, window: Window) -> None:
        """Write a window."""
        self._writer.append(window, None if window.reference else Lattice(window).weights())
