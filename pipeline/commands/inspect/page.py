"""A shard as one HTML file: text in heat colours, every byte's alternatives and tail. Works offline, loads nothing.

The page is `page.html` with the numbers in it (base64 of little-endian arrays inside JSON). Strings of the
shard reach the page as data only (`<` is escaped in the JSON, the script sets text, never markup), and its content
security policy forbids every request.
Price: about 60 bytes of page per position at 8 alternatives; `POSITIONS` bounds it to some 4 MB.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.pipeline.commands.inspect.text import bits_per_position, find_document
from bytecache.schemas.errors import InputError
from bytecache.schemas.shard.reader import ByteShard, read_shard

POSITIONS = 1 << 16
"""Most positions in one page."""
_TEMPLATE = Path(__file__).with_name("page.html")


def shard_page(path: Path, document: str = "", start: int = 0, limit: int = POSITIONS, top: int = 8) -> str:
    """The page of a shard: whole documents from `document` (an id; empty = the first) on, up to `limit` positions.

    `start`: first position of that document; `top`: alternatives per position. Raises InputError for a shard without
    such a document, IntegrityError for a damaged one.
    """
    if not path.name.endswith(".zarr.zip") or not path.is_file():
        raise InputError(f"{path}: --html shows a .zarr.zip of targets/; name an existing one")
    shard = read_shard(path)
    documents: list[dict[str, Any]] = []
    first = find_document(path, shard.doc_id, document) if shard.doc_id else 0
    left = min(limit, POSITIONS)
    for number in range(first, len(shard.doc_id)):
        lo, hi = int(shard.doc_start[number]), int(shard.doc_start[number + 1])
        lo = min(lo + start, hi - 1) if number == first else lo
        if left <= 0:
            break
        end = min(hi, lo + left)
        left -= end - lo
        documents.append(_document(shard, number, lo, end, top))
    data = {
        "title": path.name,
        "subtitle": f"{len(documents)} of {len(shard.doc_id):,} documents shown",
        "facts": _facts(path, shard),
        "provenance": shard.attrs,
        "documents": documents,
    }
    text = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text)


def _facts(path: Path, shard: ByteShard) -> list[tuple[str, str]]:
    counts, size = shard.statistics, path.stat().st_size
    n_bytes = counts["n_bytes"]
    facts = [("documents", f"{counts['n_documents']:,}"), ("bytes of text", f"{n_bytes:,}")]
    if n_bytes:
        facts.append(("bytes on disk per byte", f"{size / n_bytes:.2f}"))
        facts.append(("listed per position", f"{counts['n_entries'] / counts['n_positions']:.1f}"))
        hi = min(len(shard), 1 << 18)
        entropy, surprisal, _ = bits_per_position(shard, 0, hi)
        supervised = np.asarray(shard.mask[:hi]) != 0
        if supervised.any():
            facts.append(("mean entropy", f"{entropy[supervised].mean():.3f} bits"))
            facts.append(("teacher's surprisal", f"{surprisal[supervised].mean():.3f} bits"))
    figures = (("mean tail", "tail_mean", ".4f"), ("largest tail", "tail_max", ".3f"))
    return [*facts, *((words, format(counts[name], form)) for words, name, form in figures if name in counts)]


def _document(shard: ByteShard, number: int, lo: int, hi: int, top: int) -> dict[str, Any]:
    entropy, surprisal, p_true = bits_per_position(shard, lo, hi)
    row, symbol, prob = shard.triples(lo, hi)
    order = np.lexsort((symbol, -prob, row))
    row, symbol, prob = row[order], symbol[order], prob[order]
    first = np.searchsorted(row, np.arange(hi - lo + 1))
    shown = np.arange(len(row)) - first[row] < top
    other = np.bincount(row[~shown], prob[~shown], minlength=hi - lo)
    begin, end = int(shard.doc_start[number]), int(shard.doc_start[number + 1])
    name, whole = shard.doc_id[number], hi == end
    label = name if len(name) <= 60 else name[:57] + "..."
    arrays = {
        "text": np.asarray(shard.text[lo:hi]),
        "mask": np.asarray(shard.mask[lo:hi]),
        "count": np.bincount(row[shown], minlength=hi - lo).astype(np.uint8),
        "entropy": entropy.astype("<f4"),
        "surprisal": surprisal.astype("<f4"),
        "tail": np.asarray(shard.tail[lo:hi]).astype("<f4"),
        "p": p_true.astype("<f4"),
        "other": other.astype("<f4"),
        "symbol": symbol[shown].astype("<u2"),
        "prob": prob[shown].astype("<f4"),
    }
    encoded = {key: base64.b64encode(value.tobytes()).decode() for key, value in arrays.items()}
    shown = f"{label} ({end - begin - 1:,} bytes{'' if whole and lo == begin else ', a part'})"
    return {"label": shown, "start": lo - begin, "whole": whole, **encoded}
