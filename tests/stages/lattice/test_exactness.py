"""The mathematics against its definition: every cover enumerated, on tiny models and short texts."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError
from bytecache.stages.engines.static import context_tokens
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.probe import probe_with
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.tokens.vocab import Vocabulary
from tests.support.oracle import exact_distributions


def covers(vocabulary: Vocabulary, data: bytes) -> list[tuple[int, ...]]:
    """Every token sequence that spells `data`, by trying every token everywhere."""
    if not data:
        return [()]
    first = [(i, piece) for i, piece in enumerate(vocabulary.token_bytes) if piece and data.startswith(piece)]
    return [(i, *rest) for i, piece in first for rest in covers(vocabulary, data[len(piece) :])]


def reference(teacher: Teacher, data: bytes | None = None):
    """p(. | history) in float64 from the same weights.

    Histories of `data` come from one batch of all its covers: what follows a prefix changes nothing in a causal model.
    Any other takes a forward pass of its own.
    """
    model = teacher.engine.model.double()  # type: ignore[attr-defined]
    cache: dict[tuple[int, ...], np.ndarray] = {}
    if data is not None:
        start = teacher.vocabulary.start_id
        whole = [(start, *cover) for cover in covers(teacher.vocabulary, data)]
        batch = torch.tensor([[*cover, *[start] * (len(data) + 1 - len(cover))] for cover in whole])
        with torch.inference_mode():
            rows = torch.softmax(model(batch).logits, -1).numpy()
        for cover, row in zip(whole, rows, strict=True):
            cache.update({cover[: j + 1]: row[j] for j in range(len(cover))})

    def next_token(history: tuple[int, ...]) -> np.ndarray:
        if history not in cache:
            with torch.inference_mode():
                logits = model(torch.tensor([history])).logits[0, -1]
            cache[history] = torch.softmax(logits, -1).numpy()
        return cache[history]

    return next_token


def settings_for(folder, **changes) -> st.Teacher:
    base = {"model": str(folder), "backend": "hf", "context": 128, "overlap": 16, "floor": 0.0, "top_k": 4}
    return st.Teacher(**{**base, **changes})


@pytest.mark.parametrize("family", ["bytelevel", "sentencepiece", "sliding"])
@pytest.mark.parametrize("text", ["the cache", "e", "", "notes né", "the the"])
def test_every_cover_evaluated_equals_brute_force(tiny_checkpoint, family, text):
    teacher = open_teacher(settings_for(tiny_checkpoint(family), tau=0.0, depth=64))
    probs, tail, data = probe_with(teacher, text)
    (encoded,) = teacher.vocabulary.encode_batch([text])
    ask = reference(teacher, encoded.data)
    exact = exact_distributions(teacher.vocabulary, ask, encoded.data, encoded.synthetic)
    assert data.tobytes() == text.encode()
    np.testing.assert_allclose(probs, exact, rtol=1e-5, atol=1e-6)  # the model computes in float32
    np.testing.assert_allclose(tail, 1 - exact.sum(1), atol=2e-6)  # control tokens and the padded head


def test_exponentially_many_cuts_are_refused(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("bytecache.stages.teacher.passes.MAX_BRANCHES", 50)
    teacher = open_teacher(settings_for(tiny_checkpoint("bytelevel"), tau=0.0, depth=64))
    with pytest.raises(ConfigError, match="raise tau"):
        probe_with(teacher, "the teacher reads the text")


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rows_and_tails_sum_to_one(tiny_checkpoint, depth):
    teacher = open_teacher(settings_for(tiny_checkpoint("bytelevel"), tau=0.01, depth=depth, floor=1e-4))
    probs, tail, _ = probe_with(teacher, "A cache is a promise kept in advance; naïve façade.")
    np.testing.assert_allclose(probs.sum(1) + tail, 1, atol=1e-5)
    assert (probs >= 0).all() and (tail >= 0).all()


def test_chain_rule_telescopes_and_marginal_is_below_canonical(tiny_checkpoint):
    teacher = open_teacher(settings_for(tiny_checkpoint("bytelevel"), tau=0.001, depth=2))
    text = "The teacher reads the text once, and what it said is written down."
    ((window,),) = teacher.windows([("d", 0, teacher.vocabulary.encode(text))])
    lattice = Lattice(window)
    targets = lattice.targets()
    n = len(window.text)
    given = targets.probs[np.arange(n), window.text].astype(np.float64)
    # P(x[:i+1]) = P(x[:i]) P(x_i | x[:i]) plus what the unevaluated histories carried on.
    assert (np.exp(np.diff(targets.logp)) >= given - 1e-6).all()
    carried = targets.unaccounted[:-1].astype(np.float64)
    assert (np.exp(np.diff(targets.logp)) <= given + carried + 1e-6).all()
    assert lattice.marginal_nll <= window.canonical_nll + 1e-6


def test_causality(tiny_checkpoint):
    """With every cover evaluated, what follows byte i does not change the target at i."""
    teacher = open_teacher(settings_for(tiny_checkpoint("bytelevel"), tau=0.0, depth=64))
    one, _, _ = probe_with(teacher, "the the")
    other, _, _ = probe_with(teacher, "the tee")
    np.testing.assert_allclose(one[:6], other[:6], atol=1e-6)
    assert np.abs(one[6] - other[6]).max() > 1e-4  # the test can fail: here the prefixes differ


def test_windows_agree_with_one_pass_over_the_document(tiny_checkpoint):
    """Cutting a document changes only how much context a byte sees; with all of it in the overlap, nothing."""
    text = "A cache is a promise kept in advance. " * 5
    whole = open_teacher(settings_for(tiny_checkpoint("bytelevel"), context=250, overlap=8))
    probs, _, _ = probe_with(whole, text)
    cut = open_teacher(settings_for(tiny_checkpoint("bytelevel"), context=60, overlap=20))
    probs_cut, tail_cut, data = probe_with(cut, text)
    assert len(next(cut.windows([("d", 0, cut.vocabulary.encode(text))]))) > 1
    assert probs_cut.shape == probs.shape == (len(data) + 1, 257)
    np.testing.assert_allclose(probs_cut[:40], probs[:40], atol=1e-6)
    np.testing.assert_allclose(probs_cut.sum(1) + tail_cut, 1, atol=1e-5)


@pytest.mark.parametrize("family", ["bytelevel", "sliding"])
def test_static_rows_stand_in_where_nothing_was_evaluated(tiny_checkpoint, family):
    """A static row is the geometric mean over short contexts; with it almost nothing is unaccounted."""
    base = {"tau": 0.5, "depth": 1}
    teacher = open_teacher(settings_for(tiny_checkpoint(family), static=1e-4, **base))
    without = open_teacher(settings_for(tiny_checkpoint(family), static=0, **base))
    vocabulary, ask = teacher.vocabulary, reference(without)
    text = "A cache is a promise kept in advance; the notes can be read."
    (window,) = next(teacher.windows([("t", 0, vocabulary.encode(text))]))
    first_level = np.cumsum([0, *window.n_levels[:-1]])
    first_entry = np.cumsum([0, *window.fanout])[first_level]
    static = np.flatnonzero(window.row_static)
    assert len(static) > 5
    for row in static[:3].tolist():
        token = int(window.row_token[row])
        logs = [np.log(ask((*context.tolist(), token))) for context in context_tokens(vocabulary)]
        p = np.exp(np.mean(logs, axis=0))
        p /= p.sum()
        assert window.end[row] == pytest.approx(sum(p[i] for i in vocabulary.end_ids), rel=1e-4)
        for entry in range(first_entry[row], first_entry[row] + 4):
            byte = int(window.entry_byte[entry])
            expected = sum(p[i] for i, b in enumerate(vocabulary.token_bytes) if b and b[0] == byte)
            assert window.entry_mass[entry] == pytest.approx(expected, rel=1e-3)

    targets = Lattice(window).targets()
    np.testing.assert_allclose(targets.probs.sum(1) + targets.tail, 1, atol=1e-5)
    (bare,) = next(without.windows([("t", 0, vocabulary.encode(text))]))
    assert targets.unaccounted.mean() < 0.1 * Lattice(bare).targets().unaccounted.mean()


def test_static_states_do_not_depend_on_what_else_was_asked(tiny_checkpoint, tmp_path, monkeypatch):
    """The same unit gives the same bytes whatever the units before it cached, in memory or on disk."""
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path / "cache"))
    texts = ["The cache remembers what the teacher said.", "A student reads; nobody forgets the notes: 2 + 2 = 5."]
    for number, text in enumerate(texts):
        pq.write_table(pa.table({"doc_id": ["d"], "text": [text]}), tmp_path / f"{number}.parquet")
    settings = settings_for(tiny_checkpoint("bytelevel"), static=1e-4, tau=0.5, depth=1)
    hashes = set()
    for order in ([1], [0, 1], [1]):  # alone, after another unit, from the cache on disk
        teacher = open_teacher(settings)
        for number in order:
            out = tmp_path / f"dump-{number}"
            counts = teacher.dump_unit(tmp_path / f"{number}.parquet", out, "key", lambda: False, lambda done: None)
            assert counts["static"] > 0
        hashes.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert len(list((tmp_path / "cache/static").iterdir())) == 1
