"""Pictures of a run's page as inline SVG: curves of loss, bars. No script; colours come from the page's style.

Texts go through `safe`; numbers alone become coordinates.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from bytecache.pipeline.commands.report.facts import Point, smoothed

Place = Callable[[float], float]
"""A quantity to a coordinate."""
WIDTH, HEIGHT = 720, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 150, 14, 34


def curves_chart(curves: dict[str, list[Point]]) -> str:
    """Loss against steps: each step faintly, and the running mean over a twelfth of them; '' without two points.

    The axis reaches from the lowest to the highest of the running means after their first steps, which may be far up.
    """
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return ""
    width = max(1, max(len(points) for points in curves.values()) // 12)
    means = {name: smoothed(points, width) for name, points in curves.items()}
    settled = [bits for points in means.values() for _, bits in points[len(points) // 12 :]]
    low, high = _nice(min(settled), max(settled))
    steps = [step for points in curves.values() for step, _ in points]
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - first) / max(last - first, 1)

    def y(bits: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - bits) / (high - low)

    parts = [*_grid(low, high, y), *_steps(first, last, x)]
    ends = _apart([y(min(max(points[-1][1], low), high)) for points in means.values()])
    for end, (name, points) in zip(ends, means.items(), strict=True):
        parts.append(_path(curves[name], x, y, f"{name} faint"))
        parts.append(_path(points, x, y, name))
        words = safe(f"{name} {points[-1][1]:.3f}")
        parts.append(f'<text x="{x(last) + 8:.1f}" y="{end + 4:.1f}" class="{safe(name)}">{words}</text>')
    return _svg(HEIGHT, "Loss against steps, bits per byte", parts)


def bars_chart(rows: Sequence[tuple[str, str, float | None, str]], title: str, *, least: float = 0.0) -> str:
    """Horizontal bars: (style, label, length, what stands behind it), lengths from `least` (None: no bar)."""
    most = max((value for _, _, value, _ in rows if value is not None), default=0.0)
    span = max(most - least, 1e-9)
    parts, left, room = [], 230, WIDTH - 230 - 150
    for number, (style, label, value, words) in enumerate(rows):
        top = 10 + 30 * number
        parts.append(f'<text x="{left - 10}" y="{top + 15}" class="label">{safe(label)}</text>')
        long = 0.0 if value is None else max(0.0, (value - least) / span) * room
        parts.append(f'<rect x="{left}" y="{top}" width="{long:.1f}" height="20" rx="2" class="{safe(style)}"/>')
        parts.append(f'<text x="{left + long + 8:.1f}" y="{top + 15}">{safe(words)}</text>')
    return _svg(20 + 30 * len(rows), title, parts)


def visible(text: str) -> str:
    """The text with line ends and tabs, and a dot for every other character that cannot be seen."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{MIDDLE DOT}" for char in text)


def safe(text: str) -> str:
    """Text of strangers as markup that shows it and does nothing."""
    return escape(visible(text))


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{safe(title)}">'
    return "\n".join([head, f"<title>{safe(title)}</title>", *parts, "</svg>"])


def _path(points: Sequence[Point], x: Place, y: Place, style: str) -> str:
    """A line, kept inside the picture."""
    line = " ".join(f"{x(step):.1f},{min(max(y(bits), _TOP), HEIGHT - _BOTTOM):.1f}" for step, bits in points)
    return f'<polyline points="{line}" class="line {safe(style)}"/>'


def _grid(low: float, high: float, y: Place) -> list[str]:
    step = (high - low) / 4
    right = WIDTH - _RIGHT
    lines = []
    for number in range(5):
        bits = low + number * step
        lines.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y(bits):.1f}" y2="{y(bits):.1f}" class="grid"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y(bits) + 4:.1f}" class="label">{bits:.2f}</text>')
    return lines


def _steps(first: int, last: int, x: Place) -> list[str]:
    named = sorted({first, *(round(first + (last - first) * part / 4) for part in range(1, 5))})
    lines = [f'<text x="{x(step):.1f}" y="{HEIGHT - 14}" class="middle">{step}</text>' for step in named]
    return [*lines, f'<text x="{WIDTH - _RIGHT + 20}" y="{HEIGHT - 14}" class="label left">steps</text>']


def _nice(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis that holds both, a quarter of it a round number."""
    rough = max(high - low, 1e-3) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        start = math.floor(low / step) * step
        if start + 4 * step >= high:
            return start, start + 4 * step
    return low, high


def _apart(places: list[float], least: float = 16.0) -> list[float]:
    """The same places, moved so that no two are nearer than `least`."""
    moved = list(places)
    order = sorted(range(len(places)), key=places.__getitem__)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved
