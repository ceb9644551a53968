"""One Zarr v3 group of plain columns in one zip file: equal content is equal bytes, and reading trusts nothing.

Writing: zarr makes the members, we make the zip (stored, sorted by name, stamped 1980-01-01), because zarr's own
zip store stamps the current time. Reading: zarr takes a missing chunk for zeros and believes any size it is told, so
the zip is compared with what a writer would have made before anything is decoded: exact member names, stored back to
back from the file's first byte to its directory, array metadata of the one allowed kind, every chunk present, and every
zstd frame declaring exactly its chunk's size (which bounds the decoder's memory, whatever the frame holds). What
passes is so plain that the frames are decoded straight into the columns; zipfile checks every member's CRC-32.

Price: the compressed shard once in memory while writing; one compressed chunk on top of the result while reading.
zstd-3 packs about 100 MB/s and unpacks about 1 GB/s per core.
"""

import errno
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import Zstd
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from bytecache.schemas import strict_json
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.files import NotAFileError, open_regular, refuse_to_write
from bytecache.schemas.whole import is_whole, same

CHUNK = 1 << 20
"""Elements per chunk a writer uses (shorter columns have one chunk of their own length)."""
MAX_CHUNK = 1 << 22
MAX_ELEMENTS = 1 << 34
MAX_MEMBERS = 1 << 16
MAX_METADATA = 1 << 24
"""Bytes of one zarr.json."""
MAX_EXTRA = 64
"""Bytes of a member's extra field: sizes beyond 4 GiB need 20."""
MAX_RATIO, RATIO_FREE = 256, 1 << 27
"""A file may decode to 128 MiB whatever its size (a default shard of text takes 64), or to 256 times its size."""
_STAMP = (1980, 1, 1, 0, 0, 0)
_ENDIAN = {"uint8": {}, "int64": {"configuration": {"endian": "little"}}}


def write_zarr_zip(
    path: str | os.PathLike[str], columns: Mapping[str, NDArray[Any]], attributes: dict[str, Any]
) -> int:
    """Write one-dimensional uint8 or int64 columns and JSON attributes; returns the file's size in bytes.

    Writes `path` directly: the caller chooses a temporary name and commits. Raises StorageError.
    """
    try:
        refuse_to_write(Path(path))
    except OSError as error:
        raise StorageError(f"{os.fspath(path)} {error.strerror}: name a file or a new name") from error
    members: dict[str, Any] = {}
    store = MemoryStore(members)
    group = zarr.create_group(store, attributes=attributes)
    for name, column in columns.items():
        array = group.create_array(
            name,
            shape=column.shape,
            chunks=(min(CHUNK, max(1, column.size)),),
            dtype=column.dtype,
            compressors=[ZstdCodec(level=3)],
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        if column.size:
            array[:] = column
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(members):
                info = zipfile.ZipInfo(name, _STAMP)
                info.create_system = 3  # Unix, also when written elsewhere
                info.external_attr = 0o644 << 16
                archive.writestr(info, members[name].to_bytes())
        return os.stat(path).st_size
    except OSError as error:
        raise StorageError(f"{path}: cannot write shard: {error}; free space or fix permissions, then rerun") from error


def _frame_size(head: bytes) -> int | None:
    """Decoded size that a zstd frame declares (RFC 8878, section 3.1.1); None when it declares none."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = head[4]
    single, kind = flags >> 5 & 1, flags >> 6
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    size = (single, 2, 4, 8)[kind]
    if size == 0 or len(head) < at + size:
        return None
    return int.from_bytes(head[at : at + size], "little") + (256 if kind == 1 else 0)


class _Checked:
    """The members of one zip, compared with what the writer of these columns makes."""

    def __init__(self, path: str, archive: zipfile.ZipFile, dtypes: Mapping[str, str]) -> None:
        self.path, self.archive, self.dtypes = path, archive, dtypes
        self.size = os.stat(path).st_size
        self.shapes: dict[str, tuple[int, int]] = {}
        self.codec = Zstd()
        self.members: dict[str, zipfile.ZipInfo] = {}

    def refuse(self, member: str, why: str) -> IntegrityError:
        return IntegrityError(f"{self.path}: member {member!r}: {why}; fetch or make this shard again")

    def check_zip(self) -> None:
        infos = self.archive.infolist()
        if len(infos) > MAX_MEMBERS:
            raise self.refuse("*", f"{len(infos)} members, at most {MAX_MEMBERS}")
        for info in infos:
            name = info.filename
            if name in self.members:
                raise self.refuse(name, "appears twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                raise self.refuse(name, "is compressed or encrypted by the zip, only stored members are allowed")
            self.members[name] = info
        self.check_layout(infos)

    def check_layout(self, infos: list[zipfile.ZipInfo]) -> None:
        """Every byte of the file belongs to one member or to the directory: no overlap, no gap, no second story.

        A zip says everything twice, in the directory at its end and before each member; readers differ in which they
        believe, so both must agree.
        """
        file = self.archive.fp
        assert file is not None
        at = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            file.seek(info.header_offset)
            head = file.read(30)
            if info.header_offset != at or len(head) < 30 or head[:4] != b"PK\3\4":
                raise self.refuse(info.filename, f"begins at byte {info.header_offset}, expected {at}: members overlap")
            flags, method = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
            n_name, n_extra = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
            sizes = {int.from_bytes(head[k : k + 4], "little") for k in (18, 22)}
            agree = sizes <= {info.file_size, 0xFFFFFFFF} and file.read(n_name) == info.filename.encode()
            if not agree or flags & ~0x800 or method != zipfile.ZIP_STORED or n_extra > MAX_EXTRA:
                raise self.refuse(info.filename, "its own header and the directory disagree")
            at += 30 + n_name + n_extra + info.file_size
        directory = sum(46 + len(i.filename.encode()) + len(i.extra) + len(i.comment) for i in infos)
        # After the directory its end record, 22 bytes; beyond 4 GiB another 76 in front of it.
        rest = self.size - self.archive.start_dir - directory
        if at != self.archive.start_dir or rest not in (22, 22 + 76):
            raise self.refuse("*", "holds bytes that belong to no member")

    def json(self, name: str) -> dict[str, Any]:
        info = self.members.get(name)
        if info is None:
            raise self.refuse(name, "is missing")
        if info.file_size > MAX_METADATA:
            raise self.refuse(name, f"{info.file_size} bytes of metadata, at most {MAX_METADATA}")
        try:
            value = strict_json.parse(self.archive.read(info))
        except ValueError as error:
            raise self.refuse(name, f"is not JSON ({error})") from error
        if not isinstance(value, dict) or not same(value.get("zarr_format"), 3):
            raise self.refuse(name, "is not Zarr v3 metadata")
        return value

    def array_shape(self, name: str) -> tuple[int, int]:
        """(elements, elements per chunk) of a column whose metadata is of the one allowed kind."""
        member, dtype = f"{name}/zarr.json", self.dtypes[name]
        meta = self.json(member)
        shape, grid = meta.pop("shape", None), meta.pop("chunk_grid", None)
        chunk = None
        if isinstance(grid, dict) and grid.get("name") == "regular" and isinstance(grid.get("configuration"), dict):
            chunk = grid["configuration"].get("chunk_shape")
        sizes = []
        for what, value, low, high in (("shape", shape, 0, MAX_ELEMENTS), ("chunk shape", chunk, 1, MAX_CHUNK)):
            if not (isinstance(value, list) and len(value) == 1 and is_whole(value[0]) and low <= value[0] <= high):
                raise self.refuse(member, f"{what} is {str(value)[:80]}, expected one number in {low}..{high}")
            sizes.append(value[0])
        allowed: dict[str, Sequence[Any]] = {
            "zarr_format": (3,),
            "node_type": ("array",),
            "data_type": (dtype,),
            "fill_value": (0,),
            "chunk_key_encoding": (
                {"name": "default", "configuration": {"separator": "/"}},
                {"name": "default"},
            ),
            "attributes": ({}, None),
            "storage_transformers": ([], None),
            "dimension_names": (None,),
        }
        codecs = meta.pop("codecs", None)
        known = isinstance(codecs, list) and len(codecs) == 2 and same(codecs[0], {"name": "bytes", **_ENDIAN[dtype]})
        if not known or not isinstance(codecs[1], dict) or codecs[1].get("name") != "zstd":
            raise self.refuse(member, f"codecs are {str(codecs)[:120]}, expected bytes, zstd")
        for key in {*meta, *allowed}:
            if key not in allowed or not any(same(meta.get(key), value) for value in allowed[key]):
                raise self.refuse(member, f"{key} is {str(meta.get(key))[:80]}, not what this format writes")
        return sizes[0], sizes[1]

    def check_columns(self) -> None:
        expected = {"zarr.json"}
        decoded = 0
        for name, dtype in self.dtypes.items():
            n, chunk = self.array_shape(name)
            expected.add(f"{name}/zarr.json")
            n_chunks = math.ceil(n / chunk)
            if n_chunks > len(self.members):
                raise self.refuse(
                    f"{name}/zarr.json", f"claims {n_chunks} chunks in a zip of {len(self.members)} members"
                )
            chunk_bytes = chunk * np.dtype(dtype).itemsize
            decoded += n_chunks * chunk_bytes
            for k in range(n_chunks):
                member = f"{name}/c/{k}"
                info = self.members.get(member)
                if info is None:
                    raise self.refuse(member, "is missing (a reader would take it for zeros)")
                with self.archive.open(info) as file:
                    declared = _frame_size(file.read(18))
                if declared != chunk_bytes:
                    raise self.refuse(member, f"zstd frame of {declared} bytes, expected {chunk_bytes}")
                expected.add(member)
            self.shapes[name] = n, chunk
        for member in self.members.keys() - expected:
            raise self.refuse(member[:200], "does not belong to this format")
        if decoded > max(RATIO_FREE, MAX_RATIO * self.size):
            raise self.refuse("*", f"{self.size} bytes would decode to {decoded}, more than {MAX_RATIO} times as much")

    def column(self, name: str) -> NDArray[Any]:
        """A checked column, decoded straight into its place. Raises what zipfile and the codec raise."""
        n, chunk = self.shapes[name]
        out = np.empty(-(-n // chunk) * chunk, np.dtype(self.dtypes[name]).newbyteorder("<"))
        for k in range(len(out) // chunk):
            self.codec.decode(self.archive.read(f"{name}/c/{k}"), out[k * chunk : (k + 1) * chunk])
        return out[:n]


def read_zarr_zip(
    path: str | os.PathLike[str],
    dtypes: Mapping[str, str],
    check_sizes: Callable[[dict[str, int], int], None] = lambda sizes, size: None,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read every column of a zip written by `write_zarr_zip`: (columns, group attributes).

    `dtypes` names exactly the columns to expect, "uint8" or "int64" each. `check_sizes` is told how long they are, and
    the size of the file, before any is decoded; it may raise IntegrityError. Raises IntegrityError, naming file and
    member, for anything a writer would not have made; StorageError when the file cannot be read.
    """
    name = os.fspath(path)
    member = "*"
    try:
        with open_regular(name) as file, zipfile.ZipFile(file) as archive:
            checked = _Checked(name, archive, dtypes)
            checked.check_zip()
            meta = checked.json("zarr.json")
            if meta.get("node_type") != "group" or not isinstance(meta.get("attributes"), dict):
                raise checked.refuse("zarr.json", "is not a group with attributes")
            for key in meta.keys() - {"zarr_format", "node_type", "attributes"}:
                raise checked.refuse("zarr.json", f"key {key!r} is not what this format writes")
            checked.check_columns()
            check_sizes({name: n for name, (n, _) in checked.shapes.items()}, checked.size)
            columns: dict[str, NDArray[Any]] = {}
            for member in dtypes:
                columns[member] = checked.column(member)
    except IntegrityError:
        raise
    except Exception as error:  # zipfile, zarr and numcodecs raise many kinds for broken bytes
        if isinstance(error, NotAFileError):
            raise IntegrityError(f"{name} {error.strerror}; fetch or make this shard again") from error
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: an offset outside the file
            raise StorageError(f"{name}: cannot read shard: {error}; check the path and permissions") from error
        why = str(error) or type(error).__name__
        raise IntegrityError(
            f"{name}: member {member!r}: unreadable ({why}); fetch or make this shard again"
        ) from error
    return columns, meta["attributes"]
