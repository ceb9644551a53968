"""inspect: figures that a person can trust, a page that loads nothing and that hostile text cannot enter."""

import base64
import html.parser
import io
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from bytecache.pipeline.commands.inspect.page import shard_page
from bytecache.pipeline.commands.inspect.text import bits_per_position, inspect_file
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.schemas.shard.reader import read_shard
from tests.support.command_line import bytecache, refusal
from tests.support.student_data import write_split

EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)>"
TEXTS = ["naïve 日本 text", EVIL, "", "x" * 300]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    write_split(folder, "train", TEXTS, 4, lambda n: (np.arange(n) >= 2).astype(np.uint8))
    return next(folder.glob("*.zarr.zip"))


def test_entropy_and_surprisal_are_those_of_the_dense_rows(shard: Path) -> None:
    opened = read_shard(shard)
    n = len(opened)
    dense = opened.dense(0, n).astype(np.float64) + opened.tail_weights(0, n) * opened.tail[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(np.where(dense > 0, dense * np.log2(dense), 0), axis=1)
    true = np.asarray(opened.text).astype(int)
    true[opened.doc_start[1:] - 1] = 256
    listed = dense[np.arange(n), true]
    for lo, hi in ((0, n), (3, 40), (n - 1, n), (5, 5)):
        got = bits_per_position(opened, lo, hi)
        np.testing.assert_allclose(got[0], entropy[lo:hi], atol=1e-6)
        np.testing.assert_allclose(got[2], listed[lo:hi], rtol=1e-5)
        np.testing.assert_allclose(got[1], -np.log2(got[2]), atol=1e-6)
    row = inspect_file(shard, "train-0", 0, 3, 2)["positions"][0]
    assert row["entropy"] == pytest.approx(entropy[0], abs=1e-6) and not row["supervised"]


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data


def test_the_page_is_whole_loads_nothing_and_escapes_what_it_shows(shard: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert f"{out}: open it" in bytecache("inspect", shard, "--html", out).stdout.replace("\n", "")
    text = out.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2 and "img" not in names and "link" not in names and "iframe" not in names
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "onerror", "onclick"} & attributes.keys()
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|https?://", text)
    assert dict(page.tags)["html"]["lang"] == "en"
    labelled = [
        a for tag, a in page.tags if tag in ("select", "canvas", "aside", "pre") and a.get("id") != "provenance"
    ]
    assert all("aria-label" in attributes for attributes in labelled)
    data = json.loads(page.data)
    opened = read_shard(shard)
    assert [d["label"].split(" (")[0] for d in data["documents"]] == [f"train-{i}" for i in range(4)]
    for number, (document, want) in enumerate(zip(data["documents"], TEXTS, strict=True)):
        raw = base64.b64decode(document["text"])
        assert raw[:-1].decode() == want and document["whole"]
        count = np.frombuffer(base64.b64decode(document["count"]), np.uint8)
        symbol = np.frombuffer(base64.b64decode(document["symbol"]), "<u2")
        prob = np.frombuffer(base64.b64decode(document["prob"]), "<f4")
        assert len(count) == len(raw) and count.sum() == len(symbol) == len(prob)
        dense = opened.dense(int(opened.doc_start[number]), int(opened.doc_start[number + 1]))
        row = np.repeat(np.arange(len(raw)), count)
        np.testing.assert_allclose(prob, dense[row, symbol], rtol=1e-6)
        assert (symbol[np.cumsum(count) - count] == dense.argmax(1)).all(), "the likeliest comes first"


def test_a_page_of_a_part_and_its_refusals(shard: Path, tmp_path: Path) -> None:
    page = shard_page(shard, "train-3", start=10, limit=20, top=1)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    (document,) = data["documents"]
    assert (document["start"], document["whole"]) == (10, False) and "a part" in document["label"]
    assert base64.b64decode(document["text"]) == b"x" * 20
    out = tmp_path / "page.html"
    assert "no document 'none'" in refusal(bytecache("inspect", shard, "-d", "none", "--html", out), 3)
    assert "--html shows a .zarr.zip" in refusal(bytecache("inspect", __file__, "--html", out), 3)
    assert not out.exists()


def test_the_terminal_shows_text_in_colour_and_bytes_that_are_none_as_hex(shard: Path) -> None:
    from rich.console import Console

    from bytecache.pipeline.commands.inspect.text import paint

    console = Console(width=200, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(paint(inspect_file(shard, "train-0", 0, 4, 3)))
    coloured = console.export_text(styles=True, clear=False)
    assert "naïve 日本 text" in console.export_text() and "\x1b[" in coloured and "48;2;" in coloured


@pytest.mark.parametrize(
    "hostile", ["\x1b]0;owned\x07\x1b[2J", "\x9b31m", "gpj.\u202eexe", "\r\x08\x08", "\u2028\u2029"]
)
def test_words_of_a_stranger_do_not_command_the_terminal(hostile: str, tmp_path: Path) -> None:
    """In attributes, their names, document ids and file names."""
    builder = ShardBuilder()
    data = np.frombuffer(b"ab", np.uint8)
    probs = np.zeros((3, 257), np.float32)
    probs[[0, 1, 2], [97, 98, 256]] = 1.0
    builder.append(data, probs, np.zeros(3, np.float32))
    builder.end_document(f"id {hostile}")
    path = tmp_path / f"n{hostile.replace('/', '')}.zarr.zip"
    builder.write(path, {f"name {hostile}": f"value {hostile}", "nested": {hostile: [hostile]}})
    for arguments in ([], ["--document", f"id {hostile}"], ["--document", hostile], ["--json"]):
        done = bytecache("inspect", path, *arguments)
        commands = [char for char in done.output if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")]
        assert set(commands) <= {"\n"}, (arguments, done.output)


def test_a_folder_is_called_a_folder(tmp_path: Path) -> None:
    assert f"{tmp_path} is a folder" in refusal(bytecache("inspect", tmp_path), 3)
