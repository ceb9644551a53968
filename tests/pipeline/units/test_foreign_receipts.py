"""A receipt that seals itself may still be a stranger's (`merge`): what readers take has its kind, or it is damaged."""

from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import FileRecord, Receipt, read_receipt, receipt_path, unit_key
from bytecache.schemas.errors import IntegrityError

KEY = unit_key("fake", {"a": 1})


def sealed(store: LocalStore, **changes: Any) -> None:
    """Put a receipt in place whose own hash fits, whatever it says."""
    document = Receipt(
        stage="fake", key=KEY, name="x", files=(FileRecord(path="fake/x", size=1, sha256="0" * 64),), inputs={"a": 1}
    ).model_dump(mode="json")
    document |= changes
    document["sha256"] = receipts._seal(document)
    place = store.root / receipt_path("fake", KEY)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(receipts.json_bytes(document))


def record(path: str) -> dict[str, Any]:
    return {"path": path, "size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": [record("../outside")]},
        {"files": [record("/etc/passwd")]},
        {"files": [record("fake/x")], "beside": [record("a/../../b")]},
        {"counts": {"set_aside": [1]}},
        {"counts": {"set_aside": {"normaliser": "many"}}},
        {"counts": {"teacher": {"set_aside": 3}}},
        {"counts": {"teacher": [1]}},
        {"counts": {"bytes": {"a": 1}}},
        {"counts": {"tokens": "x"}},
        {"counts": {"checkpoint": ["x"]}},
        {"counts": {"reference": "x"}},
    ],
)
def test_what_readers_take_has_its_kind(tmp_path: Path, changes: dict[str, Any]) -> None:
    store = LocalStore(tmp_path)
    sealed(store)
    assert read_receipt(store, "fake", KEY) is not None
    sealed(store, **changes)
    with pytest.raises(IntegrityError, match=r"is damaged \(.*; run `bytecache verify --repair`"):
        read_receipt(store, "fake", KEY)


def test_a_receipt_has_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    sealed(store)
    monkeypatch.setattr(receipts, "MAX_RECEIPT", 100)
    monkeypatch.setattr(LocalStore, "read_bytes", lambda *_: pytest.fail("it was read"))
    with pytest.raises(IntegrityError, match="at most 100 are read"):
        read_receipt(store, "fake", KEY)
