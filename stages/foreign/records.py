"""Records of a foreign cache: token ids, and for every position the listed ids with their log-probabilities.

    plain        input_ids [T], topk_ids [P][k], topk_logprobs [P][k]; other column names may be given
    distillkit   input_ids [T], compressed_logprobs [P][bytes], bytepacked_indices [P][bytes] (`packed`), or token_ids
                 and top_values; the settings are compression_config.yaml beside the files
    axolotl      input_ids [T], logprobs [P][k] of numbers beside target_token_ids [P][k], or of objects
                 {"token": "token_id:123", "logprob": -0.1}
    trl          input_ids [T] or prompt_ids + completion_ids, teacher_topk_ids and teacher_topk_logprobs [P][k]

P is T, T - 1, or less where a prompt has none. Files are Parquet, or lines of JSON; they are read by record number, so
a unit of work reads only its own. A position may list nothing (null).
"""

import json
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.schemas import strict_json
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.files import arrow_path
from bytecache.schemas.parquet_pages import refuse_blown_up
from bytecache.schemas.whole import is_number
from bytecache.stages.foreign.packed import Packing

LAYOUTS = ("plain", "distillkit", "axolotl", "trl")
MAX_LINE = 1 << 28
"""Bytes of one line of JSON."""
MAX_VALUES = 1 << 24
"""Numbers and lists of one record: 64 entries at each of 128 thousand positions. A file of some kB may hold many more,
and each takes tens of bytes of memory once it is read."""


class Record(NamedTuple):
    """One sequence. N entries in all."""

    tokens: np.ndarray
    """int64 [T]"""
    counts: np.ndarray
    """int64 [P]; entries listed at each position"""
    ids: np.ndarray
    """int64 [N]"""
    logps: np.ndarray
    """float64 [N]; nats"""


class Columns(NamedTuple):
    """Where a layout keeps what is needed."""

    tokens: str
    ids: str
    logprobs: str


COLUMNS = {
    "plain": Columns("input_ids", "topk_ids", "topk_logprobs"),
    "distillkit": Columns("input_ids", "token_ids", "top_values"),
    "axolotl": Columns("input_ids", "target_token_ids", "logprobs"),
    "trl": Columns("input_ids", "teacher_topk_ids", "teacher_topk_logprobs"),
}


class Cache:
    """The records of a file or folder, by number, in the order of the file names.

    Raises ConfigError for a layout whose settings are missing, InputError for files that are none.
    """

    def __init__(self, place: Path, layout: str, columns: Columns | None = None) -> None:
        if layout not in LAYOUTS:
            raise ConfigError(f"--from {layout}: known layouts are {', '.join(LAYOUTS)}")
        self.place, self.layout = place, layout
        self.columns = columns or COLUMNS[layout]
        names = sorted(place.rglob("*")) if place.is_dir() else [place]
        paths = [path for path in names if path.suffix in (".parquet", ".jsonl", ".json") and path.is_file()]
        if not paths:
            raise InputError(f"{place}: no .parquet, .jsonl or .json file; name the cache's file or folder")
        self.passed_over = sum(path.is_file() for path in names) - len(paths)
        self.files = [_Parquet(path) if path.suffix == ".parquet" else _Lines(path) for path in paths]
        self.begin = np.cumsum([0, *(len(file) for file in self.files)]).tolist()
        self.packing = Packing.beside(paths[0]) if self._is_packed() else None

    def __len__(self) -> int:
        return int(self.begin[-1])

    def __getitem__(self, number: int) -> Record:
        """Record `number`. Raises InputError naming the file and the record."""
        which = bisect_right(self.begin, number) - 1
        file, inside = self.files[which], number - self.begin[which]
        row = file.row(inside)
        try:
            return self._record(row)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            why = self._lacking(error, row) if isinstance(error, KeyError) else str(error)
            raise InputError(f"{file.path}, record {inside}: not of layout {self.layout} ({why})") from error

    def _lacking(self, error: KeyError, row: dict[str, Any]) -> str:
        there = ", ".join(sorted(map(str, row))[:8]) or "nothing"
        return (
            f"column {error} is missing, it has {there}; take another --from, or plain, whose columns can be named by "
            "--tokens-column, --ids-column and --logprobs-column"
        )

    def _is_packed(self) -> bool:
        if self.layout != "distillkit":
            return False
        names = self.files[0].names()
        if "packed_indices" in names:
            raise ConfigError(
                f"{self.files[0].path}: the older packed columns (packed_indices, coeffs) are not read; write the "
                "cache again with DistillKit's present compression, or as token_ids and top_values"
            )
        return "compressed_logprobs" in names

    def _record(self, row: dict[str, Any]) -> Record:
        tokens = self._tokens(row)
        if self.packing is not None:
            ids, logps = self.packing.unpack(row["compressed_logprobs"], row["bytepacked_indices"])
            counts = np.full(len(ids), ids.shape[1], np.int64)
            return _checked(Record(tokens, counts, ids.reshape(-1), logps.reshape(-1)))
        listed = row[self.columns.logprobs]
        if any(isinstance(entry, dict) for position in listed or () if position for entry in position):
            pairs = [[_named(entry) for entry in position or ()] for position in listed]
            ids_of = [[token for token, _ in position] for position in pairs]
            logps_of = [[logp for _, logp in position] for position in pairs]
        else:
            ids_of = [position if position is not None else [] for position in row[self.columns.ids]]
            logps_of = [position if position is not None else [] for position in listed]
        counts = np.array([len(position) for position in ids_of], np.int64)
        if [len(position) for position in logps_of] != counts.tolist():
            raise ValueError("ids and logprobs have different lengths")
        ids = _whole([token for position in ids_of for token in position])
        chances = [logp for position in logps_of for logp in position]
        if not set(map(type, chances)) <= {int, float}:
            raise ValueError("log-probabilities that are no numbers")
        return _checked(Record(tokens, counts, ids, np.array(chances, np.float64)))

    def _tokens(self, row: dict[str, Any]) -> np.ndarray:
        if self.columns.tokens in row or "prompt_ids" not in row:
            return _whole(row[self.columns.tokens])
        return _whole([*row["prompt_ids"], *row["completion_ids"]])


def _whole(values: list[Any]) -> np.ndarray:
    """int64; ids as they stand: 3.5, true and "3" are none. Raises ValueError, TypeError, OverflowError."""
    if other := set(map(type, values)) - {int}:
        raise ValueError(f"an id is a {sorted(kind.__name__ for kind in other)[0]}, not a whole number")
    return np.array(values, np.int64)


def _named(entry: dict[str, Any]) -> tuple[int, float]:
    """(id, logprob) of {"token": "token_id:123", "logprob": -0.1}."""
    token, logprob = str(entry["token"]).rpartition(":")[2], entry["logprob"]
    if not (token.isascii() and token.isdigit()):
        raise ValueError(f"{token[:40]!r} is no id")
    if not is_number(logprob):
        raise ValueError("log-probabilities that are no numbers")
    return int(token), float(logprob)


def _checked(record: Record) -> Record:
    """The record without padding entries (log-probability -inf). Raises ValueError for what cannot be one."""
    if record.tokens.ndim != 1 or len(record.counts) > len(record.tokens):
        raise ValueError(f"{len(record.counts)} positions for {len(record.tokens)} tokens")
    if np.isnan(record.logps).any() or (record.logps > 1e-2).any():
        raise ValueError("log-probabilities that are NaN or above 0")
    if (record.ids < 0).any() or (record.tokens < 0).any():
        raise ValueError("negative ids")
    position = np.repeat(np.arange(len(record.counts)), record.counts)
    keep = ~np.isneginf(record.logps)
    if not keep.all():
        position = position[keep]
        counts = np.bincount(position, minlength=len(record.counts)).astype(np.int64)
        record = record._replace(counts=counts, ids=record.ids[keep], logps=record.logps[keep])
    if len(np.unique(np.stack([position, record.ids]), axis=1)[0]) < len(record.ids):
        raise ValueError("a position lists the same id twice")
    return record


class _Parquet:
    """Rows of a Parquet file; the last row group read stays in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(arrow_path(path))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path}: not a whole Parquet file ({error}); fetch it again") from error
        names = self.names()
        if len(set(names)) != len(names):
            raise InputError(
                f"{path}: two columns of one name ({', '.join(sorted(names)[:8])}); write it with one of each"
            )
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._begin = np.cumsum([0, *sizes]).tolist()
        self._group, self._table = -1, None

    def __len__(self) -> int:
        return int(self._begin[-1])

    def names(self) -> list[str]:
        return list(self._file.schema_arrow.names)

    def row(self, number: int) -> dict[str, Any]:
        group = bisect_right(self._begin, number) - 1
        if group != self._group:
            try:
                refuse_blown_up(self.path, self._file.metadata, group)
                self._group, self._table = group, self._file.read_row_group(group)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise InputError(f"{self.path}: row group {group} cannot be read ({error}); fetch it again") from error
        inside = number - self._begin[group]
        record: pa.Table = self._table.slice(inside, 1)  # type: ignore[attr-defined]
        count = sum(_values(chunk) for column in record.columns for chunk in column.chunks)
        if count > MAX_VALUES:
            raise _too_many(self.path, number, count)
        rows: list[dict[str, Any]] = record.to_pylist()
        return rows[0]


def _values(array: pa.Array) -> int:
    """How many numbers, lists and objects an array holds, at all depths."""
    kind = array.type
    if pa.types.is_struct(kind):
        return len(array) + sum(_values(child) for child in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return len(array) + _values(array.flatten())
    return len(array)


def _too_many(path: Path, number: int, count: int) -> InputError:
    return InputError(
        f"{path}, record {number}: {count} values, at most {MAX_VALUES} are read of one record; write shorter records"
    )


class _Lines:
    """Lines of JSON, found by their place in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._place: list[int] = []
        at = 0
        while line := self._file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise InputError(f"{path}: a line of more than {MAX_LINE} bytes; this is no cache of records")
            if line.strip():
                self._place.append(at)
            at += len(line)

    def __len__(self) -> int:
        return len(self._place)

    def names(self) -> list[str]:
        return list(self.row(0)) if self._place else []

    def row(self, number: int) -> dict[str, Any]:
        self._file.seek(self._place[number])
        line = self._file.readline()
        if (count := strict_json.most_values(line)) > MAX_VALUES:
            raise _too_many(self.path, number, count)
        try:
            row = json.loads(line, parse_constant=_infinite, object_pairs_hook=strict_json.distinct)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}, record {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{self.path}, record {number}: not a JSON object")
        return row


def _infinite(name: str) -> float:
    """JSON writers of these caches write -Infinity for padding entries."""
    if name == "-Infinity":
        return float("-inf")
    raise ValueError(f"{name} is no log-probability")
