"""The byte head: ten linear maps from the hidden state *before* a token to that token's first ten bytes.

Algorithm (BLD, arXiv 2604.07466): with h the input of the lm_head at position l-1, slot k of token l is
softmax(W[k] h + c[k]) over 260 symbols. Reading h at position l would hand the head the token it predicts.
Heads are evaluated only at bytes that exist: slots arrive sorted by k, so ten matrix products over [S_k, hidden]
replace one over [tokens, 10, 260]; at three bytes a token that is 30 % of the dense work.
Price: 10 * 260 * (hidden + 1) parameters (0.50 M at hidden 192, 26.6 M at 10k) and 6 * 260 * hidden FLOPs per byte.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

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
