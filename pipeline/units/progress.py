"""What long work says while it runs: a live bar on a terminal, one JSON line per unit otherwise. All on stderr.

Both carry the same facts (units, bytes of text per second, tokens per second, time left), so that a batch log
can be read by a program and standard output stays free for results.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Reporter:
    """Progress of one stage over `total_units` units worth `total` of `measure` ("bytes", or "steps" in training).

    `tick` takes increments ({"bytes": 4096, "tokens": 1000}), of which `measure` and "tokens" are shown as speeds. Time
    left is estimated from `measure` over this session's own speed.
    """

    def __init__(
        self,
        stage: str,
        total_units: int,
        total: int,
        *,
        done_units: int = 0,
        done: int = 0,
        measure: str = "bytes",
        stream: TextIO | None = None,
    ) -> None:
        self.stage, self.measure = stage, measure
        self.total_units, self.total = total_units, total
        self.done_units, self.done = done_units, done
        self.sums: Counter[str] = Counter()
        self._committed = 0
        self._started = time.monotonic()
        self._stream = stream if stream is not None else sys.stderr
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(stage, total=max(total, 1), completed=done, facts="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tick(self, increments: Mapping[str, Any]) -> None:
        """Add to the sums; what is no number is passed over."""
        for name, value in increments.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.sums[name] += value  # type: ignore[assignment]
        self._show()

    def unit_done(self, name: str, measure: int, seconds: float) -> None:
        """A unit of `measure` is committed; corrects the sum to it, so that ticks need not be exact."""
        self._committed += measure
        self.sums[self.measure] = self._committed
        self.done_units += 1
        self._show()
        if self._bar is None:
            self.line(
                {
                    "stage": self.stage,
                    "unit": name,
                    "units_done": self.done_units,
                    "units_total": self.total_units,
                    self.measure: measure,
                    "seconds": round(seconds, 3),
                    **self.rates(),
                }
            )

    def line(self, record: Mapping[str, Any]) -> None:
        """Write one JSON line, unless a bar is shown."""
        if self._bar is None:
            print(json.dumps(record), file=self._stream, flush=True)

    def rates(self) -> dict[str, float]:
        """Speed of this session so far per second, and seconds left."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        work = self.sums[self.measure]
        rates = {f"{self.measure}_per_s": round(work / elapsed, 3)}
        if self.sums["tokens"]:
            rates["tokens_per_s"] = round(self.sums["tokens"] / elapsed, 3)
        if work:
            rates["eta_s"] = round(max(self.total - self.done - work, 0) * elapsed / work, 1)
        return rates

    def _show(self) -> None:
        if self._bar is None or self._task is None:
            return
        rates = self.rates()
        facts = [f"{self.done_units}/{self.total_units} units"] if self.total_units > 1 else []
        facts.append(_human(rates[f"{self.measure}_per_s"], "B/s" if self.measure == "bytes" else f" {self.measure}/s"))
        if "tokens_per_s" in rates:
            facts.append(_human(rates["tokens_per_s"], " tok/s"))
        if "eta_s" in rates:
            facts.append(f"{_clock(rates['eta_s'])} left")
        completed = min(self.done + self.sums[self.measure], self.total)
        self._bar.update(self._task, completed=completed, facts="  ".join(facts))


def human_bytes(count: float) -> str:
    """12.3 MB: decimal units, three figures."""
    return _human(count, "B")


def _human(value: float, unit: str) -> str:
    for prefix in ("", " k", " M", " G"):
        if abs(value) < 1000:
            return f"{value:.3g}{prefix}{unit}" if prefix else f"{value:.0f} {unit.strip()}"
        value /= 1000
    return f"{value:.3g} T{unit}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
