"""The marginal objective: masses and gradients against enumeration, the chain rule, and Bayes' rule for the cuts."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from bytecache.schemas.arrays import END
from bytecache.schemas.settings import Train
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.batches.types import IGNORE, MicroBatch, SlotTargets
from bytecache.stages.train.objective import node_sums
from bytecache.stages.train.objective.heads import HEAD_SYMBOLS
from bytecache.stages.train.objective.loss import byte_terms, diverge
from bytecache.stages.train.objective.marginal import Marginal
from bytecache.stages.train.objective.node_sums import CONTROL, STOP, NodeTables, node_log_probs, node_logits
from bytecache.stages.train.objective.objective import Objective

WORDS = [
    b"a",
    b"b",
    b"c",
    b"ab",
    b"abc",
    b"abd",
    b"ba",
    b"cab",
    b"ab",
    b"bcca",
    b"\xe6\x97\xa5",
    b"\xe6",
    b"\x97",
    b"\xa5",
]
END_ID, START_ID, ROWS = len(WORDS), len(WORDS) + 1, len(WORDS) + 4


def vocabulary() -> Vocabulary:
    """14 tokens, one spelt twice, an end, a start, and two rows of padding beyond the tokenizer."""
    return Vocabulary([*WORDS, None, None], start_id=START_ID, end_ids=[END_ID], encoder=None)  # type: ignore[arg-type]


def prefixes() -> list[bytes]:
    return sorted({w[:d] for w in WORDS for d in range(len(w) + 1)})


def node_number(tables: NodeTables, prefix: bytes) -> int:
    node = torch.tensor([0])
    for value in prefix:
        node = tables.child_of(node, torch.tensor([value]))
        assert int(node) > 0
    return int(node)


def dense_masses(z: torch.Tensor, prefix: bytes) -> torch.Tensor:
    """Masses [260] at a node, by asking every token."""
    e = z.exp()
    parts = {}
    for v, word in enumerate(WORDS):
        if word == prefix:
            parts.setdefault(STOP, []).append(e[v])
        elif word.startswith(prefix):
            parts.setdefault(word[len(prefix)], []).append(e[v])
    if not prefix:
        parts[END], parts[CONTROL] = [e[END_ID]], [e[START_ID], e[ROWS - 2], e[ROWS - 1]]
    zero = torch.zeros((), dtype=z.dtype)
    return torch.stack([torch.stack(parts[s]).sum() if s in parts else zero for s in range(HEAD_SYMBOLS)])


def test_masses_and_gradients_equal_enumeration(monkeypatch):
    tables = NodeTables(vocabulary(), ROWS)
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(3, ROWS, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    names = prefixes()
    row = torch.arange(len(names)) % 3
    node = torch.tensor([node_number(tables, p) for p in names])
    monkeypatch.setattr(node_sums, "CELLS", 7)
    got = node_logits(z, row, node, tables)
    want = torch.stack([dense_masses(z[r], p) for r, p in zip(row, names, strict=True)]).log()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.rand(got.shape, generator=generator, dtype=torch.float64)
    finite = torch.isfinite(want)
    (mine,) = torch.autograd.grad((got.softmax(-1) * weight).sum(), z)
    (theirs,) = torch.autograd.grad((want.masked_fill(~finite, -1e30).softmax(-1) * weight).sum(), z)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)


def test_tiny_masses_keep_their_digits():
    tables = NodeTables(vocabulary(), ROWS)
    z = torch.zeros(1, ROWS)
    z[0, 3:5] = torch.tensor([-60.0, -62.0])
    z[0, 5] = z[0, 8] = -61.0
    got = node_logits(z, torch.zeros(1, dtype=torch.int64), torch.tensor([node_number(tables, b"ab")]), tables)
    torch.testing.assert_close(got[0, ord("c")], torch.tensor(-62.0), rtol=1e-6, atol=0)
    stop = torch.logsumexp(torch.tensor([-60.0, -61.0]), 0)  # the two ids that spell "ab"
    torch.testing.assert_close(got[0, STOP], stop, rtol=1e-6, atol=0)


def micro_batch(ids: list[int], targets: SlotTargets | None = None) -> MicroBatch:
    """One document of WORDS' ids in one row, then its end."""
    tokens = [*ids, END_ID]
    spans = [WORDS[v] for v in ids]
    cells = sorted([(k, t, span[k]) for t, span in enumerate(spans) for k in range(len(span))] + [(0, len(ids), END)])
    k, place, symbol = (torch.tensor(c) for c in zip(*cells, strict=True))
    return MicroBatch(
        input_ids=torch.tensor([[START_ID, *ids]]), labels=torch.tensor([tokens]), slot_token=place,
        slot_counts=torch.bincount(k, minlength=10).tolist(), slot_symbol=symbol, slot_weight=torch.ones(len(k)),
        targets=targets, n_tokens=len(tokens), n_byte_tokens=len(tokens), n_bytes=0, lengths=[len(tokens)],
    )  # fmt: skip


def test_the_choices_of_a_token_multiply_to_its_probability():
    """Byte CE summed over a document equals its token CE, except for which of two equal spellings was meant."""
    model = Marginal(vocabulary(), ROWS)
    ids = [0, 4, 1, 9, 7, 10, 2]
    micro = micro_batch(ids)
    z = torch.randn(len(ids) + 1, ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    choices = model.choices(micro, "sum")
    logq = torch.log_softmax(node_logits(z, choices.row, choices.node, model.tables), -1)
    ce = torch.zeros(len(ids) + 1, dtype=torch.float64)
    ce.index_add_(0, choices.row, -logq.gather(1, choices.true[:, None])[:, 0])
    tokens = -torch.log_softmax(z, -1)[torch.arange(len(ids) + 1), micro.labels[0]]
    torch.testing.assert_close(ce, tokens, rtol=1e-12, atol=1e-12)
    mean = model.choices(micro, "mean").weight
    torch.testing.assert_close(torch.zeros(len(ids) + 1).index_add_(0, choices.row, mean), torch.ones(len(ids) + 1))


def test_a_padded_or_masked_end_asks_no_choice():
    """No end slot where the next position does not continue the token: row ends, masks, packed documents."""
    model = Marginal(vocabulary(), ROWS)
    micro = micro_batch([0, 4, 1])
    cut = micro.labels.clone()
    cut[0, 1] = IGNORE
    keep = micro.slot_token != 1
    counts = torch.bincount(
        torch.repeat_interleave(torch.arange(10), torch.tensor(micro.slot_counts))[keep], minlength=10
    ).tolist()
    changed = MicroBatch(
        micro.input_ids, cut, micro.slot_token[keep], counts, micro.slot_symbol[keep], micro.slot_weight[keep],
        None, 3, 3, 0, 4,
    )  # fmt: skip
    rows = model.choices(changed, "sum")
    assert sorted(rows.row[rows.true == STOP].tolist()) == [2]
    assert sorted(model.choices(micro, "sum").row[model.choices(micro, "sum").true == STOP].tolist()) == [0, 1, 2]


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
            got = model.project(teacher, node, depth, torch.tensor([passed]), torch.tensor([len(before)]))
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
        got = model.project(
            teacher, torch.tensor([node_number(model.tables, prefix)]), torch.tensor([len(prefix)]),
            torch.tensor([-1]), torch.tensor([0]),
        )  # fmt: skip
        assert got.symbol.tolist() == [STOP]
        assert float(got.prob) == pytest.approx(0.2 + 0.8 * stops / (stops + goes), abs=0.01)
        assert float(got.prob) + float(got.tail) == pytest.approx(1)


def test_a_student_that_goes_on_where_the_teacher_stops_is_charged(source):
    """To stop and to go on with a byte that nobody lists are two things."""
    _, _, model = source
    node, one = torch.tensor([node_number(model.tables, b"a")]), torch.ones(1)
    teacher = SlotTargets(torch.tensor([0]), torch.tensor([99]), one, torch.zeros(1))  # "ac" is no token's beginning
    targets = model.project(teacher, node, torch.tensor([1]), torch.tensor([-1]), torch.tensor([0]))
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
    got = model.project(targets, nodes, depths, nothing, torch.zeros_like(nothing))
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


def test_one_pass_equals_masses_then_loss():
    """The compiled pass without [S, 260] arrays against node_logits and the loss of its own, gradients included."""
    model = Marginal(vocabulary(), ROWS)
    names = prefixes() * 2
    node = torch.tensor([node_number(model.tables, p) for p in names])
    row = torch.arange(len(names)) % 5
    generator = torch.Generator().manual_seed(3)
    z = (torch.randn(5, ROWS, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    rng = np.random.default_rng(5)
    slot, symbol, prob, true = [], [], [], []
    for s, n in enumerate(node.tolist()):
        offered = torch.isfinite(node_logits(z, row[s : s + 1], torch.tensor([n]), model.tables))[0].nonzero()[:, 0]
        chosen = sorted(set(rng.choice(offered.numpy(), size=2).tolist()) - {CONTROL})
        slot += [s] * len(chosen)
        symbol += chosen
        prob += (rng.dirichlet(np.ones(3))[: len(chosen)]).tolist()
        true.append(int(rng.choice(offered.numpy())))
    tail = torch.ones(len(names), dtype=torch.float64)
    entries = torch.tensor(slot)
    tail -= torch.zeros_like(tail).index_add_(0, entries, torch.tensor(prob, dtype=torch.float64))
    bucket = torch.isfinite(node_logits(z, row, node, model.tables)).sum(1) > torch.bincount(
        entries, minlength=len(names)
    )
    tail = torch.where(bucket, tail, 0.0)
    targets = SlotTargets(entries, torch.tensor(symbol), torch.tensor(prob, dtype=torch.float64), tail)
    truth = torch.tensor(true)
    weight = torch.rand(len(names), generator=generator, dtype=torch.float64)
    label = torch.tensor([2, IGNORE, 7, ROWS - 1, 0, 5])  # the last row has no slot
    z = torch.cat([z.detach(), torch.randn(1, ROWS, generator=generator, dtype=torch.float64)]).requires_grad_()
    for kind in ("forward", "reverse", "js"):
        ce, apart = byte_terms(node_logits(z, row, node, model.tables), truth, targets, divergence=kind)
        nll = functional.cross_entropy(z, label, ignore_index=IGNORE, reduction="sum")
        (want,) = torch.autograd.grad((weight * (0.3 * ce + apart)).sum() + 0.7 * nll, z)
        asked = (row, node, truth, targets.slot, targets.symbol)
        token, right, listed, log_u = node_log_probs(z, label, *asked, model.tables)
        torch.testing.assert_close(token, nll)
        value = diverge(listed, log_u, targets, kind)
        torch.testing.assert_close(-right, ce, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(value, apart, rtol=1e-9, atol=1e-9)
        (got,) = torch.autograd.grad((weight * (value - 0.3 * right)).sum() + 0.7 * token, z)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


class Stub:
    """What Objective asks of a student."""

    vocabulary = vocabulary()
    hidden_size = 8

    class Model:
        def get_output_embeddings(self) -> torch.nn.Linear:
            return torch.nn.Linear(8, ROWS)

    model = Model()


def test_objective_marginal_trains_the_token_logits_towards_the_teacher():
    """Gradient descent on the logits alone: the divergence reaches 0 where the teacher can be matched."""
    objective = Objective(Train(head="marginal", lambda_token=0.0, lambda_kl=1.0, byte_reduction="sum"), Stub(), 0)
    ids = [4, 1]
    micro = micro_batch(ids)
    slots = len(micro.slot_symbol)
    generator = np.random.default_rng(3)
    prob = torch.tensor(generator.dirichlet(np.ones(3), slots) * 0.9).float()
    spelled = torch.tensor([97, 98, 99]).repeat(slots)
    targets = SlotTargets(torch.arange(slots).repeat_interleave(3), spelled, prob.flatten(), torch.full((slots,), 0.1))
    micro = micro_batch(ids, targets)
    logits = torch.zeros(1, 3, ROWS, requires_grad=True)
    hidden = torch.zeros(1, 3, 8)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    first = None
    for _ in range(200):
        parts = objective(logits, hidden, micro)
        loss = objective.total(parts, 3, 3)
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 0.05 and float(loss.detach()) < 1e-3
    assert objective.n_parameters == 0 and {n.split(".")[0] for n, _ in objective.named_parameters()} == {"marginal"}
    tight = Objective(Train(head="marginal", lambda_kl=1.0, max_tail=0.05), Stub(), 0)
    assert float(tight(logits, hidden, micro).kl.detach()) == 0
