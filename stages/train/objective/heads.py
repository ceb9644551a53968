"""Byte heads: maps from the hidden state *before* a token to that token's first ten bytes.

    parallel        the paper's (BLD, arXiv 2604.07466): slot k of token l is softmax(W[k] h + c[k]) over 260 symbols,
                    h the input of the lm_head at position l-1; reading it at l would hand the head its token
    autoregressive  slot k of token l: U gelu(A h + s_k + sum_{j<k} E[k-j, b_j]), s_k a learnt vector: slot k sees the
                    token's bytes before it, as the teacher's targets do; byte k itself never

h is the lm_head's input at the position before the token, so no head can read the token it predicts; the autoregressive
head reads what the text has revealed of it, b_0 .. b_{k-1}, which is what "next byte" is conditioned on.
Price per byte: 6 * 260 * width FLOPs and, per token, 6 * hidden * width; `benchmarks/objective_cost.py` measures it.
The parallel head is evaluated only at bytes that exist: slots arrive sorted by k, so ten matrix products over
[S_k, hidden] replace one over [tokens, 10, 260] (at three bytes a token, 30 % of the dense work). It holds
10 * 260 * (hidden + 1) parameters (0.50 M at hidden 192, 26.6 M at 10k).
The autoregressive head holds hidden * width + 11 * 260 * width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bytecache.stages.train.batches.types import SLOTS, MicroBatch
from bytecache.stages.train.objective.loss import Divergence, LossParts, byte_terms
from bytecache.stages.train.objective.symbols import HEAD_SYMBOLS
from bytecache.stages.train.objective.term import ByteTerm


class ByteHead(nn.Module):
    """Parallel linear byte heads.

    Args:
        hidden_size: width of the student's hidden state.
        seed: seed of the initialisation (normal, 0.02), independent of the global generator.
    """

    def __init__(self, hidden_size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(SLOTS, HEAD_SYMBOLS, hidden_size, generator=generator) * 0.02)
        self.bias = nn.Parameter(torch.zeros(SLOTS, HEAD_SYMBOLS))

    def forward(
        self, hidden: Tensor, slot_token: Tensor, slot_counts: Sequence[int], slot_symbol: Tensor | None = None
    ) -> Tensor:
        """Logits of every slot.

        Args:
            hidden: float [P, hidden], one row per input position of the micro-batch, flattened.
            slot_token: int64 [S], the row of `hidden` that precedes the slot's token; sorted by slot number k.
            slot_counts: how many slots have k = 0, 1, ..., 9; sums to S.
            slot_symbol: not read; a head that sees the bytes before its own needs it.

        Returns:
            float [S, 260].
        """
        # An embedding lookup rather than indexing: its backward is fast and deterministic on every device.
        rows = torch.split(functional.embedding(slot_token, hidden), list(slot_counts))
        return torch.cat([functional.linear(r, self.weight[k], self.bias[k]) for k, r in enumerate(rows)])

    def flops(self, tokens: int, slots: int) -> int:
        """Matrix FLOPs, forward and backward."""
        return 6 * HEAD_SYMBOLS * self.weight.shape[2] * slots


def _normal(generator: torch.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator) * 0.02)


class AutoregressiveHead(nn.Module):
    """One hidden layer for all slots, which sees the token's bytes before its own (module docstring).

    Args:
        hidden_size: width of the student's hidden state. width: of the hidden layer.
        seed: independent of the global generator.
    """

    def __init__(self, hidden_size: int, width: int, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.inward = _normal(g, width, hidden_size)
        self.slot = _normal(g, SLOTS, width)
        self.norm = nn.Parameter(torch.ones(width))
        self.outward = _normal(g, HEAD_SYMBOLS, width)
        self.bias = nn.Parameter(torch.zeros(HEAD_SYMBOLS))
        self.past = _normal(g, SLOTS, HEAD_SYMBOLS, width)

    def forward(self, hidden: Tensor, slot_token: Tensor, slot_counts: Sequence[int], slot_symbol: Tensor) -> Tensor:
        """Logits of every slot.

        Args:
            hidden: float [P, hidden]. slot_token, slot_counts: as in `ByteHead.forward`.
            slot_symbol: int64 [S], the text's own symbols; a slot looks at those of smaller slots only.

        Returns:
            float [S, 260].
        """
        device = hidden.device
        k = torch.repeat_interleave(torch.arange(SLOTS, device=device), torch.tensor(slot_counts, device=device))
        inner = functional.linear(hidden, self.inward)
        x = functional.embedding(slot_token, inner) + self.slot[k]
        x = x + self._revealed(hidden.shape[0], slot_token, k, slot_symbol)
        x = functional.gelu(functional.rms_norm(x, x.shape[-1:], self.norm.to(x.dtype)))
        return functional.linear(x, self.outward, self.bias)

    def _revealed(self, tokens: int, slot_token: Tensor, k: Tensor, symbol: Tensor) -> Tensor:
        """Sum over j < k of E[k - j, b_j], one gather per distance: nothing is [tokens, 10, width]."""
        known = torch.full((tokens, SLOTS), -1, device=k.device)
        known[slot_token, k] = symbol
        total = self.past.new_zeros(k.numel(), self.past.shape[2])
        for distance in range(1, SLOTS):
            late = (k >= distance).nonzero()[:, 0]
            if late.numel() == 0:
                break
            byte = known[slot_token[late], k[late] - distance]
            late, byte = late[byte >= 0], byte[byte >= 0]
            total = total.index_add(0, late, functional.embedding(byte, self.past[distance]))
        return total

    def flops(self, tokens: int, slots: int) -> int:
        """Matrix FLOPs, forward and backward."""
        width, hidden = self.inward.shape
        return 6 * (tokens * hidden * width + slots * HEAD_SYMBOLS * width)


class HeadTerm(ByteTerm):
    """A byte head beside the lm_head, taught by the text's bytes and the teacher's.

    Args:
        kind: "parallel" or "autoregressive". width: of the latter's hidden layer; 0 = the student's, 256 at most.
        seed: of the parameters.
    """

    reads = "bytes"
    own_bytes = True

    def __init__(self, kind: str, hidden_size: int, width: int, seed: int, divergence: Divergence) -> None:
        super().__init__()
        self.divergence = divergence
        self.head: ByteHead | AutoregressiveHead
        if kind == "parallel":
            self.head = ByteHead(hidden_size, seed)
        else:
            self.head = AutoregressiveHead(hidden_size, width or min(hidden_size, 256), seed)

    def of_hidden(self, hidden: Tensor, micro: MicroBatch) -> LossParts:
        """Byte CE and, where the micro-batch carries targets, the divergence; hidden float [P, hidden]."""
        scores, true = self._scores(hidden, micro), micro.slot_symbol
        nothing = scores.new_zeros((), dtype=torch.float32)
        if micro.targets is None:
            ce = functional.cross_entropy(scores.float(), true, reduction="none")
            return LossParts(nothing, (ce * micro.slot_weight).sum(), nothing, nothing)
        kind, temperature, _ = self.divergence
        ce, apart = byte_terms(scores, true, micro.targets, divergence=kind, temperature=temperature)
        weight = self.divergence.weights(micro.slot_weight, micro.targets.tail)
        return LossParts(nothing, (ce * micro.slot_weight).sum(), (apart * weight).sum(), nothing)

    def byte_scores(self, logits: Tensor, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `ByteTerm.byte_scores`."""
        return self._scores(hidden.flatten(0, 1), micro), micro.slot_symbol

    def flops(self, tokens: int, slots: int) -> int:
        """See `ByteTerm.flops`."""
        return self.head.flops(tokens, slots)

    def _scores(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        scores: Tensor = self.head(hidden, micro.slot_token, micro.slot_counts, micro.slot_symbol)
        return scores
