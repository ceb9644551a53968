"""Hostile and damaged shards: each is refused with an IntegrityError that names the file and the member.

Which clause of schemas/SPEC.md each attack breaks stands in CLAUSES.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import numpy as np
import pytest

from bytecache.schemas.arrays import U8
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.shard.reader import read_shard
from tests.support.shard_cases import GOLDEN, golden_values, make

# Each edit takes {member: bytes} of a good shard and returns what the archive should hold instead.

Members = dict[str, bytes]


def _array(members: Members, name: str, **changes: Any) -> Members:
    meta = json.loads(members[f"{name}/zarr.json"]) | changes
    return {**members, f"{name}/zarr.json": json.dumps(meta).encode()}


def _column(members: Members, name: str, change: Callable[[Any], Any], dtype: str = "u1") -> Members:
    values = change(np.frombuffer(numcodecs.Zstd().decode(members[f"{name}/c/0"]), dtype).copy())
    return {**members, f"{name}/c/0": bytes(numcodecs.Zstd(3).encode(values))}


def _without(members: Members, name: str) -> Members:
    return {key: value for key, value in members.items() if key != name}


def _group(members: Members, **changes: Any) -> Members:
    meta = json.loads(members["zarr.json"])
    meta["attributes"] |= changes
    return {**members, "zarr.json": json.dumps(meta).encode()}


def _statistic(members: Members, **changes: Any) -> Members:
    return _group(members, statistics=json.loads(members["zarr.json"])["attributes"]["statistics"] | changes)


def _at(index: int, value: int) -> Callable[[U8], U8]:
    def change(values: U8) -> U8:
        values[index] = value
        return values

    return change


def _flip(index: int, bits: int) -> Callable[[U8], U8]:
    def change(values: U8) -> U8:
        values[index] ^= bits
        return values

    return change


def _or(index: int, bits: int) -> Callable[[U8], U8]:
    def change(values: U8) -> U8:
        values[index] |= bits
        return values

    return change


def _longer(values: U8) -> U8:
    return np.append(values, values[:1])


def _size(members: Members, name: str, more: int) -> dict[str, Any]:
    """Metadata of a column that is `more` elements longer."""
    n = json.loads(members[f"{name}/zarr.json"])["shape"][0] + more
    return {"shape": [n], "chunk_grid": _grid(n)}


def _grid(n: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": [n]}}


def _bomb(members: Members) -> Members:
    """300 MiB of zeros per dense column in a few KiB each."""
    chunk = bytes(numcodecs.Zstd(3).encode(np.zeros(1 << 20, np.uint8)))
    for name in ("text", "mask", "head", "tail_low", "top", "entry"):
        members = _array(members, name, shape=[300 << 20], chunk_grid=_grid(1 << 20))
        members |= {f"{name}/c/{k}": chunk for k in range(300)}
    return members


ATTACKS: dict[str, tuple[Callable[[Members], Members], str]] = {
    "extra member": (lambda m: {**m, "readme.txt": b"hello"}, "readme.txt.*does not belong"),
    "climbing name": (lambda m: {**m, "../evil": b"x"}, r"\.\./evil.*does not belong"),
    "absolute name": (lambda m: {**m, "/etc/evil": b"x"}, "/etc/evil.*does not belong"),
    "extra chunk": (lambda m: {**m, "text/c/1": m["text/c/0"]}, "text/c/1.*does not belong"),
    "missing chunk": (lambda m: _without(m, "tail_low/c/0"), "tail_low/c/0.*missing"),
    "missing column": (lambda m: _without(m, "mask/zarr.json"), "mask/zarr.json.*missing"),
    "missing group": (lambda m: _without(m, "zarr.json"), "zarr.json.*missing"),
    "absurd shape": (lambda m: _array(m, "text", shape=[1 << 60]), "text/zarr.json.*shape"),
    "negative shape": (lambda m: _array(m, "text", shape=[-1]), "text/zarr.json.*shape"),
    "two dimensions": (lambda m: _array(m, "text", shape=[2, 2]), "text/zarr.json.*shape"),
    "many chunks": (lambda m: _array(m, "text", shape=[1 << 33], chunk_grid=_grid(1)), "text/zarr.json.*chunks"),
    "huge chunks": (lambda m: _array(m, "text", chunk_grid=_grid(1 << 40)), "text/zarr.json.*chunk shape"),
    "other codec": (lambda m: _array(m, "text", codecs=[{"name": "bytes"}]), "text/zarr.json.*codecs"),
    "other dtype": (lambda m: _array(m, "text", data_type="int64"), "text/zarr.json.*data_type"),
    "fill value": (lambda m: _array(m, "text", fill_value=7), "text/zarr.json.*fill_value"),
    "unknown key": (lambda m: _array(m, "text", surprise=1), "text/zarr.json.*surprise"),
    "not json": (lambda m: {**m, "text/zarr.json": b"{" * 100_000}, "text/zarr.json.*not JSON"),
    "bomb frame": (
        lambda m: {**m, "text/c/0": bytes(numcodecs.Zstd(3).encode(np.zeros(1 << 26, np.uint8)))},
        "text/c/0.*frame of 67108864",
    ),
    "no frame": (lambda m: {**m, "text/c/0": b"junk" * 9}, "text/c/0.*frame of None"),
    "broken frame": (lambda m: {**m, "text/c/0": m["text/c/0"][:-9]}, "'text'.*unreadable"),
    "bomb of chunks": (_bomb, "would decode to"),
    "other format": (lambda m: _group(m, format="x"), "zarr.json.*reader knows"),
    "other version": (lambda m: _group(m, version=2), "zarr.json.*version 2"),
    "wrong statistics": (lambda m: _group(m, statistics={"n_documents": 5}), "zarr.json.*n_documents"),
    "no figure": (lambda m: _statistic(m, tail_mean=None), "zarr.json.*tail_mean is None"),
    "figure of text": (lambda m: _statistic(m, tail_max="\x1b[31m"), "zarr.json.*tail_max is .*must be a finite"),
    "truth for a figure": (lambda m: _statistic(m, kl_mean=True), "zarr.json.*kl_mean is True"),
    "no attrs": (lambda m: _group(m, attrs=3), "zarr.json.*attrs"),
    "shorter column": (
        lambda m: _array(_column(m, "mask", lambda v: v[:-1]), "mask", shape=[902], chunk_grid=_grid(902)),
        "mask.*902 rows",
    ),
    "count": (lambda m: _column(m, "head", lambda v: (v & 240) + (v & 15) ** 0), "head|count_over|reach 1"),
    "count sum": (lambda m: _column(m, "head", _flip(-1, 2)), "position.*counts do not add up|count_over"),
    "miss sum": (lambda m: _column(m, "head", _flip(-1, 1)), "position.*counts do not add up"),
    "longer overflow": (
        lambda m: _array(_column(m, "gap_over", _longer), "gap_over", **_size(m, "gap_over", 1)),
        "gap_over",
    ),
    "rank beyond": (lambda m: _column(m, "gap_over", lambda v: v * 0 + 240), "position.*ranks run beyond"),
    "huge overflow": (lambda m: _column(m, "gap_over", _at(0, 255)), "gap_over.*255, at most 240"),
    "huge count": (lambda m: _column(m, "count_over", _at(0, 121)), "count_over.*121, at most 120"),
    "tail_low value": (lambda m: _column(m, "tail_low", _at(0, 16)), "tail_low.*16, at most 15"),
    "mask value": (lambda m: _column(m, "mask", _at(0, 2)), "mask"),
    "zero code": (lambda m: _column(m, "entry", _at(0, 0)), "position 0.*code"),
    "too much mass": (lambda m: _column(m, "entry", lambda v: v | 240), "position 0.*reach 1"),
    "all and more": (lambda m: _column(_column(m, "head", _or(0, 240)), "tail_low", _at(0, 15)), "position 0.*reach 1"),
    "step": (lambda m: _group(m, precision={"value_step": 3}), "value_step is 3"),
    "no step": (lambda m: _group(m, precision={}), "value_step is None"),
    "no precision": (lambda m: _group(m, precision=7), "precision"),
    "no root": (lambda m: _column(m, "prior_parent", _at(0, 0), "<i8"), "prior_parent.*tree"),
    "loop": (lambda m: _column(m, "prior_parent", _at(1, 1), "<i8"), "prior_parent.*tree"),
    "parent jump": (lambda m: _column(m, "prior_parent", _at(1, -(1 << 63)), "<i8"), "prior_parent.*tree"),
    "chain": (lambda m: _column(m, "prior_parent", lambda v: np.arange(-1, len(v) - 1), "<i8"), "prior_parent.*bytes"),
    "twins": (lambda m: _column(m, "prior_byte", lambda v: v * 0), "prior_byte.*twice"),
    "weight": (lambda m: _column(m, "prior_code", _at(0, 61)), "prior_code.*at most 60"),
    "few weights": (
        lambda m: _array(_column(m, "prior_code", lambda v: v[:-1]), "prior_code", **_size(m, "prior_code", -1)),
        "prior_code.*expected",
    ),
    "end text": (lambda m: _column(m, "text", _at(300, 65)), "text.*END position"),
    "offset jump": (lambda m: _column(m, "doc_start", _at(1, 1 << 62), "<i8"), "doc_start.*offsets"),
    "offset wrap": (lambda m: _column(m, "doc_start", _at(1, -(1 << 63)), "<i8"), "doc_start.*offsets"),
    "offset equal": (lambda m: _column(m, "doc_start", _at(1, 0), "<i8"), "doc_start.*grow"),
    "id offsets": (lambda m: _column(m, "doc_id_start", _at(1, 14), "<i8"), "doc_id_start.*grow"),
    "id not utf-8": (lambda m: _column(m, "doc_id", _at(0, 0xFF)), "doc_id.*UTF-8"),
}


CLAUSES: dict[str, tuple[str, ...]] = {
    "SPEC 1.2": ("end text",),
    "SPEC 2.1": ("extra member", "climbing name", "absolute name", "extra chunk", "missing column", "missing group"),
    "SPEC 2.3": ("two dimensions", "other codec", "other dtype", "fill value", "unknown key", "negative shape"),
    "SPEC 2.4": ("missing chunk",),
    "SPEC 2.5": ("not json", "no attrs", "step", "no step", "no precision"),
    "SPEC 2.6": (
        "shorter column", "count", "count sum", "miss sum", "longer overflow", "huge overflow", "huge count",
        "tail_low value", "mask value", "few weights", "offset jump", "offset wrap", "offset equal", "id offsets",
        "id not utf-8",
    ),
    "SPEC 2.7": ("wrong statistics", "no figure", "figure of text", "truth for a figure"),
    "SPEC 3.1": ("no root", "loop", "parent jump", "chain", "twins"),
    "SPEC 3.3": ("weight",),
    "SPEC 4.1": ("zero code",),
    "SPEC 4.2": ("too much mass",),
    "SPEC 4.3": ("rank beyond",),
    "SPEC 4.4": ("all and more",),
    "SPEC 9.2": (
        "absurd shape", "many chunks", "huge chunks", "bomb frame", "no frame", "broken frame", "bomb of chunks",
    ),
    "SPEC 10.1": ("other format", "other version"),
}  # fmt: skip
"""Clauses of the specification, and the attacks that break them; 9.4 asks for all of the middle."""


def test_every_attack_breaks_a_clause() -> None:
    cited = [attack for attacks in CLAUSES.values() for attack in attacks]
    assert sorted(cited) == sorted(ATTACKS)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_archives_are_refused_by_name(attack: str, tmp_path: Path) -> None:
    good, _ = make(tmp_path / "good.zarr.zip")
    read_shard(good)
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit, words = ATTACKS[attack]
    bad = tmp_path / "bad.zarr.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        for name, data in edit(members).items():
            archive.writestr(name, data)
    with pytest.raises(IntegrityError, match=f"bad.zarr.zip.*{words}"):
        read_shard(bad)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicated_deflated_and_truncated_zips_are_refused(tmp_path: Path) -> None:
    """SPEC 2.2."""
    good, _ = make(tmp_path / "good.zarr.zip")
    data = good.read_bytes()
    bad = tmp_path / "bad.zarr.zip"
    bad.write_bytes(data)
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr("zarr.json", b"{}")
    with pytest.raises(IntegrityError, match="appears twice"):
        read_shard(bad)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    with pytest.raises(IntegrityError, match="only stored"):
        read_shard(bad)
    for keep in (0, 1, 100, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:keep])
        with pytest.raises(IntegrityError, match=r"bad\.zarr\.zip"):
            read_shard(bad)


def test_no_single_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    """The file's hash is the manifest's business; without it, CRC and structure must still catch or not matter."""
    expected = golden_values(read_shard(GOLDEN))
    data = GOLDEN.read_bytes()
    path = tmp_path / "flipped.zarr.zip"
    refused = 0
    offsets = range(0, len(data), 61)
    for at in offsets:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            assert golden_values(read_shard(path)) == expected
        except IntegrityError:
            refused += 1
    assert refused > 0.75 * len(offsets)
