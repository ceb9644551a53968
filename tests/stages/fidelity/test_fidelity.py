"""The certificate: reference windows through convert, stretches, the command that measures it again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import DATASET, read_dataset, seal, write_dataset
from bytecache.schemas.dump.parquet import DumpWriter, read_meta, read_windows
from bytecache.schemas.dump.window import Window, keep_rows
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.shard.reader import read_shard
from bytecache.stages.convert.convert import convert_units
from bytecache.stages.fidelity.bound import Bound
from bytecache.stages.fidelity.certificate import Fidelity, summary_line
from bytecache.stages.fidelity.divergence import kl_spread
from bytecache.stages.fidelity.measuring import true_symbols
from bytecache.stages.lattice.effort import REFERENCE
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.stretches import measure_stored
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.teacher.windows import LEAD, plan_stretch
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.command_line import bytecache, refusal
from tests.support.histories import histories
from tests.support.writing_model import (
    WritingEngine,
    joining_where_tokens_break,
    write_tokenizer,
    writing_teacher,
)

TEXT = "The student reads the notes as often as it likes; naïve façade, größer. " * 3
DEEP = {"tau": 1e-5, "depth": 8}
ASKED = {"tau": 0.02, "depth": 1}


def open_tiny(folder: Path, **changes) -> Teacher:
    base = {
        "model": str(folder),
        "backend": "hf",
        "context": 128,
        "overlap": 16,
        "floor": 0.0,
        "top_k": 3,
        "static": 0.0,
    }
    return open_teacher(st.Teacher(**{**base, **changes}))


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint) -> Teacher:
    return open_tiny(tiny_checkpoint("bytelevel"))


def at(teacher: Teacher, settings: dict, plans: list) -> list[Window]:
    kept, teacher.settings = teacher.settings, teacher.settings.model_copy(update=settings)
    try:
        return teacher.evaluate(plans)
    finally:
        teacher.settings = kept


def plan_of(teacher: Teacher, text: str, position: int, tokens: int):
    s = teacher.settings
    return plan_stretch(
        "d", teacher.vocabulary.encode(text), position, tokens,
        start_id=teacher.vocabulary.start_id, context=s.context, overlap=s.overlap,
    )  # fmt: skip


def marked(teacher: Teacher, text: str, position: int = 0, tokens: int = 24, **settings) -> Window:
    """A reference window of one stretch, its production rows chosen by `settings`."""
    stretch = plan_of(teacher, text, position, tokens)
    (deep,), (asked,) = at(teacher, DEEP, [stretch.plan]), at(teacher, settings or ASKED, [stretch.plan])
    wanted = set(histories(asked))
    sampled = np.array([history in wanted for history in histories(deep)], np.uint8)
    assert sampled.sum() == len(asked.row_start)
    return replace(deep, reference=True, doc_position=stretch.first, row_sampled=sampled)


# --- reference windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 60])
def test_production_rows_of_a_reference_window_are_the_production_window(teacher, position):
    window = marked(teacher, TEXT, position)
    (asked,) = at(teacher, ASKED, [plan_of(teacher, TEXT, position, 24).plan])
    known = keep_rows(window, window.row_sampled == 1)
    assert set(histories(known)) == set(histories(asked)) and len(known.row_start) < len(window.row_start)
    for name in ("probs", "tail", "logp", "unaccounted"):
        mine, theirs = (getattr(Lattice(w).targets(), name) for w in (known, asked))
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    difference = np.abs(Lattice(window).targets().probs - Lattice(known).targets().probs).max()
    assert difference > 1e-3  # the reference knows more
    assert len(known.topk_id) == 3 * len(known.row_start)


def write_part(path: Path, windows: list[Window]) -> Path:
    writer = DumpWriter(path, {"teacher": {"model": "tiny"}, "reference": DEEP})
    for window in windows:
        writer.append(window)
    writer.close()
    return path


@pytest.mark.parametrize("texts", [[""], ["", "the notes", ""]])
def test_empty_documents_have_an_end_to_measure(tmp_path, teacher, texts):
    """The unit's own reference window, and one stretch from every position of the shard."""
    pq.write_table(pa.table({"doc_id": [str(i) for i in range(len(texts))], "text": texts}), tmp_path / "slice")
    teacher.dump_unit(tmp_path / "slice", tmp_path / "part", "key", lambda: False, lambda _: None)
    counts = convert_units([tmp_path / "part"], tmp_path / "out", st.Convert(), {}, lambda: False, lambda _: None)
    assert counts["fidelity"]["counts"]["windows"] == 1
    shard, found = read_shard(tmp_path / "out"), Fidelity()
    measure_stored(teacher, shard, range(len(shard)), 1, found, lambda: False)
    assert found.counts["windows"] == len(shard)


def marks_of(window: Window) -> list[tuple[tuple[int, ...], int, int]]:
    """Every row as its history, whether it is static, and whether production has it too."""
    return list(zip(histories(window), window.row_static.tolist(), window.row_sampled.tolist(), strict=True))


def test_reference_windows_survive_the_dump_and_damaged_ones_are_refused(tmp_path, teacher):
    """TOKEN_DUMP 8."""
    window = marked(teacher, TEXT, 30)
    (back,) = read_windows(write_part(tmp_path / "a", [window]))
    assert back.reference and back.doc_position == window.doc_position == plan_of(teacher, TEXT, 30, 1).first
    assert sorted(marks_of(back)) == sorted(marks_of(window))
    assert read_meta(tmp_path / "a")["reference"] == DEEP
    orphaned = window.row_sampled.copy()
    branch = int(np.flatnonzero((window.row_sampled == 0) & (window.row_depth > 1))[0])
    orphaned[branch], orphaned[window.row_parent[branch]] = 1, 0
    uncanonical = window.row_sampled.copy()
    uncanonical[np.flatnonzero(window.row_depth == 0)[-1]] = 0
    broken = [
        replace(window, row_sampled=window.row_sampled[:-1]),
        replace(window, row_sampled=window.row_sampled * 2),
        replace(window, row_sampled=orphaned),
        replace(window, row_sampled=uncanonical),
        replace(window, reference=False),
        replace(window, doc_position=-1),
    ]
    for i, bad in enumerate(broken):
        with pytest.raises(IntegrityError, match="inconsistent"):
            list(read_windows(write_part(tmp_path / f"b{i}", [bad])))


def convert(tmp_path: Path, name: str, windows: list[Window], **settings) -> tuple[bytes, dict]:
    part, shard = write_part(tmp_path / f"{name}.parquet", windows), tmp_path / f"{name}.zarr.zip"
    counts = convert_units([part], shard, st.Convert(**settings), {}, lambda: False, lambda _: None)
    return shard.read_bytes(), counts


def test_convert_measures_reference_windows_and_writes_none_of_them(tmp_path, teacher):
    (ordinary,) = at(teacher, ASKED, [plan_of(teacher, TEXT, 0, 999).plan])
    extra = [marked(teacher, TEXT, position) for position in (0, 60)]
    alone, without = convert(tmp_path, "alone", [ordinary])
    mixed, counts = convert(tmp_path, "mixed", [extra[0], ordinary, extra[1]])
    assert mixed == alone and without["fidelity"] is None
    assert counts["reference"] == DEEP
    certificate = Fidelity([counts["fidelity"]]).certificate({"model": "tiny"}, counts["reference"])
    assert certificate is not None and certificate["reference"] == DEEP
    sample = {"positions": sum(len(true_symbols(w)) for w in extra), "windows": 2, "documents": 1}
    assert certificate["sample"] == sample
    assert certificate["kl"]["mean"] > certificate["branch_kl"]["mean"] / 2 > 1e-6
    assert certificate["tail"]["mean"] == pytest.approx(
        sum(certificate["tail"][part] for part in ("unevaluated", "pruned", "other")), rel=0.05
    )
    assert "KL" in summary_line(certificate)

    # The figures are those of the definition, by hand.
    shard = read_shard(tmp_path / "mixed.zarr.zip")
    total = 0.0
    for window in extra:
        whole = Lattice(window).targets()
        rows = slice(window.doc_position, window.doc_position + len(whole.tail))
        stored = shard.dense(rows.start, rows.stop)
        weights = shard.tail_weights(rows.start, rows.stop)
        total += kl_spread(whole.probs, whole.tail, stored, shard.tail[rows], weights).sum()
    assert certificate["kl"]["mean"] == pytest.approx(total / sample["positions"], rel=1e-3)


def test_a_reference_window_of_another_text_is_refused(tmp_path, teacher):
    (ordinary,) = at(teacher, ASKED, [plan_of(teacher, TEXT, 0, 999).plan])
    for i, bad in enumerate([marked(teacher, TEXT[3:]), replace(marked(teacher, TEXT), doc_position=9999)]):
        with pytest.raises(IntegrityError, match="does not hold the reference window"):
            convert(tmp_path, f"bad{i}", [ordinary, bad])


def test_a_production_that_asked_for_everything_differs_by_storing_alone(tmp_path, teacher):
    (ordinary,) = at(teacher, DEEP, [plan_of(teacher, TEXT, 0, 999).plan])
    window = marked(teacher, TEXT, 0, 24, **DEEP)
    found = []
    for name, prune in (("fine", 0.0), ("coarse", 0.05)):
        _, counts = convert(tmp_path, name, [ordinary, window], precision="precise", rate=1e-7, prune=prune)
        found.append(Fidelity([counts["fidelity"]]).certificate({}, {}) or {})
    fine, coarse = found
    assert fine["branch_kl"]["max"] < 1e-5  # what is below DEEP joins in production and is dropped in a reference
    assert fine["kl"]["mean"] < 5e-3 < coarse["kl"]["mean"]
    assert fine["tail"]["pruned"] < 1e-2 < coarse["tail"]["pruned"]
    assert fine["kl"]["mean"] == pytest.approx(fine["storing_kl"]["mean"], rel=1e-3)
    assert fine["rows_per_token"]["production"] == fine["rows_per_token"]["reference"] > 1


# --- stretches --------------------------------------------------------------------------------------------------------


def test_a_stretch_has_the_targets_of_the_document(teacher):
    """A window's targets at a stretch, and the stretch alone, agree: the text after it does not matter."""
    plan = plan_of(teacher, TEXT, 0, 999).plan
    (whole,) = at(teacher, DEEP, [plan])
    targets = Lattice(whole).targets()
    for position in (0, 40, 100, len(TEXT.encode())):
        stretch = plan_of(teacher, TEXT, position, 10)
        assert stretch.first <= position
        (window,) = at(teacher, DEEP, [stretch.plan])
        mine = Lattice(window).targets()
        assert len(mine.tail) == stretch.n_targets == len(true_symbols(window))
        here = slice(stretch.first, stretch.first + stretch.n_targets)
        np.testing.assert_allclose(mine.probs, targets.probs[here], atol=2e-4)
        assert len(window.row_start) < len(whole.row_start) / 2


def test_stretches_lie_in_the_windows_of_their_document(tiny_checkpoint):
    teacher = open_tiny(tiny_checkpoint("sentencepiece"), context=60, overlap=20)
    encoded = teacher.vocabulary.encode(TEXT)
    size = len(TEXT.encode())
    for position in range(0, size + 1, 7):
        stretch = plan_of(teacher, TEXT, position, 9)
        prompt = stretch.plan.prompt
        assert stretch.first <= min(position, size) < stretch.first + stretch.n_targets
        assert len(prompt.tokens) <= 59
        assert (
            prompt.text[stretch.plan.score_start :].tobytes()
            == TEXT.encode()[stretch.first :][: stretch.n_targets - stretch.plan.is_last]
        )
        assert prompt.first_row >= 20 - LEAD or stretch.first < 58
    assert encoded.synthetic == 1  # the family with a made-up space


def test_targets_do_not_depend_on_the_batch_or_the_order(tiny_checkpoint):
    """Each document alone, all at once, and all in reverse."""
    teacher = open_tiny(tiny_checkpoint("bytelevel"), tau=0.01, depth=2, context=64, overlap=20)
    texts = [TEXT, "the", "", "The teacher reads the text once.", TEXT[40:], "notes né " * 9, "the"]
    documents = [(f"d{i}", i, teacher.vocabulary.encode(text)) for i, text in enumerate(texts)]

    def targets(chosen: list) -> dict[str, np.ndarray]:
        found: dict[str, list] = {}
        for group in teacher.windows(chosen):
            for window in group:
                t = Lattice(window).targets()
                found.setdefault(window.doc_id, []).append(np.column_stack([t.probs, t.tail]))
        return {name: np.concatenate(pieces) for name, pieces in found.items()}

    together, reverse = targets(documents), targets(documents[::-1])
    for document in documents:
        (alone,) = targets([document]).values()
        np.testing.assert_allclose(together[document[0]], alone, atol=1e-6)
        np.testing.assert_allclose(reverse[document[0]], alone, atol=1e-6)
    np.testing.assert_allclose(together["d1"], together["d6"], atol=1e-6)


@pytest.mark.slow
def test_the_certificate_of_a_data_set_made_by_the_old_rule_shows_the_fault(tmp_path, monkeypatch):
    """What ended where the canonical tokens break joined unasked; the dump's own reference and a later one tell."""
    vocabulary = load_vocabulary(write_tokenizer(tmp_path / "tokenizer", "llama3"))
    effort = {"tau": 0.002, "depth": 2, "static": 0.0002}
    engine = WritingEngine(vocabulary, floor=0.0, spread=2.0)
    texts = [engine.write(12, seed).decode() for seed in range(8)]
    pq.write_table(pa.table({"doc_id": [str(i) for i in range(len(texts))], "text": texts}), tmp_path / "slice")
    by_the_rule_in_force = Lattice.deviations
    found = {}
    for rule in ("now", "old"):
        teacher = writing_teacher(vocabulary, **effort)
        teacher.settings = teacher.settings.model_copy(
            update={"sample_tokens": 60, "model": str(tmp_path / "tokenizer")}
        )
        if rule == "old":
            old = joining_where_tokens_break(by_the_rule_in_force, spared=REFERENCE["tau"])
            monkeypatch.setattr(Lattice, "deviations", old)
        part, shard = tmp_path / f"{rule}.parquet", tmp_path / f"{rule}.zarr.zip"
        counts = []
        for key in range(4):  # as many samples
            teacher.dump_unit(tmp_path / "slice", part, f"key {key}", lambda: False, lambda _: None)
            settings = st.Convert(precision="precise")
            counts.append(convert_units([part], shard, settings, {}, lambda: False, lambda _: None))
        monkeypatch.setattr(Lattice, "deviations", by_the_rule_in_force)
        certificate = Fidelity(c["fidelity"] for c in counts).certificate({}, {}) or {}
        again = Fidelity()
        deep = writing_teacher(vocabulary, **REFERENCE)
        stored = read_shard(shard)
        measure_stored(deep, stored, range(0, len(stored), 9), 20, again, lambda: False)
        measured = again.certificate({}, {}) or {}
        bound = Bound(c["bound"] for c in counts).summary() or {}
        found[rule] = [certificate["branch_kl"]["mean"], measured["kl"]["mean"], bound["nats"]["mean"]]
        assert certificate["missed"]["mean"] < 0.01
        assert stored.attrs["bound"]["nats"]["mean"] == bound["nats"]["mean"]
    for now, old in zip(found["now"], found["old"], strict=True):
        assert old > 3 * now, found


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_checkpoint) -> Path:
    """A run folder with targets that a tiny teacher made through the commands."""
    folder = tmp_path_factory.mktemp("published")
    texts = [f"{i}: the student reads the notes as often as it likes. " * 2 for i in range(24)]
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet")
    config = {
        "run.dir": folder / "run", "corpus.source": folder / "corpus.parquet", "corpus.unit_bytes": 2000,
        "teacher.model": tiny_checkpoint("bytelevel"), "teacher.backend": "hf", "teacher.tau": 0.001,
        "teacher.depth": 3, "teacher.sample_tokens": 24, "teacher.context": 128, "convert.prune": 1e-4,
    }  # fmt: skip
    lines: dict[str, list[str]] = {}
    for key, value in config.items():
        section, name = key.split(".")
        lines.setdefault(section, []).append(
            f"{name} = {json.dumps(value if not isinstance(value, Path) else str(value))}"
        )
    (folder / "c.toml").write_text("\n".join(f"[{s}]\n" + "\n".join(names) for s, names in lines.items()))
    for command in ("plan", "teacher", "convert"):
        result = bytecache(command, "--config", folder / "c.toml")
        assert result.exit_code == 0, result.output
    assert "fidelity: KL" in result.output
    return folder


def run_fidelity(published: Path, place: Path, *more: object):
    return bytecache("fidelity", place, "--out", published / "f.json", "--tokens", 16, "--sample", 3, *more)


def claim(place: Path, kl: object) -> None:
    dataset = read_dataset(place)
    write_dataset(place, dataset.entries, dataset.info, {"kl": {"mean": kl}})


def test_the_command_measures_what_convert_stored(published, tiny_checkpoint):
    teacher = ("--teacher", tiny_checkpoint("bytelevel"))
    place = published / "run" / "targets"
    claim(place, 0.05)
    result = run_fidelity(published, published / "run", *teacher)
    assert result.exit_code == 0, result.output
    report = json.loads((published / "f.json").read_text())
    assert report["measured"]["sample"]["windows"] == 3
    assert 0 < report["measured"]["kl"]["mean"] < 0.02
    assert report["claimed"] == {"kl": {"mean": 0.05}}
    again = run_fidelity(published, place, *teacher)
    assert again.stdout == result.stdout  # the same seed draws the same stretches
    other = run_fidelity(published, place, *teacher, "--seed", 5)
    assert other.stdout != result.stdout

    claim(place, 1e-9)
    worse = json.loads((published / "f.json").read_text())["measured"]["kl"]
    assert worse["mean"] > 3 * worse["stderr"]  # so that the next line must refuse
    line = refusal(run_fidelity(published, place, *teacher), 4)
    assert "do not trust" in line
    inspected = bytecache("inspect", next(place.glob("*.zarr.zip")))
    assert inspected.exit_code == 0 and "KL 1e-09" in inspected.stdout
    for odd in ("0.1", None):
        claim(place, odd)
        assert "no mean KL" in refusal(run_fidelity(published, place, *teacher), 4)


def test_a_bound_alone_is_no_certificate_to_compare_with(published, tiny_checkpoint):
    """As imported caches and runs without a sample have it."""
    place = published / "run" / "targets"
    dataset = read_dataset(place)
    write_dataset(place, dataset.entries, dataset.info, {"bound": {"positions": 3}})
    result = run_fidelity(published, place, "--teacher", tiny_checkpoint("bytelevel"))
    assert result.exit_code == 0 and "no certificate to compare with" in result.stdout, result.output
    report = json.loads((published / "f.json").read_text())
    assert report["claimed"] == {"bound": {"positions": 3}} and report["kl_limit"] is None


def test_targets_that_do_not_fit_the_teacher_are_found(published, tiny_checkpoint):
    other = tiny_checkpoint("bytelevel", seed=9)
    place = published / "run" / "targets"
    claim(place, 0.01)
    assert "weights that made it" in refusal(run_fidelity(published, place, "--teacher", other), 3)
    assert "do not trust" in refusal(run_fidelity(published, place, "--teacher", other, "--any-teacher"), 4)
    spelled = tiny_checkpoint("sentencepiece")
    assert "vocabulary" in refusal(run_fidelity(published, place, "--teacher", spelled), 3)
    assert "--teacher" in refusal(run_fidelity(published, place), 3)
    assert "neither a data set" in refusal(run_fidelity(published, published), 3)


def test_a_data_set_elsewhere_is_refused_with_its_address():
    message = refusal(bytecache("fidelity", "hf://datasets/me/books"), 3)
    assert "hf://datasets/me/books is not on this machine" in message and "fetch the data set" in message


def test_a_certificate_that_is_no_object_is_refused(published):
    place = published / "run" / "targets"
    dataset = read_dataset(place)
    document = json.loads((place / DATASET).read_text())
    (place / DATASET).write_bytes(seal(document | {"fidelity": [1]}))
    try:
        with pytest.raises(IntegrityError, match="fidelity"):
            read_dataset(place)
    finally:
        write_dataset(place, dataset.entries, dataset.info)
