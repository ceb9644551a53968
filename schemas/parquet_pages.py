"""How large the pages of a stranger's Parquet file become, by their own headers, before one is decompressed.

The footer of a file states sizes for whole columns, and nothing makes them true: what Arrow takes memory for is what
each page's header says, up to 2 GiB a page, and a page of zeros of that size has 100 kB. zstd and its like write no
more than the header said, so these numbers are a bound. So is the number of values: a run of equal ones has a few bytes
in a page, whatever its length.

Headers are structures of Thrift's compact protocol (thrift, doc/specs/thrift-compact-protocol.md) as parquet.thrift has
them; fields that are not asked for are passed over. Price: a seek and a read of a few kB a page, of 1 MB by default.
"""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from bytecache.schemas.files import open_regular

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_HEADER = 1 << 12
"""Bytes read of a header at first; statistics may make it longer."""
_LONGEST_HEADER = 1 << 24
_UNCOMPRESSED, _COMPRESSED = 2, 3
_PARTS = (5, 7, 8)
"""Fields that hold what only a data page, a dictionary or a data page of version 2 has; their first is a count."""
_VALUES = -1
_BOOLEANS, _BYTE, _VARINTS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
_DEEPEST = 16


class Page(NamedTuple):
    """What a page's header says."""

    size: int
    """Bytes once decompressed."""
    values: int


class _CutError(Exception):
    """The header goes on behind what was read of it."""


def pages_of(stream: BinaryIO, meta: "pq.FileMetaData", group: int, columns: Sequence[str] = ()) -> Iterator[Page]:
    """The pages of a row group, in the order of the file, of some columns or of all.

    Args:
        columns: names of top-level columns.

    Raises:
        ValueError: a header that is none, or that states a negative size.
    """
    row_group = meta.row_group(group)
    for number in range(row_group.num_columns):
        chunk = row_group.column(number)
        if columns and chunk.path_in_schema.partition(".")[0] not in columns:
            continue
        if not chunk.num_values:  # nothing is read of it, and its places may be anything
            continue
        start, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
        if dictionary is not None and 0 < dictionary < start:
            start = dictionary
        yield from _pages(stream, start, start + chunk.total_compressed_size)


MAX_GROUP_BYTES, MAX_GROUP_VALUES = 1 << 31, 1 << 28
"""Of a row group that is read at once, decompressed, at most; and values of one of its pages. The largest dump that
there is a use for (a window of 32k tokens, 4,096 candidates each) has half of either."""


def refuse_blown_up(path: str | os.PathLike[str], meta: "pq.FileMetaData", group: int) -> None:
    """Raises ValueError for a row group that few bytes make larger than any that there is a use for. OSError."""
    with open_regular(path) as stream:
        pages = list(pages_of(stream, meta, group))
    size, values = sum(page.size for page in pages), max((page.values for page in pages), default=0)
    if size > MAX_GROUP_BYTES or values > MAX_GROUP_VALUES:
        raise ValueError(
            f"it would become {size} bytes, with {values} values in a page; at most {MAX_GROUP_BYTES} and "
            f"{MAX_GROUP_VALUES} are read"
        )


def _pages(stream: BinaryIO, place: int, end: int) -> Iterator[Page]:
    while place < end:
        length, fields = _header(stream, place)
        size, stored = fields.get(_UNCOMPRESSED, -1), fields.get(_COMPRESSED, -1)
        if size < 0 or stored < 0:
            raise ValueError(f"the page at byte {place} states no size")
        yield Page(size, fields.get(_VALUES, 0))
        place += length + stored


def _header(stream: BinaryIO, place: int) -> tuple[int, dict[int, int]]:
    """(bytes, whole numbers by field) of the page header at a place."""
    wanted = _HEADER
    while True:
        stream.seek(place)
        data = stream.read(wanted)
        try:
            return _structure(data, 0, 0)
        except _CutError:
            if len(data) < wanted or wanted >= _LONGEST_HEADER:
                raise ValueError(f"the page at byte {place} has no header") from None
            wanted *= 16


def _structure(data: bytes, at: int, depth: int) -> tuple[int, dict[int, int]]:
    """(where it ends, its whole numbers by field) of a structure."""
    if depth > _DEEPEST:
        raise ValueError("structures nested too deep")
    numbers: dict[int, int] = {}
    field = 0
    while True:
        head, at = _byte(data, at)
        if not head:
            return at, numbers
        kind = head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, at = _zigzag(data, at)
        if kind in _VARINTS:
            numbers[field], at = _zigzag(data, at)
        elif kind == _STRUCT:
            at, inner = _structure(data, at, depth + 1)
            if not depth and field in _PARTS:
                numbers[_VALUES] = inner.get(1, 0)
        elif kind not in _BOOLEANS:  # whose value is their kind
            at = _behind(data, at, kind, depth)


def _behind(data: bytes, at: int, kind: int, depth: int) -> int:
    """Where a value that begins at `at` ends."""
    if kind == _BYTE or kind in _BOOLEANS:
        return at + 1
    if kind in _VARINTS:
        return _varint(data, at)[1]
    if kind == _DOUBLE:
        return at + 8
    if kind == _BINARY:
        length, at = _varint(data, at)
        return at + length
    if kind == _STRUCT:
        return _structure(data, at, depth + 1)[0]
    if kind in _LISTS:
        head, at = _byte(data, at)
        count = head >> 4
        inner: tuple[int, ...] = (head & 15,)
        if count == 15:
            count, at = _varint(data, at)
    elif kind == _MAP:
        count, at = _varint(data, at)
        head, at = _byte(data, at) if count else (0, at)
        inner = (head >> 4, head & 15)
    else:
        raise ValueError(f"no kind {kind} of value")
    for _ in range(count):
        for each in inner:
            at = _behind(data, at, each, depth + 1)
            if at > len(data):
                raise _CutError
    return at


def _byte(data: bytes, at: int) -> tuple[int, int]:
    if at >= len(data):
        raise _CutError
    return data[at], at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = _byte(data, at)
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
