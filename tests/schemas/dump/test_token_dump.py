"""The token dump: round trip, determinism, coding, and refusal of what is not a whole dump."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas import settings as st
from bytecache.schemas.dump import parquet as token_dump
from bytecache.schemas.dump.packed import Weights
from bytecache.schemas.dump.packing import in_order, pack
from bytecache.schemas.dump.parquet import DumpWriter, as_stored, read_meta, read_windows
from bytecache.schemas.dump.planes import from_planes, to_planes
from bytecache.schemas.dump.shares import step_of
from bytecache.schemas.dump.top_k import top_k_sizes
from bytecache.schemas.dump.window import Window, take_rows
from bytecache.schemas.errors import ConfigError, IntegrityError
from bytecache.stages.convert.convert import convert_units
from bytecache.stages.fidelity.divergence import kl_spread
from bytecache.stages.lattice.lattice import Lattice, Targets
from bytecache.stages.teacher.teacher import open_teacher
from tests.support.histories import histories
from tests.support.places import ROOT

DATA = ROOT / "tests" / "schemas" / "data"


@pytest.fixture(scope="module")
def windows(tiny_checkpoint) -> list[Window]:
    settings = st.Teacher(
        model=str(tiny_checkpoint("bytelevel")), backend="hf", context=64, overlap=20, tau=0.01, depth=2, top_k=3
    )
    teacher = open_teacher(settings)
    texts = ["A cache is a promise kept in advance. " * 5, "The student reads.", ""]
    (group,) = teacher.windows([(f"d{i}", i, teacher.vocabulary.encode(text)) for i, text in enumerate(texts)])
    return group


def write(path: Path, windows: list[Window]) -> Path:
    writer = DumpWriter(path, {"teacher": {"model": "tiny"}})
    for window in windows:
        writer.append(window)
    writer.close()
    return path


def placed(window: Window) -> tuple[dict, dict, dict]:
    """Masses by what they belong to: entries by (history, depth, byte), stops by (history, token), END by history."""
    names = histories(window)
    entries, stops, ends = {}, {}, {}
    level = entry = stop = 0
    for r, name in enumerate(names):
        ends[name, bool(window.row_static[r])] = float(window.end[r])
        for _ in range(window.n_stops[r]):
            key = (name, bool(window.row_static[r]), int(window.stop_token[stop]))
            stops[key] = float(window.stop_mass[stop])
            stop += 1
        for depth in range(window.n_levels[r]):
            for _ in range(window.fanout[level]):
                key = (name, bool(window.row_static[r]), depth, int(window.entry_byte[entry]))
                entries[key] = float(window.entry_mass[entry])
                entry += 1
            level += 1
    return entries, stops, ends


def test_round_trip_keeps_every_history_and_what_it_says(tmp_path, windows):
    """At the finest codes every share is within 2^-15 of its root's place; nothing that another column says is stored.

    TOKEN_DUMP 3, 4 and 5.
    """
    path = write(tmp_path / "a.parquet", windows)
    back = list(read_windows(path))
    assert [w.doc_id for w in back] == [w.doc_id for w in windows]
    for old, new in zip(windows, back, strict=True):
        for name in ("doc_index", "score_start", "is_last", "reference", "doc_position"):
            assert getattr(old, name) == getattr(new, name)
        np.testing.assert_array_equal(old.text, new.text)
        before, after = histories(old), histories(new)
        rows = [after.index(history) for history in before]
        assert sorted(rows) == list(range(len(before)))
        for name in ("row_start", "row_token", "row_depth", "row_static", "n_levels"):
            np.testing.assert_array_equal(getattr(old, name), getattr(new, name)[rows])
        np.testing.assert_allclose(new.row_logp[rows], old.row_logp, atol=0.05)
        for wanted, found in zip(placed(old), placed(new), strict=True):
            assert found.keys() <= wanted.keys()
            assert max((wanted[key] for key in wanted.keys() - found.keys()), default=0.0) <= 1e-6
            assert max((abs(found[key] - wanted[key]) for key in found), default=0) < 1e-3
        exact, kept = Lattice(old).targets(), Lattice(new).targets()
        assert np.abs(exact.probs - kept.probs).max() < 1e-3
        assert kl_spread(exact.probs, exact.tail, kept.probs, kept.tail).mean() < 1e-5
    (lean,) = [w for w in read_windows(path, top_k=False) if w.doc_id == windows[-1].doc_id]
    assert not len(lean.topk_id) and not len(lean.topk_logp)
    np.testing.assert_array_equal(lean.entry_byte, back[-1].entry_byte)
    assert read_meta(path)["teacher"] == {"model": "tiny"}


def test_the_top_k_of_canonical_rows_is_kept(tmp_path, windows):
    """TOKEN_DUMP 7."""
    for old, new in zip(windows, read_windows(write(tmp_path / "a.parquet", windows)), strict=True):
        n = int((old.row_depth == 0).sum())
        np.testing.assert_array_equal(new.topk_id[: 3 * n], old.topk_id[: 3 * n])
        np.testing.assert_allclose(new.topk_logp[: 3 * n], old.topk_logp[: 3 * n], atol=1 / 32)
        assert len(new.topk_id) == 3 * len(new.row_start) and not new.topk_id[3 * n :].any()
    unsorted = replace(windows[0], topk_logp=windows[0].topk_logp[::-1].copy())
    (back,) = read_windows(write(tmp_path / "b.parquet", [unsorted]))
    canonical = unsorted.row_depth == 0
    before = unsorted.topk_logp.reshape(-1, 3)[canonical]
    np.testing.assert_allclose(back.topk_logp.reshape(-1, 3)[: len(before)], before, atol=1 / 32)


def test_coarser_codes_are_fewer_bytes_and_keep_their_promise(tmp_path, windows):
    """TOKEN_DUMP 6."""
    sizes, added = [], []
    for divergence in (1e-2, 1e-3, 1e-4, 1e-5):
        path = tmp_path / "a.parquet"
        writer = DumpWriter(path, {"teacher": {}}, divergence)
        for window in windows:
            writer.append(window, Lattice(window).weights())
        writer.close()
        sizes.append(path.stat().st_size)
        pairs = [(Lattice(a).targets(), Lattice(b).targets()) for a, b in zip(windows, read_windows(path), strict=True)]
        added.append(float(np.concatenate([listed_kl(a, b) for a, b in pairs]).mean()))
        assert added[-1] < 6 * divergence  # a teacher that is nearly uniform is the worst there is
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 2
    assert added == sorted(added, reverse=True)


def listed_kl(exact: Targets, stored: Targets) -> np.ndarray:
    """KL(exact || stored) with what `stored` does not list as one symbol, nats, float64 [m]."""
    listed = stored.probs > 0
    p = np.column_stack([np.where(listed, exact.probs, 0), exact.tail + np.where(listed, 0, exact.probs).sum(1)])
    q = np.column_stack([stored.probs, stored.tail])
    p, q = (x.astype(np.float64) / x.sum(1, keepdims=True) for x in (p, q))
    return np.where(p > 0, p * np.log(np.maximum(p, 1e-30) / np.maximum(q, 1e-12)), 0.0).sum(1)


def test_weights_are_shares_of_the_texts_probability(windows):
    """The cells at a position hold all of it but what is unaccounted for; what gives no target weighs nothing."""
    for window in windows:
        lattice = Lattice(window)
        weights, held = lattice.weights(), lattice._sums.held
        owner = np.repeat(np.arange(len(window.row_start)), window.n_levels)
        first = np.cumsum(window.n_levels) - window.n_levels
        at = window.row_start[owner] + np.arange(len(held)) - first[owner]
        total = np.bincount(at, held, minlength=len(window.text) + 1)[window.score_start :]
        unaccounted = lattice.targets().unaccounted
        np.testing.assert_allclose(total[: len(unaccounted)] + unaccounted, 1.0, atol=1e-4)
        scored = (at >= window.score_start) & ((at < len(window.text)) | window.is_last)
        assert not weights.level[~scored].any() and (weights.level[scored] >= np.minimum(held[scored], 1.0)).all()
        assert weights.level.max() <= 1.0 and lattice.peaks().max() <= 1.0 + 1e-9


def test_light_rows_cost_less_than_heavy_ones(windows):
    """What a row is listed down to follows from its share of the text's probability, not from its own prefix."""
    window, weights, marks = in_order(windows[0], Lattice(windows[0]).weights())
    step = step_of(1e-4)
    counts = []
    for factor in (1.0, 0.1, 0.01):
        lighter = Weights(weights.level * factor, weights.stop * factor)
        packed = pack(window, lighter, marks, step)
        assert len(packed.row_scale) == len(window.row_start) and (packed.stop_rows & 7).sum() == marks.sum()
        counts.append((len(packed.entry_gap), int(packed.entry_code.astype(int).sum())))
    assert counts == sorted(counts, reverse=True) and counts[0][0] > 2 * counts[2][0]


def test_a_reader_of_a_part_finds_what_the_converter_is_handed(tmp_path, windows):
    """`teacher.keep` = "targets" converts the windows that a dump would have given, to the bit."""
    path = tmp_path / "a.parquet"
    writer = DumpWriter(path, {"teacher": {}}, 1e-4)
    for window in windows:
        writer.append(window, Lattice(window).weights())
    writer.close()
    for window, stored in zip(windows, read_windows(path, top_k=False), strict=True):
        handed = as_stored(window, Lattice(window).weights(), 1e-4)
        for name, value in vars(stored).items():
            np.testing.assert_array_equal(getattr(handed, name), value)
    with pytest.raises(IntegrityError, match="inconsistent"):
        as_stored(replace(windows[0], row_depth=windows[0].row_depth + np.uint8(1)), None, 1e-4)


def test_same_windows_same_bytes(tmp_path, windows):
    assert write(tmp_path / "a", windows).read_bytes() == write(tmp_path / "b", windows).read_bytes()


@pytest.mark.parametrize("keep", [0, 10, -1, -9])
def test_truncated_part_is_refused(tmp_path, windows, keep):
    path = write(tmp_path / "a.parquet", windows)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match="rerun `bytecache teacher`"):
        list(read_windows(path))


def test_other_versions_and_other_files_are_refused(tmp_path, windows, monkeypatch):
    """TOKEN_DUMP 1."""
    monkeypatch.setattr(token_dump, "VERSION", 99)
    path = write(tmp_path / "a.parquet", windows)
    monkeypatch.undo()
    with pytest.raises(IntegrityError, match="version 99"):
        read_meta(path)
    with pytest.raises(IntegrityError, match="missing"):
        read_meta(tmp_path / "absent")


def altered(path: Path, name: str, change: Callable[[np.ndarray], Any]) -> Path:
    """The part with the numbers of one column of its first window changed."""
    table = pq.read_table(path)
    column = table.schema.get_field_index(name)
    values = table.column(column).to_pylist()
    if name in token_dump.BLOBS:
        numbers = from_planes(np.frombuffer(values[0], np.uint8), token_dump.BLOBS[name]).copy()
        values[0] = to_planes(np.asarray(change(numbers), numbers.dtype)).tobytes()
    else:
        values[0] = change(values[0])
    field = table.schema.field(column)
    pq.write_table(table.set_column(column, field, pa.array(values, field.type)), path)
    return path


def with_item(at: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(numbers: np.ndarray) -> np.ndarray:
        numbers[at] = value
        return numbers

    return change


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a row too many": ("row_scale", lambda x: np.append(x, x[-1])),
    "a row too few": ("row_levels", lambda x: x[:-1]),
    "no rows": ("row_scale", lambda x: x[:0]),
    "a scale beyond the limit": ("row_scale", with_item(0, 41)),
    "a level too many": ("level_entries", lambda x: np.append(x, x[-1])),
    "levels beyond the text": ("row_levels", with_item(0, 60_000)),
    "a row without levels": ("row_levels", with_item(-1, 0)),
    "entries that are not there": ("level_entries", with_item(0, 300)),
    "stops that are not there": ("level_stops", with_item(1, 250)),
    "an entry that is no byte": ("entry_gap", with_item(0, 255)),
    "a share above one": ("entry_code", with_item(3, 60_000)),
    "two implied shares": ("entry_code", lambda x: x * 0),
    "a rare share too few": ("rare", lambda x: x[:-1]),
    "a rare share too many": ("rare", lambda x: np.append(x, x[-1])),
    "a row from nowhere": ("stop_rows", lambda x: np.append(x[:-1], 2) if not x[-1] else np.append(x[:-1], 0)),
    "a mark of no kind": ("stop_rows", with_item(0, 24)),
    "a chain that breaks": ("stop_rows", lambda x: x * 0),
    "a chain with two ends": ("stop_rows", lambda x: x * 0 + 1),
    "an implied entry that is no byte": ("level_top", with_item(0, 300)),
    "entries behind the last byte": ("entry_gap", lambda x: x * 0 + 255),
    "stops of another number": ("stop_code", lambda x: x[:-1]),
    "a token too few": ("token", lambda x: x[:-1]),
    "a token too many": ("token", lambda x: np.append(x, x[-1])),
    "a spelling that was never listed": ("stop_rows", lambda x: x & 7),
    "a step of no codes": ("step", lambda x: 0),
    "a step beyond the limit": ("step", lambda x: 1 << 30),
    "unlisted mass beyond all": ("level_rest", lambda x: x * 0 + 40_000),
    "END beyond all": ("row_end", with_item(0, 60_000)),
    "control beyond all": ("row_control", with_item(0, 60_000)),
    "a text that is shorter": ("text", lambda x: x[:3]),
    "a top k of another length": ("topk_rank", lambda x: x[:-1]),
    "a top k that lists too few": ("topk_token", lambda x: x[:-1]),
    "a top k that lists too many": ("topk_token", lambda x: np.append(x, x[-1])),
    "a rank that no token has": ("topk_rank", with_item(0, 5)),
    "a window that begins behind its end": ("score_start", lambda x: 1 << 20),
    "a position in an ordinary window": ("doc_position", lambda x: 5),
    "a reference that marks no rows": ("reference", lambda x: True),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_window_that_no_teacher_made_is_refused(tmp_path, windows, what):
    """Counts that add up are not enough: with these the sums would be those of another text, or none.

    TOKEN_DUMP 2, 3, 4 and 5.
    """
    path = altered(write(tmp_path / "a.parquet", windows[:1]), *WRONG[what])
    with pytest.raises(IntegrityError, match=r"a\.parquet: .*inconsistent"):
        list(read_windows(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("entry_mass", np.nan), ("entry_mass", -1e-9), ("stop_mass", 1.5), ("end", np.inf), ("control", np.nan),
        ("row_logp", np.nan), ("row_logp", 5.0), ("row_start", 30_000), ("row_token", 1), ("row_parent", 30_000),
        ("n_levels", 30_000), ("stop_depth", 30_000), ("fanout", 30_000), ("row_depth", 7), ("row_static", 2),
    ],
)  # fmt: skip
def test_a_window_that_no_teacher_made_is_not_written(tmp_path, windows, name, value):
    values = np.array(getattr(windows[0], name))
    values[-1 if np.issubdtype(values.dtype, np.integer) else 3] = value
    with pytest.raises(IntegrityError, match="inconsistent"):
        write(tmp_path / "b.parquet", [replace(windows[0], **{name: values})])


def test_a_level_out_of_order_and_a_row_twice_are_not_written(tmp_path, windows):
    w = windows[0]
    turned = w.entry_byte.copy()
    turned[[0, 1]] = turned[[1, 0]]
    with pytest.raises(IntegrityError, match="do not ascend"):
        write(tmp_path / "a.parquet", [replace(w, entry_byte=turned)])
    branch = int(np.flatnonzero(w.row_depth > 0)[0])
    order = np.append(np.arange(len(w.row_start)), branch)
    twice = take_rows(w, order, w.row_parent[order], w.row_depth[order])
    with pytest.raises(IntegrityError, match="two rows go on from one stop"):
        write(tmp_path / "a.parquet", [twice])


@pytest.mark.parametrize("name", ["doc_id", "score_start", "doc_position", "text", "is_last"])
def test_a_null_is_refused(tmp_path, windows, name):
    """TOKEN_DUMP 2."""
    path = write(tmp_path / "a.parquet", windows[:2])
    table = pq.read_table(path)
    column = table.schema.get_field_index(name)
    kind = table.schema[column].type
    values = pa.array([None, *table.column(column).to_pylist()[1:]], kind)
    pq.write_table(table.set_column(column, pa.field(name, kind), values), path)
    with pytest.raises(IntegrityError, match=rf"a\.parquet: .*nulls in {name}"):
        list(read_windows(path))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"teacher": {', b'"no one": {', "teacher = 'None'"),
        (b'"ends": true', b'"ends": "no"', "ends = 'no'"),
        (b'"kind": "text"', b'"kind": 7', "kind = '7'"),
        (b'"tau": 0.01', b'"tau": NaN', "not a bytecache token dump"),
        (b'"teacher": {', b'"teacher": {}, "teacher": {', "not a bytecache token dump"),
    ],
)
def test_metadata_of_no_dump_are_refused(tmp_path, windows, old, new, words):
    """TOKEN_DUMP 1."""
    path = tmp_path / "a.parquet"
    writer = DumpWriter(path, {"teacher": {"settings": {"tau": 0.01}}, "kind": "text", "ends": True})
    writer.append(windows[0])
    writer.close()
    table = pq.read_table(path)
    meta = table.schema.metadata[b"bytecache"]
    assert old in meta
    pq.write_table(table.replace_schema_metadata({b"bytecache": meta.replace(old, new)}), path)
    with pytest.raises(IntegrityError, match=rf"a\.parquet: .*{words}"):
        convert_units([path], tmp_path / "out", st.Convert(), {}, lambda: False, lambda _: None)


def test_a_dump_that_does_not_say_its_effort_is_not_coarsened(tmp_path, windows):
    path = write(tmp_path / "a.parquet", windows)
    convert_units([path], tmp_path / "out", st.Convert(), {}, lambda: False, lambda _: None)
    with pytest.raises(ConfigError, match="leave them at -1"):
        convert_units([path], tmp_path / "out", st.Convert(tau=0.5), {}, lambda: False, lambda _: None)
    with pytest.raises(ConfigError, match=r"convert\.rate = 1e-09 is below"):
        convert_units([path], tmp_path / "out", st.Convert(rate=1e-9), {}, lambda: False, lambda _: None)


def test_stops_out_of_order_are_refused(tmp_path, windows):
    """TOKEN_DUMP 5."""
    w = windows[0]
    row = int(np.flatnonzero(w.n_stops > 1)[0])
    stops = slice(int(w.n_stops[:row].sum()), int(w.n_stops[: row + 1].sum()))
    assert len(set(w.stop_depth[stops].tolist())) > 1
    turned = {name: np.array(getattr(w, name)) for name in ("stop_depth", "stop_token", "stop_mass")}
    for values in turned.values():
        values[stops] = values[stops][::-1]
    with pytest.raises(IntegrityError, match="inconsistent"):
        write(tmp_path / "a.parquet", [replace(w, **turned)])


def test_sizes_of_the_top_k_are_those_of_a_dump_that_holds_no_more(tmp_path, windows):
    found = top_k_sizes(write(tmp_path / "whole.parquet", windows), [3, 2, 0, 99])
    assert found[99] == found[3]
    for k in (3, 2, 0):
        cut = [
            replace(w, **{
                name: getattr(w, name).reshape(len(w.row_start), 3)[:, :k].ravel() for name in ("topk_id", "topk_logp")
            })
            for w in windows
        ]  # fmt: skip
        group = pq.read_metadata(write(tmp_path / f"{k}.parquet", cut)).row_group(0)
        columns = [group.column(at) for at in range(group.num_columns)]
        sizes = [one.total_compressed_size for one in columns if one.path_in_schema.startswith("topk_")]
        assert found[k] == sum(sizes)
    mixed = [replace(windows[0], topk_id=windows[0].topk_id[:-3], topk_logp=windows[0].topk_logp[:-3]), *windows[1:]]
    with pytest.raises(IntegrityError, match="different top k"):
        top_k_sizes(write(tmp_path / "mixed.parquet", mixed), [1])


def test_a_blob_of_another_length_is_refused(tmp_path, windows):
    path = write(tmp_path / "a.parquet", windows[:1])
    table = pq.read_table(path)
    column = table.schema.get_field_index("entry_code")
    (blob,) = table.column(column).to_pylist()
    for wrong in (blob[:-1], blob[:-2], b""):
        field = table.schema.field(column)
        pq.write_table(table.set_column(column, field, pa.array([wrong], field.type)), path)
        with pytest.raises(IntegrityError, match="inconsistent"):
            list(read_windows(path))


@pytest.mark.parametrize("n", [0, 1, 7, 1000])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_planes_hold_the_lowest_bytes_first(n, dtype):
    values = (np.random.default_rng(n).normal(size=n) * 1000).astype(dtype)
    planes = to_planes(values)
    width = np.dtype(dtype).itemsize
    np.testing.assert_array_equal(planes.reshape(width, n), values.view(np.uint8).reshape(n, width).T)
    np.testing.assert_array_equal(from_planes(planes, dtype), values)


# ---- golden parts


def reader_of_the_document() -> dict[str, Any]:
    """What the reader that TOKEN_DUMP.md shows defines."""
    text = (ROOT / "schemas" / "TOKEN_DUMP.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)  # our own document
    return names


def test_the_golden_part_reads_as_it_always_did():
    """By the reader that the document shows as well; a change of the format shows here."""
    reader = reader_of_the_document()
    expected = json.loads((DATA / "golden-dump.json").read_text())
    windows = list(read_windows(DATA / "golden-dump-3.parquet"))
    shown = list(reader["windows"](DATA / "golden-dump-3.parquet"))
    assert [w.doc_id for w in windows] == [w["doc_id"] for w in expected] == [w["doc_id"] for w in shown]
    for window, wanted, raw in zip(windows, expected, shown, strict=True):
        rows = reader["rows_of"](raw)
        for name in ("row_start", "row_parent", "row_token", "row_depth", "row_static", "n_levels", "n_stops"):
            assert getattr(window, name).tolist() == wanted[name], name
        assert [row[:3] for row in rows] == list(
            map(list, zip(wanted["row_start"], wanted["row_parent"], wanted["row_token"], strict=True))
        )
        entries, stops, ends = placed(window)
        levels = [level for row in rows for level in row[4]]
        np.testing.assert_allclose(
            list(entries.values()), [m for level in levels for m in level[0].values()], rtol=1e-6
        )
        np.testing.assert_allclose(list(stops.values()), [m for level in levels for m in level[1].values()], rtol=1e-6)
        np.testing.assert_allclose(list(ends.values()), [row[4][0][2] for row in rows], rtol=1e-6)
        np.testing.assert_allclose(Lattice(window).targets().probs.max(1), wanted["most_likely"], rtol=1e-5)


def test_version_2_is_read_and_says_the_same():
    """The part of the release before, of which the golden one is a copy."""
    old, new = (list(read_windows(DATA / f"golden-dump-{version}.parquet")) for version in (2, 3))
    assert read_meta(DATA / "golden-dump-2.parquet")["version"] == 2
    for before, after in zip(old, new, strict=True):
        assert set(histories(before)) == set(histories(after))
        one, two = Lattice(before).targets(), Lattice(after).targets()
        assert listed_kl(one, two).mean() < 1e-3
    (lean, *_) = read_windows(DATA / "golden-dump-2.parquet", top_k=False)
    assert not len(lean.topk_id)
