"""Every head through the objective: dense references, sums over micro-batches, and no head reads what it predicts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bytecache.schemas import settings as st
from bytecache.schemas.arrays import END
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Train
from bytecache.stages.student import student
from bytecache.stages.student.student import Student
from bytecache.stages.train.batches.stream import ShardReader, collate, cut
from bytecache.stages.train.batches.types import IGNORE, SLOTS, MicroBatch
from bytecache.stages.train.objective.heads import AutoregressiveHead, ByteHead
from bytecache.stages.train.objective.objective import Objective
from bytecache.stages.train.objective.symbols import HEAD_SYMBOLS
from tests.support.student_data import make_dataset

HEADS = ("parallel", "autoregressive")


def small_student(vocabulary: int = 50) -> Student:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return Student(LlamaForCausalLM(config).eval(), None, None, 1, "", Path())  # type: ignore[arg-type]


def some_head(kind: str):
    """A head with weights large enough that every input shows in the output."""
    head = ByteHead(32, 1) if kind == "parallel" else AutoregressiveHead(32, 16, 1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return head


@pytest.mark.parametrize("kind", HEADS)
def test_no_head_can_read_the_token_it_predicts(kind):
    """Perturb token l, as input and as bytes: its own slots may change only after the byte that changed."""
    opened, head = small_student(), some_head(kind)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(2, 50, (12,), generator=generator)
    inputs = torch.cat([torch.tensor([0]), tokens[:-1]])[None]  # labels are `tokens`: slot (l, k) is fed by position l
    slot_token, counts = torch.arange(12).repeat(SLOTS), [12] * SLOTS
    symbols = torch.randint(0, 256, (SLOTS, 12), generator=generator)

    def logits(ids, true):
        with torch.no_grad():
            _, hidden = opened.forward(ids)
            return head(hidden.flatten(0, 1), slot_token, counts, true.flatten()).view(SLOTS, 12, HEAD_SYMBOLS)

    before = logits(inputs, symbols)
    for token in range(11):
        changed = inputs.clone()
        changed[0, token + 1] = (changed[0, token + 1] + 7) % 50
        after = logits(changed, symbols)
        assert torch.equal(before[:, : token + 1], after[:, : token + 1])
        assert (before[:, token + 1] - after[:, token + 1]).abs().max() > 1e-4
    for k in range(SLOTS):
        other = symbols.clone()
        other[k, 5] = (other[k, 5] + 1) % 256
        moved = (logits(inputs, other) - before).abs().amax(-1)
        assert (moved[: k + 1] == 0).all() and (moved[:, [t for t in range(12) if t != 5]] == 0).all()
        if kind == "autoregressive":
            assert (moved[k + 1 :, 5] > 1e-5).all()


@pytest.mark.parametrize("kind", HEADS)
def test_gradient_of_a_byte_loss_stops_before_its_token(kind):
    opened, head = small_student(), some_head(kind)
    ids = torch.arange(10, 20)[None]  # distinct, and tied weights only reach the loss through the inputs here
    _, hidden = opened.forward(ids)
    logits = head(hidden.flatten(0, 1), torch.tensor([5]), [1] + [0] * 9, torch.tensor([65]))
    functional.cross_entropy(logits, torch.tensor([65])).backward()
    grad = opened.model.get_input_embeddings().weight.grad.abs().sum(1)
    assert (grad[10:16] > 0).all() and (grad[16:20] == 0).all()


def test_parallel_slots_equal_a_dense_head():
    head = some_head("parallel")
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    slot_token = torch.tensor([0, 3, 6, 3, 5, 3])
    got = head(hidden, slot_token, [3, 2, 1, 0, 0, 0, 0, 0, 0, 0])
    dense = torch.einsum("th,ksh->tks", hidden, head.weight) + head.bias
    torch.testing.assert_close(got, dense[slot_token, torch.tensor([0, 0, 0, 1, 1, 2])])


def test_an_autoregressive_slot_is_the_sum_it_says():
    head = some_head("autoregressive")
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    slot_token, counts = torch.tensor([1, 2, 2, 2]), [2, 1, 1] + [0] * 7
    symbol = torch.tensor([65, 66, 67, 68])
    got = head(hidden, slot_token, counts, symbol)
    x = hidden[2] @ head.inward.T + head.slot[2] + head.past[1, 67] + head.past[2, 66]
    x = functional.gelu(functional.rms_norm(x, (16,), head.norm))
    torch.testing.assert_close(got[3], x @ head.outward.T + head.bias)


def batch(rows: list[int], ids, labels, lengths, symbols, reduction: str) -> MicroBatch:
    """Rows of a toy batch; lengths[r][t] bytes of each token."""
    cells = [
        (j, at * ids.shape[1] + t, 1 / n if reduction == "mean" else 1.0, symbols[r, t, j])
        for at, r in enumerate(rows) for t, n in enumerate(lengths[r]) for j in range(n)
    ]  # fmt: skip
    cells.sort(key=lambda c: c[0])
    k, place, weight, symbol = (np.array(c) for c in zip(*cells, strict=True))
    t = torch.from_numpy
    counts = np.bincount(k, minlength=SLOTS).tolist()
    return MicroBatch(
        input_ids=ids[rows], labels=labels[rows], slot_token=t(place), slot_counts=counts, slot_symbol=t(symbol),
        slot_weight=t(weight).float(), targets=None, n_tokens=0, n_byte_tokens=0, n_bytes=0, lengths=[0],
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_and_micro_batches(reduction):
    """Two micro-batches of one row each add up to the batch, and a slot's weight is what the reduction says."""
    opened = small_student()
    settings = Train(head="parallel", lambda_byte=1.0, lambda_kl=0.1, byte_reduction=reduction)
    objective = Objective(settings, opened, 1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 50, (2, 6), generator=generator)
    labels = torch.randint(2, 50, (2, 6), generator=generator)
    labels[1, 4:] = IGNORE
    lengths = [[1, 3, 2, 1, 2, 1], [2, 2, 1, 1]]
    symbols = np.random.default_rng(0).integers(0, END, size=(2, 6, 3))

    def parts(rows):
        micro = batch(rows, ids, labels, lengths, symbols, reduction)
        with torch.no_grad():
            logits, hidden = opened.forward(micro.input_ids)
            head = objective.term.head
            logq = torch.log_softmax(torch.einsum("rth,ksh->rtks", hidden, head.weight) + head.bias, -1)
            want = sum(-float(logq[at, t, j, symbols[r, t, j]]) / (n if reduction == "mean" else 1)
                       for at, r in enumerate(rows) for t, n in enumerate(lengths[r]) for j in range(n))  # fmt: skip
            return objective(logits, hidden, micro), want

    (both, want), (one, _), (two, _) = parts([0, 1]), parts([0]), parts([1])
    assert float(both.byte) == pytest.approx(want, rel=1e-5)
    total = objective.total(both, 10, 10)
    torch.testing.assert_close(total, objective.total(one, 10, 10) + objective.total(two, 10, 10))
    assert objective.terms(both, 10, 10)["loss"] == pytest.approx(float(both.token) / 10 + float(both.byte) / 10)
    plain = Objective(settings.model_copy(update={"lambda_byte": 0.0, "lambda_token": 0.5}), opened, 1, lambda_kl=0)
    torch.testing.assert_close(plain.total(both, 10, 10), both.token / 10)


@pytest.mark.parametrize("head", ["parallel", "marginal"])
def test_chunks_of_positions_change_nothing(tmp_path, head):
    """Sums and gradients of a real micro-batch, logits whole and in pieces of 7 positions through the lm_head."""
    targets = make_dataset(tmp_path / "targets", documents=4, sentences=6)
    student.prepare(st.Student(tokenizer="bpe:300", hidden_size=32, layers=1, heads=2), targets, tmp_path / "s", seed=1)
    opened = student.load(tmp_path / "s")
    reader = ShardReader(targets, read_dataset(targets), "train", opened.vocabulary, opened.end_id)
    micro = collate(cut(reader[0], 0, 400, 64)[:3], with_targets=True)
    found = []
    for chunk in (0, 7):
        objective = Objective(Train(head=head, chunk=chunk), opened, 0)
        objective.observe(reader)
        opened.model.zero_grad()
        if chunk:
            trunk, to_logits = student.split_model(opened)
            parts = objective(to_logits, trunk(micro.input_ids, None), micro)
        else:
            parts = objective(*opened.forward(micro.input_ids), micro)
        objective.total(parts, 5, 5).backward()
        found.append((parts, [p.grad.clone() for p in opened.model.parameters()]))
    assert float(found[0][0].kl.detach()) > 1
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_chunks_refuse_a_student_that_alters_its_logits():
    opened = small_student()
    forward = opened.model.forward
    opened.model.forward = lambda *a, **k: _scaled(forward(*a, **k))
    with pytest.raises(ConfigError, match="alters the logits"):
        student.split_model(opened)


def _scaled(output):
    output.logits = output.logits * 3
    return output
