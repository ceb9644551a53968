"""The marginal objective: masses and gradients against enumeration, the chain rule, and what trains the logits."""

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from bytecache.schemas.arrays import END
from bytecache.schemas.settings import Train
from bytecache.stages.train.batches.types import IGNORE, MicroBatch, SlotTargets
from bytecache.stages.train.objective import node_sums
from bytecache.stages.train.objective.choices import node_log_probs
from bytecache.stages.train.objective.loss import byte_terms, diverge
from bytecache.stages.train.objective.marginal import Marginal
from bytecache.stages.train.objective.node_sums import NodeTables, node_logits
from bytecache.stages.train.objective.objective import Objective
from bytecache.stages.train.objective.symbols import CONTROL, HEAD_SYMBOLS, STOP
from tests.support.small_trie import END_ID, ROWS, START_ID, WORDS, node_number, prefixes, vocabulary


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


def with_teacher(ids: list[int]) -> MicroBatch:
    """The same with a teacher that has every byte of WORDS equally likely, END too."""
    bare = micro_batch(ids)
    slots, symbols = len(bare.slot_symbol), torch.tensor([97, 98, 99, 100, END])
    slot = torch.arange(slots).repeat_interleave(len(symbols))
    prob = torch.full((len(slot),), 1 / len(symbols))
    return micro_batch(ids, SlotTargets(slot, symbols.repeat(slots), prob, torch.zeros(slots)))


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


def test_an_end_whose_successor_is_not_there_is_the_texts_to_decide():
    """The end of the row, a masked successor: the teacher says nothing there, the choice is learned all the same."""
    model = Marginal(vocabulary(), ROWS, trust=float("inf"))
    micro = with_teacher([0, 4, 1])
    ends = model.choices(micro, "sum")
    assert sorted(ends.row[ends.true == STOP].tolist()) == [0, 1, 2] and ends.certain.all()
    cut = micro.labels.clone()
    cut[0, 1] = IGNORE
    keep = micro.slot_token != 1
    number = torch.repeat_interleave(torch.arange(10), torch.tensor(micro.slot_counts))
    place = torch.cumsum(keep.long(), 0) - 1
    t = micro.targets
    kept = keep[t.slot]
    changed = replace(
        micro, labels=cut, slot_token=micro.slot_token[keep], slot_symbol=micro.slot_symbol[keep],
        slot_counts=torch.bincount(number[keep], minlength=10).tolist(), slot_weight=micro.slot_weight[keep],
        targets=SlotTargets(place[t.slot[kept]], t.symbol[kept], t.prob[kept], t.tail[keep]),
    )  # fmt: skip
    choices = model.choices(changed, "sum")
    stops = choices.true == STOP
    assert choices.row[stops].tolist() == [0, 2] and choices.certain[stops].tolist() == [False, True]
    assert not torch.isin(choices.targets.slot, torch.nonzero(~choices.certain)[:, 0]).any()


def test_packed_rows_do_not_look_at_one_another():
    """Two rows in one sequence, the second of which begins with the token that the first ends with."""
    model = Marginal(vocabulary(), ROWS, trust=float("inf"))
    one = with_teacher([0, 4])
    first = one.input_ids[0].tolist()
    ids, labels = torch.tensor([[*first[:2], 0, 4]]), torch.tensor([[0, 4, 4, END_ID]])
    ids[0, 2] = 4  # what the first row ended with, by chance
    shape = replace(one, input_ids=ids, labels=labels)
    slots = sorted([(k, t) for t, v in enumerate([0, 4, 4]) for k in range(len(WORDS[v]))] + [(0, 3)])
    number, place = (torch.tensor(c) for c in zip(*slots, strict=True))
    n = len(slots)
    shape = replace(
        shape, slot_token=place, slot_counts=torch.bincount(number, minlength=10).tolist(),
        slot_symbol=torch.full((n,), 97), slot_weight=torch.ones(n),
        targets=SlotTargets(torch.arange(n), torch.full((n,), 97), torch.ones(n), torch.zeros(n)),
    )  # fmt: skip
    for positions, certain in ((None, True), (torch.tensor([[0, 1, 0, 1]]), False)):
        choices = model.choices(replace(shape, position_ids=positions), "sum")
        end = (choices.true == STOP) & (choices.row == 1)
        assert choices.certain[end].tolist() == [certain]


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
    objective.term.marginal.trust = float("inf")
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
    assert objective.n_parameters == 0 and {n.split(".")[0] for n, _ in objective.named_parameters()} == {"term"}
    tight = Objective(Train(head="marginal", lambda_kl=1.0, max_tail=0.05), Stub(), 0)
    assert float(tight(logits, hidden, micro).kl.detach()) == 0
