"""Tiny quantised checkpoints, written by hand in the layouts that GPTQ, AWQ, FP8 and compressed-tensors publish.

Rounding is to the nearest value, group by group; beside each lies what its integers stand for, in float32, so that an
engine's arithmetic can be told from the rounding of the weights. The lm_head and the embeddings stay as they are, as in
nearly all that is published.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which value of eight is at each place of an int32, from the lowest bits on."""
Tensors = dict[str, Tensor]
Layout = Callable[[Tensor], tuple[Tensors, Tensor]]
"""A weight [N, K] -> its tensors by the ending of their names, and the float32 weight that they stand for."""


def _pack(values: Tensor, axis: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of four bits to an int32, along an axis."""
    parts = values.long().unflatten(axis, (-1, 8)).movedim(axis + 1, -1)
    words = sum(parts[..., number] << (4 * place) for place, number in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def _grouped(weight: Tensor) -> Tensor:
    return weight.unflatten(1, (-1, GROUP))


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric: values 0..15 [N, K] around 8, scales float16 [N, G], the weight that they stand for."""
    groups = _grouped(weight)
    scale = (groups.abs().amax(-1) / 7).half()
    values = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8
    return values.flatten(1), scale, ((values - 8) * scale.float()[..., None]).flatten(1)


def gptq(weight: Tensor) -> tuple[Tensors, Tensor]:
    """Packed along the inputs; zero points are written one too low, as the format has it."""
    values, scale, meant = _four_bits(weight)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 7)
    index = torch.arange(weight.shape[1]).div(GROUP, rounding_mode="floor").int()
    parts = {"qweight": _pack(values.T, 0), "qzeros": _pack(zeros, 1), "scales": scale.T.contiguous(), "g_idx": index}
    return parts, meant


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    """With zero points, packed along the outputs in AWQ's order."""
    groups = _grouped(weight)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-6).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    values = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    meant = ((values - zero[..., None]) * scale.float()[..., None]).flatten(1)
    parts = {
        "qweight": _pack(values.flatten(1).T, 1, AWQ_ORDER), "qzeros": _pack(zero.T, 1, AWQ_ORDER),
        "scales": scale.T.contiguous(),
    }  # fmt: skip
    return parts, meant


def fp8_tensor(weight: Tensor) -> tuple[Tensors, Tensor]:
    """Eight-bit floats, one scale a weight."""
    scale = weight.abs().max() / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale.float()}, values.float() * scale


def fp8_channel(weight: Tensor) -> tuple[Tensors, Tensor]:
    """Eight-bit floats, a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale.float()}, values.float() * scale


def int8_channel(weight: Tensor) -> tuple[Tensors, Tensor]:
    """Eight-bit integers, a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale.float()}, values.float() * scale


def packed_four(weight: Tensor) -> tuple[Tensors, Tensor]:
    """compressed-tensors' `pack-quantized`."""
    values, scale, meant = _four_bits(weight)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": _pack(values, 1), "weight_scale": scale.contiguous(), "weight_shape": shape}, meant


def _compressed(form: str, weights: dict[str, object], activations: dict[str, object] | None) -> dict[str, object]:
    common = {"symmetric": True, "dynamic": False, "group_size": None}
    group = {
        "targets": ["Linear"], "weights": {**common, **weights},
        "input_activations": activations and {"symmetric": True, "dynamic": True, **activations},
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


_EIGHT_BITS = {"num_bits": 8, "strategy": "token"}
KINDS: dict[str, tuple[Layout, dict[str, object]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "fp8": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "compressed-tensors fp8": (
        fp8_channel,
        _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"},
                    {**_EIGHT_BITS, "type": "float"}),
    ),
    "compressed-tensors int8": (
        int8_channel,
        _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"},
                    {**_EIGHT_BITS, "type": "int"}),
    ),
    "compressed-tensors int4": (
        packed_four,
        _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, None),
    ),
}  # fmt: skip


def quantise(whole: Path, kind: str, out: Path) -> tuple[Path, Path]:
    """`out/quantised` and `out/meant`: a checkpoint's layers as `kind` writes them, and what they stand for."""
    layout, section = KINDS[kind]
    folders = out / "quantised", out / "meant"
    for folder in folders:
        shutil.copytree(whole, folder)
    coded, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(whole / "model.safetensors").items():
        coded[name] = meant[name] = weight
        if name.endswith("_proj.weight"):
            parts, meant[name] = layout(weight.float())
            del coded[name]
            coded |= {name.removesuffix("weight") + ending: part for ending, part in parts.items()}
    for folder, tensors in zip(folders, (coded, meant), strict=True):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return folders
