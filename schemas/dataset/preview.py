"""Rows and a picture of a data set for people: what the teacher said at the first positions of some documents.

Made of the shards alone, the same bytes every time. The rows are a small Parquet table that a hub's viewer shows; the
picture is an SVG of a text in which every character is as dark as the teacher was uncertain of it.
"""

import unicodedata
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.schemas.arrays import END, F64
from bytecache.schemas.shard.reader import ByteShard

POSITIONS = 160
"""Positions shown of a document."""
DOCUMENTS = 4
"""Documents shown of a split, those that are longest among its first."""
AMONG = 64
LISTED = 4
"""Bytes that are named at a position, the likeliest."""
BEFORE = 48
"""Bytes of text shown before a position."""
COLUMNS, LINES = 72, 6
"""Of the picture, in cells."""
DARK_BITS = 6.0
"""Entropy that is drawn darkest."""
_CELL, _LINE, _TOP = 9, 20, 34


class Stretch(NamedTuple):
    """The first n positions of a document: `text` uint8 [n], `symbol` int64 [n], `prob` float64 [n, 257], tail [n]."""

    document: str
    text: bytes
    symbol: list[int]
    prob: F64
    tail: F64

    def entropy(self) -> F64:
        """float64 [n], bits; the unlisted mass spread as the shard's prior weighs it."""
        p = np.clip(self.prob, 1e-300, 1)
        bits: F64 = -(self.prob * np.log2(p)).sum(1)
        return bits


def stretches(shard: ByteShard) -> list[Stretch]:
    """Of the longest among the shard's first documents, in their order."""
    size = np.diff(shard.doc_start)[:AMONG]
    chosen = sorted(np.argsort(-size, kind="stable")[:DOCUMENTS].tolist())
    stretches = []
    for document in chosen:
        lo, end = int(shard.doc_start[document]), int(shard.doc_start[document + 1])
        hi = min(end, lo + POSITIONS)
        symbol = shard.symbols(lo, hi).tolist()
        dense = shard.dense(lo, hi, spread_tail=True).astype(np.float64)
        tail = shard.tails(lo, hi).astype(np.float64)
        stretches.append(Stretch(shard.doc_id[document], shard.text[lo:hi].tobytes(), symbol, dense, tail))
    return stretches


def preview_table(stretches: list[Stretch]) -> bytes:
    """Parquet: a row a position, with names that need no explanation."""
    rows: list[dict[str, Any]] = []
    for one in stretches:
        entropy = one.entropy()
        for i, symbol in enumerate(one.symbol):
            best = np.argsort(-one.prob[i], kind="stable")[:LISTED]
            rows.append({
                "document": one.document,
                "position": i,
                "text_before": one.text[max(0, i - BEFORE) : i].decode("utf-8", errors="replace"),
                "next_byte": symbol_name(symbol),
                "teacher_expects": ", ".join(f"{symbol_name(int(s))} {one.prob[i, s]:.1%}" for s in best),
                "probability_of_next": round(float(one.prob[i, symbol]), 6),
                "entropy_bits": round(float(entropy[i]), 4),
                "unlisted": round(float(one.tail[i]), 6),
            })  # fmt: skip
    kinds = {"document": pa.string(), "position": pa.int32(), "text_before": pa.string(), "next_byte": pa.string(),
             "teacher_expects": pa.string(), "probability_of_next": pa.float32(), "entropy_bits": pa.float32(),
             "unlisted": pa.float32()}  # fmt: skip
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    data: bytes = sink.getvalue().to_pybytes()
    return data


PREVIEW_FIELDS = {
    "document": ("sc:Text", "Id of the document."),
    "position": ("sc:Integer", "How many bytes of the document come before."),
    "text_before": ("sc:Text", "The end of those bytes."),
    "next_byte": ("sc:Text", "The byte that follows in the text, or END."),
    "teacher_expects": ("sc:Text", "The likeliest next bytes and their probabilities."),
    "probability_of_next": ("sc:Float", "What the teacher gave to the byte that follows."),
    "entropy_bits": ("sc:Float", "Entropy of the teacher's distribution, bits."),
    "unlisted": ("sc:Float", "Probability of all symbols that are not listed."),
}
"""Columns of the preview: their Croissant type, and what they hold."""


def symbol_name(symbol: int) -> str:
    """A symbol for people: the character of a printable ASCII byte, a name for white space, hexadecimal else."""
    if symbol == END:
        return "END"
    named = {0x20: "space", 0x2C: "comma", 0x0A: "newline", 0x0D: "return", 0x09: "tab"}
    return named.get(symbol) or (chr(symbol) if 0x20 < symbol < 0x7F else f"0x{symbol:02x}")


def picture(one: Stretch) -> bytes:
    """SVG of a text: each character on a ground as dark as the bits that its bytes held."""
    entropy = one.entropy()
    drawn: list[tuple[int, int, int, str, float]] = []  # column, line, cells, character, bits
    column = line = at = 0
    text = one.text[: len(one.symbol) - (one.symbol[-1] == END)].decode("utf-8", errors="ignore")
    for character in text:
        size = len(character.encode())
        bits, at = float(entropy[at : at + size].sum()), at + size
        cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        shown = {"\n": "¶", "\t": "→"}.get(character, character if character.isprintable() else "·")
        if column + cells > COLUMNS:
            column, line = 0, line + 1
        if line >= LINES:
            break
        drawn.append((column, line, cells, shown, bits))
        column += cells
        if character == "\n":
            column, line = 0, line + 1
    height = _TOP + (max((d[1] for d in drawn), default=0) + 1) * _LINE + 10
    width = COLUMNS * _CELL + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-family="sans-serif" font-size="12" fill="#555555">the text, on a ground as dark as '
        f"the teacher was uncertain: white 0 bits, darkest {DARK_BITS:g} bits and more</text>",
    ]
    for column, line, cells, shown, bits in drawn:
        x, y, share = 10 + column * _CELL, _TOP + line * _LINE, min(bits / DARK_BITS, 1.0)
        ink = "#ffffff" if share > 0.6 else "#111111"
        parts.append(f'<rect x="{x}" y="{y}" width="{cells * _CELL}" height="{_LINE - 2}" fill="#b03a2e" '
                     f'fill-opacity="{share:.2f}"/>')  # fmt: skip
        if shown.strip():
            parts.append(f'<text x="{x + cells * _CELL / 2:g}" y="{y + 14}" font-family="monospace" font-size="14" '
                         f'text-anchor="middle" fill="{ink}">{escape(shown)}</text>')  # fmt: skip
    return "\n".join([*parts, "</svg>", ""]).encode()
