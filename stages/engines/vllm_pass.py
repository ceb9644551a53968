"""One pass of branches through vLLM's model, in a worker: what a scheduled step does, of arrays made elsewhere.

`stages.engines.vllm_branches` says what a pass is. The attention metadata are built by the backend's own builder from
vLLM's common form of them, the one that speculative decoding uses; so the same lines serve every backend, the V1 and
the V2 runner, and each rank of a teacher that is spread over several.
"""

from typing import Any

import numpy as np
import torch

from bytecache.stages.engines.vllm_branches import BranchPass


def run_pass(runner: Any, step: BranchPass) -> torch.Tensor:
    """Hidden states [R, width] of the tokens that branches end with."""
    from vllm.forward_context import set_forward_context

    device = runner.device
    _copy_blocks(runner, step.copies)
    metadata, slots = _attention(runner, step)
    tokens, positions, wanted = (_to(array, device) for array in (step.tokens, step.positions, step.wanted))
    if getattr(runner, "uses_mrope", False):
        positions = positions.expand(3, -1)
    forward = getattr(runner, "_model_forward", None) or runner.model
    with set_forward_context(metadata, runner.vllm_config, num_tokens=len(step.tokens), slot_mapping=slots):
        hidden: torch.Tensor = forward(
            input_ids=tokens, positions=positions, intermediate_tensors=None, inputs_embeds=None
        )
    return hidden[wanted]


def _attention(runner: Any, step: BranchPass) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and slots of every layer."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    device = runner.device
    slots = _to(step.slots, device)
    query_start, seq_lens = torch.from_numpy(step.query_start), torch.from_numpy(step.seq_lens)
    common = CommonAttentionMetadata(
        query_start_loc=_to(step.query_start, device),
        query_start_loc_cpu=query_start,
        seq_lens=_to(step.seq_lens, device),
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(step.seq_lens),
        num_actual_tokens=len(step.tokens),
        max_query_len=int(np.diff(step.query_start).max()),
        max_seq_len=int(step.seq_lens.max()),
        block_table_tensor=_to(step.table, device),
        slot_mapping=slots,
        causal=True,
        is_prefilling=torch.ones(len(step.seq_lens), dtype=torch.bool),
        positions=_to(step.positions, device),
    )
    metadata: dict[str, Any] = {}
    for group in runner.attn_groups[0]:
        of_group = group.build_metadata(common)
        metadata |= dict.fromkeys(group.layer_names, of_group)
    return metadata, dict.fromkeys(metadata, slots)


def _copy_blocks(runner: Any, copies: np.ndarray) -> None:
    """Copy whole blocks of every layer's keys and values; `copies` int64 [C, 2], from and to."""
    if not len(copies):
        return
    count = runner.kv_cache_config.num_blocks
    seen: set[int] = set()
    for cache in runner.kv_caches:
        if cache.data_ptr() in seen:  # layers that share their keys
            continue
        seen.add(cache.data_ptr())
        source, target = _to(np.ascontiguousarray(copies.T), cache.device)
        blocks = cache.unflatten(0, (count, cache.shape[0] // count))
        blocks.index_copy_(0, target, blocks.index_select(0, source))


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
