"""What a teacher's bytes say of tokens: Bayes' rule for the cuts against frequencies, and which choices are open."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from bytecache.schemas.arrays import END
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.batches.types import SlotTargets
from bytecache.stages.train.objective.loss import byte_terms
from bytecache.stages.train.objective.marginal import Marginal
from bytecache.stages.train.objective.node_sums import node_logits
from bytecache.stages.train.objective.projection import Places, project
from bytecache.stages.train.objective.symbols import STOP
from tests.support.small_trie import ROWS, node_number, prefixes, vocabulary

EVERY = float("inf")


def projected(model, teacher, node, depth, passed, length, trust=EVERY):
    """`project` with the tables of a model."""
    nothing = torch.zeros_like(node)
    places = Places(node, depth, passed, length, nothing, nothing > 0, torch.zeros(len(node)))
    return project(teacher, places, model.tables, model.segmentation, trust)


SPELT = [b"a", b"b", b"c", b"ab", b"abc", b"ba", b"cab"]


def greedy(text: bytes) -> list[bytes]:
    """Cut by longest match."""
    out, at = [], 0
    while at < len(text):
        word = max((w for w in SPELT if text.startswith(w, at)), key=len)
        out.append(word)
        at += len(word)
    return out


STEP = {97: [0.1, 0.6, 0.3], 98: [0.5, 0.1, 0.4], 99: [0.4, 0.3, 0.3]}


@pytest.fixture(scope="module")
def source() -> tuple[bytes, list[bytes], Marginal]:
    """Text of a first-order byte source, its longest-match cuts, and an objective that has counted them."""
    rng = np.random.default_rng(0)
    text = [97]
    for _ in range(60_000):
        text.append(int(rng.choice([97, 98, 99], p=STEP[text[-1]])))
    data = bytes(text)
    words = greedy(data)
    spelt = Vocabulary([*SPELT, None], start_id=7, end_ids=[7], encoder=None)  # type: ignore[arg-type]
    model = Marginal(spelt, 8)
    edges = np.cumsum([0, *map(len, words)])
    ends = np.full(len(words), len(data))
    model.segmentation.add(model.tables, np.frombuffer(data, np.uint8), edges[:-1], edges[1:], ends)
    model.segmentation.settle()
    return data, words, model


def test_projected_targets_are_the_tokenizers_own_choices(source):
    """A first-order byte source cut by longest match: projecting its exact byte probabilities gives the empirical
    frequencies of what tokens choose at each node, given the token before, up to sampling."""
    _, words, model = source
    compared = 0
    for before in SPELT:
        after = [w for v, w in pairwise(words) if v == before]
        for prefix in (b"", b"a", b"ab", b"b", b"c", b"bc"):
            seen = Counter("stop" if w == prefix else w[len(prefix)] for w in after if w.startswith(prefix))
            total = sum(seen.values())
            if total < 1500:
                continue
            compared += 1
            try:
                passed = node_number(model.tables, before + prefix)
            except AssertionError:
                passed = -1
            p = torch.tensor(STEP[(before + prefix)[-1]])
            teacher = SlotTargets(torch.zeros(3, dtype=torch.int64), torch.tensor([97, 98, 99]), p, torch.zeros(1))
            node, depth = torch.tensor([node_number(model.tables, prefix)]), torch.tensor([len(prefix)])
            got = projected(model, teacher, node, depth, torch.tensor([passed]), torch.tensor([len(before)])).targets
            for symbol in (97, 98, 99):
                mine = float(got.prob[got.symbol == symbol].sum())
                assert mine == pytest.approx(seen[symbol] / total, abs=0.03), (before, prefix, symbol)
            stop = float(got.prob[got.symbol == STOP].sum())
            assert stop == pytest.approx(seen["stop"] / total, abs=0.03), (before, prefix)
    assert compared > 8


def test_of_unlisted_bytes_as_many_stop_as_of_the_text_at_large(source):
    data, words, model = source
    often = {b: data.count(b) / len(data) for b in (97, 98, 99)}
    starts = np.cumsum([0, *map(len, words)])[:-1]
    for prefix, listed in ((b"a", 99), (b"b", 99), (b"ab", 97)):  # which no token goes on with
        stops = goes = 0.0
        for byte, share in often.items():
            here = [w for at, w in zip(starts, words, strict=True) if data.startswith(prefix + bytes([byte]), at)]
            stops += share * sum(w == prefix for w in here) / len(here)
            goes += share * sum(len(w) > len(prefix) for w in here) / len(here)
        teacher = SlotTargets(torch.tensor([0]), torch.tensor([listed]), torch.tensor([0.2]), torch.tensor([0.8]))
        got = projected(
            model, teacher, torch.tensor([node_number(model.tables, prefix)]), torch.tensor([len(prefix)]),
            torch.tensor([-1]), torch.tensor([0]),
        ).targets  # fmt: skip
        assert got.symbol.tolist() == [STOP]
        assert float(got.prob) == pytest.approx(0.2 + 0.8 * stops / (stops + goes), abs=0.01)
        assert float(got.prob) + float(got.tail) == pytest.approx(1)


def test_a_student_that_goes_on_where_the_teacher_stops_is_charged(source):
    """To stop and to go on with a byte that nobody lists are two things."""
    _, _, model = source
    node, one = torch.tensor([node_number(model.tables, b"a")]), torch.ones(1)
    teacher = SlotTargets(torch.tensor([0]), torch.tensor([99]), one, torch.zeros(1))  # "ac" is no token's beginning
    targets = projected(model, teacher, node, torch.tensor([1]), torch.tensor([-1]), torch.tensor([0])).targets
    z = torch.zeros(1, 8)
    z[0, 3:5] = 8.0  # "ab" and "abc"
    wrong, right = (
        float(byte_terms(node_logits(s, torch.tensor([0]), node, model.tables), torch.tensor([STOP]), targets)[1])
        for s in (z, -z)
    )
    assert right < 0.01 and wrong > 5


def test_projection_keeps_distributions_and_tails():
    model = Marginal(vocabulary(), ROWS)
    names = prefixes()
    nodes = torch.tensor([node_number(model.tables, p) for p in names])
    rng = np.random.default_rng(1)
    slot, symbol, prob = [], [], []
    tail = rng.uniform(0, 0.3, len(names))
    for s in range(len(names)):
        listed = rng.choice([97, 98, 99, 100, 0xE6, 0x97, 0xA5, END], size=4, replace=False)
        slot += [s] * 4
        symbol += listed.tolist()
        prob += (rng.dirichlet(np.ones(4)) * (1 - tail[s])).tolist()
    targets = SlotTargets(
        torch.tensor(slot), torch.tensor(symbol), torch.tensor(prob, dtype=torch.float64), torch.tensor(tail)
    )
    nothing = torch.full((len(names),), -1)
    depths = torch.tensor([len(p) for p in names])
    got = projected(model, targets, nodes, depths, nothing, torch.zeros_like(nothing)).targets
    total = got.tail.clone().index_add_(0, got.slot, got.prob)
    known = total > 0
    torch.testing.assert_close(total[known], torch.ones_like(total[known]))
    z = torch.randn(1, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    scores = node_logits(z, torch.zeros(len(names), dtype=torch.int64), nodes, model.tables)
    assert torch.isfinite(scores[got.slot, got.symbol]).all(), "an entry on something the node does not offer"
    assert torch.isfinite(scores).sum(1).tolist() == model.tables.offered(nodes).tolist()
    true = scores.argmax(1)
    for kind in ("forward", "reverse", "js"):
        _, value = byte_terms(scores, true, got, divergence=kind)
        assert torch.isfinite(value).all() and (value > -1e-9)[known].all()
        (grad,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        assert torch.isfinite(grad).all() and abs(float(grad.sum())) < 1e-9  # a shift of all logits changes nothing


def test_where_only_the_cut_hangs_the_text_corrects_it_without_bias(source):
    """`c` before an `a` is a token, or the beginning of `cab`: the byte after decides, which the teacher's row does not
    know. Over all ways that the text can go, weighted as it goes, the targets have the true mean."""
    _, _, model = source
    tables, cut = model.tables, model.segmentation
    node = torch.tensor([node_number(tables, b"c")])
    teacher = SlotTargets(
        torch.zeros(3, dtype=torch.int64), torch.tensor([97, 98, 99]), torch.tensor(STEP[99]), torch.zeros(1)
    )
    ways = [(97, False, STEP[99][0] * STEP[97][1]), (97, True, STEP[99][0] * (1 - STEP[97][1]))]
    ways += [(98, True, STEP[99][1]), (99, True, STEP[99][2])]
    truth = {97: STEP[99][0] * STEP[97][1], STOP: 1 - STEP[99][0] * STEP[97][1]}
    mean = Counter()
    targets = []
    for following, stopped, weight in ways:
        places = Places(
            node, torch.tensor([1]), torch.tensor([-1]), torch.tensor([0]), torch.tensor([following]),
            torch.tensor([stopped]), torch.zeros(1),
        )  # fmt: skip
        found = project(teacher, places, tables, cut, 0.01)
        assert not found.certain[0] and not found.open[0]
        assert (found.targets.prob >= 0).all() and float(found.targets.prob.sum()) == pytest.approx(1)
        targets.append(dict(zip(found.targets.symbol.tolist(), found.targets.prob.tolist(), strict=True)))
        for symbol, prob in targets[-1].items():
            mean[symbol] += weight * prob
    assert targets[0][97] > targets[2][97] > targets[1].get(97, 0.0), "the text's own cut is heard"
    for symbol, prob in truth.items():
        assert mean[symbol] == pytest.approx(prob, abs=0.01)
    assert project(teacher, places, tables, cut, EVERY).certain[0]


def test_where_the_token_itself_hangs_the_text_decides(source):
    """At `ab` before a `c`, if half of the tokens there had ended at `a`: the choice is not always asked."""
    _, _, model = source
    node = torch.tensor([node_number(model.tables, b"ab")])
    teacher = SlotTargets(
        torch.zeros(3, dtype=torch.int64), torch.tensor([97, 98, 99]), torch.tensor(STEP[98]), torch.zeros(1)
    )
    shares = model.segmentation
    at = shares.get_buffer("base")[node_number(model.tables, b"abc")]
    kept = shares.on[at : at + 4].clone()
    with torch.no_grad():
        shares.on[at : at + 4] = torch.tensor([0.3, 0.5, 0.2, 0.0])
    places = Places(
        node, torch.tensor([2]), torch.tensor([-1]), torch.tensor([0]), torch.tensor([99]), torch.tensor([False]),
        torch.zeros(1),
    )  # fmt: skip
    found = project(teacher, places, model.tables, shares, 0.05)
    with torch.no_grad():
        shares.on[at : at + 4] = kept
    assert found.open[0] and not found.certain[0]


def test_where_the_end_of_the_token_before_is_in_doubt_the_text_decides(source):
    """At `ba`, which no byte continues, all is certain: unless what follows still decides where the token began."""
    _, _, model = source
    teacher = SlotTargets(
        torch.zeros(3, dtype=torch.int64), torch.tensor([97, 98, 99]), torch.tensor(STEP[99]), torch.zeros(1)
    )
    node = torch.tensor([node_number(model.tables, b"ba")])
    seen = []
    for doubt in (0.0, 0.3):
        places = Places(
            node, torch.tensor([2]), torch.tensor([-1]), torch.tensor([1]), torch.tensor([97]), torch.tensor([True]),
            torch.tensor([doubt]),
        )  # fmt: skip
        found = project(teacher, places, model.tables, model.segmentation, 0.05)
        seen.append((bool(found.certain[0]), bool(found.open[0])))
        assert project(teacher, places, model.tables, model.segmentation, EVERY).certain[0]
    assert seen == [(True, False), (False, True)]
