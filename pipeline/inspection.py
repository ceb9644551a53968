"""A dump part or a shard, readable for a person or as JSON: what the teacher said, position by position."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import InputError, IntegrityError, StorageError

END = 256


def inspect_file(path: Path, document: str = "", start: int = 0, limit: int = 40, top: int = 4) -> dict[str, Any]:
    """Summary of a file and `limit` positions of one document from position `start`.

    `document`: an id, or empty for the first one; `top`: alternatives listed per position. Raises InputError for
    a file of another kind or an unknown document, IntegrityError for a damaged one.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; name a .parquet of teacher/ or a .zarr.zip of targets/")
    if path.name.endswith(".parquet"):
        return _dump(path, document, start, limit, top)
    if path.name.endswith(".zarr.zip"):
        return _shard(path, document, start, limit, top)
    raise InputError(f"{path}: unknown kind of file; name a .parquet of teacher/ or a .zarr.zip of targets/")


def render(report: dict[str, Any]) -> str:
    """`inspect_file` for a person."""
    lines = [f"{report['file']}: {report['kind']}"]
    lines += [f"  {name}: {_short(value)}" for name, value in report["summary"].items()]
    lines += [
        "",
        f"document {report['document']!r}",
        f"  {'position':>8}  {'next':<8} {'p(next)':>8} {'tail':>8}  most likely",
    ]
    for row in report["positions"]:
        tops = "  ".join(f"{show_symbol(symbol)} {prob:.3f}" for symbol, prob in row["top"])
        chance = "-" if row["p"] is None else f"{row['p']:.4f}"
        tail = "-" if row["tail"] is None else f"{row['tail']:.1e}"
        name = row["text"] if "text" in row else show_symbol(row["symbol"])
        lines.append(f"  {row['position']:>8}  {name:<8} {chance:>8} {tail:>8}  {tops}")
    return "\n".join(lines)


def show_symbol(symbol: int | str) -> str:
    """A byte as a quoted character where it has one, else as hex; END by name."""
    if isinstance(symbol, str):
        return symbol
    if symbol == END:
        return "END"
    return repr(chr(symbol)) if 32 <= symbol < 127 or symbol in (9, 10, 13) else f"0x{symbol:02x}"


def _shard(path: Path, document: str, start: int, limit: int, top: int) -> dict[str, Any]:
    from schemas.byte_shard import read_shard
    from schemas.manifest import read_dataset
    from stages.fidelity import summary_line

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
    number = _find(path, shard.doc_id, document)
    first, last = int(shard.doc_start[number]), int(shard.doc_start[number + 1])
    lo = min(first + start, last)
    hi = min(lo + limit, last)
    dense = shard.dense(lo, hi)
    rows = []
    for position in range(lo, hi):
        symbol = END if position == last - 1 else int(shard.text[position])
        probs = dense[position - lo]
        rows.append(
            {
                "position": position - first,
                "symbol": symbol,
                "p": float(probs[symbol]),
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
    }


def _dump(path: Path, document: str, start: int, limit: int, top: int) -> dict[str, Any]:
    """Rows are canonical token positions; the alternatives are the next bytes at the token's start."""
    from schemas.token_dump import read_meta, read_windows

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
    chosen = windows[_find(path, [window.doc_id for window in windows], document)].doc_id if windows else ""
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


def _find(path: Path, ids: list[str], document: str) -> int:
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
    text = str(value)
    return text if len(text) <= 240 else text[:237] + "..."
