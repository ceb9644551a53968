"""How large the batches of a stranger's Arrow file become, by their own messages, before one is decompressed.

A buffer of a compressed batch begins with the number of bytes that it becomes (Arrow columnar format, "Compression"),
for which Arrow takes memory. Where those numbers lie in a message is said by a FlatBuffers table (Message.fbs); of that
encoding this reads what it needs: a table begins with the distance to its list of fields, whose entries are the
fields' places in it. Price: a few microseconds a batch.
"""

import struct
from collections.abc import Iterator
from typing import Any

_DICTIONARY, _BATCH = 2, 3
"""Kinds of messages that hold buffers (`MessageHeader`)."""
_KIND, _HEADER = 1, 2
_BUFFERS, _COMPRESSION = 2, 3
_DATA = 1


class _Table:
    """A FlatBuffers table at a place of a message."""

    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place
        (distance,) = struct.unpack_from("<i", data, place)
        self._fields = place - distance
        (self._size,) = struct.unpack_from("<H", data, self._fields)

    def at(self, field: int) -> int:
        """Where a field's value stands; 0 where the table has none."""
        entry = 4 + 2 * field
        if entry + 2 > self._size:
            return 0
        (offset,) = struct.unpack_from("<H", self.data, self._fields + entry)
        return self.place + offset if offset else 0

    def behind(self, field: int) -> int:
        """The place that a field points to."""
        place = self.at(field)
        if not place:
            raise ValueError(f"a message lacks its field {field}")
        return place + int(struct.unpack_from("<I", self.data, place)[0])


def batch_sizes(data: Any) -> Iterator[int]:
    """Bytes that each compressed batch of a stream becomes, dictionaries included; 0 for one that is not compressed.

    Args:
        data: a pyarrow file at the beginning of a stream's first message.

    Raises:
        ValueError: a message that is none. ArrowException: a stream that breaks off.
    """
    import pyarrow as pa

    messages = pa.ipc.MessageReader.open_stream(data)
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return
        yield _size(message.metadata.to_pybytes(), message.body)


def _size(metadata: bytes, body: Any) -> int:
    try:
        message = _Table(metadata, int(struct.unpack_from("<I", metadata, 0)[0]))
        kind = metadata[message.at(_KIND)] if message.at(_KIND) else 0
        if kind not in (_DICTIONARY, _BATCH):
            return 0
        batch = _Table(metadata, message.behind(_HEADER))
        if kind == _DICTIONARY:
            batch = _Table(metadata, batch.behind(_DATA))
        if not batch.at(_COMPRESSION) or not batch.at(_BUFFERS):
            return 0
        place = batch.behind(_BUFFERS)
        (count,) = struct.unpack_from("<I", metadata, place)
        total = 0
        for number in range(count):
            start, length = struct.unpack_from("<qq", metadata, place + 4 + 16 * number)
            if length:
                (size,) = struct.unpack("<q", memoryview(body)[start : start + 8])
                total += max(size, length)
        return total
    except (struct.error, IndexError) as error:
        raise ValueError(f"a message that cannot be read ({error})") from error
