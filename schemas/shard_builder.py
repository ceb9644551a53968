"""The writer of byte targets: dense rows in, one shard out.

Rows are gathered as sparse rows; once `prior.SAMPLE` of them wait (or the shard ends) the prior is learned from them,
they are encoded, and from then on rows are encoded as they come. The prior is learned in two rounds: first from all
the masses, then from those that the first one leaves unlisted, which is what it has to spread. Positions that say
nothing, prompts, teach it nothing, nor are unsupervised ones part of the statistics.

Price in memory: up to 100 bytes for each of the first 2 ** 20 positions, then 4 a position and 1 a listed symbol.
"""

import json
import math
import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas import gather, quantise
from schemas import prior as priors
from schemas.arrays import END, F32, F64, I16, I64, SYMBOLS, U8
from schemas.errors import IntegrityError
from schemas.packing import COLUMNS, FORMAT, STEPS, VERSION, Codes, pack_columns
from schemas.prior import Prior
from schemas.zarr_zip import write_zarr_zip

_BLOCK = 1 << 14
"""Rows gathered at a time: bounds the scratch for the worst case (257 entries per row) to 25 MiB."""


class Precision(NamedTuple):
    """What a writer spends: the trade between bytes and divergence (benchmarks/rate_distortion.py draws it)."""

    rate: float
    """nats of divergence that a bit of file is worth: higher is smaller and less exact"""
    value_step: int
    """codes of listed symbols are multiples of this power of two"""
    tail_step: int
    """the same for the tail, unless that costs more than `rate` allows"""


PRECISIONS = {
    "small": Precision(3e-3, 16, 32),
    "default": Precision(4e-4, 16, 16),
    "precise": Precision(5e-5, 4, 8),
}


class _Rows(NamedTuple):
    """Rows that wait for the prior: gathered, not yet encoded."""

    true: I16
    """int16 [n]: the symbol that follows"""
    mask: U8
    n_kept: I16
    rest: F64
    given: F32
    symbol: I16
    """int16, prob float32 [entries]: what was kept, row after row"""
    prob: F32


def _join(rows: list[_Rows]) -> _Rows:
    return _Rows(*(np.concatenate(part) for part in zip(*rows, strict=True)))


class ShardBuilder:
    """Collects documents as quantised columns (never the dense rows) and writes them as one shard.

    `precision`: a name in PRECISIONS, or a Precision. `prune`: symbols rarer than this, unless most likely, are never
    listed, whatever the precision says (0: the precision decides alone).
    """

    def __init__(self, prune: float = 0.0, precision: str | Precision = "default") -> None:
        if not 0.0 <= prune <= 0.1:
            raise ValueError(f"prune is {prune}, must be within 0..0.1")
        if isinstance(precision, str):
            if precision not in PRECISIONS:
                raise ValueError(f"precision {precision!r} is unknown, must be one of {', '.join(PRECISIONS)}")
            precision = PRECISIONS[precision]
        rate, *steps = precision
        if not 1e-7 <= rate <= 1.0 or any(step not in STEPS for step in steps):
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
            self._gather(lo, true[lo:hi], mask[lo:hi], probs[lo:hi], tail[lo:hi])
            for lo, hi in zip(range(0, n, _BLOCK), range(_BLOCK, n + _BLOCK, _BLOCK), strict=True)
        ]
        self._n_rows += n
        self._columns["text"] += text.tobytes() + bytes(n - len(text))
        self._columns["mask"] += mask.tobytes()
        self._ended = n > len(text)
        if self._n_rows >= (priors.SAMPLE if self._prior is None else _BLOCK):
            self._flush()

    def _gather(self, first: int, true: I16, mask: U8, probs: F32, tail: F32) -> _Rows:
        n = len(probs)
        flat = probs.reshape(-1)
        count, rest = np.empty(n, np.int16), np.empty(n, np.float64)
        symbol, prob = np.empty(SYMBOLS * n, np.int16), np.empty(SYMBOLS * n, np.float32)
        n_entries, row, reason, value = gather.gather_rows(
            flat, flat.view(np.uint32), tail, self._threshold, self._scale, count, rest, symbol, prob
        )
        if row < 0:
            return _Rows(
                true, mask.copy(), count, rest, tail.copy(), symbol[:n_entries].copy(), prob[:n_entries].copy()
            )
        if reason == quantise.BAD_VALUE and value == 0.0:  # -0.0: the kernel orders floats by their bits
            return self._gather(first, true, mask, probs + np.float32(0.0), tail)
        document = len(self._doc_start) - 1
        position = self.n_positions + first + row - self._doc_start[-1]
        what = (
            f"probability or tail {value} (must be within 0..1)"
            if reason == quantise.BAD_VALUE
            else f"probabilities and tail sum to {value:.6f} (must be 1 within {gather.SUM_TOLERANCE})"
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
        text = np.frombuffer(self._columns["text"], np.uint8)
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
        m = int(rows.n_kept[:n].sum(dtype=np.int64))
        rows = _Rows(
            rows.true[:n], rows.mask[:n], rows.n_kept[:n], rows.rest[:n], rows.given[:n], rows.symbol[:m], rows.prob[:m]
        )
        text, starts = text[:n], starts[starts <= n]
        tree = priors.grow(text, starts, rows.n_kept > 0)
        node = priors.find_nodes(text, starts, tree.child(), 0, n)
        skip = np.zeros(m, np.uint8)
        for round_ in range(2):  # what everything looks like; then what is left over once some of it is listed
            if round_:
                _, skip = self._encode(rows, node, _Table(tree), np.zeros(2))
            mass = np.zeros((len(tree.parent), SYMBOLS), np.int64)
            quantise.learn_masses(node, skip, rows.n_kept, rows.symbol, rows.prob, float(priors.UNIT), mass)
            tree = priors.weigh(tree, mass)
        return tree

    def _encode(self, rows: _Rows, node: I16, table: "_Table", divergence: F64) -> tuple[dict[str, U8], U8]:
        """The coded columns of rows, and which of their entries are listed."""
        n, m = len(rows.true), len(rows.symbol)
        head, tail, top = (np.empty(n, np.uint8) for _ in range(3))
        gap, value, listed = (np.empty(m, np.uint8) for _ in range(3))
        n_top, n_entries = quantise.encode_rows(
            rows.true, node, *rows[1:], table.weight, table.total, table.rank,
            self._price, self.precision.rate, self._least, self.precision.value_step, self.precision.tail_step,
            head, tail, top, gap, value, listed, divergence,
        )  # fmt: skip
        codes = Codes(head, tail, top[:n_top], gap[:n_entries], value[:n_entries])
        return pack_columns(codes, self.precision.value_step), listed

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
        bytes. Returns n_documents, n_bytes (text), n_positions, n_supervised, n_entries; of supervised positions
        tail_mean, tail_max (decoded), kl_mean (nats, input against decoded with the tail spread by the prior),
        quantisation_kl_mean (over the listed symbols and the tail only); size (bytes of the file). Raises ValueError
        for an open document or attrs that are not JSON, StorageError when the disk refuses.
        """
        if self.n_positions != self._doc_start[-1]:
            raise ValueError("the last document is open: call end_document before write")
        self._flush()
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
        supervised = columns["mask"] == 1
        n_supervised = int(supervised.sum())
        histogram = np.bincount((columns["head"] & 240 | columns["tail_low"])[supervised], minlength=256)
        used = np.flatnonzero(histogram)
        mass = math.fsum(quantise.TAIL[code] * histogram[code] for code in used)
        statistics = {
            "n_documents": len(self._doc_start) - 1,
            "n_bytes": self.n_bytes,
            "n_positions": self.n_positions,
            "n_supervised": n_supervised,
            "n_entries": len(columns["entry"]),
            "tail_mean": _rounded(mass / max(1, n_supervised)),
            "tail_max": _rounded(quantise.TAIL[used[-1]]) if n_supervised else 0.0,
            "kl_mean": _rounded(max(0.0, float(self._divergence[1])) / max(1, n_supervised)),
            "quantisation_kl_mean": _rounded(max(0.0, float(self._divergence[0])) / max(1, n_supervised)),
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
    bits = [round(16 * (4.0 + math.log2(1 + rank))) / 16 for rank in range(SYMBOLS)]
    return np.array(bits) * rate


def _rounded(value: float) -> float:
    """Six digits: a shard's bytes must not depend on the last bit of a logarithm."""
    return float(f"{value:.6g}")
