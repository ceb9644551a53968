"""One number per position, over many positions: mean, standard error, p99, maximum; mergeable in any grouping.

p99 is read off a histogram and rounded up to a bin's edge (6 %). Standard errors treat windows, not positions, as
independent (ratio estimator), because errors come in runs.
"""

import math
from typing import Any

import numpy as np

_BINS = 40
"""Histogram bins per decade."""
_LEAST = 1e-12
"""Values below share the lowest bin."""


class Measure:
    """Mean, spread between windows, p99 and maximum of one number per position; mergeable."""

    def __init__(self) -> None:
        self.total = self.largest = 0.0
        self.squares = self.cross = 0.0
        """Over windows: sum of S^2 and of S n, S the window's sum and n its positions."""
        self.histogram: dict[int, int] = {}
        """Positions per bin of log10 |value|."""

    def add(self, values: np.ndarray) -> None:
        """One window: a value for each of its positions."""
        total = math.fsum(values)
        self.total += total
        self.squares += total * total
        self.cross += total * len(values)
        size = np.abs(values)
        self.largest = max(self.largest, float(size.max(initial=0.0)))
        bins = np.floor(np.log10(np.maximum(size, _LEAST)) * _BINS).astype(int)
        for index, count in zip(*np.unique(bins, return_counts=True), strict=True):
            self.histogram[int(index)] = self.histogram.get(int(index), 0) + int(count)

    def merge(self, state: dict[str, Any]) -> None:
        """What another one has measured."""
        self.total += state["total"]
        self.squares += state["squares"]
        self.cross += state["cross"]
        self.largest = max(self.largest, state["largest"])
        for index, count in state["histogram"].items():
            self.histogram[int(index)] = self.histogram.get(int(index), 0) + count

    def state(self) -> dict[str, Any]:
        """JSON for `merge`."""
        histogram = {str(index): count for index, count in sorted(self.histogram.items())}
        return {
            "total": self.total, "squares": self.squares, "cross": self.cross, "largest": self.largest,
            "histogram": histogram,
        }  # fmt: skip

    def _p99(self, positions: int) -> float:
        above = positions // 100
        for index in sorted(self.histogram, reverse=True):
            above -= self.histogram[index]
            if above < 0:
                return min(float(10.0 ** ((index + 1) / _BINS)), self.largest)
        return 0.0

    def summary(self, positions: int, windows: int, squared_positions: float) -> dict[str, float]:
        """mean, stderr, p99, max; p99 and max are of the absolute value."""
        mean = self.total / positions
        spread = max(0.0, self.squares - 2 * mean * self.cross + mean * mean * squared_positions)
        stderr = math.sqrt(spread * windows / (windows - 1)) / positions if windows > 1 else 0.0
        summary = {"mean": mean, "stderr": stderr, "p99": self._p99(positions), "max": self.largest}
        return {name: rounded(value) for name, value in summary.items()}


def rounded(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6g}")
