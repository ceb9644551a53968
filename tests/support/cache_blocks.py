"""As much of vLLM's scheduler as branches touch: a pool of blocks that counts references."""

from types import SimpleNamespace

import numpy as np

from bytecache.stages.engines.engine import Prompt

BLOCK = 4
"""Tokens in each."""


class Scheduler:
    """As much of vLLM's as is touched: a pool that counts references, and requests that give their blocks back."""

    def __init__(self, blocks: int):
        self.blocks = [SimpleNamespace(block_id=number, ref_cnt=0, is_null=number == 0) for number in range(blocks)]
        self.requests: dict[str, list[SimpleNamespace]] = {}
        pool = SimpleNamespace(
            num_gpu_blocks=blocks, get_num_free_blocks=lambda: len(self.free()), get_new_blocks=self.take,
            touch=self.touch, free_blocks=self.give,
        )  # fmt: skip
        coordinator = SimpleNamespace(get_blocks=lambda name: (self.requests[name],))
        self.kv_cache_manager = SimpleNamespace(block_pool=pool, coordinator=coordinator)
        spec = SimpleNamespace(block_size=BLOCK)
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])

    def free(self):
        return [block for block in self.blocks if not block.ref_cnt and not block.is_null]

    def take(self, count: int):
        taken = self.free()[:count]
        assert len(taken) == count
        self.touch(taken)
        return taken

    def touch(self, blocks):
        for block in blocks:
            block.ref_cnt += 1

    def give(self, blocks):
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0

    def run(self, name: str, tokens: int, computed: int | None = None):
        """A request that finishes after `computed` of its tokens."""
        self.requests[f"{name}-x1"] = self.take(-(-tokens // BLOCK))
        computed = tokens if computed is None else computed
        self._free_blocks(SimpleNamespace(request_id=f"{name}-x1", num_computed_tokens=computed))

    def _free_blocks(self, request):
        self.give(self.requests.pop(request.request_id))


def prompt_of(tokens: int) -> Prompt:
    return Prompt("w", np.arange(tokens, dtype=np.int32), 0, np.zeros(0, np.uint8), np.zeros(tokens, np.int64))
