"""The plan: whole documents in order, the same from any source, refused or repaired when it is not what it was."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bytecache.pipeline.plan import make as planning
from bytecache.pipeline.plan.index import PLAN_KEY, load_plan, read_plan
from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units import receipts
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError, Interrupted
from bytecache.schemas.files import file_sha256
from bytecache.schemas.settings import Settings


def corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def settings_of(source: Path, **keys: object) -> Settings:
    run = {"seed": keys.pop("seed", 0)}
    return Settings.model_validate({"run": run, "corpus": {"source": str(source), "unit_bytes": 1000, **keys}})


def hashes(store: LocalStore) -> dict[str, str]:
    return {key: file_sha256(store.get_path(key)) for key in store.list("") if not key.startswith(receipts.FOLDER)}


def test_slices_hold_every_document_once_in_order(tmp_path: Path) -> None:
    texts = [f"{i} " * (1 + i * 7 % 60) for i in range(100)] + ["long " * 1000]
    settings = settings_of(corpus(tmp_path / "c.jsonl", texts), heldout_fraction=0.2)
    store = LocalStore(tmp_path / "run")
    plan, new = planning.make_plan(store, settings)
    assert new
    found: dict[str, list[str]] = {"train": [], "heldout": []}
    for number, unit in enumerate(plan.units):
        table = pq.read_table(store.get_path(unit.slice))
        assert table.schema.names == ["doc_id", "text", "context"]
        rows = table.column("text").to_pylist()
        found[unit.split] += rows
        assert (unit.index, unit.n_docs, unit.n_bytes) == (number, len(rows), sum(len(row.encode()) for row in rows))
        assert unit.n_bytes <= 1000 or unit.n_docs == 1
    assert sorted(found["train"] + found["heldout"]) == sorted(texts)
    assert 5 < len(found["heldout"]) < 40
    for part in found.values():
        assert part == [text for text in texts if text in part]
    assert plan.n_bytes == sum(len(text.encode()) for text in texts)


def test_same_text_gives_the_same_plan_from_any_source(tmp_path: Path) -> None:
    texts = [f"document {i} " * 20 for i in range(30)]
    (tmp_path / "other").mkdir()
    first, second = LocalStore(tmp_path / "one"), LocalStore(tmp_path / "two")
    plan, _ = planning.make_plan(first, settings_of(corpus(tmp_path / "c.jsonl", texts)))
    again, _ = planning.make_plan(second, settings_of(corpus(tmp_path / "other" / "c.jsonl", texts)))
    assert plan.hash == again.hash
    assert hashes(first) == hashes(second)


def test_planning_again_does_nothing(tmp_path: Path) -> None:
    settings = settings_of(corpus(tmp_path / "c.jsonl", ["a" * 500, "b" * 900]))
    store = LocalStore(tmp_path / "run")
    plan, _ = planning.make_plan(store, settings)
    stamps = {key: store.get_path(key).stat().st_mtime_ns for key in store.list("")}
    again, new = planning.make_plan(store, settings)
    assert (again, new) == (plan, False)
    assert stamps == {key: store.get_path(key).stat().st_mtime_ns for key in store.list("")}
    assert load_plan(store, settings) == plan


def test_changed_corpus_or_settings_are_refused_with_what_changed(tmp_path: Path) -> None:
    source = corpus(tmp_path / "c.jsonl", ["a" * 500, "b" * 900])
    store = LocalStore(tmp_path / "run")
    planning.make_plan(store, settings_of(source))
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1.*new run.dir"):
        planning.make_plan(store, settings_of(source, seed=1))
    with pytest.raises(ConfigError, match="unit_bytes: 1000 -> 2000"):
        load_plan(store, settings_of(source, unit_bytes=2000))
    corpus(source, ["a" * 500, "b" * 899 + "c"])
    with pytest.raises(ConfigError, match=r"corpus text: 2 documents, 1400 bytes, sha256 .* -> 2 documents"):
        planning.make_plan(store, settings_of(source))


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_small_corpora_get_both_splits(tmp_path: Path, fraction: float) -> None:
    for texts in (["a", "b"], ["a", "b", "c", "a"], [f"document {i}" for i in range(50)]):
        settings = settings_of(corpus(tmp_path / "c.jsonl", texts), heldout_fraction=fraction)
        store = LocalStore(tmp_path / f"run-{len(texts)}")
        plan, _ = planning.make_plan(store, settings)
        assert {unit.split for unit in plan.units} == {"train", "heldout"}
        sides: dict[str, set[str]] = {"train": set(), "heldout": set()}
        for unit in plan.units:
            sides[unit.split] |= set(pq.read_table(store.get_path(unit.slice)).column("text").to_pylist())
        assert min(map(len, sides.values())) == 1, "one document alone is moved"
        assert sorted(store.list("plan/slices")) == sorted(unit.slice for unit in plan.units)


def test_no_heldout_when_none_is_asked_for_or_possible(tmp_path: Path) -> None:
    plan, _ = planning.make_plan(
        LocalStore(tmp_path / "a"), settings_of(corpus(tmp_path / "c.jsonl", ["a", "b"]), heldout_fraction=0.0)
    )
    assert {unit.split for unit in plan.units} == {"train"}
    for number, texts in enumerate((["a"], ["same", "same"])):  # equal texts are on one side
        for seed in range(6):
            settings = settings_of(corpus(tmp_path / "d.jsonl", texts), heldout_fraction=0.5, seed=seed)
            plan, _ = planning.make_plan(LocalStore(tmp_path / f"{number}-{seed}"), settings)
            assert {unit.split for unit in plan.units} == {"train"}


def test_equal_texts_never_straddle_the_splits(tmp_path: Path) -> None:
    settings = settings_of(corpus(tmp_path / "c.jsonl", [f"text {i % 20}" for i in range(100)]), heldout_fraction=0.4)
    store = LocalStore(tmp_path / "run")
    plan, _ = planning.make_plan(store, settings)
    texts: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for unit in plan.units:
        texts[unit.split] |= set(pq.read_table(store.get_path(unit.slice)).column("text").to_pylist())
    assert texts["heldout"]
    assert not texts["train"] & texts["heldout"]


def test_damaged_slices_and_plans_are_noticed(tmp_path: Path) -> None:
    settings = settings_of(corpus(tmp_path / "c.jsonl", ["a" * 500, "b" * 900]))
    store = LocalStore(tmp_path / "run")
    with pytest.raises(InputError, match="bytecache plan"):
        load_plan(store, settings)
    plan, _ = planning.make_plan(store, settings)
    before = hashes(store)
    path = store.get_path(plan.units[0].slice)
    path.write_bytes(path.read_bytes()[:-5])
    assert planning.make_plan(store, settings) == (plan, False)
    assert hashes(store) == before
    place = store.get_path(PLAN_KEY)
    whole = place.read_text()
    place.write_text(whole.replace('"sizes":[500', '"sizes":[501'))
    with pytest.raises(IntegrityError, match="was edited"):
        read_plan(store)
    place.write_text(whole[:50])
    with pytest.raises(IntegrityError, match="damaged"):
        read_plan(store)


def test_pages_are_read_as_they_are_asked_for_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PAGE", 4)
    texts = [f"document {i} " * 60 for i in range(30)]
    settings = settings_of(corpus(tmp_path / "c.jsonl", texts), heldout_fraction=0.2)
    store = LocalStore(tmp_path / "run")
    planning.make_plan(store, settings)
    plan = load_plan(store, settings)
    assert len(plan.page_keys) == -(-len(plan.sizes) // 4) > 6
    assert sorted(store.list("plan/units")) == sorted(plan.page_keys)
    assert [unit.n_bytes for unit in plan.units] == list(plan.sizes)
    assert [unit.index for unit in plan.units if unit.split == "heldout"] == plan.of_split("heldout")
    assert [unit.index for unit in plan.units if unit.split == "train"] == plan.of_split("train")
    assert plan.units[2:9] == list(plan.units)[2:9]
    with pytest.raises(IndexError):
        plan.units[len(plan.sizes)]
    for key in plan.page_keys[1:]:
        store.delete(key)
    again = load_plan(store, settings)
    assert again.units[3].index == 3  # of the page that is left
    with pytest.raises(IntegrityError, match=r"00001.* missing or altered; run `bytecache plan`"):
        again.units[4]
    assert planning.make_plan(store, settings) == (plan, False)
    assert sorted(store.list("plan/units")) == sorted(plan.page_keys)
    covered = {file.path for _, key in receipts.list_receipts(store, "plan")
               for file in receipts.read_receipt(store, "plan", key).files}  # type: ignore[union-attr]  # fmt: skip
    assert covered == {PLAN_KEY, *plan.page_keys, *(unit.slice for unit in plan.units)}


def test_a_stopped_plan_leaves_no_plan(tmp_path: Path) -> None:
    settings = settings_of(corpus(tmp_path / "c.jsonl", [f"{i}" * 900 for i in range(9)]))
    store = LocalStore(tmp_path / "run")
    calls = iter([False] * 8 + [True])
    with pytest.raises(Interrupted, match="rerun"):
        planning.make_plan(store, settings, lambda: next(calls))
    assert list(store.list("plan/slices"))
    assert read_plan(store) is None
    assert planning.make_plan(store, settings)[1]
