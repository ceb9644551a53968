"""The writer of byte targets: rows in, dense or without their zeros, one shard out.

Rows are gathered into blocks, checked and sorted (gather.py). Once `prior.SAMPLE` of them wait (or the shard ends) the
prior is learned from them, they are encoded, and from then on rows are encoded as they come. The prior is learned in
two rounds: first from all the masses, then from those that the first one leaves unlisted, which is what it has to
spread. Positions that say nothing, prompts, teach it nothing, nor are unsupervised ones part of the statistics.

Price in memory: about 130 bytes for each of the first 2 ** 20 positions, then 4 a position and 1 a listed symbol.
"""

import json
import math
import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytecache.schemas.arrays import END, F32, F64, I16, I64, SYMBOLS, U8
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.shard import gather, quantise, reasons
from bytecache.schemas.shard import prior as priors
from bytecache.schemas.shard.blocks import BLOCK, ENTRIES, Block, Rows
from bytecache.schemas.shard.codes import COLUMNS, FORMAT, STEPS, TAIL, VERSION, Codes, pack_columns
from bytecache.schemas.shard.gather import Threshold
from bytecache.schemas.shard.incoming import DenseRows, Incoming, SparseRows
from bytecache.schemas.shard.limits import excess
from bytecache.schemas.shard.prior import Prior
from bytecache.schemas.shard.rounding import Steps
from bytecache.schemas.shard.worth import Table
from bytecache.schemas.shard.zarr_zip import write_zarr_zip


class Precision(NamedTuple):
    """What a writer spends: the trade between bytes and divergence (benchmarks/rate_distortion.py draws it)."""

    rate: float
    """nats of divergence that a bit of file is worth: higher is smaller and less exact"""
    value_step: int
    """codes of listed symbols are multiples of this power of two"""
    tail_step: int
    """the same for the tail, unless that costs more than `rate` allows"""


LEAST_RATE = 1e-7
PRECISIONS = {
    "small": Precision(3e-3, 16, 32),
    "default": Precision(4e-4, 16, 16),
    "precise": Precision(5e-5, 4, 8),
}


class _Refused(NamedTuple):
    """A row that a loop refused."""

    row: int
    """of the piece"""
    reason: int
    value: float

    @property
    def is_negative_zero(self) -> bool:
        """Whether nothing is wrong but a probability of -0.0."""
        return self.reason == reasons.BAD_VALUE and self.value == 0.0


class _Learned(NamedTuple):
    """The shard's prior, its `child` and its `Table`."""

    prior: Prior
    child: I16
    table: Table


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
        if not LEAST_RATE <= rate <= 1.0 or any(step not in STEPS for step in steps):
            raise ValueError(f"{precision}: rate must be within {LEAST_RATE:g}..1, steps powers of two up to 64")
        self.prune, self.precision = prune, precision
        # Rows keep what could be listed, and some more for the prior to learn from.
        threshold = 2.0 ** (2 * math.floor(math.log2(precision.value_step)) - 22)
        self._price = _price(precision.rate)
        self._least = max(prune, (0.6 * precision.value_step / 256) ** 2)
        self._threshold = Threshold(np.uint32(np.float32(threshold).view(np.uint32)), np.float32(2.0**30 / threshold))
        self._steps = Steps(precision.value_step, precision.tail_step, precision.rate, float(priors.UNIT))
        self._columns = {name: bytearray() for name in COLUMNS if not name.startswith(("prior_", "doc_"))}
        self._doc_id = bytearray()
        self._doc_start = [0]
        self._doc_id_start = [0]
        self._ended = False
        self._blocks = [Block(ENTRIES)]
        self._n_rows = 0
        self._learned: _Learned | None = None
        self._divergence = np.zeros(2)

    @property
    def n_positions(self) -> int:
        """Positions so far, END positions included."""
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
        probs = np.ascontiguousarray(probs, np.float32)
        if probs.ndim != 2 or probs.shape[1] != SYMBOLS or len(probs) != len(tail):
            raise ValueError(
                f"text {np.shape(text)}, probs {probs.shape}, tail {np.shape(tail)}: "
                "expected [m], [m or m + 1, 257], [rows]"
            )
        self._append(text, tail, mask, DenseRows(probs))

    def append_sparse(self, text: U8, count: I64, symbol: I16, prob: F32, tail: F32, mask: U8 | None = None) -> None:
        """`append` of rows without their zeros: count int64 [rows] entries each, ascending by symbol.

        symbol int16, prob float32 [entries]. Raises what `append` raises.
        """
        count = np.ascontiguousarray(count, np.int64)
        symbol = np.ascontiguousarray(symbol, np.int16)
        prob = np.ascontiguousarray(prob, np.float32)
        start = np.zeros(len(count) + 1, np.int64)
        np.cumsum(count, out=start[1:])
        if len(count) != len(tail) or (len(count) and count.min() < 0) or not start[-1] == len(symbol) == len(prob):
            raise ValueError(
                f"count {count.shape} of sum {start[-1]}, symbol {symbol.shape}, prob {prob.shape}, "
                f"tail {np.shape(tail)}: expected one count >= 0 for each tail, and as many entries as they say"
            )
        self._append(text, tail, mask, SparseRows(count, start, symbol, prob))

    def _append(self, text: U8, tail: F32, mask: U8 | None, rows: Incoming) -> None:
        text = np.ascontiguousarray(text, np.uint8)
        tail = np.ascontiguousarray(tail, np.float32)
        n = len(tail)
        if tail.shape != (n,) or text.ndim != 1 or n - len(text) not in (0, 1):
            raise ValueError(f"text {text.shape}, tail {tail.shape}: expected [m], [m or m + 1]")
        if self._ended:
            raise ValueError("the last piece held the END position: call end_document before the next piece")
        mask = np.ones(n, np.uint8) if mask is None else np.ascontiguousarray(mask, np.uint8)
        if mask.shape != (n,) or (n and mask.max() > 1):
            raise ValueError(f"mask {mask.shape} must have one 0 or 1 per row of probs ({n})")
        refused = self._gather(rows, text, tail, mask)
        if refused is not None and refused.is_negative_zero:
            refused = self._gather(rows.without_negative_zeros(), text, tail, mask)
        if refused is not None:
            raise self._refusal(refused)
        self._n_rows += n
        self._columns["text"] += text.tobytes() + bytes(n - len(text))
        self._columns["mask"] += mask.tobytes()
        self._ended = n > len(text)
        if self._n_rows >= (priors.SAMPLE if self._learned is None else BLOCK):
            self._flush()

    def _gather(self, rows: Incoming, text: U8, tail: F32, mask: U8) -> "_Refused | None":
        """Add rows to the blocks, a piece at a time; if one is refused, none, and that one is returned."""
        n_blocks, last = len(self._blocks), self._blocks[-1]
        n_rows, n_entries = last.n_rows, last.n_entries
        for lo in range(0, len(tail), rows.piece):
            hi = min(lo + rows.piece, len(tail))
            block = self._block_with_room(hi - lo, rows.most_entries(lo, hi))
            room = block.room(hi - lo)
            added, row, reason, value = rows.gather(lo, hi, tail[lo:hi], self._threshold, room)
            if row < 0:
                added, row, reason, value = gather.order_rows(self._least, room)
            if row >= 0:
                del self._blocks[n_blocks:]
                last.n_rows, last.n_entries = n_rows, n_entries
                return _Refused(lo + row, reason, value)
            block.add(text[lo:hi], mask[lo:hi], tail[lo:hi], added)
        return None

    def _block_with_room(self, rows: int, entries: int) -> Block:
        """The last block, or a new one behind it."""
        if not self._blocks[-1].has_room(rows, entries):
            self._blocks.append(Block(max(ENTRIES, entries)))
        return self._blocks[-1]

    def _refusal(self, refused: "_Refused") -> Exception:
        """What to raise for a row of a piece."""
        row, reason, value = refused
        if reason == reasons.BAD_ORDER:
            return ValueError(f"row {row} of this piece: its symbols must ascend and be at most {END}")
        document = len(self._doc_start) - 1
        position = self.n_positions + row - self._doc_start[-1]
        what = (
            f"probability or tail {value} (must be within 0..1)"
            if reason == reasons.BAD_VALUE
            else f"probabilities and tail sum to {value:.6f} (must be 1 within {gather.SUM_TOLERANCE})"
        )
        return IntegrityError(
            f"row {row} of this piece (document {document} of the shard, position {position}): {what}; "
            "check the teacher's numbers, nothing of this piece was kept"
        )

    def _flush(self) -> None:
        """Encode what waits; the first time, learn the prior from its first SAMPLE rows."""
        if not self._n_rows:
            return
        done = len(self._columns["head"])
        text = np.frombuffer(self._columns["text"], np.uint8)
        starts = np.array(self._doc_start, np.int64)
        if self._learned is None:
            self._learned = self._learn(text, starts)
        for block in self._blocks:
            rows = block.rows(block.n_rows)
            node = priors.find_nodes(text, starts, self._learned.child, done, done + block.n_rows)
            for name, column in self._encode(rows, node, self._learned.table).items():
                self._columns[name] += column.tobytes()
            done += block.n_rows
        del self._blocks[1:]
        self._blocks[0].n_rows = self._blocks[0].n_entries = self._n_rows = 0

    def _learn(self, text: U8, starts: I64) -> "_Learned":
        """The prior of the first SAMPLE of the rows that wait."""
        begin = np.cumsum([0, *(block.n_rows for block in self._blocks)]).clip(max=priors.SAMPLE)
        sample, n = np.diff(begin), int(begin[-1])
        rows = [block.rows(k) for block, k in zip(self._blocks, sample, strict=True)]
        tree = priors.grow(text[:n], starts[starts <= n], np.concatenate([r.n_kept for r in rows]) > 0)
        node = np.split(priors.find_nodes(text, starts, tree.child(), 0, n), begin[1:-1])
        mass = np.zeros((len(tree.parent), SYMBOLS), np.int64)
        for r, nodes in zip(rows, node, strict=True):
            quantise.learn_masses(r, nodes, self._steps.unit, mass)
        table = self._table(priors.weigh(tree, mass))  # what everything looks like
        for r, nodes in zip(rows, node, strict=True):  # then what is left over once some of it is listed
            quantise.forget_listed(r, nodes, table, self._steps, mass)
        prior = priors.weigh(tree, mass)
        return _Learned(prior, prior.child(), self._table(prior))

    def _table(self, prior: Prior) -> Table:
        packed: I16 = prior.code.astype(np.int16) << 9 | priors.ranks(prior.order())
        return Table(packed, priors.WEIGHT, priors.INVERSE, prior.totals(), self._price)

    def _encode(self, rows: Rows, node: I16, table: Table) -> dict[str, U8]:
        """The coded columns of rows."""
        n, m = len(rows.true), len(rows.symbol)
        codes = Codes(*(np.empty(size, np.uint8) for size in (n, n, n, m, m)))
        n_top, n_entries = quantise.encode_rows(rows, node, table, self._steps, codes, self._divergence)
        codes = codes._replace(top=codes.top[:n_top], gap=codes.gap[:n_entries], value=codes.value[:n_entries])
        return pack_columns(codes, self._steps.value)

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
        for an open document or attrs that are not JSON, IntegrityError for more than a reader accepts in a file of
        that size (`limits`), StorageError when the disk refuses.
        """
        if self.n_positions != self._doc_start[-1]:
            raise ValueError("the last document is open: call end_document before write")
        self._flush()
        columns = self._all_columns()
        statistics = self._statistics(columns)
        attributes = {
            "format": FORMAT,
            "version": VERSION,
            "precision": {"prune": self.prune, **self.precision._asdict()},
            "statistics": statistics,
            "attrs": json.loads(json.dumps(attrs, sort_keys=True, allow_nan=False)),
        }
        size = write_zarr_zip(path, columns, attributes)
        why = excess(size, self.n_positions, len(self._doc_start) - 1)
        if why:
            raise IntegrityError(f"{os.fspath(path)}: {why}; make smaller shards (convert.shard_bytes)")
        return {**statistics, "size": size}

    def _all_columns(self) -> dict[str, NDArray[Any]]:
        prior = self._learned.prior if self._learned else priors.flat_prior()
        columns: dict[str, NDArray[Any]] = {
            "prior_parent": prior.parent,
            "prior_byte": prior.byte,
            "prior_code": priors.pack_code(prior),
            "doc_start": np.array(self._doc_start, np.int64),
            "doc_id": np.frombuffer(self._doc_id, np.uint8),
            "doc_id_start": np.array(self._doc_id_start, np.int64),
        }
        columns |= {name: np.frombuffer(column, np.uint8) for name, column in self._columns.items()}
        return {name: columns[name].astype(kind, copy=False) for name, kind in COLUMNS.items()}

    def _statistics(self, columns: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """What the shard says of itself, see `write`."""
        supervised = columns["mask"] == 1
        n_supervised = int(supervised.sum())
        histogram = np.bincount((columns["head"] & 240 | columns["tail_low"])[supervised], minlength=256)
        used = np.flatnonzero(histogram)
        mass = math.fsum(TAIL[code] * histogram[code] for code in used)
        quantisation, whole = (max(0.0, float(nats)) / max(1, n_supervised) for nats in self._divergence)
        return {
            "n_documents": len(self._doc_start) - 1,
            "n_bytes": self.n_bytes,
            "n_positions": self.n_positions,
            "n_supervised": n_supervised,
            "n_entries": len(columns["entry"]),
            "tail_mean": _rounded(mass / max(1, n_supervised)),
            "tail_max": _rounded(TAIL[used[-1]]) if n_supervised else 0.0,
            "kl_mean": _rounded(whole),
            "quantisation_kl_mean": _rounded(quantisation),
        }


def _price(rate: float) -> F64:
    """float64 [257]: nats that listing the symbol of each rank must gain: `rate` times its bits, in sixteenths."""
    bits = [round(16 * (4.0 + math.log2(1 + rank))) / 16 for rank in range(SYMBOLS)]
    return np.array(bits) * rate


def _rounded(value: float) -> float:
    """Six digits: a shard's bytes must not depend on the last bit of a logarithm."""
    return float(f"{value:.6g}")
