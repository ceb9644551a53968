"""Byte targets: the teacher's next-byte distribution at every position of a text, in one Zarr v3 zip per shard.

A document of n bytes owns n + 1 positions; the last one predicts END. Per position: the most likely symbol
(implied probability: 1 minus the rest), the unlisted mass, and a ragged list of the symbols that the shard's own
context prior does not predict well enough. SPEC.md is the normative description. This module is what users need: the
reader, and the writer's names. `builder` writes, `prior` holds the context tree, `quantise` what a writer chooses,
`codes` the columns, `expansion` the reader's loops, `zarr_zip` the file.

Price in memory: 7 bytes a position and 2 a listed symbol. Sizes, speeds and the commands that measure them:
docs/results.md.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytecache.schemas.arrays import END, F32, F64, I16, I64, SYMBOLS, U8
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.shard import prior as priors
from bytecache.schemas.shard import reasons
from bytecache.schemas.shard.codes import COLUMNS, FORMAT, STEPS, TAIL, VERSION, check_bounds
from bytecache.schemas.shard.expansion import INDEX_STRIDE, SPARE, Contexts, RowKeys, Stored, decode_rows, expand_rows
from bytecache.schemas.shard.limits import excess
from bytecache.schemas.shard.prior import Prior
from bytecache.schemas.shard.zarr_zip import read_zarr_zip
from bytecache.schemas.whole import is_number, is_whole, same

__all__ = [
    "FORMAT",
    "TAIL_MASS",
    "VERSION",
    "ByteShard",
    "Triples",
    "read_shard",
]

FIGURES = ("tail_mean", "tail_max", "kl_mean", "quantisation_kl_mean")
"""What a writer found out about a shard; a reader takes its word for it, if it is a number."""

_REASONS = {
    reasons.BAD_ORDER: ("entry", "ranks run beyond the last symbol"),
    reasons.BAD_CODE: ("entry", "a code that no writer produces"),
    reasons.BAD_MASS: ("entry", "listed mass and tail reach 1"),
    reasons.BAD_COUNT: ("head", "the counts do not add up to the lengths of `entry` and `top`"),
    reasons.BAD_COUNT_OVER: ("count_over", "its length is not the number of counts of 7 and more"),
    reasons.BAD_GAP_OVER: ("gap_over", "its length is not the number of widest gaps"),
}
"""Why `expand_rows` refuses: the member to blame, and the words."""


TAIL_MASS: F32 = TAIL.astype(np.float32)
"""float32 [256]: unlisted mass of a `tail` code."""


class Triples(NamedTuple):
    """Sparse rows: non-zero (row, symbol, probability), rows ascending, symbols ascending within a row."""

    row: NDArray[np.int32]
    """int32 [E], relative to the first requested position"""
    symbol: NDArray[np.int16]
    """int16 [E], 0..255 bytes, 256 END"""
    prob: F32
    """float32 [E]"""


@dataclass(frozen=True, eq=False)
class ByteShard:
    """A shard in memory, N positions, D documents, E listed symbols; made by `read_shard`, which has checked it."""

    path: str
    attrs: dict[str, Any]
    """what the writer was given"""
    statistics: dict[str, Any]
    """n_documents, n_bytes, n_positions, n_supervised, n_entries, tail_mean, tail_max, kl_mean, quantisation_kl_mean"""
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
    codes: dict[str, NDArray[Any]] = field(repr=False)
    """rows by symbol, as `expansion.expand_rows` makes them: tail, count, place uint8 [N]; key uint16 [<= E + N]"""
    key_index: I64 = field(repr=False)
    """int64: key offset of every 1024th position, and of N"""

    @cached_property
    def tail(self) -> F32:
        """float32 [N]: decoded unlisted mass; kept once asked for (`tails` gives a part and keeps nothing)."""
        return self.tails(0, len(self))

    def tails(self, lo: int, hi: int) -> F32:
        """float32 [hi - lo]: decoded unlisted mass of positions lo..hi."""
        tails: F32 = TAIL_MASS[self.codes["tail"][lo:hi]]
        return tails

    @cached_property
    def _rows(self) -> tuple[NDArray[Any], ...]:
        return self.key_index, *(self.codes[name] for name in ("tail", "count", "place", "key"))

    @cached_property
    def _spread(self) -> tuple[I16, F64]:
        return self.prior.child(), self.prior.weights()

    def __len__(self) -> int:
        return len(self.text)

    def symbols(self, lo: int, hi: int) -> I64:
        """int64 [hi - lo]: the true symbol of positions lo..hi, the byte that follows or END."""
        symbols: I64 = self.text[lo:hi].astype(np.int64)
        first, last = np.searchsorted(self.doc_start, [lo + 1, hi + 1])
        symbols[np.asarray(self.doc_start[first:last]) - 1 - lo] = END
        return symbols

    def triples(self, lo: int, hi: int) -> Triples:
        """Non-zero probabilities of positions lo..hi, implied symbol and END included, the tail left out.

        A row's probabilities and its `tail` sum to 1 (float32 rounding aside). Raises IndexError.
        """
        if not 0 <= lo <= hi <= len(self.text):
            raise IndexError(f"{self.path}: positions {lo}..{hi} are outside 0..{len(self)}")
        return Triples._make(decode_rows(lo, hi, *self._rows))

    def dense(self, lo: int, hi: int, spread_tail: bool = False) -> F32:
        """float32 [hi - lo, 257]: the same as a table; 1028 bytes per position, for small ranges. Raises IndexError.

        With `spread_tail`, the tail is divided among the unlisted symbols as the shard's prior weighs them (rows
        then sum to 1): the distribution that `statistics["kl_mean"]` speaks of.
        """
        row, symbol, prob = self.triples(lo, hi)
        out = np.zeros((hi - lo, SYMBOLS), np.float32)
        out[row, symbol] = prob
        if spread_tail and hi > lo:
            out += (self.tail_weights(lo, hi) * self.tails(lo, hi)[:, None].astype(np.float64)).astype(np.float32)
        return out

    def tail_weights(self, lo: int, hi: int) -> F64:
        """float64 [hi - lo, 257], rows sum to 1: how the prior divides a tail, 0 where listed. Raises IndexError."""
        row, symbol, _ = self.triples(lo, hi)
        child, weights = self._spread
        share = weights[priors.find_nodes(self.text, self.doc_start, child, lo, hi)]
        share[row, symbol] = 0.0
        weights_of_rows: F64 = share / share.sum(1, keepdims=True)
        return weights_of_rows

    def document(self, index: int) -> bytes:
        """Text of one document."""
        return self.text[self.doc_start[index] : self.doc_start[index + 1] - 1].tobytes()


_Refuse = Callable[[str, str], IntegrityError]
"""(member, what is wrong with it) -> what to raise."""
_Columns = dict[str, NDArray[Any]]


def read_shard(path: str | os.PathLike[str]) -> ByteShard:
    """Read and check a whole shard.

    Raises IntegrityError, naming file and member, unless every column is present, whole, consistent with the
    others and decodes to distributions; StorageError when the file cannot be read.
    """
    name = os.fspath(path)

    def check_sizes(sizes: dict[str, int], size: int) -> None:
        why = excess(size, sizes["text"], sizes["doc_start"] - 1)
        if why:
            raise IntegrityError(
                f"{name}: {why}; ask its maker for smaller shards (convert.shard_bytes), or do not use it"
            )

    def refuse(member: str, why: str) -> IntegrityError:
        return IntegrityError(f"{name}: member {member!r}: {why}; fetch or make this shard again")

    columns, attributes = read_zarr_zip(path, COLUMNS, check_sizes)
    _check_attributes(attributes, refuse)
    attrs, statistics, precision = attributes["attrs"], attributes["statistics"], attributes["precision"]
    _check_positions(columns, refuse)
    doc_id = _document_ids(columns, refuse)
    try:
        prior = priors.check_prior(columns["prior_parent"], columns["prior_byte"], columns["prior_code"])
    except ValueError as error:
        raise refuse(*_member_first(error)) from error
    codes, index = _expand(columns, precision["value_step"], prior, refuse)
    _check_statistics(statistics, columns, len(doc_id), refuse)
    text, mask, doc_start = columns["text"], columns["mask"], columns["doc_start"]
    return ByteShard(name, attrs, statistics, precision, text, mask, doc_start, doc_id, prior, codes, index)


def _member_first(error: ValueError) -> tuple[str, str]:
    """Member and words of an error that begins with the member's name."""
    member, _, why = str(error).partition(" ")
    return member, why


def _check_attributes(attributes: dict[str, Any], refuse: _Refuse) -> None:
    """Refuse a file of another format, and one that does not say what its codes are multiples of."""
    if attributes.get("format") != FORMAT or not same(attributes.get("version"), VERSION):
        other = f"{attributes.get('format')!r} version {attributes.get('version')!r}"
        raise refuse("zarr.json", f"is {other[:120]}, this reader knows {FORMAT!r} version {VERSION}")
    if any(not isinstance(attributes.get(key), dict) for key in ("attrs", "statistics", "precision")):
        raise refuse("zarr.json", "lacks attrs, statistics or precision")
    step = attributes["precision"].get("value_step")
    if not is_whole(step) or step not in STEPS:
        raise refuse("zarr.json", f"precision.value_step is {str(step)[:40]}, must be one of {STEPS}")


def _check_positions(columns: _Columns, refuse: _Refuse) -> None:
    """Refuse columns that do not have one number a position, and offsets that do not divide what they should."""
    n = len(columns["text"])
    for member in ("mask", "head", "tail_low"):
        if len(columns[member]) != n:
            raise refuse(member, f"{len(columns[member])} rows, but `text` has {n}")
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


def _document_ids(columns: _Columns, refuse: _Refuse) -> list[str]:
    blob, start = columns["doc_id"].tobytes(), columns["doc_id_start"].tolist()
    try:
        return [blob[a:b].decode("utf-8") for a, b in pairwise(start)]
    except UnicodeDecodeError as error:
        raise refuse("doc_id", f"is not UTF-8 ({error.reason})") from error


def _check_statistics(statistics: dict[str, Any], columns: _Columns, n_documents: int, refuse: _Refuse) -> None:
    """Refuse a shard that says other counts of itself than its columns have."""
    n = len(columns["text"])
    counts = {
        "n_documents": n_documents,
        "n_bytes": n - n_documents,
        "n_positions": n,
        "n_entries": len(columns["entry"]),
    }
    # The first golden shard does not say how many are supervised.
    counts |= {"n_supervised": int(columns["mask"].sum(dtype=np.int64))} if "n_supervised" in statistics else {}
    for key, value in counts.items():
        if not same(statistics.get(key), value):
            raise refuse("zarr.json", f"{key} is {str(statistics.get(key))[:40]}, the columns hold {value}")
    for key in FIGURES:
        value = statistics.get(key, 0.0)
        if not is_number(value) or not math.isfinite(value):
            raise refuse("zarr.json", f"{key} is {str(value)[:40]}, must be a finite number")


def _expand(columns: _Columns, step: int, prior: Prior, refuse: _Refuse) -> tuple[_Columns, I64]:
    """The rows by symbol, and the index of their keys."""
    try:
        check_bounds(columns, step)
    except ValueError as error:
        raise refuse(*_member_first(error)) from error
    stored = Stored(*(columns[name] for name in Stored._fields))
    n, n_entries = len(stored.head), len(stored.entry)
    if n == 0 and any(len(column) for column in stored[2:]):
        raise refuse("entry", "entries, but no rows")
    order = prior.order()
    contexts = Contexts(prior.child(), order.reshape(-1), priors.ranks(order).reshape(-1))
    tail, count, place = (np.empty(n, np.uint8) for _ in range(3))
    key, index = np.empty(n + n_entries + SPARE, np.uint16), np.zeros(-(-n // INDEX_STRIDE) + 1, np.int64)
    row, reason, n_keys = expand_rows(stored, contexts, step, RowKeys(tail, count, place, key, index))
    if row >= 0:
        member, why = _REASONS[reason]
        raise refuse(member, f"position {row}: {why}")
    return {"tail": tail, "count": count, "place": place, "key": key[:n_keys]}, index
