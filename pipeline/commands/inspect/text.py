"""A dump part or a shard, readable for a person or as JSON: what the teacher said, position by position.

A shard's text is shown in heat colours of the teacher's entropy (`paint`); `inspection_page` makes the same a web page.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bytecache.schemas.arrays import END, F64
from bytecache.schemas.errors import InputError, IntegrityError, StorageError
from bytecache.schemas.files import kind_of
from bytecache.schemas.messages import one_line, plain
from bytecache.schemas.shard.reader import ByteShard, read_shard

HEAT = ("", "on #3a2a20", "on #553522", "on #6f3d24", "on #894529", "on #a34d30", "on #bd5538", "on #d65d42")
"""Colours of 0, 0.5, 1, ... bits of entropy; light text on them reads well on a dark terminal and a light one."""
PAINTED = 1200
"""Bytes of text painted above the table."""


def bits_per_position(shard: ByteShard, lo: int, hi: int) -> tuple[F64, F64, F64]:
    """(entropy, surprisal of the true symbol, its probability) of positions lo..hi, float64 [hi - lo], bits.

    The tail is spread as the shard's prior says.
    """
    parts = [_bits(shard, at, min(at + 4096, hi)) for at in range(lo, hi, 4096)]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True)) if parts else (np.zeros(0),) * 3


def _bits(shard: ByteShard, lo: int, hi: int) -> tuple[F64, F64, F64]:
    p = shard.dense(lo, hi, spread_tail=True).astype(np.float64)
    chance = p[np.arange(hi - lo), shard.symbols(lo, hi)]
    entropy = -(p * np.log2(np.maximum(p, 1e-300))).sum(axis=1)
    return np.maximum(entropy, 0.0), -np.log2(np.maximum(chance, 2.0**-24)), chance


def inspect_file(path: Path, document: str = "", start: int = 0, limit: int = 40, top: int = 4) -> dict[str, Any]:
    """Summary of a file and `limit` positions of one document from position `start`.

    `document`: an id, or empty for the first one; `top`: alternatives listed per position. Raises InputError for
    a file of another kind or an unknown document, IntegrityError for a damaged one.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise InputError(f"{path} is elsewhere: `bytecache inspect` reads files of this machine; fetch it first")
    if not path.is_file():
        fault = f"is {kind_of(path.stat().st_mode)}" if path.exists() else "does not exist"
        raise InputError(f"{path} {fault}; name a .parquet of teacher/ or a .zarr.zip of targets/")
    if path.name.endswith(".parquet"):
        return _dump(path, document, start, limit, top)
    if path.name.endswith(".zarr.zip"):
        return _shard(path, document, start, limit, top)
    raise InputError(f"{path}: unknown kind of file; name a .parquet of teacher/ or a .zarr.zip of targets/")


def paint(report: dict[str, Any]) -> Group:
    """`inspect_file` for a person at a terminal, in colour."""
    head = Text(plain(f"{report['file']}: {report['kind']}\n"), style="bold")
    for name, value in report["summary"].items():
        head.append(plain(f"  {name}: "), style="dim").append(_short(value) + "\n")
    head.append(plain(f"\ndocument {report['document']!r}\n"), style="bold")
    parts: list[Any] = [head]
    if report.get("heat"):
        parts += [_heat_text(*report["heat"]), _legend()]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("position", "next", "p(next)", "bits", "entropy", "tail", "most likely"):
        table.add_column(title, justify="left" if title in ("next", "most likely") else "right", no_wrap=True)
    for row in report["positions"]:
        cells: list[Any] = [str(row["position"]), plain(row["text"]) if "text" in row else show_symbol(row["symbol"])]
        cells.append("-" if row["p"] is None else f"{row['p']:.4f}")
        bits = (row.get("surprisal"), row.get("entropy"))
        cells += ["-" if b is None else Text(f"{b:.2f}", style=_style(b)) for b in bits]
        cells.append("-" if row["tail"] is None else f"{row['tail']:.1e}")
        tops = Text()
        for symbol, prob in row["top"]:
            style = "bold green" if symbol == row.get("symbol") else ""
            tops.append(f"{show_symbol(symbol)} {prob:.3f}  ", style=style)
        table.add_row(*cells, tops)
    return Group(*parts, table)


def _style(bits: float) -> str:
    colour = HEAT[min(int(bits * 2), len(HEAT) - 1)]
    return f"#ffffff {colour}" if colour else ""


def _heat_text(data: bytes, entropy: list[float]) -> Text:
    """Characters, each in the colour of its most uncertain byte; bytes that are not text as hex."""
    out = Text()
    at = 0
    while at < len(data):
        width = next((w for w in (1, 2, 3, 4) if _is_character(data[at : at + w])), 1)
        piece = data[at : at + width]
        shown = piece.decode("utf-8") if _is_character(piece) else f"<{piece[0]:02x}>"
        if shown == "\n":
            shown = "\u21b5\n"
        elif not shown.isprintable() and shown != "\t":
            shown = f"<{piece[0]:02x}>"
        out.append(shown, style=_style(max(entropy[at : at + width])))
        at += width
    return out


def _is_character(piece: bytes) -> bool:
    try:
        return len(piece.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


def _legend() -> Text:
    out = Text("\nentropy, bits: ", style="dim")
    for step in range(len(HEAT)):
        out.append(f" {step / 2:g}{'+' if step == len(HEAT) - 1 else ''} ", style=_style(step / 2))
    return out.append("\n")


def show_symbol(symbol: int | str) -> str:
    """A byte as a quoted character where it has one, else as hex; END by name."""
    if isinstance(symbol, str):
        return symbol
    if symbol == END:
        return "END"
    return repr(chr(symbol)) if 32 <= symbol < 127 or symbol in (9, 10, 13) else f"0x{symbol:02x}"


def _shard(path: Path, document: str, start: int, limit: int, top: int) -> dict[str, Any]:
    from bytecache.schemas.dataset.index import read_dataset
    from bytecache.stages.fidelity.certificate import summary_line

    shard = read_shard(path)
    summary = {**shard.statistics, "bytes_on_disk": path.stat().st_size}
    if shard.statistics.get("n_bytes"):
        summary["bytes_per_text_byte"] = round(path.stat().st_size / shard.statistics["n_bytes"], 3)
    summary |= shard.attrs
    index = path.parent / "dataset.json"
    if index.is_file():
        try:
            summary["fidelity"] = summary_line(read_dataset(path.parent).fidelity).removeprefix("fidelity: ")
        except (IntegrityError, StorageError) as error:
            summary["fidelity"] = f"the index cannot be read: {error}"
    if not shard.doc_id:
        return {"file": str(path), "kind": "byte targets", "summary": summary, "document": "", "positions": []}
    number = find_document(path, shard.doc_id, document)
    first, last = int(shard.doc_start[number]), int(shard.doc_start[number + 1])
    lo = min(first + start, last)
    hi = min(lo + limit, last)
    dense = shard.dense(lo, hi)
    entropy, surprisal, _ = bits_per_position(shard, lo, max(hi, min(last, lo + PAINTED)))
    rows = []
    for position in range(lo, hi):
        symbol = END if position == last - 1 else int(shard.text[position])
        probs = dense[position - lo]
        rows.append(
            {
                "position": position - first,
                "symbol": symbol,
                "p": float(probs[symbol]),
                "surprisal": float(surprisal[position - lo]),
                "entropy": float(entropy[position - lo]),
                "tail": float(shard.tail[position]),
                "supervised": bool(shard.mask[position]),
                "top": _top(probs, top),
            }
        )
    return {
        "file": str(path),
        "kind": "byte targets",
        "summary": summary,
        "document": shard.doc_id[number],
        "positions": rows,
        "heat": (shard.text[lo : min(lo + PAINTED, last - 1)].tobytes(), entropy.tolist()),
    }


def _dump(path: Path, document: str, start: int, limit: int, top: int) -> dict[str, Any]:
    """Rows are canonical token positions; the alternatives are the next bytes at the token's start."""
    from bytecache.schemas.dump.parquet import read_meta, read_windows

    meta = read_meta(path)
    everything = list(read_windows(path))
    windows = [window for window in everything if not window.reference]
    summary: dict[str, Any] = {
        "windows": len(windows),
        "reference_windows": len(everything) - len(windows),
        "documents": len({window.doc_id for window in windows}),
        "histories": sum(len(window.row_start) for window in windows),
        "branches": sum(int((window.row_depth > 0).sum()) for window in windows),
        "bytes_on_disk": path.stat().st_size,
        **{name: value for name, value in meta.items() if name not in ("format", "version")},
    }
    rows: list[dict[str, Any]] = []
    chosen = windows[find_document(path, [window.doc_id for window in windows], document)].doc_id if windows else ""
    position = 0
    for window in windows:
        if window.doc_id != chosen:
            continue
        canonical = np.flatnonzero(window.row_depth == 0)
        level = np.concatenate([[0], np.cumsum(window.n_levels)])
        entry = np.concatenate([[0], np.cumsum(window.fanout)])
        width = len(window.topk_id) // max(1, len(window.row_start))
        for row, following in zip(canonical, [*canonical[1:], None], strict=True):
            if window.row_start[row] < window.score_start or following is None:
                continue
            if position >= start and len(rows) < limit:
                a, b = int(entry[level[row]]), int(entry[level[row] + 1])
                order = np.argsort(-window.entry_mass[a:b], kind="stable")[:top]
                piece = bytes(window.text[window.row_start[row] : window.row_start[following]])
                rows.append(
                    {
                        "position": position,
                        "text": repr(piece.decode("utf-8", "backslashreplace")),
                        "token": int(window.row_token[following]),
                        "p": math.exp(float(window.row_logp[following])),
                        "tail": None,
                        "end": float(window.end[row]),
                        "top": [[int(window.entry_byte[a + i]), float(window.entry_mass[a + i])] for i in order],
                        "top_tokens": [
                            [int(token), float(logp)]
                            for token, logp in zip(
                                window.topk_id[row * width : (row + 1) * width][:top],
                                window.topk_logp[row * width : (row + 1) * width][:top],
                                strict=True,
                            )
                        ],
                    }
                )
            position += 1
    return {"file": str(path), "kind": "token dump", "summary": summary, "document": chosen, "positions": rows}


def find_document(path: Path, ids: list[str], document: str) -> int:
    """Index of a document by its id (empty: the first). Raises InputError."""
    if not document:
        return 0
    if document not in ids:
        shown = ", ".join(sorted(set(ids))[:5])
        raise InputError(f"{path}: no document {document!r}; it holds {len(set(ids))}, for example {shown}")
    return ids.index(document)


def _top(probs: np.ndarray, top: int) -> list[list[Any]]:
    order = np.argsort(-probs, kind="stable")[:top]
    return [[int(symbol), float(probs[symbol])] for symbol in order if probs[symbol] > 0]


def _short(value: Any) -> str:
    text = one_line(str(value))
    return text if len(text) <= 240 else text[:237] + "..."
