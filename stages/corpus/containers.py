"""What documents lie in: compressed lines, and tables (Parquet, or the Arrow streams of `datasets.save_to_disk`).

Both are read in one pass with one piece in memory, and say where they break off.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from bytecache.schemas.errors import InputError
from bytecache.schemas.files import arrow_path, open_regular
from bytecache.schemas.parquet_pages import pages_of
from bytecache.stages.corpus.arrow_messages import batch_sizes

if TYPE_CHECKING:
    import pyarrow as pa

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Endings of compressed lines, and what they are called."""
TABLES = (".parquet", ".arrow")
DAMAGED_LINES = (EOFError, zlib.error, gzip.BadGzipFile, io.UnsupportedOperation)
"""What reading damaged compressed lines raises, beside an OSError without a number."""
_ROWS = 64
_PAGE, _VALUES = 1 << 28, 1 << 26
"""Bytes of a Parquet page, decompressed, and its values, at most: four documents of the largest size."""
_BATCH = 1 << 30
"""Bytes of a compressed batch of an Arrow file, decompressed, at most."""
_BEFORE_MESSAGES = 8
"""Bytes of the mark with which an Arrow file begins; a stream follows, and the footer behind it."""


@contextmanager
def open_compressed(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a .gz or .zst file. Raises InputError for one without a byte, which no archive is."""
    if not path.stat().st_size:
        raise InputError(f"{path}: a {COMPRESSED[path.suffix]} file of 0 bytes is cut short; fetch the file again")
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as stream:
            yield cast("BinaryIO", stream)
        return
    import pyarrow as pa

    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
        yield io.BufferedReader(stream)


class Table:
    """The records of a Parquet file or an Arrow stream, in order.

    Iterating raises InputError, naming the file and the row, where it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def opened(self) -> Iterator["tuple[pa.Schema, _Batches]"]:
        """(schema, batches by the names of columns). What is read inside may raise InputError."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        place = _Batches()
        try:
            if self.path.suffix == ".parquet":
                with pq.ParquetFile(arrow_path(self.path)) as file:
                    place.start = lambda names: _groups(self.path, file, names)
                    yield file.schema_arrow, place
            else:
                with pa.memory_map(str(self.path)) as data, _arrow_reader(data, self.path) as reader:
                    place.start = lambda names: (batch.select(names) for batch in _small(reader))
                    yield reader.schema, place
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}, near row {place.row}: not UTF-8 ({error.reason} at byte {error.start} of the value); "
                "re-encode it"
            ) from None
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            kind = "Parquet" if self.path.suffix == ".parquet" else "Arrow file"
            reason = str(error).splitlines()[0][:160]
            raise InputError(
                f"{self.path}: truncated or damaged {kind} after row {place.row}: {reason}; fetch the file again"
            ) from None


class _Batches:
    """The reading of a table: which row it is at, and its records."""

    def __init__(self) -> None:
        self.row = 0
        self.start: Any = None

    def records(self, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, record) of every row, with these columns."""
        for batch in self.start(names):
            for record in batch.to_pylist():
                yield self.row, record
                self.row += 1


def _groups(path: Path, file: Any, names: list[str]) -> Iterator[Any]:
    """The batches of a Parquet file, of fewer rows where its pages are large: each row may repeat a page's one value.

    Raises InputError for a page that a few bytes make larger than any document.
    """
    for group in range(file.num_row_groups):
        with open_regular(path) as stream:
            try:
                pages = list(pages_of(stream, file.metadata, group, names))
            except ValueError as error:
                raise InputError(
                    f"{path}: truncated or damaged Parquet in row group {group}: {error}; fetch the file again"
                ) from error
        largest = max((page.size for page in pages), default=0)
        values = max((page.values for page in pages), default=0)
        if largest > _PAGE or values > _VALUES:
            raise InputError(
                f"{path}: row group {group} has a page of {largest} bytes or {values} values, at most {_PAGE} and "
                f"{_VALUES} are read; write it with smaller pages"
            )
        rows = max(1, min(_ROWS, _PAGE // max(1, largest)))
        yield from file.iter_batches(batch_size=rows, row_groups=[group], columns=names)


def _arrow_reader(data: Any, path: Path) -> Any:
    """A stream is what `save_to_disk` writes; a file with a footer, which is one too, what other tools do.

    The footer is not read: it could name other messages than those that were looked at.

    Raises InputError for a batch that a few bytes make larger than any that there is a use for.
    """
    import pyarrow as pa

    begin = _BEFORE_MESSAGES if data.read(6) == b"ARROW1" else 0
    data.seek(begin)
    try:
        largest = max(batch_sizes(data), default=0)
    except ValueError as error:
        if isinstance(error, pa.ArrowException):  # ArrowInvalid is both
            raise
        raise InputError(f"{path}: damaged Arrow file: {error}; fetch the file again") from error
    if largest > _BATCH:
        raise InputError(
            f"{path}: a batch would decompress to {largest} bytes, at most {_BATCH} are read; write it with fewer rows "
            "a batch"
        )
    data.seek(begin)
    return pa.ipc.open_stream(data)


def _small(reader: Any) -> Iterator[Any]:
    """The batches of a stream, cut to a few rows, so that few records are Python objects at a time."""
    for batch in reader:
        batch.validate(full=True)  # offsets are a stranger's: nothing else looks where they lead
        for first in range(0, batch.num_rows, _ROWS):
            yield batch.slice(first, _ROWS)
