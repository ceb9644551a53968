"""What a target may know of the text after it: no more than the mass that was handed on, at every preset.

Texts are drawn from the teacher itself, as the bound supposes (stages.fidelity.bound); the teacher's predictions depend
on how the text was cut as much as they can. Then the text goes on in several ways: each may change the canonical cut of
what was there before.
"""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from bytecache.schemas import settings as st
from bytecache.schemas.errors import InputError
from bytecache.schemas.settings import PRESETS
from bytecache.stages.fidelity.bound import JSD_PER_NAT, Bound
from bytecache.stages.fidelity.divergence import divergence
from bytecache.stages.lattice.effort import DROPPED, REFERENCE
from bytecache.stages.lattice.lattice import Lattice, Targets
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.tokens.vocab import Misfit, Vocabulary, load_vocabulary
from tests.support.families import FAMILIES
from tests.support.oracle import exact_distributions
from tests.support.places import FIXTURES
from tests.support.writing_model import (
    CUTS,
    WritingEngine,
    joining_where_tokens_break,
    write_tokenizer,
    writing_teacher,
)

SMALL = ["gpt2", "llama3", "qwen", "smollm2", "mistral", "gemma"]
"""Of families.py, but for those of CUTS, whose tokens are runs of white space, numbers and contractions."""
REAL = ["gpt2", "qwen3", "deepseek_v3", "smollm2", "mistral_v3", "gpt_neox"]
FUTURES = ["a", "\n", "7", "120 7", " ", "\n\n\nthe", "'t"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    made: dict[str, Vocabulary] = {}

    def get(name: str) -> Vocabulary:
        if name not in made:
            folder = tmp_path_factory.mktemp("causality") / name
            if name in CUTS:
                write_tokenizer(folder, name)
            else:
                FAMILIES[name].write(folder)
            made[name] = load_vocabulary(folder)
        return made[name]

    return get


def lattice_of(vocabulary: Vocabulary, text: str, **effort: float) -> Lattice | None:
    """None where the tokenizer cannot spell the text."""
    teacher = writing_teacher(vocabulary, **effort)
    (encoded,) = vocabulary.encode_batch([text])
    if isinstance(encoded, Misfit):
        return None
    ((window,),) = teacher.windows([("d", 0, encoded)])
    return Lattice(window)


def distance(one: Targets, other: Targets, until: int) -> np.ndarray:
    """JSD of the first positions, up to `until` and with it, nats."""
    rows = slice(0, until + 1)
    symbol = np.zeros(until + 1, np.int64)
    return divergence(one.probs[rows], one.tail[rows], other.probs[rows], other.tail[rows], symbol).jsd


def shift_and_bound(vocabulary: Vocabulary, effort: dict[str, float], texts: int, tokens: int) -> tuple[float, float]:
    """Mean JSD between what one text is given under two futures, and what the bound allows, per position."""
    engine = WritingEngine(vocabulary, floor=0.0, spread=2.0)
    shifts, allowed = [], []
    for seed in range(texts):
        past = engine.write(tokens, seed).decode()
        found = [lattice_of(vocabulary, past + future, **effort) for future in FUTURES]
        for one, other in combinations([lattice for lattice in found if lattice is not None], 2):
            shifts.append(distance(one.targets(), other.targets(), len(past)).mean())
            lost = [-np.log1p(-np.minimum(f.handed().total[: len(past) + 1], 1 - 1e-12)).mean() for f in (one, other)]
            allowed.append(min(JSD_PER_NAT * sum(lost), math.log(2)))
    return float(np.mean(shifts)), float(np.mean(allowed))


@pytest.mark.parametrize(
    "preset", ["balanced", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fast", "exact"))]
)
@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "mistral"])
def test_what_follows_moves_a_target_by_no_more_than_the_bound(small, name, preset):
    shift, allowed = shift_and_bound(small(name), PRESETS[preset], texts=6, tokens=6)
    assert shift <= allowed


def real_vocabulary(name: str) -> Vocabulary:
    """Of a fixture, or of Gemma where its packages are installed."""
    folder: Path = FIXTURES / "tokenizers" / name
    if name == "gemma-3-270m":
        try:
            folder = resolve_model(st.Teacher(model=f"builtin:{name}"))
        except InputError as error:  # make gemma
            pytest.skip(str(error))
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return load_vocabulary(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [*REAL, "gemma-3-270m"])
def test_and_so_with_real_tokenizers(name, preset):
    shift, allowed = shift_and_bound(real_vocabulary(name), PRESETS[preset], texts=4, tokens=6)
    assert shift <= allowed


@pytest.mark.slow
def test_the_rule_that_is_no_more_moves_them_further(small, monkeypatch):
    """The tests above can fail, and the bound would say so."""
    vocabulary, effort = small("gpt2"), PRESETS["exact"]
    now, allowed = shift_and_bound(vocabulary, effort, texts=14, tokens=6)
    monkeypatch.setattr(Lattice, "deviations", joining_where_tokens_break(Lattice.deviations))
    before, allowed_before = shift_and_bound(vocabulary, effort, texts=14, tokens=6)
    assert before > 10 * now
    assert allowed_before > 2 * allowed


@pytest.mark.parametrize("name", SMALL)
def test_no_more_bits_are_given_to_the_text_than_the_bound_says(small, name):
    """Against brute force, of texts with blank lines, indentation, numbers and contractions."""
    vocabulary = small(name)
    checked = 0
    for text in ("\n\n\na", "a\n\n  b", "12 7120", "don't", "the  \n\n7"):
        (encoded,) = vocabulary.encode_batch([text])
        if isinstance(encoded, Misfit):
            continue
        for effort in ({"tau": 0.2, "depth": 1, "static": 0.01}, PRESETS["exact"]):
            teacher = writing_teacher(vocabulary, **effort)
            ((window,),) = teacher.windows([("d", 0, encoded)])
            lattice = Lattice(window)
            exact = exact_distributions(vocabulary, teacher.engine.next_token, encoded.data)  # type: ignore[attr-defined]
            true = np.frombuffer(encoded.data, np.uint8)
            at = np.arange(len(true))
            targets = lattice.targets()
            given = lattice.marginal_nll if not encoded.synthetic else -float(targets.logp[-1])
            bound = Bound()
            bound.add(lattice)
            assert -given <= np.log(exact[at, true]).sum() + bound.leak_nats + 1e-5
            checked += 1
    assert checked >= 6


@pytest.mark.parametrize("name", SMALL)
def test_a_reference_is_within_its_word_of_brute_force(small, name):
    """All histories above 2e-4, no joins: where cuts say what follows too."""
    vocabulary = small(name)
    errors, missed = [], []
    for seed in range(3):
        (encoded,) = vocabulary.encode_batch([WritingEngine(vocabulary, floor=0.0, spread=2.0).write(4, seed).decode()])
        if isinstance(encoded, Misfit):
            continue
        teacher = writing_teacher(vocabulary, **REFERENCE)
        ((window,),) = teacher.windows([("d", 0, encoded)])
        lattice = Lattice(window, drop=DROPPED)
        exact = exact_distributions(vocabulary, teacher.engine.next_token, encoded.data, encoded.synthetic)  # type: ignore[attr-defined]
        targets = lattice.targets()
        np.testing.assert_allclose(targets.probs.sum(1) + targets.tail, 1, atol=1e-5)
        assert not targets.unaccounted.any()
        errors.append(np.abs(targets.probs - exact).sum(1))
        missed.append(lattice.handed().total)
    assert len(errors) >= 2
    assert np.concatenate(errors).mean() < 0.01 and np.concatenate(missed).mean() < 0.002
