"""Light histories that the text bears out: evaluated because the text goes on as the known ones did not foresee."""

from collections.abc import Sequence

import numpy as np
import pytest

from bytecache.schemas.settings import PRESETS
from bytecache.stages.fidelity.divergence import kl_spread
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import Teacher
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary
from tests.support.oracle import exact_distributions
from tests.support.writing_model import WritingEngine, write_tokenizer, writing_teacher

CUTS = {
    "at a break": (["ab", " don", "."], ["a", "b", " don", "."]),
    "inside a token": (["ab", " the", " don", "."], ["ab", " t", "he", " don", "."]),
}
"""Canonical tokens and a rival's, by where the light rival is without a row beside it."""
SHORT = (["ab", "x", "q", "z", "j", " don", "."], ["a", "b", "x", "q", "z", "j", " don", "."])
"""The same with four tokens of a byte before the word that was foreseen."""


class Foreseeing(WritingEngine):
    """The canonical cut gives ` don` next to nothing; a light rival is nearly sure of it, and of what follows."""

    def __init__(self, vocabulary: Vocabulary, canonical: Sequence[str], rival: Sequence[str], share: float) -> None:
        super().__init__(vocabulary, floor=0.0, spread=2.0)
        self.told: dict[tuple[int, ...], dict[int, float]] = {}
        cuts = [self.ids(rival), self.ids(canonical)]
        common = next(i for i, (one, other) in enumerate(zip(*cuts, strict=False)) if one != other)
        for cut, odd, last in zip(cuts, (0.99, 1e-6), (".", "'t"), strict=True):
            for i, token in enumerate(cut):
                history = (vocabulary.start_id, *cut[:i])
                self.told[history] = {token: odd if vocabulary.token_bytes[token] == b" don" else 0.99}
            # After the odd word the two say different things of the next byte.
            self.told[history] = {self.ids([last])[0]: 0.99}
        leaves, stays = (cut[common] for cut in cuts)
        self.told[(vocabulary.start_id, *cuts[0][:common])] = {leaves: share, stays: 0.99 - share}

    def ids(self, pieces: Sequence[str]) -> list[int]:
        return [self.vocabulary.token_bytes.index(piece.encode()) for piece in pieces]

    def logits(self, history: Sequence[int]) -> np.ndarray:
        """float32 [size]"""
        found = super().logits(history).copy()
        said = self.told.get(tuple(int(token) for token in history), {})
        if said:
            others = np.delete(found, list(said))
            level = np.log(np.exp(others - others.max()).sum()) + others.max()
            for token, p in said.items():
                found[token] = np.log(p / (1.0 - sum(said.values()))) + level
        return found


def worst_position(vocabulary: Vocabulary, cuts: tuple[list[str], list[str]], preset: str) -> float:
    """The greatest KL of a text's positions to brute force, nats, at a preset."""
    canonical, other = cuts
    teacher: Teacher = writing_teacher(vocabulary, **PRESETS[preset])
    teacher.engine = engine = Foreseeing(vocabulary, canonical, other, share=PRESETS[preset]["tau"] / 2)
    encoded = vocabulary.encode("".join(canonical))
    assert [vocabulary.token_bytes[token] for token in encoded.ids] == [piece.encode() for piece in canonical]
    ((window,),) = teacher.windows([("d", 0, encoded)])
    targets = Lattice(window).targets()
    exact = exact_distributions(vocabulary, engine.next_token, encoded.data)
    return float(kl_spread(exact, np.maximum(1 - exact.sum(1), 0.0), targets.probs, targets.tail).max())


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    return load_vocabulary(write_tokenizer(tmp_path_factory.mktemp("borne"), "gpt2"))


@pytest.mark.parametrize("preset", ["balanced", "exact"])
@pytest.mark.parametrize("rival", CUTS)
def test_a_light_history_is_evaluated_where_the_text_goes_on_as_it_alone_foresaw(vocabulary, rival, preset):
    assert worst_position(vocabulary, CUTS[rival], preset) < 0.1


@pytest.mark.parametrize("rival", CUTS)
def test_it_is_not_by_its_share_alone(vocabulary, rival, monkeypatch):
    """The test above can fail."""
    monkeypatch.setattr("bytecache.stages.lattice.effort.BORNE_OUT", np.inf)
    assert worst_position(vocabulary, CUTS[rival], "balanced") > 1.0


def test_two_tokens_of_a_byte_are_too_little_text_to_tell_by(vocabulary, monkeypatch):
    assert worst_position(vocabulary, SHORT, "balanced") < 0.1
    monkeypatch.setattr("bytecache.stages.lattice.lattice.AHEAD_BYTES", 0)
    assert worst_position(vocabulary, SHORT, "balanced") > 1.0
