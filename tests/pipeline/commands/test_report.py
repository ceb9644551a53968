"""The page of a run: complete, self-contained, deaf to what documents try to say in it; and retention as defined."""

import json
import math
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bytecache.pipeline.commands.report.charts import curves_chart
from bytecache.pipeline.commands.report.facts import Facts, arms_of, curve_of, retention
from bytecache.pipeline.commands.report.page import heat, report_page
from bytecache.pipeline.commands.report.table import summary_rows
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units.receipts import FileRecord, Receipt

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=\"fetch('http://evil.example/')\">"
    "<!--TITLE--><!--BODY-->&lt;\u202e\x00\x1b[2J\u2028 é 日本 \U0001f600\n\tend"
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


def result(name: str, bits: float, text_bytes: int = 1000) -> dict[str, object]:
    return {
        "name": name, "token_bits_per_byte": bits, "kl_nats_per_byte": 0.1, "head_bits_per_byte": bits,
        "teacher_bits_per_byte": 0.75, "head_time_share": None, "text_bytes": text_bytes,
    }  # fmt: skip


RESULTS = [result("distilled", 1.1), result("control", 1.2), result("before", 1.5), result("original", 1.0)]


class Page(HTMLParser):
    """Elements with their attributes and text; an element that is not closed, or closed twice, is a fault."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def facts(text: str) -> Facts:
    entropy = [0.1 * (place % 70) for place in range(len(text.encode()))]
    return Facts(
        title=text,
        table=[(text, text)],
        arms=arms_of(RESULTS),
        teacher_bits=0.75,
        curves={name: [(step, 2 - 0.01 * step) for step in range(1, 40)] for name in ("control", "distilled")},
        stages=[("teacher", 12.5, 1000), (text, 3.0, 10)],
        passage={
            "document": text, "text": text, "entropy": {"teacher": entropy, "control": entropy, "distilled": entropy},
            "refused": {text: text},
        },
        loading=[text],
    )  # fmt: skip


def test_a_page_of_hostile_text_has_the_elements_of_one_of_harmless_text() -> None:
    raw = report_page(facts(HOSTILE))
    page, harmless = Page(raw), Page(report_page(facts("x" * 40)))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in harmless.elements}
    # But for the colours of the passage, of which each stretch is an element.
    counted = [[tag for tag, _ in each.elements if tag != "b"] for each in (page, harmless)]
    assert counted[0] == counted[1]
    shown = "".join(page.text)
    assert "</pre><script>alert(1)</script>" in shown and "日本 \U0001f600" in shown and "<!--BODY-->" in shown
    assert not [char for char in raw if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") and char not in "\n\t"]


def test_a_page_asks_for_nothing_and_runs_nothing() -> None:
    raw = report_page(facts(HOSTILE))
    page = Page(raw)
    policy = [given["content"] for tag, given in page.elements if "http-equiv" in given]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"} & {
        t for t, _ in page.elements
    }
    for _, given in page.elements:
        assert not [name for name in given if name.startswith("on") or name in ("src", "href", "xlink:href", "style")]
    style = re.search(r"<style>(.*?)</style>", raw, re.S)
    assert style is not None and not re.search(r"url\(|@import|//", style[1])


def test_pictures_are_sound_and_show_what_they_were_given() -> None:
    raw = report_page(facts("y" * 30))
    pictures = re.findall(r"<svg.*?</svg>", raw, re.S)
    assert len(pictures) == 4
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert not re.search(r"nan|inf", picture.partition(">")[2])
    bars = [float(rect.get("width")) for rect in ElementTree.fromstring(pictures[0]).iter("rect")]  # type: ignore[arg-type]
    assert [bar / bars[0] for bar in bars] == pytest.approx([1, 1.2 / 1.5, 1.1 / 1.5, 1 / 1.5], abs=1e-3)
    assert curves_chart({"control": [(1, 2.0)]}) == "", "one point is no curve"


def test_retention_is_the_part_of_the_way_from_before_to_the_original() -> None:
    kept = retention(RESULTS)
    assert kept == pytest.approx({"before": 0, "control": 0.6, "distilled": 0.8, "original": 1})
    assert [arm["name"] for arm in arms_of(RESULTS)] == ["before", "control", "distilled", "original"]
    rows = dict(summary_rows(1, [], [], [], RESULTS))
    assert rows["held out, student distilled: tokens"] == "1.1000 bits/byte, retention 80.0%"
    assert rows["held out, before training: tokens"] == "1.5000 bits/byte"
    # Where the original is no better than the student was, there is no way to go.
    worse = [result("distilled", 1.1), result("before", 1.0), result("original", 1.0)]
    assert retention(worse) == {} and retention(RESULTS[:2]) == {}
    assert "retention" not in str(summary_rows(1, [], [], [], worse)) and "Retention" not in report_page(
        Facts(title="t", table=[], arms=arms_of(worse))
    )


def test_students_that_read_other_text_are_not_compared() -> None:
    other = [*RESULTS[:2], result("before", 1.5), result("original", 1.0, 900)]
    assert retention(other) == {} and "%" not in str(summary_rows(1, [], [], [], other))
    assert (
        "original 900 B"
        in dict(summary_rows(1, [], [], [], other))["held out, of other text each, so not to be compared"]
    )


def test_colours_are_those_of_the_bytes() -> None:
    assert heat("ab", [0.0, 3.0]) == 'a<b class="h6">b</b>'
    assert heat("é<", [1.0, 2.0, 0.0]) == '<b class="h3">é</b>&lt;', "a character has the mean of its bytes"
    assert heat("a", [99.0]) == '<b class="h11">a</b>'


def test_a_curve_is_read_from_a_log_that_was_cut_off(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    receipt = Receipt(
        stage="train",
        key="0" * 64,
        name="control",
        files=(FileRecord(path="train/r/step-2.safetensors", size=1, sha256="0" * 64),),
        inputs={},
        counts={"checkpoint": "train/r/step-2.safetensors"},
    )
    assert curve_of(store, receipt) == []
    lines = [{"step": s, "token_nll": nll, "tokens": 10, "text_bytes": 40} for s, nll in ((1, 4.0), (2, 9.0), (2, 2.0))]
    lines.append({"step": 3, "token_nll": 0.0, "tokens": 0, "text_bytes": 0})
    (tmp_path / "train/r").mkdir(parents=True)
    (tmp_path / "train/r/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "tok')
    (first, second) = curve_of(store, receipt)
    assert first == (1, pytest.approx(1 / math.log(2))) and second == (2, pytest.approx(0.5 / math.log(2)))
