"""The mathematics against brute force for every family of tokenizers: duplicates, byte fallback, padded heads and all.

The teacher is a function of the history (function_model.py), so that nothing but the sums can differ.
"""

import numpy as np
import pytest

from bytecache.schemas.dump.window import Window
from bytecache.stages.lattice.lattice import Lattice, Targets
from bytecache.stages.teacher.teacher import Teacher
from bytecache.stages.tokens.vocab import Encoded, Vocabulary, load_vocabulary
from tests.support.families import FAMILIES
from tests.support.function_model import FunctionEngine, function_teacher
from tests.support.oracle import exact_distributions

SMALL = [
    "gpt2",
    "llama3",
    "qwen",
    "deepseek",
    "neox",
    "smollm2",
    "llama2",
    "mistral",
    "gemma",
    "unigram",
    "rwkv",
    "tekken",
]
EVERY_COVER = {"tau": 0.0, "depth": 64}
TEXTS = ["the th", " a\u00e9", "x  the"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    made: dict[str, Vocabulary] = {}

    def get(name: str) -> Vocabulary:
        if name not in made:
            if name == "tekken":
                pytest.importorskip("tiktoken")
            folder = tmp_path_factory.mktemp("oracle") / name
            FAMILIES[name].write(folder)
            made[name] = load_vocabulary(folder)
        return made[name]

    return get


def targets_of(teacher: Teacher, text: str) -> Targets:
    ((window,),) = teacher.windows([("d", 0, teacher.vocabulary.encode(text))])
    return Lattice(window).targets()


def canonical_nll(window: Window) -> float:
    """Of all canonical tokens, that of a synthetic space among them: what the bytes after it are given is less."""
    return float(-window.row_logp[window.row_depth == 0].astype(np.float64).sum())


def exact(teacher: Teacher, text: str) -> np.ndarray:
    assert isinstance(teacher.engine, FunctionEngine)
    encoded = teacher.vocabulary.encode(text)
    return exact_distributions(teacher.vocabulary, teacher.engine.next_token, encoded.data, encoded.synthetic)


@pytest.mark.parametrize("name", SMALL)
def test_every_cover_evaluated_equals_brute_force(vocabulary, name):
    """All 257 columns, END at every byte among them; what is missing to 1 is the mass of control tokens."""
    teacher = function_teacher(vocabulary(name), **EVERY_COVER)
    for text in TEXTS:
        found, wanted = targets_of(teacher, text), exact(teacher, text)
        np.testing.assert_allclose(found.probs, wanted, atol=1e-6)
        np.testing.assert_allclose(found.tail, 1 - wanted.sum(1), atol=2e-6)
        assert not found.unaccounted.any()


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_masses_down_to_1e_minus_30_keep_their_digits(vocabulary, name):
    teacher = function_teacher(vocabulary(name), spread=14.0, **EVERY_COVER)
    smallest = 1.0
    for text in TEXTS:
        found, wanted = targets_of(teacher, text).probs, exact(teacher, text)
        listed = wanted > 1e-30
        np.testing.assert_allclose(found[listed], wanted[listed], rtol=1e-4)
        smallest = min(smallest, wanted[listed].min())
    assert smallest < 1e-25


@pytest.mark.parametrize("name", SMALL)
def test_the_chain_rule_telescopes_and_no_cover_is_counted_twice(vocabulary, name):
    teacher = function_teacher(vocabulary(name), **EVERY_COVER)
    for text in TEXTS:
        ((window,),) = teacher.windows([("d", 0, teacher.vocabulary.encode(text))])
        lattice = Lattice(window)
        found = lattice.targets()
        given = found.probs[np.arange(len(text.encode())), np.frombuffer(text.encode(), np.uint8)]
        np.testing.assert_allclose(np.exp(np.diff(found.logp)), given, rtol=1e-5)
        assert lattice.marginal_nll <= canonical_nll(window) + 1e-6


@pytest.mark.parametrize("name", ["gpt2", "qwen", "llama2", "gemma", "rwkv"])
def test_no_target_knows_the_text_after_it(vocabulary, name):
    teacher = function_teacher(vocabulary(name), **EVERY_COVER)
    one, other = targets_of(teacher, "the th").probs, targets_of(teacher, "the ax").probs
    np.testing.assert_allclose(one[:5], other[:5], atol=1e-6)
    assert np.abs(one[5] - other[5]).max() > 1e-4


@pytest.mark.parametrize("effort", [{"tau": 1.0, "depth": 0}, {"tau": 0.02, "depth": 2, "static": 0.005}])
@pytest.mark.parametrize("name", SMALL)
def test_at_any_effort_rows_are_distributions_and_marginals_below_canonical(vocabulary, name, effort):
    teacher = function_teacher(vocabulary(name), floor=1e-4, **effort)
    ((window,),) = teacher.windows([("d", 0, teacher.vocabulary.encode("the cat  and the \u4f60"))])
    lattice = Lattice(window)
    found = lattice.targets()
    np.testing.assert_allclose(found.probs.sum(1) + found.tail, 1, atol=1e-5)
    assert (found.probs >= 0).all() and (found.tail >= 0).all() and (found.unaccounted <= found.tail + 1e-5).all()
    assert lattice.marginal_nll <= canonical_nll(window) + 1e-6


def test_a_token_of_1024_bytes_is_one_level_after_the_other(vocabulary):
    """Text inside the long token: its mass is followed for 1,023 bytes and given up where the text departs."""
    teacher = function_teacher(vocabulary("neox"), tau=1.0, depth=0)
    text = "a" + " " * 1023 + "b"
    ((window,),) = teacher.windows([("d", 0, teacher.vocabulary.encode(text))])
    first = int(np.flatnonzero(window.row_start == 1)[0])
    assert window.n_levels[first] == 1024
    found = Lattice(window).targets()
    np.testing.assert_allclose(found.probs.sum(1) + found.tail, 1, atol=1e-5)


@pytest.mark.parametrize("gap", [np.inf, 200.0, 100.0])
def test_text_beyond_the_smallest_mass_costs_no_more_than_itself(vocabulary, gap):
    """300 spaces, one by one, each of e^-25; a token of 1,024 spaces has no mass, or e^-100 and so soon all of it.

    A history without mass must not grow beyond float64 while the others shrink; where the text leaves the one that has
    everything, the canonical tokens go on alone.
    """
    teacher = function_teacher(vocabulary("neox"), tau=1.0, depth=0)
    table, engine = teacher.vocabulary.token_bytes, teacher.engine
    assert isinstance(engine, FunctionEngine)
    normal = engine.logits

    def logits(history):
        found = normal(history)
        peak = found.max()
        for token, piece in enumerate(table):
            if piece and not piece.strip(b" "):
                found[token] = peak - (25 if len(piece) == 1 else gap if len(piece) == 1024 else 60)
        return found

    engine.logits = logits
    text = "a" + " " * 300 + "bc"
    ids = [table.index(bytes([byte])) for byte in text.encode()]
    encoded = Encoded(np.array(ids, np.int32), np.arange(len(ids) + 1, dtype=np.int64), text.encode(), 0)
    ((window,),) = teacher.windows([("d", 0, encoded)])
    lattice = Lattice(window)
    found = lattice.targets()
    np.testing.assert_allclose(found.probs.sum(1) + found.tail, 1, atol=1e-5)
    assert np.isfinite(found.logp).all() and 0 < lattice.marginal_nll <= window.canonical_nll
    last = engine.next_token((teacher.vocabulary.start_id, *ids))
    mass = [sum(p for p, piece in zip(last, table, strict=True) if piece and piece[0] == byte) for byte in (0, 1)]
    assert found.probs[-1, 0] / found.probs[-1, 1] == pytest.approx(mass[0] / mass[1], rel=1e-4)  # no token is "c\0"


def test_what_else_is_in_the_batch_changes_nothing(tiny_checkpoint):
    """A real model: alone, among others, and in another order, a document's targets are the same."""
    from test_exactness import settings_for

    from bytecache.stages.teacher.teacher import open_teacher

    teacher = open_teacher(settings_for(tiny_checkpoint("bytelevel"), tau=0.01, depth=2))
    texts = ["the cache", "A teacher reads the text once, and the notes are kept.", "n\u00e9", "the student"]
    documents = [(str(i), i, teacher.vocabulary.encode(text)) for i, text in enumerate(texts)]
    seen: dict[str, Targets] = {}
    for batch in (documents, documents[::-1], *([document] for document in documents)):
        for window in next(teacher.windows(batch)):
            targets = Lattice(window).targets()
            first = seen.setdefault(window.doc_id, targets)
            np.testing.assert_allclose(targets.probs, first.probs, atol=1e-5)
            np.testing.assert_allclose(targets.tail, first.tail, atol=1e-5)
