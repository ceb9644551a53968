"""Hostile and damaged files, by the thousand: a refusal of ours, or the very same content; never a crash, never else.

Bytes are flipped, cut, doubled, moved and overwritten; then, harder, the parts inside are changed and everything
around them (CRC, sizes, hashes) is made to fit again, which is what an attacker would do. BYTECACHE_FUZZ=20000 tries
that many, at random.
"""

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bytecache.schemas import strict_json
from bytecache.schemas.dataset import index as manifest
from bytecache.schemas.dataset.index import read_dataset, seal
from bytecache.schemas.dataset.verification import verify_dataset
from bytecache.schemas.dump import version2
from bytecache.schemas.dump.parquet import DumpWriter, read_meta, read_windows
from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import BytecacheError, IntegrityError
from bytecache.schemas.files import file_sha256
from bytecache.schemas.shard.reader import read_shard
from tests.support.shard_cases import GOLDEN, golden_values, make
from tests.support.student_data import make_dataset

FEW = settings(
    max_examples=int(os.environ.get("BYTECACHE_FUZZ", "150")), deadline=None, database=None,
    derandomize="BYTECACHE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def named(error: BytecacheError, file: str) -> None:
    assert file in str(error)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a file's bytes; offsets are shares of its length, so that they fit any file."""
    kind = draw(st.sampled_from(("flip", "cut", "insert", "overwrite", "double", "swap", "number")))
    at, other = draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))
    length = draw(st.integers(1, 64))
    blob = draw(st.binary(min_size=1, max_size=16))
    number = draw(st.sampled_from((0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40)))

    def apply(data: bytes) -> bytes:
        i, j = int(at * len(data)), int(other * len(data))
        if kind == "flip":
            return data[:i] + bytes([data[i] ^ 1 << length % 8]) + data[i + 1 :]
        if kind == "cut":
            return data[:i] + data[i + length :]
        if kind == "insert":
            return data[:i] + blob + data[i:]
        if kind == "overwrite":
            return data[:i] + blob + data[i + len(blob) :]
        if kind == "double":
            return data[: i + length] + data[i:]
        if kind == "swap":
            a, b = sorted((i, j))
            return data[:a] + data[b : b + length] + data[a + length : b] + data[a : a + length] + data[b + length :]
        raw = struct.pack("<Q", number)[:draw_width]
        return data[:i] + raw + data[i + len(raw) :]

    draw_width = draw(st.sampled_from((1, 2, 4, 8)))
    return apply


@FEW
@given(changes=st.lists(damage(), min_size=1, max_size=3))
def test_a_damaged_shard_is_refused_or_reads_the_same(changes: list[Callable[[bytes], bytes]], tmp_path: Path) -> None:
    data = GOLDEN.read_bytes()
    for change in changes:
        data = change(data)
    path = tmp_path / "fuzzed.zarr.zip"
    path.write_bytes(data)
    try:
        found = golden_values(read_shard(path))
    except BytecacheError as error:
        named(error, "fuzzed.zarr.zip")
    else:
        assert found == golden_values(read_shard(GOLDEN))


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path, _ = make(tmp_path_factory.mktemp("members") / "good.zarr.zip")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@FEW
@given(data=st.data())
def test_members_changed_with_fitting_checksums(members: dict[str, bytes], data: st.DataObject, tmp_path: Path) -> None:
    """Whatever is inside, what comes out is a refusal or a shard that keeps every promise of a shard (SPEC 9.4)."""
    edited = dict(members)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(edited)))
        change = data.draw(damage())
        if "/c/" in name and data.draw(st.booleans()):  # inside the compressed chunk
            try:
                edited[name] = bytes(numcodecs.Zstd(3).encode(change(bytes(numcodecs.Zstd().decode(edited[name])))))
            except RuntimeError:
                continue
        else:
            edited[name] = change(edited[name])
    path = tmp_path / "fuzzed.zarr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in edited.items():
            archive.writestr(name, content)
    try:
        shard = read_shard(path)
    except BytecacheError as error:
        named(error, "fuzzed.zarr.zip")
        return
    dense = shard.dense(0, len(shard))
    assert np.isfinite(dense).all() and (dense >= 0).all()
    np.testing.assert_allclose(dense.sum(1, dtype=np.float64) + shard.tail, 1, atol=1e-5)
    assert len(shard.doc_id) == len(shard.doc_start) - 1
    assert all(isinstance(shard.document(i), bytes) for i in range(len(shard.doc_id)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [prefix] + [path for key in keys for path in paths_of(value[key], (*prefix, key))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@FEW
@given(data=st.data())
def test_metadata_changed_as_json(members: dict[str, bytes], data: st.DataObject, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(name for name in members if name.endswith("zarr.json"))))
    meta = json.loads(members[name])
    meta = replaced(meta, data.draw(st.sampled_from(paths_of(meta))), data.draw(JSON))
    path = tmp_path / "fuzzed.zarr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, json.dumps(meta).encode() if member == name else content)
    try:
        shard = read_shard(path)
    except BytecacheError as error:
        named(error, "fuzzed.zarr.zip")
    else:
        assert len(shard) == shard.statistics["n_positions"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("fuzz") / "d", documents=4, sentences=3, per_shard=2)


@FEW
@given(name=st.sampled_from(("manifest.parquet", "dataset.json")), change=damage())
def test_a_damaged_index_is_refused(dataset: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = dataset / name
    whole = path.read_bytes()
    data = change(whole)
    try:
        path.write_bytes(data)
        found = verify_dataset(dataset)
        assert bool(found) == (data != whole)
        if found:
            with pytest.raises(IntegrityError, match=r"manifest\.parquet|dataset\.json"):
                read_dataset(dataset)
    finally:
        path.write_bytes(whole)


@FEW
@given(data=st.data())
def test_an_index_that_was_sealed_again_is_refused_or_sound(dataset: Path, data: st.DataObject) -> None:
    whole = {name: (dataset / name).read_bytes() for name in ("manifest.parquet", "dataset.json")}
    document = json.loads(whole["dataset.json"])
    try:
        if data.draw(st.booleans()):
            table = data.draw(damage())(whole["manifest.parquet"])
            (dataset / "manifest.parquet").write_bytes(table)
            document["manifest"]["sha256"] = hashlib.sha256(table).hexdigest()
        else:
            document = replaced(document, data.draw(st.sampled_from(paths_of(document))), data.draw(JSON))
        try:
            (dataset / "dataset.json").write_bytes(seal(document))
        except (ValueError, AttributeError):
            return
        try:
            found = read_dataset(dataset)
        except BytecacheError:
            return
        assert all("/" not in entry.file and ".." not in entry.file for entry in found.entries)
        assert [entry.sha256 for entry in found.entries] == [
            file_sha256(dataset / entry.file) for entry in found.entries
        ], "what names a shard must still be true"
    finally:
        for name, content in whole.items():
            (dataset / name).write_bytes(content)


def a_window(number: int) -> Window:
    """Twelve bytes, three histories of two levels each, four entries per level, one stop and two tokens per row."""
    rng = np.random.default_rng(number)
    lengths = {"fanout": 6, "entry_byte": 24, "entry_mass": 24, "topk_id": 6, "topk_logp": 6, "row_sampled": 0}
    columns = {name: rng.random(lengths.get(name, 3)).astype(kind) for name, kind in version2.LISTS.items()}
    columns |= {"entry_byte": np.tile(np.arange(97, 101, dtype=np.uint8), 6)}
    columns |= {
        "entry_mass": columns["entry_mass"] / 5,
        "stop_mass": columns["stop_mass"] / 9,
        "end": columns["end"] / 9,
    }
    columns |= {"row_start": np.array([0, 1, 2], np.int32), "row_parent": np.array([-1, 0, 1], np.int32)}
    columns |= {"n_levels": np.full(3, 2, np.int32), "fanout": np.full(6, 4, np.uint16)}
    columns |= {"n_stops": np.ones(3, np.int32), "stop_depth": np.ones(3, np.uint16)}
    text = np.frombuffer(b"a dozen byte", np.uint8)
    return Window(doc_id=f"d{number}", doc_index=number, text=text, score_start=0, is_last=True, **columns)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "part.parquet"
    writer = DumpWriter(path, {"teacher": {"model": "m"}})
    for number in range(3):
        writer.append(a_window(number))
    writer.close()
    return path


@FEW
@given(changes=st.lists(damage(), min_size=1, max_size=2))
def test_a_damaged_dump_part_never_crashes(dump: Path, changes: list[Callable[[bytes], bytes]], tmp_path: Path) -> None:
    """Its receipt's sha256 is what finds a flipped bit; the reader itself must only fail in an orderly way."""
    data = dump.read_bytes()
    for change in changes:
        data = change(data)
    path = tmp_path / "fuzzed.parquet"
    path.write_bytes(data)
    try:
        read_meta(path)
        for window in read_windows(path):
            assert len(window.row_start) == len(window.n_levels)
    except BytecacheError as error:
        named(error, "fuzzed.parquet")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"\xff", "utf-8"),
        (b"9" * 5_000, "beyond 64 bits"),
        (b'{"mean": 1' + b"0" * 400 + b"}", "beyond 64 bits"),
        (b"9223372036854775808", "beyond 64 bits"),
        (b"-9223372036854775809", "beyond 64 bits"),
        (b"1e999", "beyond a float64"),
        (b"-1e999", "beyond a float64"),
        (b"", "Expecting value"),
    ],
)
def test_json_with_two_meanings_is_refused(text: bytes, words: str) -> None:
    """SPEC 7.8."""
    with pytest.raises(ValueError, match=words):
        strict_json.parse(text)


def test_overlapping_and_hidden_members_are_refused(tmp_path: Path) -> None:
    """SPEC 9.1."""
    good = GOLDEN.read_bytes()
    path = tmp_path / "x.zarr.zip"

    def refused(data: bytes, words: str) -> None:
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=words):
            read_shard(path)

    refused(b"#!/bin/sh\n" + good, "expected 0")  # zipfile forgives what comes before
    refused(good + b"trailing", r"belong to no member|unreadable")
    start = good.index(b"PK\1\2")
    # A gap between the last member and the directory.
    end = bytearray(good[start:])
    tail = end.rindex(b"PK\5\6")
    end[tail + 16 : tail + 20] = struct.pack("<I", start + 7)
    refused(good[:start] + b"hidden!" + bytes(end), "belong to no member")
    # Two entries of the directory that share one member's bytes.
    second = good.index(b"PK\1\2", start + 4)
    end = bytearray(good[start:])
    end[second - start + 42 : second - start + 46] = struct.pack("<I", 0)
    refused(good[:start] + bytes(end), "overlap|expected|disagree|unreadable")
    # The member's own header names another file than the directory does.
    at = good.index(b"text/zarr.json")
    refused(good[:at] + b"TEXT" + good[at + 4 :], "disagree")


@pytest.mark.slow
def test_a_manifest_that_would_decompress_to_much_is_refused(dataset: Path, tmp_path: Path) -> None:
    """SPEC 9.3."""
    rows = [read_dataset(dataset).entries[0].model_dump()]
    table = pa.Table.from_pylist(rows, schema=manifest._SCHEMA).take(pa.array(np.zeros(5_000_000, np.int32)))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    data = sink.getvalue().to_pybytes()
    assert len(data) < 1 << 20
    document = json.loads((dataset / "dataset.json").read_text())
    document["manifest"]["sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / "manifest.parquet").write_bytes(data)
    (tmp_path / "dataset.json").write_bytes(seal(document))
    with pytest.raises(IntegrityError, match="5000000 rows"):
        read_dataset(tmp_path)
