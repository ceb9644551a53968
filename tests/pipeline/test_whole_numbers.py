"""Receipts, the plan and notes of copies: no number in them is a truth value, one with a fraction or a text."""

import json
from pathlib import Path

import pytest

from bytecache.pipeline.plan import index as plan
from bytecache.pipeline.plan.index import PLAN_KEY, Unit, make_index, read_page, read_plan
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.stores.mirror import Mirror
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import FileRecord, Receipt, read_receipt, receipt_path, unit_key
from tests.support.other_numbers import cases, is_refused

KEY = unit_key("fake", {"a": 1})


def test_a_receipt(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = FileRecord(path="fake/x", size=1, sha256="0" * 64)
    counts = {"n_documents": 1, "set_aside": {"x": 1}, "teacher": {"tokens": 1}, "skipped_documents": {"y": 1}}
    whole = Receipt(
        stage="fake", key=KEY, name="x", files=(record,), beside=(record,), inputs={"a": 1}, counts=counts,
        timings={"s": 1.5},
    ).model_dump(mode="json")  # fmt: skip
    place = store.root / receipt_path("fake", KEY)
    place.parent.mkdir(parents=True)

    def put(document: dict[str, object]) -> None:
        place.write_bytes(receipts.json_bytes({**document, "sha256": receipts._seal(document)}))

    put(whole)
    assert read_receipt(store, "fake", KEY) is not None
    for at, other, document in [
        *cases(whole, free=("inputs",)), (("deleted",), 0, whole | {"deleted": 0}),
        (("timings",), True, whole | {"timings": {"s": True}}),
    ]:  # fmt: skip
        if at[-1] in ("n_documents", "tokens") and type(other) is float:
            continue  # a figure, summed as one
        put(document)
        assert is_refused(read_receipt, store, "fake", KEY), f"{at} = {other!r}"


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_a_plan(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    units = [
        Unit(index=n, split="heldout", slice=f"plan/slices/{n}", sha256=f"{n}" * 64, n_docs=1, n_bytes=1)
        for n in (0, 1)
    ]
    raw = plan.page_bytes(units)
    index = make_index(
        {"sha256": "0", "n_documents": 1, "n_bytes": 1},
        {},
        units,
        [plan.hashlib.sha256(raw).hexdigest()],
    )
    (tmp_path / "plan").mkdir()
    place = tmp_path / PLAN_KEY
    place.write_bytes(plan.index_bytes(index))
    assert read_plan(store) is not None
    whole = json.loads(place.read_bytes())
    for at, other, document in cases(whole):
        sealed = plan.Index.model_construct(**document)
        place.write_bytes(receipts.canonical_json(document | {"hash": plan._plan_hash(sealed)}))
        assert is_refused(read_plan, store), f"{at} = {other!r}"
    for at, other, document in cases(json.loads(raw)):
        page = receipts.canonical_json(document) + b"\n"
        sha256 = plan.hashlib.sha256(page).hexdigest()
        (tmp_path / plan.page_key(0, sha256)).parent.mkdir(exist_ok=True)
        (tmp_path / plan.page_key(0, sha256)).write_bytes(page)
        assert is_refused(read_page, store, 0, sha256), f"{at} = {other!r}"


def test_a_note_of_a_copy(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path)
    (tmp_path / "notes").mkdir()
    whole = {"version": "v", "size": 1, "mtime_ns": 1}
    place = tmp_path / "notes" / "key.json"
    place.write_text(json.dumps(whole))
    assert mirror.note("key") is not None
    for at, other, document in cases(whole):
        place.write_text(json.dumps(document))
        assert mirror.note("key") is None, (at, other)
