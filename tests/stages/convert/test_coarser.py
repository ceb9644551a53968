"""Converting at a greater tau: what a capture at that tau would have given, without the teacher."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.shard.reader import read_shard
from bytecache.stages.convert.coarser import coarsen
from bytecache.stages.convert.convert import convert_units
from bytecache.stages.convert.effort import Effort, coarser_effort
from bytecache.stages.fidelity.divergence import kl_spread
from bytecache.stages.lattice.effort import least_share
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import Teacher
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary
from tests.support.families import FAMILIES
from tests.support.function_model import function_teacher
from tests.support.histories import histories

TEXTS = ["The quick brown f\u00e9", "  def f(x):\n", ""]
FINE = {"tau": 0.002, "depth": 3}


@pytest.fixture(autouse=True)
def by_share_alone(monkeypatch) -> None:
    """These teachers find all text absurd: the text would bear out nearly everything, and which history carries a fifth
    of it depends on those that joined it, so neither would be the same at every tau."""
    monkeypatch.setattr("bytecache.stages.lattice.effort.BORNE_OUT", np.inf)
    monkeypatch.setattr("bytecache.stages.lattice.lattice.tokens_off", lambda depth, *_: depth.astype(np.int64))


@pytest.fixture(scope="module", params=["gpt2", "llama2"])
def vocabulary(request, tmp_path_factory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("coarser") / request.param
    FAMILIES[request.param].write(folder)
    return load_vocabulary(folder)


def dump(teacher: Teacher, folder: Path) -> Path:
    pq.write_table(pa.table({"doc_id": [f"d{i}" for i in range(len(TEXTS))], "text": TEXTS}), folder / "slice.parquet")
    out = folder / f"{teacher.settings.tau:g}-{teacher.settings.depth}-{teacher.settings.static:g}.parquet"
    teacher.settings = teacher.settings.model_copy(update={"model": str(folder), "sample_tokens": 5})
    teacher.dump_unit(folder / "slice.parquet", out, "key", lambda: False, lambda _: None)
    return out


def convert(part: Path, **settings) -> tuple[dict, dict[str, np.ndarray], Path]:
    out = part.with_suffix(f".{len(list(part.parent.iterdir()))}.zarr.zip")
    counts = convert_units([part], out, st.Convert(precision="precise", **settings), {}, lambda: False, lambda _: None)
    shard = read_shard(out)
    return counts, {"dense": shard.dense(0, len(shard.text)), "tail": shard.tail}, out


def windows_of(vocabulary: Vocabulary, **effort):
    teacher = function_teacher(vocabulary, **effort)
    documents = [(f"d{i}", i, teacher.vocabulary.encode(text)) for i, text in enumerate(TEXTS)]
    return [window for group in teacher.windows(documents) for window in group]


@pytest.mark.parametrize("effort", [(0.02, 3), (0.002, 1), (0.1, 2), (0.05, 0), (1.0, 3)])
def test_rows_are_those_of_a_capture_at_that_effort(vocabulary, effort):
    tau, depth = effort
    equal = 0
    for fine, asked in zip(windows_of(vocabulary, **FINE), windows_of(vocabulary, tau=tau, depth=depth), strict=True):
        reduced, stand_ins = coarsen(fine, Effort(tau, depth, 0.0))
        assert stand_ins == 0
        if not set(histories(asked)) <= set(histories(fine)):
            assert_lacking_for_a_reason(fine, asked)
            continue
        equal += 1
        assert histories(reduced) == histories(asked)
        for name in ("row_parent", "row_depth", "entry_byte", "entry_mass", "stop_token", "stop_mass", "topk_id"):
            np.testing.assert_array_equal(getattr(reduced, name), getattr(asked, name))
        for mine, theirs in zip(Lattice(reduced).targets(), Lattice(asked).targets(), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert equal >= 2


def assert_lacking_for_a_reason(fine: Window, asked: Window) -> None:
    """What the coarse capture asked for and the dump lacks was too light there: it is joined histories that weigh it
    down in a coarse lattice, of a teacher that finds the text absurd."""
    lattice, row_of = Lattice(fine), {history: row for row, history in enumerate(histories(fine))}
    row, _ = lattice._stops
    lacking = [h for h in histories(asked) if h not in row_of and h[:-1] in row_of]
    assert lacking
    for history in lacking:
        parent = row_of[history[:-1]]
        (stop,) = np.flatnonzero((row == parent) & (fine.stop_token == history[-1]))
        least = least_share(FINE["tau"], int(FINE["depth"]), np.array([fine.row_depth[parent] + 1]))
        assert lattice._sums.share[stop] <= least[0]


@pytest.mark.parametrize("effort", [(0.02, 3), (0.05, 0), (1.0, 0)])
def test_shards_are_those_of_a_capture_at_that_effort(vocabulary, tmp_path, effort):
    """Through the file as well: branches, static rows off, the certificate's own windows.

    The dump codes a row by its weight in its own lattice, so the two agree to within the codes and not to the bit.
    """
    tau, depth = effort
    fine = dump(function_teacher(vocabulary, floor=1e-5, **FINE), tmp_path)
    coarse = dump(function_teacher(vocabulary, floor=1e-5, tau=tau, depth=depth), tmp_path)
    found, mine, _ = convert(fine, tau=tau, depth=depth)
    wanted, theirs, _ = convert(coarse)
    for name in mine:
        assert np.abs(mine[name] - theirs[name]).mean() < 2e-3 and np.abs(mine[name] - theirs[name]).max() < 0.05
    assert found.pop("stand_ins") == 0
    assert found.pop("size") > 0 and wanted.pop("size") > 0  # the teacher's identity is in the file
    # Their references differ by histories about as heavy as the reference's tau; what production knew does not.
    reference, other = found.pop("fidelity"), wanted.pop("fidelity")
    for name in ("positions", "canonical_rows", "production_rows"):
        assert reference["counts"][name] == other["counts"][name] > 0
    for name in ("n_documents", "n_bytes", "n_positions", "n_supervised"):
        assert found[name] == wanted[name]
    for name in ("teacher_nll", "canonical_nll", "unaccounted_mean"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5)
    whole, full, _ = convert(fine)
    assert whole["unaccounted_mean"] < found["unaccounted_mean"]
    assert np.abs(full["dense"] - mine["dense"]).max() > 1e-3


def test_with_static_rows_it_is_at_least_as_exact(tmp_path_factory):
    """Where the fine capture had a branch and the coarse one a static row, the branch stands in."""
    folder = tmp_path_factory.mktemp("static") / "gpt2"
    FAMILIES["gpt2"].write(folder)
    vocabulary = load_vocabulary(folder)
    coarse = {"tau": 0.1, "depth": 1, "static": 0.02}
    exact = [Lattice(w, drop=1.0).targets() for w in windows_of(vocabulary, tau=1e-4, depth=6, spread=2.0)]
    errors: dict[str, list[np.ndarray]] = {"captured": [], "converted": []}
    total = 0
    fine = windows_of(vocabulary, static=0.002, spread=2.0, **FINE)
    for window, other, truth in zip(fine, windows_of(vocabulary, spread=2.0, **coarse), exact, strict=True):
        reduced, stand_ins = coarsen(window, Effort(**coarse))
        total += stand_ins
        rows = Lattice(reduced).targets()
        np.testing.assert_allclose(rows.probs.sum(1) + rows.tail, 1, atol=1e-5)
        assert len(reduced.row_start) <= len(window.row_start)
        for name, found in (("converted", rows), ("captured", Lattice(other).targets())):
            errors[name].append(kl_spread(truth.probs, truth.tail, found.probs, found.tail))
    assert total > 0
    assert np.concatenate(errors["converted"]).mean() <= np.concatenate(errors["captured"]).mean()


def test_the_captures_own_effort_changes_nothing(vocabulary, tmp_path):
    part = dump(function_teacher(vocabulary, static=0.005, **FINE), tmp_path)
    counts, _, plain = convert(part)
    again, _, asked = convert(part, tau=FINE["tau"], depth=FINE["depth"], static=0.005)
    assert plain.read_bytes() == asked.read_bytes() and counts == again
    for window in windows_of(vocabulary, static=0.005, **FINE):
        same, stand_ins = coarsen(window, Effort(static=0.005, **FINE))
        assert stand_ins == 0 and histories(same) == histories(window)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tau": 0.001}, r"convert\.tau = 0\.001 .* teacher\.tau = 0\.002, so convert\.tau must be at least 0\.002"),
        ({"tau": 0.0}, r"convert\.tau = 0 "),
        ({"depth": 4}, r"convert\.depth = 4 .* must be at most 3"),
        ({"static": 0.001}, r"convert\.static = 0\.001 .* must be 0 or at least 0\.005"),
    ],
)
def test_more_effort_than_the_captures_is_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        coarser_effort(st.Convert(**asked), {**FINE, "static": 0.005})
    with pytest.raises(ConfigError, match="has no static rows"):
        coarser_effort(st.Convert(static=0.1), {**FINE, "static": 0.0})


def test_a_conversion_that_asks_for_too_much_writes_nothing(vocabulary, tmp_path):
    part = dump(function_teacher(vocabulary, **FINE), tmp_path)
    with pytest.raises(ConfigError, match="run `bytecache teacher`"):
        convert(part, tau=0.001)
    assert not list(tmp_path.glob("*.zip"))
