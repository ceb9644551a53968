"""A small file cannot cost its reader without bound, and nothing that a default conversion makes is refused."""

from pathlib import Path

import numpy as np
import pytest

from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.shard import limits
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.schemas.shard.limits import excess, most_documents, most_positions
from bytecache.schemas.shard.reader import read_shard


def letters(path: Path, documents: int, length: int) -> int:
    """A shard of one letter over and over, certain: nothing packs better. Returns its size."""
    builder = ShardBuilder()
    for number in range(documents):
        text = np.full(length, 97, np.uint8)
        symbols = np.append(text, np.int16(256)).astype(np.int16)
        rows = length + 1
        builder.append_sparse(
            text, np.ones(rows, np.int64), symbols, np.full(rows, 0.999, np.float32), np.full(rows, 0.001, np.float32)
        )
        builder.end_document(str(number))
    return int(builder.write(path, {})["size"])


def test_the_limits_admit_a_default_shard_of_nothing_but_one_letter() -> None:
    """SPEC 9.2. Measured: 16 MiB of one letter in 20,782 bytes. Answers of a few letters come with prompts and ids."""
    assert not excess(20_782, (16 << 20) + 1, 1)
    assert not excess(1 << 20, 16 << 20, 1 << 20)


def test_a_file_must_have_the_bytes_for_what_it_holds() -> None:
    assert "67108864 positions in a file of 43000 bytes, at most 23723520" in excess(43_000, 64 << 20, 1)
    assert "documents" in excess(43_000, 16 << 20, 2 << 20)
    for size in (0, 1, 1 << 20, 1 << 34):
        assert not excess(size, most_positions(size), most_documents(size))
        assert excess(size, most_positions(size) + 1, 1) and excess(size, 1, most_documents(size) + 1)


@pytest.mark.parametrize(("documents", "length", "free"), [(1, 5000, "FREE_POSITIONS"), (300, 1, "FREE_DOCUMENTS")])
def test_reader_and_writer_refuse_alike_before_anything_is_decoded(
    documents: int, length: int, free: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.zarr.zip"
    letters(path, documents, length)
    read_shard(path)
    monkeypatch.setattr(limits, "POSITIONS_PER_BYTE", 0)
    monkeypatch.setattr(limits, "BYTES_PER_DOCUMENT", 1 << 20)
    monkeypatch.setattr(limits, free, 100)

    def decoded(*arguments: object) -> None:
        raise AssertionError("nothing may be decoded")

    monkeypatch.setattr("bytecache.schemas.shard.zarr_zip._Checked.column", decoded)
    with pytest.raises(IntegrityError, match=r"x\.zarr\.zip: \d+ (positions|documents) in a file of .* smaller shards"):
        read_shard(path)
    with pytest.raises(IntegrityError, match=r"in a file of \d+ bytes, at most \d+ are read; make smaller shards"):
        letters(tmp_path / "y.zarr.zip", documents, length)
