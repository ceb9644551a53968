"""The objective: CE_token + lambda_byte * CE_byte + lambda_kl * KL_byte(teacher || head), sparse from disk to gradient.

Algorithm. A slot r is one byte of one student token. The teacher lists probabilities p_i for some symbols L and keeps
the rest as one number t (the tail). With q = softmax(head logits) over 260 symbols,

    KL_r = sum_{i in L} p_i (log p_i - log q_i) + t (log t - log u),     u = sum_{j not in L} q_j,

so the unlisted symbols form one bucket and nothing is renormalised. log u is a log-sum-exp over the unlisted logits,
not log(1 - sum of listed): the latter cancels to nothing in float32 once the listed mass reaches 1. Gradients have
a closed form,

    dKL/dz_j = q_j (sum_L p + t) - p_j [j in L] - t r_j,     r = softmax over the unlisted only,

hence one fused autograd function that stores two [S, 260] arrays (q, r) and scatters at unique places: deterministic.
A slot's loss is weighted 1/n (`mean`) or 1 (`sum`), n = supervised bytes among its token's first ten, then summed and
divided by the tokens of the whole step, so micro-batches and ranks add up to the same number.
Price: about 3 passes over [S, 260] floats forward, 3 backward; no [batch, time, 10, 260] array exists.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bytecache.schemas.arrays import SYMBOLS
from bytecache.stages.train.batches.types import SlotTargets

FLOOR = 1e-6
"""Smallest probability that targets can hold; reverse KL charges the student no more than -log of it."""
TINY = 1e-37
"""Keeps a logarithm finite where it is multiplied by 0."""
LOWEST = -1e4
"""Stands for log 0 where it is multiplied by 0."""


class _LogProbs(torch.autograd.Function):
    """logits [S, 260], true [S], slot [E], symbol [E] -> (log q(true) [S], log q of the entries [E], log u [S])."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, true: Tensor, slot: Tensor, symbol: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logp = torch.log_softmax(logits, dim=-1)
        unlisted = logp.clone()
        unlisted[slot, symbol] = -torch.inf
        log_u = torch.logsumexp(unlisted, dim=-1)
        rest = unlisted.sub_(log_u.clamp_min(LOWEST)[:, None]).exp_()
        listed = logp[slot, symbol]
        right = logp.gather(1, true[:, None])[:, 0]
        ctx.save_for_backward(logp.exp_(), rest, true, slot, symbol)
        return right, listed, log_u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, rest, true, slot, symbol = ctx.saved_tensors
        g_true, g_listed, g_u = grads
        total = (g_true + g_u).index_add(0, slot, g_listed)
        grad = q.mul(total[:, None]).neg_()
        grad.addcmul_(rest, g_u[:, None])
        grad[slot, symbol] += g_listed
        grad[torch.arange(true.numel(), device=true.device), true] += g_true
        return grad, None, None, None


def _tempered(targets: SlotTargets, temperature: float, symbols: int | Tensor) -> SlotTargets:
    """The teacher at another temperature: p^(1/T) and, the tail being spread evenly over its symbols, renormalised."""
    prob, tail = targets.prob, targets.tail
    ones = torch.ones_like(prob)
    unlisted = symbols - torch.zeros_like(tail).index_add_(0, targets.slot, ones)
    prob = prob ** (1 / temperature)
    # With nothing left to list a tail is rounding, which a power would blow up.
    tail = torch.where(unlisted > 0, unlisted * (tail / unlisted.clamp_min(1)) ** (1 / temperature), 0.0)
    total = tail.clone().index_add_(0, targets.slot, prob)
    return SlotTargets(targets.slot, targets.symbol, prob / total[targets.slot], tail / total)


def _divergence(kind: str, p: Tensor, log_q: Tensor) -> Tensor:
    """Elementwise share of the divergence between teacher p and student q; they sum to it over a partition."""
    log_p = p.clamp_min(FLOOR if kind == "reverse" else TINY).log()
    if kind == "forward":
        return torch.where(p > 0, p * (log_p - log_q), 0.0)
    q = log_q.exp()
    if kind == "reverse":
        return torch.where(q > 0, q * (log_q.clamp_min(LOWEST) - log_p), 0.0)
    log_m = ((p + q) / 2).clamp_min(TINY).log()
    mine = torch.where(q > 0, q * (log_q.clamp_min(LOWEST) - log_m), 0.0)
    return (torch.where(p > 0, p * (log_p - log_m), 0.0) + mine) / 2


def byte_terms(
    logits: Tensor, true: Tensor, targets: SlotTargets, *, divergence: str = "forward", temperature: float = 1.0,
    symbols: int | Tensor = SYMBOLS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of the true symbol, and the divergence between teacher and head, per slot.

    Args:
        logits: float [S, 260], computed in float32 at least; -inf for a symbol that cannot follow.
        true: int64 [S], the text's own symbol.
        targets: the teacher's entries and tails of the same S slots; no entry on a symbol of logit -inf.
        divergence: "forward" KL(teacher || head), "reverse" KL(head || teacher) or "js" (Jensen-Shannon).
        temperature: both sides of the divergence at T; it is multiplied by T squared, which keeps its gradients' size.
        symbols: how many the teacher's tail is spread over, the listed ones included; one number, or int64 [S].

    Returns:
        (CE float [S], divergence float [S]) in nats; the latter is 0 only where the head equals the teacher on every
        listed symbol.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    targets = SlotTargets(targets.slot, targets.symbol, targets.prob.to(z.dtype), targets.tail.to(z.dtype))
    right, listed, log_u = cast(
        tuple[Tensor, Tensor, Tensor],
        _LogProbs.apply(z, true, targets.slot, targets.symbol),  # type: ignore[no-untyped-call]
    )
    ce = -right
    if temperature != 1.0:
        targets = _tempered(targets, temperature, symbols)
        _, listed, log_u = cast(
            tuple[Tensor, Tensor, Tensor],
            _LogProbs.apply(z / temperature, true, targets.slot, targets.symbol),  # type: ignore[no-untyped-call]
        )
    return ce, diverge(listed, log_u, targets, divergence) * temperature**2


def diverge(listed: Tensor, log_u: Tensor, targets: SlotTargets, divergence: str) -> Tensor:
    """The divergence [S] from the student's log-probabilities of the entries [E] and of each slot's bucket [S]."""
    shares = _divergence(divergence, targets.prob, listed)
    return _divergence(divergence, targets.tail, log_u).index_add(0, targets.slot, shares)


class LossParts(NamedTuple):
    """Sums over a micro-batch in nats, not yet divided, 0-dim.

    token: NLL of the tokens. byte: weighted CE of the bytes. kl: weighted divergence from the teacher. open: weighted
    CE of the choices that the teacher leaves to the text (`projection.py`).
    """

    token: Tensor
    byte: Tensor
    kl: Tensor
    open: Tensor

    def total(
        self, n_tokens: int, n_byte_tokens: int, lambda_token: float, lambda_byte: float, lambda_kl: float
    ) -> Tensor:
        """The objective's share of this micro-batch, given the counts of the whole step."""
        loss = lambda_token * self.token / max(n_tokens, 1)
        if lambda_byte or lambda_kl:
            loss = loss + (lambda_byte * self.byte + lambda_kl * (self.kl + self.open)) / max(n_byte_tokens, 1)
        return loss

    def plus(self, other: "LossParts") -> "LossParts":
        """The sums over both sets of positions."""
        return LossParts(*(a + b for a, b in zip(self, other, strict=True)))


class Divergence(NamedTuple):
    """How teacher and student are compared: `train.divergence`, `train.temperature`, `train.max_tail`."""

    kind: str = "forward"
    temperature: float = 1.0
    max_tail: float = 1.0

    def weights(self, weight: Tensor, unlisted: Tensor) -> Tensor:
        """Weights [S] of the divergence: 0 where the teacher left more than `max_tail` unlisted (float [S])."""
        return weight if self.max_tail >= 1 else weight * (unlisted <= self.max_tail)
