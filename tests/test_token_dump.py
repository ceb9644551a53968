"""The token dump: round trip, determinism, rounding, and refusal of what is not a whole dump."""

from pathlib import Path

import numpy as np
import pytest

from schemas import settings as st
from schemas import token_dump
from schemas.errors import IntegrityError
from schemas.token_dump import MASS_BITS, DumpWriter, Window, read_meta, read_windows, round_masses
from stages.lattice import Lattice
from stages.teacher import open_teacher


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
            if name in ("entry_mass", "stop_mass"):
                np.testing.assert_allclose(after, before, rtol=2.0 ** -(MASS_BITS + 1), atol=0)
            else:
                np.testing.assert_array_equal(after, before)
        difference = Lattice(old).targets().probs - Lattice(new).targets().probs
        assert np.abs(difference).max() < 1e-4
    (lean,) = [w for w in read_windows(path, top_k=False) if w.doc_id == windows[-1].doc_id]
    assert not len(lean.topk_id) and not len(lean.topk_logp)
    np.testing.assert_array_equal(lean.entry_byte, windows[-1].entry_byte)
    assert read_meta(path)["teacher"] == {"model": "tiny"}


def test_same_windows_same_bytes(tmp_path, windows):
    assert write(tmp_path / "a", windows).read_bytes() == write(tmp_path / "b", windows).read_bytes()


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
    monkeypatch.setattr(token_dump, "VERSION", 99)
    path = write(tmp_path / "a.parquet", windows)
    monkeypatch.undo()
    with pytest.raises(IntegrityError, match="version 99"):
        read_meta(path)
    with pytest.raises(IntegrityError, match="missing"):
        read_meta(tmp_path / "absent")


@pytest.mark.parametrize("name", ["row_parent", "n_levels", "stop_depth", "fanout", "row_start"])
def test_inconsistent_window_is_refused(tmp_path, windows, name):
    values = dict(vars(windows[0]))
    values[name] = values[name].copy()
    values[name][-1] = 30_000
    path = write(tmp_path / "a.parquet", [Window(**values)])
    with pytest.raises(IntegrityError, match="inconsistent"):
        list(read_windows(path))
