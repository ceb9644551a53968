"""The byte terms against dense float64 references, gradients included."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from bytecache.stages.train.batches.types import SlotTargets
from bytecache.stages.train.objective.loss import FLOOR, byte_terms
from bytecache.stages.train.objective.symbols import HEAD_SYMBOLS


def case(slots: int, seed: int, *, tail: float = 0.1, sharp: float = 2.0):
    """Random logits and sparse targets; also the dense float64 teacher [S, 257] with its tails."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(slots, HEAD_SYMBOLS)) * sharp)
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
    listed = functional.pad(dense > 0, (0, HEAD_SYMBOLS - 257))
    p = functional.pad(dense, (0, HEAD_SYMBOLS - 257))
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


def dense_divergence(kind, logits, dense, tail, temperature=1.0):
    """Any divergence over listed symbols and one rest bucket, written out densely in float64, slot by slot."""
    values = []
    for z, p, t in zip(logits, dense, tail, strict=True):
        listed = p > 0
        p, t = p[listed], t
        if temperature != 1:
            spread = (257 - listed.sum()) * (t / (257 - listed.sum())) ** (1 / temperature)
            p = p ** (1 / temperature)
            p, t = p / (p.sum() + spread), spread / (p.sum() + spread)
        q = torch.softmax(z / temperature, -1)
        inside = torch.cat([listed, torch.zeros(3, dtype=torch.bool)])
        q = torch.cat([q[inside], q[~inside].sum()[None]])
        p = torch.cat([p, t[None]])
        kl = lambda a, b: torch.where(a > 0, a * (a.clamp_min(1e-300) / b).log(), 0.0).sum()  # noqa: E731
        if kind == "forward":
            values.append(kl(p, q))
        elif kind == "reverse":
            values.append(kl(q, p.clamp_min(FLOOR)))
        else:
            values.append((kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2)
    return torch.stack(values) * temperature**2


@pytest.mark.parametrize("tail", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_divergences_equal_a_dense_reference_with_gradients(kind, temperature, tail):
    logits, true, targets, dense = case(12, 7, tail=tail)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    _, got = byte_terms(a, true, targets, divergence=kind, temperature=temperature)
    want = dense_divergence(kind, b, dense, targets.tail, temperature)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    weight = torch.linspace(0.1, 2, 12, dtype=torch.float64)
    (weight * got).sum().backward()
    (weight * want).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_symbols_that_cannot_follow_have_no_gradient(kind):
    """-inf logits (a trie node offers few symbols), also where nothing is left for the bucket and the tail is 0."""
    logits = torch.full((2, HEAD_SYMBOLS), -torch.inf, dtype=torch.float64)
    logits[0, [1, 2, 3]] = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    logits[1, [4, 5]] = torch.tensor([0.1, 0.9], dtype=torch.float64)
    logits.requires_grad_()
    t = torch.tensor
    prob = t([0.5, 0.2, 0.4, 0.6], dtype=torch.float64)
    targets = SlotTargets(t([0, 0, 1, 1]), t([1, 2, 4, 5]), prob, t([0.3, 0.0], dtype=torch.float64))
    ce, value = byte_terms(logits, t([3, 4]), targets, divergence=kind)
    (ce + value).sum().backward()
    assert torch.isfinite(ce).all() and torch.isfinite(value).all() and torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 10:] == 0).all() and logits.grad.abs().sum() > 0
