"""Where a tokenizer's cuts are in doubt once the text has left every token, and where they are not."""

import pytest
import torch

from bytecache.stages.train.objective.loss import Divergence
from bytecache.stages.train.objective.marginal import MarginalTerm
from bytecache.stages.train.objective.segmentation import PRIOR, Segmentation
from tests.support.tiny_worlds import make_world


@pytest.fixture(scope="module")
def cut() -> Segmentation:
    """Cuts of a BPE that splits text into words at spaces."""
    world = make_world(2, "abcd ", 150, n=10_000)
    term = MarginalTerm(world.vocabulary, world.vocabulary.size, Divergence())
    term.observe(world.train)
    return term.marginal.segmentation


def test_a_space_leaves_no_doubt_even_where_the_text_never_had_one(cut):
    node = torch.nonzero(cut.left == 0)[:, 0]
    node = node[node > 0]
    assert len(node)
    length = cut.get_buffer("longest")[node]
    at_space, at_letter = (cut.doubt(node, torch.full_like(node, ord(letter)), length) for letter in " a")
    assert at_space.max() < 0.02 < 0.3 < at_letter.min()


def test_where_the_text_was_seen_its_own_share_counts(cut):
    """As if `PRIOR` more places had been seen, of which the symbol's habit is the share of longest tokens."""
    base, longest = cut.get_buffer("base"), cut.get_buffer("longest")
    for node in torch.argsort(cut.left, descending=True)[:8]:
        length = longest[node]
        ended = float(cut._counts[1, base[node] + length])
        share = (ended + PRIOR * float(cut.habit[97])) / (float(cut.left[node]) + PRIOR)
        found = cut.doubt(node[None], torch.tensor([97]), length[None])
        assert float(found[0]) == pytest.approx(min(share, 1 - share), abs=1e-4)
