"""No number of a file is a truth value, a number with a fraction or a text: every one that readers take is tried.

The cases are made of the documents themselves: each whole number in each is replaced in turn, whatever it is called.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import describe_shard, read_dataset, seal, write_dataset
from bytecache.schemas.dump.parquet import read_meta
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.schemas.shard.reader import read_shard
from bytecache.schemas.whole import is_number, is_whole, same
from tests.support.other_numbers import cases, is_refused, others
from tests.support.places import GOLDEN_FILES
from tests.support.shard_cases import GOLDEN


def test_what_is_whole() -> None:
    assert is_whole(3) and is_whole(0, 0) and not is_whole(-1, 0)
    assert not any(is_whole(value) for value in (True, False, 1.0, "1", None, [1], np.int64(1)))
    assert is_number(1) and is_number(1.5) and not is_number(True) and not is_number("1")
    assert same(1, 1) and same({"a": [1]}, {"a": [1]}) and same([], []) and same(None, None)
    assert not any(same(value, 1) for value in (True, 1.0, "1"))
    assert not same({"a": [True]}, {"a": [1]}) and not same({"a": 1.0}, {"a": 1}) and not same(0, False)


def test_a_shard(tmp_path: Path) -> None:
    with zipfile.ZipFile(GOLDEN) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path, tried = tmp_path / "x.zarr.zip", 0
    for name in [name for name in members if name.endswith("zarr.json")]:
        for at, other, document in cases(json.loads(members[name]), free=("attrs", "level", "tail_step")):
            tried += 1
            with zipfile.ZipFile(path, "w") as archive:
                for member, raw in members.items():
                    archive.writestr(member, json.dumps(document).encode() if member == name else raw)
            assert is_refused(read_shard, path), f"{name}: {at} = {other!r}"
    assert tried > 100


def test_an_index(tmp_path: Path) -> None:
    builder = ShardBuilder()
    builder.append(np.zeros(1, np.uint8), np.full((2, 257), 1 / 257, np.float32), np.zeros(2, np.float32))
    builder.end_document("one")
    path = tmp_path / "train-0.zarr.zip"
    missing = [{"unit": 1, "n_documents": 1, "n_bytes": 1, "reason": "x"}]
    info = {"edition": {"number": 1, "parent": ""}, "creation": {"missing": missing}}
    write_dataset(tmp_path, [describe_shard(path, "train", "k", builder.write(path, {}))], info)
    file = tmp_path / "dataset.json"
    original = json.loads(file.read_bytes())
    assert len(read_dataset(tmp_path).entries) == 1
    tried = 0
    for at, other, document in cases(original):
        tried += 1
        file.write_bytes(seal(document))
        assert is_refused(read_dataset, tmp_path), f"{at} = {other!r}"
    assert tried > 20


def test_a_dump_and_an_identity(tmp_path: Path) -> None:
    table = pq.read_table(GOLDEN_FILES / "golden-dump-3.parquet")
    key = next(name for name in table.schema.metadata if b"bytecache" in name)
    meta = json.loads(table.schema.metadata[key])
    path = tmp_path / "x.parquet"
    for other in [*others(meta["version"]), True]:
        pq.write_table(table.replace_schema_metadata({key: json.dumps(meta | {"version": other}).encode()}), path)
        with pytest.raises(IntegrityError):
            read_meta(path)
    whole = {"format": ["bytecache.dump", 1], "effort": 1, "windows": [1, 1]}
    assert TeacherIdentity.of(whole, "it").effort == 1
    for at, other, document in cases(whole):
        assert is_refused(TeacherIdentity.of, document, "it"), f"{at} = {other!r}"


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(st).values() if isinstance(kind, type) and issubclass(kind, st.Section)]
)
def test_a_setting(kind: type[st.Section]) -> None:
    for name, field in kind.model_fields.items():
        if field.annotation in (int, float):
            for value in (True, False):
                assert is_refused(kind.model_validate, {name: value}), f"{name} = {value}"
