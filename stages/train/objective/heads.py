"""Byte heads: maps from the hidden state *before* a token to that token's first ten bytes.

    parallel        the paper's (BLD, arXiv 2604.07466): slot k of token l is softmax(W[k] h + c[k]) over 260 symbols,
                    h the input of the lm_head at position l-1; reading it at l would hand the head its token
    mlp             slot k of token l: U gelu(A h + s_k): one hidden layer shared by the slots, s_k a learnt vector
    transformer     the same layer, then one causal self-attention layer over the token's slots; no byte is seen
    autoregressive  U gelu(A h + s_k + sum_{j<k} E[k-j, b_j]): slot k sees the token's bytes before it, as the
                    teacher's targets do; byte k itself never

h is the lm_head's input at the position before the token, so no head can read the token it predicts; the autoregressive
head reads what the text has revealed of it, b_0 .. b_{k-1}, which is what "next byte" is conditioned on.
Price per byte: 6 * 260 * width FLOPs and, per token, 6 * hidden * width; `benchmarks/objective_cost.py` measures it.
The parallel head is evaluated only at bytes that exist: slots arrive sorted by k, so ten matrix products over
[S_k, hidden] replace one over [tokens, 10, 260] (at three bytes a token, 30 % of the dense work). It holds
10 * 260 * (hidden + 1) parameters (0.50 M at hidden 192, 26.6 M at 10k).
The mlp holds hidden * width + (10 + 260) * width parameters, a tenth of the parallel head where width is hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bytecache.schemas.errors import ConfigError
from bytecache.stages.train.batches.types import SLOTS

HEAD_SYMBOLS = 260
"""256 bytes, END (slot 0 of the student's EOS token), and three that are never a target (the paper's specials)."""


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
            slot_symbol: not read; heads that see the bytes before theirs need it (`heads.py`).

        Returns:
            float [S, 260].
        """
        # An embedding lookup rather than indexing: its backward is fast and deterministic on every device.
        rows = torch.split(functional.embedding(slot_token, hidden), list(slot_counts))
        return torch.cat([functional.linear(r, self.weight[k], self.bias[k]) for k, r in enumerate(rows)])

    def flops(self, tokens: int, slots: int) -> int:
        """Matrix FLOPs, forward and backward."""
        return 6 * HEAD_SYMBOLS * self.weight.shape[2] * slots

    @property
    def n_parameters(self) -> int:
        """Parameters of the head, all of which are dropped at export."""
        return sum(p.numel() for p in self.parameters())


PARTS = 4
"""Attention heads of the `transformer` head."""


def _normal(generator: torch.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator) * 0.02)


class SharedHead(nn.Module):
    """One hidden layer for all slots; `kind` as in the module's docstring.

    Args:
        hidden_size: width of the student's hidden state. width: of the hidden layer.
        kind: "mlp", "transformer" or "autoregressive". seed: independent of the global generator.
    """

    def __init__(self, hidden_size: int, width: int, kind: str, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.kind = kind
        self.inward = _normal(g, width, hidden_size)
        self.slot = _normal(g, SLOTS, width)
        self.norm = nn.Parameter(torch.ones(width))
        self.outward = _normal(g, HEAD_SYMBOLS, width)
        self.bias = nn.Parameter(torch.zeros(HEAD_SYMBOLS))
        if kind == "autoregressive":
            self.past = _normal(g, SLOTS, HEAD_SYMBOLS, width)
        if kind == "transformer":
            self.qkv = _normal(g, 3 * width, width)
            self.mix = _normal(g, width, width)

    def forward(self, hidden: Tensor, slot_token: Tensor, slot_counts: Sequence[int], slot_symbol: Tensor) -> Tensor:
        """Logits of every slot.

        Args:
            hidden: float [P, hidden]. slot_token, slot_counts: as in `ByteHead.forward`.
            slot_symbol: int64 [S], the text's own symbols; the autoregressive head looks at smaller slots' only.

        Returns:
            float [S, 260].
        """
        device = hidden.device
        k = torch.repeat_interleave(torch.arange(SLOTS, device=device), torch.tensor(slot_counts, device=device))
        inner = functional.linear(hidden, self.inward)
        x = functional.embedding(slot_token, inner) + self.slot[k]
        if self.kind == "autoregressive":
            x = x + self._revealed(hidden.shape[0], slot_token, k, slot_symbol)
        elif self.kind == "transformer":
            x = x + self._attend(hidden.shape[0], x, slot_token, k)
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

    def _attend(self, tokens: int, x: Tensor, slot_token: Tensor, k: Tensor) -> Tensor:
        """Causal attention among the slots of each token that has any."""
        used, place = torch.unique(slot_token, return_inverse=True)
        grid = x.new_zeros(used.numel(), SLOTS, x.shape[1])
        grid[place, k] = x
        q, key, value = functional.linear(grid, self.qkv).chunk(3, dim=-1)
        q, key, value = (t.view(used.numel(), SLOTS, PARTS, -1).transpose(1, 2) for t in (q, key, value))
        mixed = functional.scaled_dot_product_attention(q, key, value, is_causal=True)
        return functional.linear(mixed.transpose(1, 2).flatten(2), self.mix)[place, k]

    def flops(self, tokens: int, slots: int) -> int:
        """Matrix FLOPs, forward and backward; attention counted as if every token filled its ten slots."""
        width, hidden = self.inward.shape
        attention = tokens * SLOTS * (4 * width * width + 2 * SLOTS * width) if self.kind == "transformer" else 0
        return 6 * (tokens * hidden * width + slots * HEAD_SYMBOLS * width + attention)

    @property
    def n_parameters(self) -> int:
        """Parameters of the head, all of which are dropped at export."""
        return sum(p.numel() for p in self.parameters())


def make_head(kind: str, hidden_size: int, width: int, seed: int) -> ByteHead | SharedHead:
    """The head that `train.head` names; `width` 0 is the student's own, 256 at most.

    Raises:
        ConfigError: a width that the transformer's attention cannot be divided into.
    """
    if kind == "parallel":
        return ByteHead(hidden_size, seed)
    width = width or min(hidden_size, 256)
    if kind == "transformer" and width % PARTS:
        raise ConfigError(f"train.head_width = {width}: head 'transformer' needs a multiple of {PARTS}; round it")
    return SharedHead(hidden_size, width, kind, seed)
