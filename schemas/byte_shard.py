"""Byte targets: the teacher's next-byte distribution at every position of a text, in one Zarr v3 zip per shard.

A document of n bytes owns n + 1 positions; the last one predicts END. Per position: the most likely symbol
(implied probability: 1 minus the rest), the unlisted mass, and a ragged list of the symbols that the shard's own
context prior does not predict well enough. SPEC.md is the normative description; `prior` holds the context tree,
`quantise` what a writer chooses, `expansion` the reader's loops, `zarr_zip` the file.

Price: while building, up to 100 bytes of memory for each of the first 2 ** 20 positions (the prior is learned from
them), then 4 a position and 2 a listed symbol; when read, 6 a position and 2 a listed symbol. Sizes, speeds and the
commands that measure them: SPEC.md, "Cost".
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas import prior as priors
from schemas import quantise
from schemas.errors import IntegrityError
from schemas.expansion import INDEX_STRIDE, decode_rows, expand_rows
from schemas.prior import Prior
from schemas.quantise import END, F32, F64, I16, I32, I64, SYMBOLS, U8
from schemas.packing import pack_columns, unpack_columns
from schemas.zarr_zip import read_zarr_zip, write_zarr_zip

FORMAT = "bytecache.byte-targets"
VERSION = 1
COLUMNS = {
    "text": "uint8",
    "mask": "uint8",
    "head": "uint8",
    "tail_low": "uint8",
    "count_over": "uint8",
    "top": "uint8",
    "entry": "uint8",
    "gap_over": "uint8",
    "value_low": "uint8",
    "prior_parent": "int64",
    "prior_byte": "uint8",
    "prior_code": "uint8",
    "doc_start": "int64",
    "doc_id": "uint8",
    "doc_id_start": "int64",
}
_BLOCK = 1 << 14
"""Rows gathered at a time: bounds the scratch for the worst case (257 entries per row) to 25 MiB."""
_REASONS = {
    quantise.BAD_ORDER: "ranks run beyond the last symbol",
    quantise.BAD_CODE: "a code that no writer produces",
    quantise.BAD_MASS: "listed mass and tail reach 1",
    quantise.BAD_COUNT: "the counts do not add up to the lengths of `entry` and `top`",
}


class Precision(NamedTuple):
    """What a writer spends: the trade between bytes and divergence (benchmarks/rate_distortion.py draws it)."""

    rate: float
    """nats of divergence that a bit of file is worth: higher is smaller and less exact"""
    value_step: int
    """codes of listed symbols are multiples of this power of two"""
    tail_step: int
    """the same for the tail, unless that costs more than `rate` allows"""


PRESETS = {
    "small": Precision(3e-3, 16, 32),
    "default": Precision(7e-4, 16, 16),
    "precise": Precision(5e-5, 4, 8),
}


class Triples(NamedTuple):
    """Sparse rows: non-zero (row, symbol, probability), rows ascending, symbols ascending within a row."""

    row: NDArray[np.int32]
    """int32 [E], relative to the first requested position"""
    symbol: NDArray[np.int16]
    """int16 [E], 0..255 bytes, 256 END"""
    prob: F32
    """float32 [E]"""


class _Rows(NamedTuple):
    """Rows that wait for the prior: gathered, not yet encoded."""

    true: I16
    """int16 [n]: the symbol that follows"""
    count: I16
    rest: F64
    symbol: I16
    prob: F32


def _join(rows: list[_Rows]) -> _Rows:
    return _Rows(*(np.concatenate(part) for part in zip(*rows, strict=True)))


class ShardBuilder:
    """Collects documents as quantised columns (never the dense rows) and writes them as one shard.

    `precision`: a name in PRESETS, or a Precision. `prune`: symbols rarer than this, unless most likely, are never
    listed, whatever the precision says (0: the precision decides alone).
    """

    def __init__(self, prune: float = 0.0, precision: str | Precision = "default") -> None:
        if not 0.0 <= prune <= 0.1:
            raise ValueError(f"prune is {prune}, must be within 0..0.1")
        if isinstance(precision, str):
            if precision not in PRESETS:
                raise ValueError(f"precision {precision!r} is unknown, must be one of {', '.join(PRESETS)}")
            precision = PRESETS[precision]
        rate, *steps = precision
        if not 1e-7 <= rate <= 1.0 or any(step not in (1, 2, 4, 8, 16, 32, 64) for step in steps):
            raise ValueError(f"{precision}: rate must be within 1e-7..1, steps powers of two up to 64")
        self.prune, self.precision = prune, precision
        # Rows keep what could be listed, and some more for the prior to learn from.
        threshold = 2.0 ** (2 * math.floor(math.log2(precision.value_step)) - 22)
        self._threshold = np.uint32(np.float32(threshold).view(np.uint32))
        # Fixed-point unit of the mass below the threshold: a value fits an int32.
        self._scale = np.float32(2.0**30 / threshold)
        self._price = _price(precision.rate)
        self._least = max(prune, (0.6 * precision.value_step / 256) ** 2)
        self._columns = {name: bytearray() for name in COLUMNS if not name.startswith(("prior_", "doc_"))}
        self._doc_id = bytearray()
        self._doc_start = [0]
        self._doc_id_start = [0]
        self._ended = False
        self._rows: list[_Rows] = []
        self._n_rows = 0
        self._prior: Prior | None = None
        self._divergence = np.zeros(2)

    @property
    def n_positions(self) -> int:
        return len(self._columns["text"])

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
        true = np.full(n, END, np.int16)
        true[: len(text)] = text
        self._rows += [
            self._gather(true[lo : lo + _BLOCK], probs[lo : lo + _BLOCK], tail[lo : lo + _BLOCK], lo)
            for lo in range(0, n, _BLOCK)
        ]
        self._n_rows += n
        self._columns["text"] += text.tobytes() + bytes(n - len(text))
        self._columns["mask"] += mask.tobytes()
        self._ended = n > len(text)
        if self._n_rows >= (priors.SAMPLE if self._prior is None else _BLOCK):
            self._flush()

    def _gather(self, true: I16, probs: F32, tail: F32, first: int) -> _Rows:
        n = len(probs)
        flat = probs.reshape(-1)
        count, rest = np.empty(n, np.int16), np.empty(n, np.float64)
        symbol, prob = np.empty(SYMBOLS * n, np.int16), np.empty(SYMBOLS * n, np.float32)
        n_entries, row, reason, value = quantise.gather_rows(
            flat, flat.view(np.uint32), tail, self._threshold, self._scale, count, rest, symbol, prob
        )
        if row < 0:
            return _Rows(true, count, rest, symbol[:n_entries].copy(), prob[:n_entries].copy())
        if reason == quantise.BAD_VALUE and value == 0.0:  # -0.0: the kernel orders floats by their bits
            return self._gather(true, probs + np.float32(0.0), tail, first)
        document = len(self._doc_start) - 1
        position = self.n_positions + first + row - self._doc_start[-1]
        what = (
            f"probability or tail {value} (must be within 0..1)"
            if reason == quantise.BAD_VALUE
            else f"probabilities and tail sum to {value:.6f} (must be 1 within {quantise.SUM_TOLERANCE})"
        )
        raise IntegrityError(
            f"row {first + row} of this piece (document {document} of the shard, position {position}): {what}; "
            "check the teacher's numbers, nothing of this piece was kept"
        )

    def _flush(self) -> None:
        """Encode what waits; the first time, learn the prior from its first SAMPLE rows."""
        if not self._n_rows:
            return
        rows = _join(self._rows)
        self._rows, self._n_rows = [], 0
        done = len(self._columns["head"])
        text = np.frombuffer(bytes(self._columns["text"]), np.uint8)
        starts = np.array(self._doc_start, np.int64)
        if self._prior is None:
            self._prior = self._learn(text, starts, rows)
            self._table = _Table(self._prior)
        node = priors.find_nodes(text, starts, self._table.child, done, done + len(rows.true))
        columns, _ = self._encode(rows, node, self._table, self._divergence)
        for name, column in columns.items():
            self._columns[name] += column.tobytes()

    def _learn(self, text: U8, starts: I64, rows: _Rows) -> Prior:
        n = min(len(rows.true), priors.SAMPLE)
        m = int(rows.count[:n].sum(dtype=np.int64))
        rows = _Rows(rows.true[:n], rows.count[:n], rows.rest[:n], rows.symbol[:m], rows.prob[:m])
        text, starts = text[:n], starts[starts <= n]
        tree = priors.grow(text, starts)
        node = priors.find_nodes(text, starts, tree.child(), 0, n)
        skip = np.zeros(m, np.uint8)
        for _ in range(2):  # what everything looks like; then what is left over once some of it is listed
            mass = np.zeros((len(tree.parent), SYMBOLS), np.int64)
            quantise.learn_masses(node, skip, rows.count, rows.symbol, rows.prob, float(priors.UNIT), mass)
            tree = priors.weigh(tree, mass)
            _, skip = self._encode(rows, node, _Table(tree), np.zeros(2))
        return tree

    def _encode(self, rows: _Rows, node: I32, table: "_Table", divergence: F64) -> tuple[dict[str, U8], U8]:
        """The coded columns of rows, and which of their entries are listed."""
        n, m = len(rows.true), len(rows.symbol)
        head, tail, top = (np.empty(n, np.uint8) for _ in range(3))
        gap, value, listed = (np.empty(m, np.uint8) for _ in range(3))
        n_top, n_entries = quantise.encode_rows(
            rows.true, node, rows.count, rows.rest, rows.symbol, rows.prob, table.weight, table.total, table.rank,
            self._price, self.precision.rate, self._least, self.precision.value_step, self.precision.tail_step,
            head, tail, top, gap, value, listed, divergence,
        )  # fmt: skip
        return pack_columns(head, tail, top[:n_top], gap[:n_entries], value[:n_entries]), listed

    def end_document(self, doc_id: str) -> None:
        """Close the document whose last appended piece held the END position. Raises ValueError otherwise."""
        if not self._ended:
            raise ValueError(f"document {doc_id!r}: the last piece must have one more row of probs than bytes of text")
        self._doc_id += doc_id.encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, a ValueError
        self._doc_id_start.append(len(self._doc_id))
        self._doc_start.append(self.n_positions)
        self._ended = False

    def write(self, path: str | os.PathLike[str], attrs: dict[str, Any]) -> dict[str, Any]:
        """Write the shard to `path` (directly: the caller renames and commits) and return its statistics.

        `attrs` is any JSON object; it comes back as `ByteShard.attrs`. Equal documents and attrs give equal
        bytes. Returns n_documents, n_bytes (text), n_positions, n_entries, tail_mean, tail_max (decoded), kl_mean
        (nats per position, input against decoded with the tail spread by the prior), quantisation_kl_mean (over
        the listed symbols and the tail only), size (bytes of the file). Raises ValueError for an open document or
        attrs that are not JSON, StorageError when the disk refuses.
        """
        if self.n_positions != self._doc_start[-1]:
            raise ValueError("the last document is open: call end_document before write")
        self._flush()
        n = self.n_positions
        prior = self._prior or priors.flat_prior()
        columns: dict[str, NDArray[Any]] = {
            "prior_parent": prior.parent,
            "prior_byte": prior.byte,
            "prior_code": priors.pack_code(prior),
            "doc_start": np.array(self._doc_start, np.int64),
            "doc_id": np.frombuffer(self._doc_id, np.uint8),
            "doc_id_start": np.array(self._doc_id_start, np.int64),
        }
        columns |= {name: np.frombuffer(column, np.uint8) for name, column in self._columns.items()}
        histogram = np.bincount(columns["head"] & 240 | columns["tail_low"], minlength=256)
        used = np.flatnonzero(histogram)
        mass = math.fsum(quantise.TAIL[code] * histogram[code] for code in used)
        statistics = {
            "n_documents": len(self._doc_start) - 1,
            "n_bytes": self.n_bytes,
            "n_positions": n,
            "n_entries": len(columns["entry"]),
            "tail_mean": _rounded(mass / max(1, n)),
            "tail_max": _rounded(quantise.TAIL[used[-1]]) if n else 0.0,
            "kl_mean": _rounded(max(0.0, float(self._divergence[1])) / max(1, n)),
            "quantisation_kl_mean": _rounded(max(0.0, float(self._divergence[0])) / max(1, n)),
        }
        attributes = {
            "format": FORMAT,
            "version": VERSION,
            "precision": {"prune": self.prune, **self.precision._asdict()},
            "statistics": statistics,
            "attrs": json.loads(json.dumps(attrs, sort_keys=True, allow_nan=False)),
        }
        size = write_zarr_zip(
            path, {name: columns[name].astype(kind, copy=False) for name, kind in COLUMNS.items()}, attributes
        )
        return {**statistics, "size": size}


class _Table:
    """A prior in the form the writer's kernel reads."""

    def __init__(self, prior: Prior) -> None:
        self.child = prior.child()
        self.weight = prior.weights()
        self.total = np.array([math.fsum(row) for row in self.weight])
        self.rank = priors.ranks(prior.order())


def _price(rate: float) -> F64:
    """float64 [257]: nats that listing the symbol of each rank must gain: `rate` times its bits, in sixteenths."""
    bits = [round(16 * (5.0 + 0.7 * math.log2(1 + rank))) / 16 for rank in range(SYMBOLS)]
    return np.array(bits) * rate


def _rounded(value: float) -> float:
    """Six digits: a shard's bytes must not depend on the last bit of a logarithm."""
    return float(f"{value:.6g}")


@dataclass(frozen=True, eq=False)
class ByteShard:
    """A shard in memory, N positions, D documents, E listed bytes; made by `read_shard`, which has checked it."""

    path: str
    attrs: dict[str, Any]
    """what the writer was given"""
    statistics: dict[str, Any]
    """n_documents, n_bytes, n_positions, n_entries, tail_mean, tail_max, kl_mean, quantisation_kl_mean"""
    precision: dict[str, Any]
    """what the writer spent: prune, rate, value_step, tail_step"""
    text: U8
    """uint8 [N]: the byte that follows at each position; 0 at END positions"""
    mask: U8
    """uint8 [N]: 1 = supervised"""
    doc_start: I64
    """int64 [D + 1]: document d owns positions doc_start[d]..doc_start[d + 1], the last of them END"""
    doc_id: list[str]
    prior: Prior = field(repr=False)
    codes: dict[str, U8] = field(repr=False)
    """rows by symbol: top, tail, end, count uint8 [N]; byte, value uint8 [E]"""
    entry_index: I64 = field(repr=False)
    """int64: entry offset of every 1024th position, and of N"""

    @cached_property
    def tail(self) -> F32:
        """float32 [N]: decoded unlisted mass."""
        return quantise.TAIL.astype(np.float32)[self.codes["tail"]]

    @cached_property
    def _spread(self) -> tuple[I32, F64]:
        return self.prior.child(), self.prior.weights()

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
        n = decode_rows(
            lo, hi, at, c["top"], c["tail"], c["end"], c["count"], c["byte"], c["value"], row, symbol, prob
        )
        return Triples(row[:n], symbol[:n], prob[:n])

    def dense(self, lo: int, hi: int, spread_tail: bool = False) -> F32:
        """float32 [hi - lo, 257]: the same as a table; 1028 bytes per position, for small ranges. Raises IndexError.

        With `spread_tail`, the tail is divided among the unlisted symbols as the shard's prior weighs them (rows
        then sum to 1): the distribution that `statistics["kl_mean"]` speaks of.
        """
        row, symbol, prob = self.triples(lo, hi)
        out = np.zeros((hi - lo, SYMBOLS), np.float32)
        out[row, symbol] = prob
        if spread_tail and hi > lo:
            child, weights = self._spread
            share = weights[priors.find_nodes(self.text, self.doc_start, child, lo, hi)]
            share[row, symbol] = 0.0
            out += (share * (self.tail[lo:hi].astype(np.float64) / share.sum(1))[:, None]).astype(np.float32)
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
    attrs, statistics, precision = (attributes.get(key) for key in ("attrs", "statistics", "precision"))
    if not isinstance(attrs, dict) or not isinstance(statistics, dict) or not isinstance(precision, dict):
        raise refuse("zarr.json", "lacks attrs, statistics or precision")
    n = len(columns["text"])
    for member in ("mask", "head", "tail_low"):
        if len(columns[member]) != n:
            raise refuse(member, f"{len(columns[member])} rows, but `text` has {n}")
    if len(columns["entry"]) != len(columns["value_low"]):
        raise refuse("value_low", f"{len(columns['value_low'])} entries, but `entry` has {len(columns['entry'])}")
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
    try:
        prior = priors.check_prior(columns["prior_parent"], columns["prior_byte"], columns["prior_code"])
    except ValueError as error:
        raise refuse(str(error).partition(" ")[0], str(error).partition(" ")[2]) from error
    codes, index = _expand(columns, prior, refuse)
    counts = {
        "n_documents": len(doc_id),
        "n_bytes": n - len(doc_id),
        "n_positions": n,
        "n_entries": len(columns["entry"]),
    }
    for key, value in counts.items():
        if statistics.get(key) != value:
            raise refuse("zarr.json", f"{key} is {str(statistics.get(key))[:40]}, the columns hold {value}")
    return ByteShard(
        name, attrs, statistics, precision, columns["text"], columns["mask"], doc_start, doc_id, prior, codes, index
    )


def _expand(
    columns: dict[str, NDArray[Any]], prior: Prior, refuse: Callable[[str, str], IntegrityError]
) -> tuple[dict[str, U8], I64]:
    """The rows by symbol, and the index of their entries."""
    try:
        packed = unpack_columns(columns)
    except ValueError as error:
        raise refuse(str(error).partition(" ")[0], str(error).partition(" ")[2]) from error
    n, m = len(packed.head), len(packed.gap)
    count, top, end = (np.empty(n, np.uint8) for _ in range(3))
    byte, value = np.empty(m, np.uint8), np.empty(m, np.uint8)
    index = np.zeros(-(-n // INDEX_STRIDE) + 1, np.int64)
    order = prior.order()
    row, reason, n_entries = expand_rows(
        columns["text"], columns["doc_start"], prior.child(), order, priors.ranks(order),
        *packed, count, top, end, byte, value, index,
    )  # fmt: skip
    if row >= 0:
        raise refuse("head" if reason == quantise.BAD_COUNT else "entry", f"position {row}: {_REASONS[reason]}")
    if n == 0 and (m or len(packed.top)):
        raise refuse("entry", "entries, but no rows")
    codes = {"top": top, "tail": packed.tail, "end": end, "count": count}
    return codes | {"byte": byte[:n_entries], "value": value[:n_entries]}, index
