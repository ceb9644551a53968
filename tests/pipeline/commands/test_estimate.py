"""Predictions: exact where they must be, honest intervals, budgets kept; a real pilot beside the run it foretells."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.pipeline.commands.estimate.budget import Budget, Kept, Variant, candidates, within_budget
from bytecache.pipeline.commands.estimate.estimate import choose_units, meaning_of, presets, settings_of, with_preset
from bytecache.pipeline.commands.estimate.prediction import Predicted, ratio_total
from bytecache.pipeline.commands.estimate.traffic import Amounts, both_modes, traffic_lines
from bytecache.pipeline.stores import LocalStore
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Convert, Settings, Teacher
from tests.support.tiny_models import make_checkpoint


@given(st.lists(st.floats(1, 1e6), min_size=2, max_size=30), st.floats(0.01, 100), st.data())
def test_proportional_quantities_are_predicted_exactly(sizes: list[float], rate: float, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, len(sizes)))
    found = ratio_total(sizes[:n], [rate * size for size in sizes[:n]], sizes)
    assert found.value == pytest.approx(rate * sum(sizes))
    assert found.low == pytest.approx(found.value)
    assert found.high == pytest.approx(found.value)


@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(0, 1e3)), min_size=1, max_size=20))
def test_a_pilot_of_everything_is_the_truth(pairs: list[tuple[float, float]]) -> None:
    sizes, values = zip(*pairs, strict=True)
    truth = sum(values)
    assert ratio_total(sizes, values, sizes) == Predicted(*[pytest.approx(truth)] * 3)


def test_one_unit_gives_no_interval() -> None:
    assert ratio_total([10], [30], [10, 10, 20]) == Predicted(120.0, 0.0, math.inf)


@pytest.mark.parametrize("n", [3, 6, 15])
@pytest.mark.parametrize("population", [8, 40])
def test_the_interval_holds_the_truth_nine_times_in_ten(n: int, population: int) -> None:
    """Noise about a rate, sizes that vary; a little on the safe side."""
    generator = np.random.default_rng(n)
    held = 0
    for _ in range(600):
        sizes = generator.uniform(20, 100, population)
        values = sizes * generator.normal(3, 0.4, population)
        at = generator.choice(population, min(n, population - 1), replace=False)
        found = ratio_total(sizes[at], values[at], sizes)
        held += found.low <= values.sum() <= found.high
    assert 0.86 < held / 600 < 0.98


@given(st.integers(1, 50), st.integers(1, 500))
def test_units_are_spread_over_the_plan(count: int, total: int) -> None:
    chosen = choose_units(count, total)
    assert len(set(chosen)) == len(chosen) == min(count, total)
    assert all(0 <= index < total for index in chosen)
    if count < total:
        assert max(np.diff([-1, *chosen, total])) <= total / count + 1


def test_presets_replace_what_they_decide() -> None:
    assert presets(Teacher)[0] == "fast"
    tuned = Teacher(tau=0.5, depth=1, top_k=3)
    assert with_preset(tuned, "") == tuned
    assert with_preset(tuned, "exact") == Teacher(preset="exact", top_k=3)

    assert presets(Convert) == ["small", "default", "precise"]
    assert with_preset(Convert(prune=0.01, shard_bytes=5000), "small") == Convert(precision="small", shard_bytes=5000)


GB = 1e9


def about(value: float) -> Predicted:
    return Predicted(value, value / 2, value * 2)


def variant(teacher: str, convert: str, ratio: float, dollars: float, gigabytes: dict[int, float]) -> Variant:
    """`gigabytes`: of the dump, by top_k; shards have none. A GB costs a dollar."""
    nothing = Predicted(1.0, 1.0, 1.0)
    kept = {k: Kept(about(size * GB), about(size * GB), about(dollars + size)) for k, size in gigabytes.items()}
    return Variant(
        teacher, convert, nothing, nothing, nothing, nothing, nothing, nothing,
        shard_ratio=Predicted(ratio, ratio - 1, ratio + 1), dollars=about(dollars + gigabytes[16]), by_top_k=kept,
    )  # fmt: skip


FOUND = [
    variant(teacher, convert, ratio, dollars, {16: dump, 8: dump - 1, 4: dump - 2})
    for teacher, dollars, dump in (("fast", 5.0, 5.0), ("exact", 19.0, 6.0))
    for convert, ratio in (("small", 3.0), ("precise", 9.0))
]


def test_what_a_store_is_asked_for_follows_from_the_amounts() -> None:
    """Both ways, by their formulas: the dump is written, read once and kept meanwhile, or never there."""
    amounts = Amounts(text_bytes=1000, units=10, shards=2, hours=1.0, heartbeat_s=20.0)
    dump, targets = Predicted(30_000.0, 20_000.0, 40_000.0), Predicted(4_000.0, 3_000.0, 5_000.0)
    by_dump, straight = both_modes(amounts, dump, targets)
    assert by_dump.peak_bytes == Predicted(35_000.0, 24_000.0, 46_000.0)
    assert by_dump.network_bytes == Predicted(65_000.0, 44_000.0, 86_000.0)
    assert straight.peak_bytes == straight.network_bytes == Predicted(5_000.0, 4_000.0, 6_000.0)
    assert by_dump.requests == 12 * 16 + 20 + 180 and straight.requests == 2 * 16 + 10 + 180
    lines = traffic_lines((by_dump, straight), 1000, "targets")
    assert "(as configured)" not in lines[0] and "(as configured)" in lines[1]
    assert "35.0 and 65.0 bytes per byte" in lines[0] and "5.0 and 5.0 bytes per byte" in lines[1]


def test_budgets_choose_the_most_precise_that_keeps_them() -> None:
    settings = Settings()

    def chosen(**limits: float) -> tuple[int, int]:
        choice = within_budget(FOUND, Budget(**limits), settings)
        return FOUND.index(choice.variant), choice.top_k

    assert chosen() == (3, 16)
    assert chosen(ratio=4.0) == (2, 16)
    assert chosen(dollars=40.0) == (1, 16)  # the upper bound of the exact ones is 50, or 46 with the least top k
    assert chosen(dollars=46.0) == (3, 4)
    assert chosen(ratio=4.0, dollars=49.0) == (2, 8)
    assert chosen(gigabytes=10.5) == (3, 8)
    assert chosen(gigabytes=6.0) == (1, 4)
    with pytest.raises(ConfigError, match=r"up to 4\.00 bytes per text byte, the cheapest up to \$16\.00; raise"):
        within_budget(FOUND, Budget(ratio=3.5), settings)
    with pytest.raises(ConfigError, match=r"at least 6 GB are kept; raise"):
        within_budget(FOUND, Budget(gigabytes=5), settings)


def test_the_choice_of_top_k_is_explained() -> None:
    settings = Settings()
    choice = within_budget(FOUND, Budget(gigabytes=10.5), settings)
    options = "--set teacher.preset=exact --set convert.precision=precise"
    assert settings_of(choice, settings) == f"{options} --set teacher.top_k=8"
    assert "top_k 8, with 16, dump and shards take up to 12 GB" in meaning_of(choice, settings)
    choice = within_budget(FOUND, Budget(dollars=46.0, gb_price=1.0), settings)
    assert "top_k 4, with 8, all costs up to $48.00" in meaning_of(choice, settings)
    choice = within_budget(FOUND, Budget(ratio=4.0), settings)
    assert settings_of(choice, settings) == "--set teacher.preset=exact --set convert.precision=small"
    assert "top_k 16, as configured: it makes the dump larger" in meaning_of(choice, settings)


def test_top_k_is_weighed_where_its_bytes_matter_and_nobody_reads_it() -> None:
    tight = Budget(gigabytes=1.0)
    assert candidates(Settings(), tight) == [16, 8, 4, 2, 1, 0]
    assert candidates(Settings.model_validate({"teacher": {"top_k": 0}}), tight) == [0]
    assert candidates(Settings.model_validate({"teacher": {"top_k": 5}}), tight) == [5, 2, 1, 0]
    assert candidates(Settings(), Budget(dollars=1.0, gb_price=0.1)) == [16, 8, 4, 2, 1, 0]
    for unchanged in (Budget(ratio=3.0), Budget(dollars=40.0), Budget(gb_price=1.0)):
        assert candidates(Settings(), unchanged) == [16]
    for reader in ({"train": {"head": "uld"}}, {"convert": {"delete_dump": True}}):
        assert candidates(Settings.model_validate(reader), tight) == [16]


TEXTS = [f"{i}: " + "the student reads the notes as often as it likes, " * (1 + i % 3) for i in range(80)]


def bytecache_on(folder: Path, *settings: str) -> Callable[..., str]:
    """A corpus and a tiny teacher in `folder`; the command line with settings for them, which returns its output."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    make_checkpoint(folder / "teacher")
    common = [
        f"corpus.source={folder / 'corpus.jsonl'}", f"teacher.model={folder / 'teacher'}", f"run.dir={folder / 'run'}",
        "teacher.backend=hf", "teacher.context=128", "teacher.overlap=32", *settings,
    ]  # fmt: skip
    options = [part for setting in common for part in ("--set", setting)]

    def bytecache(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == code, result.output
        return result.stdout

    return bytecache


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_pilot_beside_the_run_it_foretells(tmp_path: Path) -> None:
    bytecache = bytecache_on(tmp_path, "corpus.unit_bytes=1000", "teacher.sample_tokens=0", "convert.shard_bytes=4000")
    report = json.loads(bytecache("estimate", "--units", "4", "--json", "--price", "2"))
    store = LocalStore(tmp_path / "run")
    assert len(list(store.list("receipts/teacher"))) == 4 < report["units"]
    (found,) = report["variants"]
    hours = found["teacher_hours"]["value"]
    assert found["dollars"]["value"] == pytest.approx(2 * hours)
    everything = bytecache("estimate", "--units", "2", "--max-ratio", "1000", "--max-dollars", "5", "--price", "1")
    assert "within the budget: --set teacher.preset=exact --set convert.precision=precise" in everything
    assert "tau 0.0015, depth 2" in everything
    assert "top_k 16, as configured" in everything
    assert len(list(store.list("receipts/teacher"))) == 4  # other presets leave nothing
    bytecache("estimate", "--units", "2", "--max-ratio", "0.001", code=2)
    bytecache("teacher")
    bytecache("convert")
    made = [json.loads(store.read_bytes(key)) for key in store.list("receipts/teacher")]
    shards = [json.loads(store.read_bytes(key)) for key in store.list("receipts/convert")]
    truth = {
        "tokens": sum(receipt["counts"]["tokens"] for receipt in made),
        "dump_bytes": sum(receipt["files"][0]["size"] for receipt in made),
        "shard_bytes": sum(receipt["files"][0]["size"] for receipt in shards),
    }
    for name, value in truth.items():
        assert found[name]["value"] == pytest.approx(value, rel=0.15), name
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_the_chosen_presets_keeps_the_budget(tmp_path: Path) -> None:
    bytecache = bytecache_on(tmp_path, "corpus.unit_bytes=1000", "teacher.sample_tokens=0")
    every = json.loads(bytecache("estimate", "--units", "6", "--presets", "--json"))["variants"]
    ratios = {(one["teacher"], one["convert"]): one["shard_ratio"] for one in every}
    assert ratios["exact", "small"]["value"] < ratios["exact", "precise"]["value"]
    budget = ratios["exact", "small"]["high"] * 1.05
    chosen = json.loads(bytecache("estimate", "--units", "6", "--json", "--max-ratio", str(budget)))
    options = chosen["chosen"].split()
    assert "convert.precision=precise" not in options
    assert "teacher.preset=exact" in options
    bytecache("teacher", *options)
    bytecache("convert", *options)
    store = LocalStore(tmp_path / "run")
    shards = [json.loads(store.read_bytes(key)) for key in store.list("receipts/convert")]
    assert sum(shard["files"][0]["size"] for shard in shards) <= budget * chosen["text_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_the_chosen_top_k_keeps_the_gigabytes(tmp_path: Path) -> None:
    """Sizes with each k are those that a dump with it has."""
    # Another k is another key, and so another stretch for the certificate: a good part of units as small as these.
    bytecache = bytecache_on(tmp_path, "corpus.unit_bytes=2000", "teacher.sample_tokens=0")
    every = json.loads(bytecache("estimate", "--units", "99", "--max-gb", "1", "--json"))
    most = every["variants"][-1]
    assert every["meaning"].endswith("top_k 16, as configured: it keeps the budget")
    sizes = {int(k): kept["kept_bytes"]["high"] for k, kept in most["by_top_k"].items()}
    assert list(sizes) == [16, 8, 4, 2, 1, 0] and sorted(sizes.values(), reverse=True) == list(sizes.values())
    limit = (sizes[4] + sizes[8]) / 2 / 1e9
    found = json.loads(bytecache("estimate", "--units", "99", "--max-gb", str(limit), "--json"))
    options = found["chosen"].split()
    assert options[-1] == "teacher.top_k=4"
    cut = tmp_path / "cut"
    bytecache("plan", "--run-dir", str(cut))
    bytecache("teacher", "--run-dir", str(cut), *options)
    bytecache("convert", "--run-dir", str(cut), *options)
    store = LocalStore(cut)
    receipts = [
        json.loads(store.read_bytes(key)) for stage in ("teacher", "convert") for key in store.list(f"receipts/{stage}")
    ]
    made = sum(receipt["files"][0]["size"] for receipt in receipts)
    assert made <= limit * 1e9
    assert made == pytest.approx(sizes[4], rel=0.02)
