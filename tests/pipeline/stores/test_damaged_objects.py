"""Objects whose bytes are not those that were stored: damage that is told apart from an outage, by few reads."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import obstore
import pytest

from bytecache.pipeline.commands import verify
from bytecache.pipeline.plan.make import make_plan
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.stores.objects import ObjectStore
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.settings import Settings
from tests.support.student_data import make_dataset

MOST = 12
"""Reads of one object by a whole `verify`: it is looked at for its receipt and for what it is part of."""


def filled(folder: Path) -> ObjectStore:
    """A bucket with a small run: plan, receipts and a data set."""
    texts = [f"document {number}, " * 30 for number in range(40)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    local = LocalStore(folder / "run")
    make_plan(local, Settings.model_validate({"corpus": {"source": str(corpus), "unit_bytes": 1000}}))
    make_dataset(folder / "run" / "targets", documents=6, per_shard=2)
    store = ObjectStore("memory:///", folder / "scratch", patience=1000.0)
    for key in local.list(""):
        store.replace(key, store.write_temp("x", local.read_bytes(key)))
    return store


def counted(monkeypatch: pytest.MonkeyPatch, *, changing: bool = False) -> Counter[str]:
    """Reads of bytes, by key; `changing`: no read gives the bytes of another one."""
    real, reads = obstore.get, Counter[str]()

    class Changing:
        def __init__(self, result: Any) -> None:
            self.meta, self.attributes, self._length = result.meta, result.attributes, result.meta["size"]

        def stream(self, min_chunk_size: int) -> Any:
            yield os.urandom(self._length)

    def get(backend: Any, key: str, *, options: Any = None) -> Any:
        result = real(backend, key, options=options)
        if options and options.get("head"):
            return result
        reads[key] += 1
        assert reads[key] <= 3 * MOST, "it goes on for ever"
        return Changing(result) if changing else result

    monkeypatch.setattr(obstore, "get", get)
    return reads


def damage(store: ObjectStore) -> list[str]:
    """Other bytes under the old records, everywhere."""
    keys = list(store.list(""))
    for key in keys:
        result = obstore.get(store._bucket.backend, key)
        raw = bytes(result.bytes())
        altered = raw[:-1] + bytes([raw[-1] ^ 1])
        obstore.put(store._bucket.backend, key, altered, attributes=result.attributes, use_multipart=False)
    return keys


def test_a_store_where_nothing_is_as_it_was_is_verified_by_some_reads_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)
    assert all("its receipt is missing" in line for line in verify.verify(store)[0]), "the set was put there by hand"
    keys = damage(store)
    reads = counted(monkeypatch)
    problems = "\n".join(verify.verify(store)[0])
    assert max(reads.values()) <= MOST
    for key in keys:
        if not key.startswith("plan/"):  # the plan's own files are told by its damaged index and receipts
            assert key in problems, key


def test_bytes_that_are_never_the_same_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    monkeypatch.setattr("bytecache.schemas.patience.LONGEST_PAUSE", 0.01)
    key = next(iter(store.list("plan/slices")))
    reads = counted(monkeypatch, changing=True)
    for look in (store.get_path, store.read_bytes):
        with pytest.raises(IntegrityError, match="delete the object"):
            look(key)
    assert store.sha256(key, deep=True) != store.sha256(key)
    assert reads[key] < 3 * MOST
