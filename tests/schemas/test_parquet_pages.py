"""What the pages of a Parquet file become is known from their headers, whatever its footer says."""

import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas import parquet_pages
from bytecache.schemas.dataset import index
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.parquet_pages import Page, pages_of, refuse_blown_up

TABLE = pa.table({
    "text": ["x" * (1000 * (i % 7)) + str(i) for i in range(3000)],
    "list": [[i] * 3 for i in range(3000)],
    "object": [{"number": i, "words": "two words"} for i in range(3000)],
})  # fmt: skip


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def pages(data: bytes, *columns: str) -> list[list[Page]]:
    meta = pq.read_metadata(io.BytesIO(data))
    return [list(pages_of(io.BytesIO(data), meta, group, columns)) for group in range(meta.num_row_groups)]


def varint(number: int, length: int = 0) -> bytes:
    """A zigzag number of Thrift, in as many bytes as asked for."""
    number *= 2
    out = bytearray()
    while number > 127 or len(out) + 1 < length:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def with_small_sizes(data: bytes) -> bytes:
    """The same file, whose footer calls every size and sum of sizes above 10 MB a hundred bytes."""
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8]
    group = pq.read_metadata(io.BytesIO(data)).row_group(0)
    for number in {group.total_byte_size, *(group.column(i).total_uncompressed_size for i in range(group.num_columns))}:
        if number > 10_000_000:
            assert varint(number) in footer
            footer = footer.replace(varint(number), varint(100, len(varint(number))))
    return data[: -8 - size] + footer + data[-8:]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["zstd", "snappy", "none", "gzip"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_sizes_are_those_of_an_honest_footer(version: str, codec: str, dictionary: bool) -> None:
    """Which counts the headers as well, some 30 bytes each."""
    options = {"data_page_version": version, "compression": codec, "use_dictionary": dictionary, "row_group_size": 1000}
    data = parquet(TABLE, **options)
    meta = pq.read_metadata(io.BytesIO(data))
    for group, found in enumerate(pages(data)):
        headers = meta.row_group(group).total_byte_size - sum(page.size for page in found)
        assert 10 * len(found) < headers < 120 * len(found)
        values = sum(page.values for page in pages(data, "text")[group])
        assert 1000 <= values <= 2000  # a dictionary counts as well
    assert len(pages(data, "list", "text")[0]) < len(pages(data)[0])


def test_statistics_longer_than_what_is_read_at_first() -> None:
    """Older writers put the least and the greatest value into the header, whole."""
    header = b"\x15\x00" + b"\x15" + varint(70) + b"\x15" + varint(50)
    header += (
        b"\x2c\x15"
        + varint(9)
        + b"\x15\x00\x15\x06\x15\x06\x1c\x18"
        + b"\xc0\x9a\x0c"
        + b"m" * 200_000
        + b"\x00\x00\x00"
    )
    found = list(parquet_pages._pages(io.BytesIO(header + b"." * 50 + header), 0, 2 * len(header) + 100))
    assert found == [Page(70, 9), Page(70, 9)]


def test_headers_that_are_none(tmp_path: Path) -> None:
    """Any bytes in their place are sizes or a ValueError, at once."""
    data = parquet(TABLE.slice(0, 100), use_dictionary=False)
    meta = pq.read_metadata(io.BytesIO(data))
    draw = random.Random(0)
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(draw.choice([1, 1, 8, 64])):
            broken[draw.randrange(4, 200)] = draw.randrange(256)
        try:
            assert all(page.size >= 0 for page in pages_of(io.BytesIO(broken), meta, 0))
        except ValueError:
            continue
    for junk in (b"\x0c" * 100_000, b"\x1c" * 100_000, b"\xff" * 100_000, b"\x19\xfc" + b"\xff" * 8 + b"\x7f", b""):
        with pytest.raises(ValueError, match=r"header|nested|64 bits|size|kind"):
            list(parquet_pages._pages(io.BytesIO(junk), 0, 10))


def test_a_footer_that_lies_blows_nothing_up(tmp_path: Path) -> None:
    """A page of 300 MB in a file of 30 kB, which says of itself that it becomes 100 bytes."""
    rows = pa.table(
        {name: pa.array([None], kind) for name, kind in zip(index._SCHEMA.names, index._SCHEMA.types, strict=True)}
    )
    text = index._SCHEMA.names[0]
    data = parquet(rows.set_column(0, text, pa.array(["x" * 300_000_000])), compression="zstd", write_statistics=False)
    lie = with_small_sizes(data)
    assert len(lie) < 100_000 and pq.read_metadata(io.BytesIO(lie)).row_group(0).total_byte_size < 10_000
    with pytest.raises(IntegrityError, match=r"1 rows of 300\d{6} bytes .* are read; do not use it"):
        index._parse_manifest("manifest.parquet", lie)


def test_a_run_of_equal_values_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two million zeros in a list of one row take a few bytes, in the page as well."""
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(pa.table({"list": [[0] * 2_000_000]})))
    meta = pq.read_metadata(path)
    assert path.stat().st_size < 20_000
    refuse_blown_up(path, meta, 0)
    monkeypatch.setattr(parquet_pages, "MAX_GROUP_VALUES", 1_000_000)
    with pytest.raises(ValueError, match="values in a page; at most"):
        refuse_blown_up(path, meta, 0)


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_column_without_a_value_has_no_page(dictionary: bool) -> None:
    """Its places are those of nothing: a file of no rows, or a group of none among others, is whole."""
    assert pages(parquet(TABLE.slice(0, 0), use_dictionary=dictionary)) == [[]]
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, TABLE.schema, use_dictionary=dictionary) as writer:
        for rows in (3, 0, 3):
            writer.write_table(TABLE.slice(0, rows))
    assert [bool(group) for group in pages(sink.getvalue())] == [True, False, True]
