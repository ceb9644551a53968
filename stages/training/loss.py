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
from torch.nn import functional

from stages.training.byte_head import ByteHead

IGNORE = -100
"""Label of positions that carry no token loss."""


class SlotTargets(NamedTuple):
    """Teacher targets of S slots as E flat entries; (slot, symbol) pairs are unique.

    slot int64 [E], symbol int64 [E] in 0..256, prob float32 [E], tail float32 [S] (unlisted mass, 0..1).
    """

    slot: Tensor
    symbol: Tensor
    prob: Tensor
    tail: Tensor


class _ByteTerms(torch.autograd.Function):
    """logits [S, 260], true symbol [S], targets -> (CE [S], KL [S]) in nats."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, true: Tensor, slot: Tensor, symbol: Tensor, prob: Tensor, tail: Tensor
    ) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(logits, dim=-1)
        ce = -logp.gather(1, true[:, None])[:, 0]
        unlisted = logp.clone()
        unlisted[slot, symbol] = -torch.inf
        # Never empty: the three special symbols are not listed by any teacher.
        log_u = torch.logsumexp(unlisted, dim=-1)
        cross = torch.zeros_like(ce).index_add_(0, slot, torch.xlogy(prob, prob) - prob * logp[slot, symbol])
        mass = tail.clone().index_add_(0, slot, prob)
        kl = cross + torch.xlogy(tail, tail) - tail * log_u
        ctx.save_for_backward(logp.exp(), unlisted.sub_(log_u[:, None]).exp_(), true, slot, symbol, prob, tail, mass)
        return ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, rest, true, slot, symbol, prob, tail, mass = ctx.saved_tensors
        g_ce, g_kl = grads
        grad = q * (g_ce + g_kl * mass)[:, None]
        grad.addcmul_(rest, (g_kl * tail)[:, None], value=-1)
        grad[slot, symbol] -= g_kl[slot] * prob
        grad[torch.arange(true.numel(), device=true.device), true] -= g_ce
        return grad, None, None, None, None, None


def byte_terms(logits: Tensor, true: Tensor, targets: SlotTargets) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the true symbol and KL(teacher || head), per slot.

    Args:
        logits: float [S, 260], computed in float32 at least.
        true: int64 [S], the text's own symbol, 0..256.
        targets: the teacher's entries and tails of the same S slots.

    Returns:
        (CE float [S], KL float [S]) in nats; KL is 0 only where the head equals the teacher on every listed symbol.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    prob, tail = targets.prob.to(z.dtype), targets.tail.to(z.dtype)
    terms = _ByteTerms.apply(z, true, targets.slot, targets.symbol, prob, tail)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], terms)


class LossParts(NamedTuple):
    """Sums over a micro-batch, in nats, not yet divided: token NLL, weighted byte CE, weighted KL; each 0-dim."""

    token: Tensor
    byte: Tensor
    kl: Tensor

    def total(self, n_tokens: int, n_byte_tokens: int, lambda_byte: float, lambda_kl: float) -> Tensor:
        """The objective's share of this micro-batch, given the counts of the whole step."""
        loss = self.token / max(n_tokens, 1)
        if lambda_byte or lambda_kl:
            loss = loss + (lambda_byte * self.byte + lambda_kl * self.kl) / max(n_byte_tokens, 1)
        return loss


def loss_parts(
    token_logits: Tensor,
    labels: Tensor,
    hidden: Tensor,
    head: ByteHead | None,
    slot_token: Tensor,
    slot_counts: list[int],
    slot_symbol: Tensor,
    slot_weight: Tensor,
    targets: SlotTargets | None,
) -> LossParts:
    """The three terms of one micro-batch.

    Args:
        token_logits: float [R, T, V]; row t predicts labels[:, t].
        labels: int64 [R, T], already shifted; IGNORE where there is nothing to predict.
        hidden: float [R, T, hidden], the lm_head's input.
        head: the byte head, or None for CE_token alone.
        slot_token, slot_counts, slot_symbol, slot_weight: see `stream.MicroBatch`.
        targets: None leaves KL at 0 without touching any teacher data (the control).
    """
    flat = token_logits.flatten(0, 1).float()
    token = functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    zero = token.new_zeros(())
    if head is None or slot_token.numel() == 0:
        return LossParts(token, zero, zero)
    logits = head(hidden.flatten(0, 1), slot_token, slot_counts)
    if targets is None:
        ce = functional.cross_entropy(logits.float(), slot_symbol, reduction="none")
        return LossParts(token, (ce * slot_weight).sum(), zero)
    ce, kl = byte_terms(logits, slot_symbol, targets)
    return LossParts(token, (ce * slot_weight).sum(), (kl * slot_weight).sum())
