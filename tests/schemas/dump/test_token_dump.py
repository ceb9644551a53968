"""The token dump: round trip, determinism, rounding, and refusal of what is not a whole dump."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas import settings as st
from bytecache.schemas.dump import parquet as token_dump
from bytecache.schemas.dump.masses import LEAST_BITS, MASS_BITS, SHARE_BITS, from_planes, round_masses, to_planes
from bytecache.schemas.dump.parquet import DumpWriter, read_meta, read_windows, round_entries
from bytecache.schemas.dump.top_k import top_k_sizes
from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import ConfigError, IntegrityError
from bytecache.stages.convert.convert import convert_units
from bytecache.stages.fidelity.divergence import kl_spread
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import open_teacher


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


def test_round_trip_keeps_everything_but_low_mantissa_bits(tmp_path, windows):
    path = write(tmp_path / "a.parquet", windows)
    back = list(read_windows(path))
    assert [w.doc_id for w in back] == [w.doc_id for w in windows]
    for old, new in zip(windows, back, strict=True):
        for name in vars(old):
            before, after = getattr(old, name), getattr(new, name)
            if name == "entry_mass":
                np.testing.assert_allclose(after, before, rtol=2.0 ** -(LEAST_BITS + 1), atol=0)
            elif name == "stop_mass":
                np.testing.assert_allclose(after, before, rtol=2.0 ** -(MASS_BITS + 1), atol=0)
            else:
                np.testing.assert_array_equal(after, before)
        exact, kept = Lattice(old).targets(), Lattice(new).targets()
        assert np.abs(exact.probs - kept.probs).max() < 1e-4
        assert kl_spread(exact.probs, exact.tail, kept.probs, kept.tail).mean() < 1e-5
    (lean,) = [w for w in read_windows(path, top_k=False) if w.doc_id == windows[-1].doc_id]
    assert not len(lean.topk_id) and not len(lean.topk_logp)
    np.testing.assert_array_equal(lean.entry_byte, windows[-1].entry_byte)
    assert read_meta(path)["teacher"] == {"model": "tiny"}


def test_same_windows_same_bytes(tmp_path, windows):
    assert write(tmp_path / "a", windows).read_bytes() == write(tmp_path / "b", windows).read_bytes()


def test_entries_keep_the_bits_that_their_share_deserves(windows):
    """By definition: an error of 2^-16 of the prefix, or of 2^-6 of the entry; nothing vanishes; twice is as once.

    TOKEN_DUMP 6.
    """
    for window in windows:
        rounded = round_entries(window)
        off = np.abs(rounded.astype(np.float64) - window.entry_mass)
        prefix = prefixes(window)
        assert (off <= np.maximum(prefix * 2.0**-SHARE_BITS, window.entry_mass * 2.0 ** -(LEAST_BITS + 1))).all()
        assert ((rounded > 0) == (window.entry_mass > 0)).all()
        np.testing.assert_array_equal(round_entries(replace(window, entry_mass=rounded)), rounded)
    assert len(np.unique(rounded)) < len(np.unique(window.entry_mass))


def prefixes(window: Window) -> np.ndarray:
    """float64 [E]; the mass of the prefix of every entry's level, 1 at the start of a row."""
    out: list[float] = []
    level = entry = 0
    for start, count in zip(window.row_start, window.n_levels, strict=True):
        prefix = 1.0
        for depth in range(count):
            following = prefix
            for _ in range(window.fanout[level]):
                out.append(prefix)
                at = start + depth
                if at < len(window.text) and window.entry_byte[entry] == window.text[at]:
                    following = float(window.entry_mass[entry])
                entry += 1
            prefix = following
            level += 1
    return np.array(out)


def test_rounding_is_to_nearest_and_keeps_tiny_masses():
    mass = np.array([1.0, 0.3, 1e-30, 0.0, np.float32(2**-126)], np.float32)
    rounded = round_masses(mass)
    np.testing.assert_allclose(rounded, mass, rtol=2.0 ** -(MASS_BITS + 1))
    assert rounded[3] == 0 and (round_masses(rounded) == rounded).all()


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


@pytest.mark.parametrize("name", ["row_parent", "n_levels", "stop_depth", "fanout", "row_start"])
def test_inconsistent_window_is_refused(tmp_path, windows, name):
    """TOKEN_DUMP 2."""
    path = write(tmp_path / "a.parquet", windows[:1])
    table = pq.read_table(path)
    column = table.schema.get_field_index(name)
    (values,) = table.column(column).to_pylist()
    values[-1] = 30_000
    pq.write_table(
        table.set_column(column, table.schema.field(column), pa.array([values], table.schema[column].type)), path
    )
    with pytest.raises(IntegrityError, match="inconsistent"):
        list(read_windows(path))
    written = Window(**{**vars(windows[0]), name: np.array(values, getattr(windows[0], name).dtype)})
    with pytest.raises(IntegrityError, match="inconsistent"):
        write(tmp_path / "b.parquet", [written])


WRONG = {
    "a mass is NaN": ("entry_mass", 7, np.nan),
    "a mass is below zero": ("entry_mass", 7, -1e-9),
    "a mass is above one": ("stop_mass", 0, 1.5),
    "END is infinite": ("end", -1, np.inf),
    "control is NaN": ("control", 2, np.nan),
    "a log-probability is NaN": ("row_logp", 3, np.nan),
    "a log-probability is above zero": ("row_logp", 3, 5.0),
    "a row starts a byte late": ("row_start", 3, 1),
    "a row has a token that its parent does not end with": ("row_token", 3, 1),
    "a branch is nobody's": ("row_depth", -1, 1),
    "a row is static twice": ("row_static", -1, 2),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_window_that_no_teacher_made_is_refused(tmp_path, windows, what):
    """Counts that add up are not enough: with these the sums would be NaN, or those of another text.

    TOKEN_DUMP 3 and 4.
    """
    path = write(tmp_path / "a.parquet", windows[:1])
    name, at, value = WRONG[what]
    table = pq.read_table(path)
    column = table.schema.get_field_index(name)
    values = np.array(getattr(windows[0], name))
    values[at] = values[at] + value if np.issubdtype(values.dtype, np.integer) else value
    stored = pa.array(
        [to_planes(values).tobytes()] if name == "entry_mass" else [values.tolist()], table.schema[column].type
    )
    pq.write_table(table.set_column(column, table.schema.field(column), stored), path)
    with pytest.raises(IntegrityError, match=r"a\.parquet: .*inconsistent"):
        list(read_windows(path))


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
    column = table.schema.get_field_index("entry_mass")
    (blob,) = table.column(column).to_pylist()
    for wrong in (blob[:-1], blob[:-4], b""):
        field = table.schema.field(column)
        pq.write_table(table.set_column(column, field, pa.array([wrong], field.type)), path)
        with pytest.raises(IntegrityError, match="inconsistent"):
            list(read_windows(path))


@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_planes_hold_the_lowest_bytes_first(n):
    values = np.random.default_rng(n).normal(size=n).astype(np.float32)
    planes = to_planes(values)
    np.testing.assert_array_equal(planes.reshape(4, n), values.view(np.uint8).reshape(n, 4).T)
    np.testing.assert_array_equal(from_planes(planes), values)
