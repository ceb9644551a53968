"""`report/report.html`: a run in pictures, one file that loads nothing.

The page has no script, and its content security policy forbids every request. All text goes through `safe`, since a
passage and the name of its document are a stranger's: characters that mean something to a browser are escaped, those
that cannot be seen or that turn the direction of what follows are shown as a dot.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bytecache.pipeline.commands.evaluate import BEFORE
from bytecache.pipeline.commands.report.charts import bars_chart, curves_chart, safe
from bytecache.pipeline.commands.report.facts import LABELS, Facts
from bytecache.pipeline.commands.train import CONTROL, DISTILLED
from bytecache.pipeline.units.progress import human_bytes

LEVELS = 12
"""Colours of 0, 0.5, 1, ... bits of entropy."""
_TEMPLATE = Path(__file__).with_name("page.html")


def report_page(facts: Facts) -> str:
    """The page of a run."""
    sections = [
        _arms(facts),
        _section("Learning", curves_chart(facts.curves), _CURVES),
        _section("Time and size", _stages(facts.stages), "Seconds of work when it was done, and bytes that it left."),
        _passage(facts.passage),
        _section("The student", _loading(facts.loading), "A plain checkpoint: nothing of bytecache is needed."),
        _section("Everything measured", _table(facts.table), ""),
    ]
    page = _TEMPLATE.read_text(encoding="utf-8")
    return page.replace("<!--TITLE-->", safe(facts.title)).replace("<!--BODY-->", "\n".join(sections))


_CURVES = (
    "Bits per byte of the text of each step, before the step learns it; bold, the running mean. As long as no text is "
    "read twice, this is a measure on text that the student does not know."
)


def _section(title: str, body: str, note: str) -> str:
    if not body:
        return ""
    note = f'<p class="note">{safe(note)}</p>' if note else ""
    return f"<section>\n<h2>{safe(title)}</h2>\n{body}\n{note}\n</section>"


def _arms(facts: Facts) -> str:
    """Bits per byte of every student, and how much of the original's lead each kept."""
    if not facts.arms:
        return ""
    rows = [
        (arm["name"], LABELS.get(arm["name"], arm["name"]), arm["bits"], f"{arm['bits']:.4f}") for arm in facts.arms
    ]
    charts = [bars_chart(rows, "Held-out text, bits per byte")]
    kept = [arm for arm in facts.arms if arm["retention"] is not None and arm["name"] in (CONTROL, DISTILLED)]
    note = "Held-out text, bits per byte: lower is better."
    if kept:
        bars = [(arm["name"], LABELS[arm["name"]], arm["retention"], f"{arm['retention']:.1%}") for arm in kept]
        charts += ["<h3>Retention</h3>", bars_chart([*bars, ("original", "the original", 1.0, "100%")], "Retention")]
        note += " Retention: the part of the way from the student before training to the original."
    if facts.teacher_bits is not None:
        note += f" The teacher, which reads each document from its start: {facts.teacher_bits:.4f} bits per byte."
    title = "What the student kept" if any(arm["name"] == BEFORE for arm in facts.arms) else "What the students learned"
    return _section(title, "\n".join(charts), note)


def _stages(stages: Sequence[tuple[str, float, int]]) -> str:
    rows = [("stage", name, seconds, f"{seconds:.1f} s, {human_bytes(size)}") for name, seconds, size in stages]
    return bars_chart(rows, "Seconds of each stage") if rows else ""


def _passage(passage: dict[str, Any]) -> str:
    """The passage once for everybody who read it, in heat colours."""
    if not passage.get("entropy"):
        return ""
    names = [name for name in ("teacher", CONTROL, DISTILLED) if name in passage["entropy"]]
    blocks = []
    for name in names:
        bits = passage["entropy"][name]
        mean = sum(bits) / max(len(bits), 1)
        label = "the teacher" if name == "teacher" else LABELS.get(name, name)
        blocks.append(f"<h3>{safe(label)}, {mean:.2f} bits</h3>\n<pre>{heat(passage['text'], bits)}</pre>")
    for name, why in passage.get("refused", {}).items():
        blocks.append(f'<p class="note">{safe(name)}: not shown, {safe(why)}</p>')
    legend = "".join(f'<i class="h{level}">{level / 2:g}</i>' for level in range(LEVELS))
    blocks.append(f'<p class="legend">bits: {legend}</p>')
    note = (
        f"The beginning of {passage['document']}, which no student was trained on. The colour of a character "
        "is how unsure its reader was of it, in bits of entropy per byte, having read what stands before it."
    )
    return _section("A passage, byte by byte", "\n".join(blocks), note)


def heat(text: str, bits: Sequence[float]) -> str:
    """A text with each character on its colour; bits: of each byte in UTF-8, whose mean a character has."""
    return "".join(f'<b class="h{level}">{safe(run)}</b>' if level else safe(run) for level, run in _runs(text, bits))


def _runs(text: str, bits: Sequence[float]) -> Iterator[tuple[int, str]]:
    """Stretches of one colour."""
    level, run, place = 0, "", 0
    for char in text:
        some = bits[place : place + len(char.encode())]
        place += len(char.encode())
        mine = min(LEVELS - 1, round(2 * sum(some) / len(some))) if some else 0
        if mine != level and run:
            yield level, run
            run = ""
        level, run = mine, run + char
    if run:
        yield level, run


def _loading(lines: Sequence[str]) -> str:
    return f"<pre>{safe(chr(10).join(lines))}</pre>" if lines else ""


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{safe(name)}</th><td>{safe(value)}</td></tr>" for name, value in rows)
    return "\n".join(["<table>", *cells, "</table>"])
