"""Byte targets: the teacher's next-byte distribution at every position of a text, in one Zarr v3 zip per shard.

A document of n bytes owns n + 1 positions; the last one predicts END. Per position: the most likely symbol
(implied probability: 1 minus the rest), the unlisted mass, P(END), and a ragged list of other bytes with 8-bit
log-probabilities. SPEC.md is the normative description; `quantise` holds the arithmetic, `zarr_zip` the file.

Price: 7 bytes of memory per position plus 2 per listed byte, the same while building and when read; about
6-10 bytes of file per byte of text. Figures and the commands that produce them: SPEC.md, "Cost".
"""

import json
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas import quantise
from schemas.errors import IntegrityError
from schemas.quantise import F32, FLOOR, I64, INDEX_STRIDE, SYMBOLS, U8
from schemas.zarr_zip import read_zarr_zip, write_zarr_zip

FORMAT = "bytecache.byte-targets"
VERSION = 1
COLUMNS = {
    "text": "uint8",
    "mask": "uint8",
    "top": "uint8",
    "tail": "uint8",
    "end": "uint8",
    "count": "uint8",
    "byte": "uint8",
    "logp": "uint8",
    "doc_start": "int64",
    "doc_id": "uint8",
    "doc_id_start": "int64",
}
_BLOCK = 1 << 14
"""Rows encoded at a time: bounds the scratch for the worst case (256 entries per row) to 8 MiB."""
_REASONS = {
    quantise.BAD_ORDER: "entries are not ascending or repeat the implied symbol",
    quantise.BAD_CODE: "a code that no writer produces",
    quantise.BAD_MASS: "listed mass and tail reach 1",
    quantise.BAD_COUNT: "column `count` does not add up to the length of `byte`",
}


class Triples(NamedTuple):
    """Sparse rows: non-zero (row, symbol, probability), rows ascending, symbols ascending within a row."""

    row: NDArray[np.int32]
    """int32 [E], relative to the first requested position"""
    symbol: NDArray[np.int16]
    """int16 [E], 0..255 bytes, 256 END"""
    prob: F32
    """float32 [E]"""


class ShardBuilder:
    """Collects documents as quantised columns (never the dense rows) and writes them as one shard.

    `prune`: bytes rarer than this, unless most likely, are summed into their position's tail. END is pruned
    only below 1e-6, where nothing has a code.
    """

    def __init__(self, prune: float = 1e-3) -> None:
        if not 0.0 <= prune <= 0.1:
            raise ValueError(f"prune is {prune}, must be within 0..0.1")
        self.prune = prune
        self._threshold = _bits_at_least(max(prune, FLOOR))
        self._floor = _bits_at_least(FLOOR)
        # Fixed-point unit of the pruned mass: the largest power of two for which a pruned value fits an int32.
        self._scale = np.float32(2.0 ** math.floor(31 - math.log2(float(self._threshold.view(np.float32)))))
        self._columns = {name: bytearray() for name in COLUMNS if name not in ("doc_start", "doc_id_start")}
        self._doc_start = [0]
        self._doc_id_start = [0]
        self._ended = False
        self._tail_histogram = np.zeros(256, np.int64)
        self._divergence = np.zeros(1)
        self._scratch = np.empty((6, _BLOCK), np.uint8)
        self._entries = np.empty((2, 256 * _BLOCK), np.uint8)

    @property
    def n_positions(self) -> int:
        return len(self._columns["top"])

    @property
    def n_bytes(self) -> int:
        """Bytes of text so far."""
        return self.n_positions - (len(self._doc_start) - 1) - self._ended

    def append(self, text: U8, probs: F32, tail: F32, mask: U8 | None = None) -> None:
        """Add the next piece of the current document.

        text uint8 [m]; probs float32 [m, 257], or [m + 1, 257] when the piece ends the document (the last row
        predicts END); tail float32 [rows], unlisted mass; mask uint8 [rows], 1 = supervised (default all).
        Every row and its tail sum to 1 within 1e-4; the residual goes to the most likely symbol.

        Raises IntegrityError naming the row for NaN, negative or wrongly summing probabilities (the builder is
        then as before the call), ValueError for shapes that do not match.
        """
        text = np.ascontiguousarray(text, np.uint8)
        probs = np.ascontiguousarray(probs, np.float32)
        tail = np.ascontiguousarray(tail, np.float32)
        n = len(probs)
        if probs.ndim != 2 or probs.shape[1] != SYMBOLS or n - len(text) not in (0, 1) or tail.shape != (n,):
            raise ValueError(
                f"text {text.shape}, probs {probs.shape}, tail {tail.shape}: expected [m], [m or m + 1, 257], [rows]"
            )
        if self._ended:
            raise ValueError("the last piece held the END position: call end_document before the next piece")
        mask = np.ones(n, np.uint8) if mask is None else np.ascontiguousarray(mask, np.uint8)
        if mask.shape != (n,) or (n and mask.max() > 1):
            raise ValueError(f"mask {mask.shape} must have one 0 or 1 per row of probs ({n})")
        before = {name: len(column) for name, column in self._columns.items()}
        divergence = self._divergence.copy()
        try:
            for lo in range(0, n, _BLOCK):
                self._encode(probs[lo : lo + _BLOCK], tail[lo : lo + _BLOCK], lo)
        except IntegrityError:
            for name, length in before.items():
                del self._columns[name][length:]
            self._divergence[:] = divergence
            raise
        self._tail_histogram += np.bincount(
            np.frombuffer(self._columns["tail"], np.uint8, offset=before["tail"]), minlength=256
        )
        self._columns["text"] += text.tobytes() + bytes(n - len(text))
        self._columns["mask"] += mask.tobytes()
        self._ended = n > len(text)

    def _encode(self, probs: F32, tail: F32, first: int) -> None:
        flat = probs.reshape(-1)
        top, codes, end, count = (column[: len(probs)] for column in self._scratch[:4])
        entry_byte, entry_code = self._entries
        n_entries, row, reason, value = quantise.encode_rows(
            flat, flat.view(np.uint32), tail, self._threshold, self._floor, self._scale,
            top, codes, end, count, entry_byte, entry_code, self._divergence,
        )  # fmt: skip
        if row >= 0:
            if reason == quantise.BAD_VALUE and value == 0.0:  # -0.0: the kernel orders floats by their bits
                return self._encode(probs + np.float32(0.0), tail, first)
            document = len(self._doc_start) - 1
            position = self.n_positions + row - self._doc_start[-1]
            what = (
                f"probability or tail {value} (must be within 0..1)"
                if reason == quantise.BAD_VALUE
                else f"probabilities and tail sum to {value:.6f} (must be 1 within {quantise.SUM_TOLERANCE})"
            )
            raise IntegrityError(
                f"row {first + row} of this piece (document {document} of the shard, position {position}): {what}; "
                "check the teacher's numbers, nothing of this piece was kept"
            )
        for name, values in (("top", top), ("tail", codes), ("end", end), ("count", count)):
            self._columns[name] += values.tobytes()
        self._columns["byte"] += entry_byte[:n_entries].tobytes()
        self._columns["logp"] += entry_code[:n_entries].tobytes()

    def end_document(self, doc_id: str) -> None:
        """Close the document whose last appended piece held the END position. Raises ValueError otherwise."""
        if not self._ended:
            raise ValueError(f"document {doc_id!r}: the last piece must have one more row of probs than bytes of text")
        self._columns["doc_id"] += doc_id.encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, a ValueError
        self._doc_id_start.append(len(self._columns["doc_id"]))
        self._doc_start.append(self.n_positions)
        self._ended = False

    def write(self, path: str | os.PathLike[str], attrs: dict[str, Any]) -> dict[str, Any]:
        """Write the shard to `path` (directly: the caller renames and commits) and return its statistics.

        `attrs` is any JSON object; it comes back as `ByteShard.attrs`. Equal documents and attrs give equal
        bytes. Returns n_documents, n_bytes (text), n_positions, n_entries, tail_mean, tail_max (decoded),
        quantisation_kl_mean (nats per position, input against decoded, over listed symbols and the tail),
        size (bytes of the file). Raises ValueError for an open document or attrs that are not JSON,
        StorageError when the disk refuses.
        """
        if self.n_positions != self._doc_start[-1]:
            raise ValueError("the last document is open: call end_document before write")
        n = self.n_positions
        columns: dict[str, NDArray[Any]] = {
            "doc_start": np.array(self._doc_start, np.int64),
            "doc_id_start": np.array(self._doc_id_start, np.int64),
        }
        columns |= {name: np.frombuffer(column, np.uint8) for name, column in self._columns.items()}
        used = np.flatnonzero(self._tail_histogram)
        mass = math.fsum(quantise.DECODE[code] * self._tail_histogram[code] for code in used)
        statistics = {
            "n_documents": len(self._doc_start) - 1,
            "n_bytes": self.n_bytes,
            "n_positions": n,
            "n_entries": len(columns["byte"]),
            "tail_mean": _rounded(mass / max(1, n)),
            "tail_max": _rounded(quantise.DECODE[used[-1]]) if n else 0.0,
            "quantisation_kl_mean": _rounded(max(0.0, float(self._divergence[0])) / max(1, n)),
        }
        attributes = {
            "format": FORMAT,
            "version": VERSION,
            "prune": self.prune,
            "statistics": statistics,
            "attrs": json.loads(json.dumps(attrs, sort_keys=True, allow_nan=False)),
        }
        size = write_zarr_zip(
            path, {name: columns[name].astype(kind, copy=False) for name, kind in COLUMNS.items()}, attributes
        )
        return {**statistics, "size": size}


def _bits_at_least(value: float) -> np.uint32:
    """Bits of the smallest float32 that is >= value."""
    nearest = np.float32(value)
    if float(nearest) < value:
        nearest = np.nextafter(nearest, np.float32(1.0))
    return np.uint32(nearest.view(np.uint32))


def _rounded(value: float) -> float:
    """Six digits: a shard's bytes must not depend on the last bit of a logarithm."""
    return float(f"{value:.6g}")


@dataclass(frozen=True, eq=False)
class ByteShard:
    """A shard in memory, N positions, D documents, E listed entries; made by `read_shard`, which has checked it."""

    path: str
    attrs: dict[str, Any]
    """what the writer was given"""
    statistics: dict[str, Any]
    """n_documents, n_bytes, n_positions, n_entries, tail_mean, tail_max, quantisation_kl_mean"""
    prune: float
    text: U8
    """uint8 [N]: the byte that follows at each position; 0 at END positions"""
    mask: U8
    """uint8 [N]: 1 = supervised"""
    doc_start: I64
    """int64 [D + 1]: document d owns positions doc_start[d]..doc_start[d + 1], the last of them END"""
    doc_id: list[str]
    codes: dict[str, U8] = field(repr=False)
    """the coded columns: top, tail, end, count uint8 [N]; byte, logp uint8 [E]"""
    entry_index: I64 = field(repr=False)
    """int64: entry offset of every 1024th position, and of N"""

    @cached_property
    def tail(self) -> F32:
        """float32 [N]: decoded unlisted mass."""
        return quantise.DECODE.astype(np.float32)[self.codes["tail"]]

    def __len__(self) -> int:
        return len(self.text)

    def _entries(self, lo: int, hi: int) -> tuple[int, int]:
        """Offset of lo's first entry, and how many rows lo..hi have."""
        if not 0 <= lo <= hi <= len(self):
            raise IndexError(f"{self.path}: positions {lo}..{hi} are outside 0..{len(self)}")
        count = self.codes["count"]
        offsets = []
        for at in (lo, hi):
            known = at // INDEX_STRIDE
            offsets.append(int(self.entry_index[known]) + int(count[known * INDEX_STRIDE : at].sum(dtype=np.int64)))
        return offsets[0], offsets[1] - offsets[0]

    def triples(self, lo: int, hi: int) -> Triples:
        """Non-zero probabilities of positions lo..hi, implied symbol and END included, the tail left out.

        A row's probabilities and its `tail` sum to 1 (float32 rounding aside). Raises IndexError.
        """
        at, n_entries = self._entries(lo, hi)
        room = n_entries + 2 * (hi - lo)
        row, symbol, prob = np.empty(room, np.int32), np.empty(room, np.int16), np.empty(room, np.float32)
        c = self.codes
        n = quantise.decode_rows(
            lo, hi, at, c["top"], c["tail"], c["end"], c["count"], c["byte"], c["logp"], row, symbol, prob
        )
        return Triples(row[:n], symbol[:n], prob[:n])

    def dense(self, lo: int, hi: int) -> F32:
        """float32 [hi - lo, 257]: the same as a table; 1028 bytes per position, for small ranges. Raises IndexError."""
        row, symbol, prob = self.triples(lo, hi)
        out = np.zeros((hi - lo, SYMBOLS), np.float32)
        out[row, symbol] = prob
        return out

    def document(self, index: int) -> bytes:
        """Text of one document."""
        return self.text[self.doc_start[index] : self.doc_start[index + 1] - 1].tobytes()


def read_shard(path: str | os.PathLike[str]) -> ByteShard:
    """Read and check a whole shard.

    Raises IntegrityError, naming file and member, unless every column is present, whole, consistent with the
    others and decodes to distributions; StorageError when the file cannot be read.
    """
    columns, attributes = read_zarr_zip(path, COLUMNS)
    name = os.fspath(path)

    def refuse(member: str, why: str) -> IntegrityError:
        return IntegrityError(f"{name}: member {member!r}: {why}; fetch or make this shard again")

    if attributes.get("format") != FORMAT or attributes.get("version") != VERSION:
        found = f"{attributes.get('format')!r} version {attributes.get('version')!r}"
        raise refuse("zarr.json", f"is {found[:120]}, this reader knows {FORMAT!r} version {VERSION}")
    attrs, statistics, prune = (attributes.get(key) for key in ("attrs", "statistics", "prune"))
    if not isinstance(attrs, dict) or not isinstance(statistics, dict) or not isinstance(prune, int | float):
        raise refuse("zarr.json", "lacks attrs, statistics or prune")
    n = len(columns["text"])
    for member in ("mask", "top", "tail", "end", "count"):
        if len(columns[member]) != n:
            raise refuse(member, f"{len(columns[member])} rows, but `text` has {n}")
    if len(columns["logp"]) != len(columns["byte"]):
        raise refuse("logp", f"{len(columns['logp'])} entries, but `byte` has {len(columns['byte'])}")
    if n and columns["mask"].max() > 1:
        raise refuse("mask", "holds a value other than 0 and 1")
    doc_start, id_start = columns["doc_start"], columns["doc_id_start"]
    for member, start, stop, least in (
        ("doc_start", doc_start, n, 1),
        ("doc_id_start", id_start, len(columns["doc_id"]), 0),
    ):
        # Bounds first: a difference of unchecked int64 values could wrap around.
        if len(start) == 0 or start[0] != 0 or start[-1] != stop or start.min() < 0 or start.max() > stop:
            raise refuse(member, f"offsets must run from 0 to {stop}")
        if (np.diff(start) < least).any():
            raise refuse(member, f"offsets must grow by at least {least}")
    if len(id_start) != len(doc_start):
        raise refuse("doc_id_start", f"{len(id_start) - 1} ids for {len(doc_start) - 1} documents")
    if columns["text"][doc_start[1:] - 1].any():
        raise refuse("text", "an END position holds a byte other than 0")
    blob = columns["doc_id"].tobytes()
    try:
        doc_id = [blob[a:b].decode("utf-8") for a, b in zip(id_start[:-1].tolist(), id_start[1:].tolist(), strict=True)]
    except UnicodeDecodeError as error:
        raise refuse("doc_id", f"is not UTF-8 ({error.reason})") from error
    codes = {member: columns[member] for member in ("top", "tail", "end", "count", "byte", "logp")}
    index = np.zeros(-(-n // INDEX_STRIDE) + 1, np.int64)
    row, reason = quantise.check_rows(*codes.values(), index)
    if row >= 0 or (n == 0 and len(codes["byte"])):
        raise refuse(
            "count" if reason in (0, quantise.BAD_COUNT) else "logp",
            f"position {row}: {_REASONS.get(reason, 'no rows')}",
        )
    counts = {"n_documents": len(doc_id), "n_bytes": n - len(doc_id), "n_positions": n, "n_entries": len(codes["byte"])}
    for key, value in counts.items():
        if statistics.get(key) != value:
            raise refuse("zarr.json", f"{key} is {str(statistics.get(key))[:40]}, the columns hold {value}")
    return ByteShard(
        name, attrs, statistics, float(prune), columns["text"], columns["mask"], doc_start, doc_id, codes, index
    )
