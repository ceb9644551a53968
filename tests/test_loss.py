"""The objective against a dense float64 reference, and proof that no head can read the token it predicts."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from stages.training.byte_head import END, SLOTS, SYMBOLS, ByteHead
from stages.training.loss import IGNORE, SlotTargets, byte_terms, loss_parts
from stages.training.student import Student


def case(slots: int, seed: int, *, tail: float = 0.1, sharp: float = 2.0):
    """Random logits and sparse targets; also the dense float64 teacher [S, 257] with its tails."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(slots, SYMBOLS)) * sharp)
    dense = np.zeros((slots, 257))
    for s in range(slots):
        listed = rng.choice(257, size=rng.integers(1, 9), replace=False)
        dense[s, listed] = rng.dirichlet(np.ones(listed.size)) * (1 - tail)
    slot, symbol = np.nonzero(dense)
    t = torch.from_numpy
    targets = SlotTargets(t(slot), t(symbol), t(dense[slot, symbol]), torch.full((slots,), tail, dtype=torch.float64))
    true = t(rng.integers(0, 257, size=slots))
    return logits, true, targets, t(dense)


def reference(logits, true, dense, tail):
    """KL over listed symbols and one rest bucket, written out densely."""
    q = torch.softmax(logits.double(), -1)
    listed = functional.pad(dense > 0, (0, SYMBOLS - 257))
    p = functional.pad(dense, (0, SYMBOLS - 257))
    kl = torch.where(listed, torch.xlogy(p, p) - p * torch.log(q), 0.0).sum(-1)
    rest = torch.where(listed, 0.0, q).sum(-1)
    kl = kl + torch.xlogy(tail, tail) - torch.where(tail > 0, tail * torch.log(rest), 0.0)
    return -torch.log(q.gather(1, true[:, None])[:, 0]), kl


@pytest.mark.parametrize("tail", [0.0, 1e-4, 0.3, 0.999])
def test_sparse_terms_equal_the_dense_reference_with_gradients(tail):
    logits, true, targets, dense = case(40, 1, tail=tail)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ce, kl = byte_terms(a, true, targets)
    ce_ref, kl_ref = reference(b, true, dense, targets.tail)
    torch.testing.assert_close(ce, ce_ref, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl, kl_ref, rtol=1e-10, atol=1e-12)
    weight = torch.linspace(0.1, 2, 40, dtype=torch.float64)
    (weight * (0.7 * ce + 1.3 * kl)).sum().backward()
    (weight * (0.7 * ce_ref + 1.3 * kl_ref)).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    logits, true, targets, _ = case(3, 5)
    assert torch.autograd.gradcheck(lambda z: byte_terms(z, true, targets), logits.requires_grad_())


def test_float32_stays_true_when_the_listed_mass_reaches_one():
    """Listed logits 60 above the rest: 1 - sum(listed) is 0 in float32, the rest bucket must still be exact."""
    logits, true, targets, dense = case(16, 2, tail=1e-3)
    logits = logits + 60.0 * functional.pad(dense > 0, (0, 3)).double()
    single = logits.float().requires_grad_()
    double = single.detach().double().requires_grad_()
    _, kl = byte_terms(single, true, SlotTargets(*targets[:2], targets.prob.float(), targets.tail.float()))
    listed = functional.pad(dense > 0, (0, 3))
    log_q = torch.log_softmax(double, -1)
    p = functional.pad(dense, (0, 3))
    log_rest = torch.logsumexp(log_q.masked_fill(listed, -torch.inf), -1)
    rest = targets.tail * (targets.tail.log() - log_rest)
    want = (torch.xlogy(p, p) - torch.where(listed, p * log_q, 0.0)).sum(-1) + rest
    torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-6)
    kl.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-4, atol=1e-7)
    assert torch.isfinite(single.grad).all()


def test_kl_is_zero_exactly_at_the_teacher():
    _, true, targets, dense = case(8, 3, tail=0.2)
    p = functional.pad(dense, (0, 3))
    unlisted = p == 0
    q = torch.where(unlisted, 0.2 / unlisted.sum(-1, keepdim=True).double(), p)
    logits = q.log().requires_grad_()
    _, kl = byte_terms(logits, true, targets)
    kl.sum().backward()
    assert kl.abs().max() < 1e-12 and logits.grad.abs().max() < 1e-12


def small_student(vocabulary: int = 50) -> tuple[Student, ByteHead]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return Student(model, None, None, 1, ""), ByteHead(32, 1)  # type: ignore[arg-type]


def test_no_head_can_read_the_token_it_predicts():
    """Perturb token l (fed at input position l): logits of its own and earlier slots must not move, later ones must."""
    opened, head = small_student()
    tokens = torch.randint(2, 50, (12,), generator=torch.Generator().manual_seed(4))
    inputs = torch.cat([torch.tensor([0]), tokens[:-1]])[None]  # labels are `tokens`: slot (l, k) is fed by position l
    slot_token = torch.arange(12).repeat(SLOTS)
    counts = [12] * SLOTS

    def logits(ids):
        with torch.no_grad():
            _, hidden = opened.forward(ids)
            return head(hidden.flatten(0, 1), slot_token, counts).view(SLOTS, 12, SYMBOLS)

    before = logits(inputs)
    for token in range(11):
        changed = inputs.clone()
        changed[0, token + 1] = (changed[0, token + 1] + 7) % 50
        after = logits(changed)
        assert torch.equal(before[:, : token + 1], after[:, : token + 1])
        assert (before[:, token + 1] - after[:, token + 1]).abs().max() > 1e-4


def test_gradient_of_a_byte_loss_stops_before_its_token():
    opened, head = small_student()
    opened.model.get_input_embeddings().weight.requires_grad_()
    ids = torch.arange(10, 20)[None]  # distinct, and tied weights only reach the loss through the inputs here
    _, hidden = opened.forward(ids)
    logits = head(hidden.flatten(0, 1), torch.tensor([5]), [1] + [0] * 9)
    functional.cross_entropy(logits, torch.tensor([65])).backward()
    grad = opened.model.get_input_embeddings().weight.grad.abs().sum(1)
    assert (grad[10:16] > 0).all() and (grad[16:20] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_and_micro_batches(reduction):
    """Two micro-batches of one row each add up to the batch, and a slot's weight is what the reduction says."""
    opened, head = small_student()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 50, (2, 6), generator=generator)
    labels = torch.randint(2, 50, (2, 6), generator=generator)
    labels[1, 4:] = IGNORE
    n_bytes = [[1, 3, 2, 1, 2, 1], [2, 2, 1, 1]]  # bytes of each token
    true_rng = np.random.default_rng(0)

    def parts(rows):
        k, place, weight, symbol = [], [], [], []
        for at, r in enumerate(rows):
            for t, n in enumerate(n_bytes[r]):
                for j in range(n):
                    k.append(j)
                    place.append(at * 6 + t)
                    weight.append(1 / n if reduction == "mean" else 1.0)
                    symbol.append(symbols[r, t, j])
        by = np.argsort(k, kind="stable")
        counts = np.bincount(k, minlength=SLOTS).tolist()
        pick = lambda v, d: torch.tensor(np.asarray(v)[by], dtype=d)  # noqa: E731
        with torch.no_grad():
            logits, hidden = opened.forward(ids[rows])
            got = loss_parts(
                logits, labels[rows], hidden, head, pick(place, torch.int64), counts,
                pick(symbol, torch.int64), pick(weight, torch.float32), None,
            )  # fmt: skip
            logq = torch.log_softmax(torch.einsum("rth,ksh->rtks", hidden, head.weight) + head.bias, -1)
        want = sum(-float(logq[at, t, j, symbols[r, t, j]]) / (n if reduction == "mean" else 1)
                   for at, r in enumerate(rows) for t, n in enumerate(n_bytes[r]) for j in range(n))  # fmt: skip
        return got, want

    symbols = true_rng.integers(0, END, size=(2, 6, 3))
    (both, want), (one, _), (two, _) = parts([0, 1]), parts([0]), parts([1])
    assert float(both.byte) == pytest.approx(want, rel=1e-5)
    total = both.total(10, 10, 1.0, 0.1)
    torch.testing.assert_close(total, one.total(10, 10, 1.0, 0.1) + two.total(10, 10, 1.0, 0.1))
    torch.testing.assert_close(both.total(10, 10, 0.0, 0.0), both.token / 10)
