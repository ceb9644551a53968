"""A range of the lines of a file, so that several processes can read one file."""

from typing import BinaryIO


class LineRange:
    """The lines that begin in [begin, end) of a file.

    Behind the file's beginning an empty line comes first, the one that ends before the range: no line of the range is
    taken for the first of the file.
    """

    def __init__(self, stream: BinaryIO, begin: int, end: int) -> None:
        self._stream, self._at, self._end = stream, begin, end
        self._blank = begin > 0
        if begin:
            stream.seek(begin - 1)
            self._at += len(stream.readline()) - 1

    def readline(self, limit: int) -> bytes:
        """The next line, of at most `limit` bytes; empty after the last."""
        if self._blank:
            self._blank = False
            return b"\n"
        line = self._stream.readline(limit) if self._at < self._end else b""
        self._at += len(line)
        return line
