"""From the lm_head's input to logits, apart from the model's own forward pass: for losses that make them in pieces."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bytecache.schemas.errors import ConfigError


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states [..., hidden] to logits [..., V] as a causal model of transformers makes them.

    That is its lm_head, and what the configuration says comes after it: a factor (Cohere, Falcon-H1, HyperCLOVA), a
    divisor (Granite), a soft cap (Gemma).
    """
    config = model.config.get_text_config()
    cap, divisor = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None)
    named = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    factor = next((value for value in named if value is not None), None)
    if config.model_type == "hyperclovax":  # which calls its factor as others call their divisor
        factor, divisor = divisor, None

    def to_logits(hidden: Tensor) -> Tensor:
        logits: Tensor = model.get_output_embeddings()(hidden)
        logits = logits / divisor if divisor else logits
        logits = logits * factor if factor is not None else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    return to_logits


def bare(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        inner = next(
            (i for i in (getattr(model, name, None) for name in ("module", "_orig_mod")) if i is not None), None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def head_input(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The lm_head's input, float [R, T, hidden], by the model's own forward pass, which makes one row of logits alone.

    The call goes through whatever the model is wrapped in, so gradients are exchanged and kernels compiled as ever.
    """
    states: Tensor = model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    return states


def check_head_input(model: nn.Module) -> None:
    """Refuse a model whose logits `head_input` and `logits_of` do not give.

    Raises:
        ConfigError: it has no `logits_to_keep`, its weights are divided among processes, or the logits differ.
    """
    inner = bare(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    without = "leave out `chunk`, so that the loss reads all logits at once"
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        raise ConfigError(f"{type(base).__name__} cannot leave its logits out (no logits_to_keep); {without}")
    weight = inner.get_output_embeddings().weight
    if type(model).__name__.startswith("FullySharded") or hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
        raise ConfigError(
            f"the lm_head of {type(base).__name__} is divided among processes, pieces need it whole; {without}"
        )
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            ids = torch.arange(8, device=weight.device)[None] % inner.config.get_text_config().vocab_size
            whole = inner(input_ids=ids, use_cache=False).logits
            pieces = logits_of(inner)(head_input(inner, {"input_ids": ids, "use_cache": False}))
    finally:
        inner.train(training)
    if not torch.allclose(whole.float(), pieces.float(), rtol=1e-2, atol=1e-2):
        raise ConfigError(f"{type(base).__name__} alters the logits of its lm_head; {without}")
