"""What of the machine and the checkpoint decides a teacher's precision, and what vLLM is told."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bytecache.schemas import settings as st
from bytecache.schemas.errors import InputError
from bytecache.stages.engines.vllm_start import _remedy, engine_arguments
from bytecache.stages.models.device import device_kind, head_is_quantised, own_dtype, trunk_dtype
from tests.support.places import ROOT

WORD = torch.zeros(2, 4)


def checkpoint(folder, tensors, **config):
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("tensors", "quantised"),
    [
        ({"lm_head.weight": WORD.bfloat16()}, False),
        ({"lm_head.weight": WORD, "lm_head.bias": WORD[0].clone()}, False),
        ({"model.embed_tokens.weight": WORD}, False),  # tied
        ({"model.layers.0.q_proj.qweight": WORD.int(), "lm_head.weight": WORD.half()}, False),
        ({"lm_head.qweight": WORD.int(), "lm_head.scales": WORD.half()}, True),
        ({"language_model.lm_head.weight_packed": WORD.int(), "language_model.lm_head.weight_scale": WORD}, True),
        ({"lm_head.weight": WORD.to(torch.float8_e4m3fn)}, True),
    ],
)
def test_a_quantised_head_is_known_by_its_tensors(tmp_path, tensors, quantised):
    folder = checkpoint(tmp_path, tensors)
    assert head_is_quantised(folder) is quantised
    overrides = engine_arguments(folder, st.Teacher(context=64).resolved(), 63, on_cpu=True)["hf_overrides"]
    assert overrides == ({} if quantised else {"head_dtype": "float32"})


def test_a_damaged_checkpoint_is_an_input_error(tmp_path):
    checkpoint(tmp_path, {"lm_head.weight": WORD})
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"weights in .* are damaged"):
        head_is_quantised(tmp_path)


@pytest.mark.parametrize(
    ("config", "stated"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_the_checkpoints_own_precision(tmp_path, config, stated):
    assert own_dtype(checkpoint(tmp_path, {"a": WORD}, **config)) == stated


def test_auto_is_float32_on_a_cpu_alone():
    assert trunk_dtype(st.Teacher(), on_cpu=True) == "float32"
    assert trunk_dtype(st.Teacher(), on_cpu=False) == "auto"
    assert trunk_dtype(st.Teacher(dtype="float16"), on_cpu=True) == "float16"


def arguments(folder, *, on_cpu=False, **changes):
    return engine_arguments(folder, st.Teacher(context=64, **changes).resolved(), 68, on_cpu=on_cpu)


def test_a_gpu_computes_more_at_once_than_a_cpu(tmp_path):
    folder = checkpoint(tmp_path, {"a": WORD}, layer_types=["full_attention"])
    cpu, gpu = arguments(folder, on_cpu=True), arguments(folder)
    assert (cpu["max_num_batched_tokens"], gpu["max_num_batched_tokens"]) == (512, 8192)
    assert arguments(folder, max_batched_tokens=2048)["max_num_batched_tokens"] == 2048
    assert cpu["max_num_seqs"] < gpu["max_num_seqs"] and cpu["enforce_eager"] and not gpu["enforce_eager"]
    assert not cpu["async_scheduling"] and gpu["async_scheduling"]
    assert cpu["max_model_len"] == gpu["max_model_len"] == 69


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, 16),
        ({"text_config": {"layer_types": ["full_attention"]}}, 16),
        ({"num_hidden_layers": 2}, 16),
        ({"kv_lora_rank": 512}, None),  # latent keys: kernels want 64 or 128
        ({"text_config": {"kv_lora_rank": 512}}, None),
        ({"layer_types": ["linear_attention", "full_attention"]}, None),
        ({"mamba_d_state": 128}, None),
        ({"q_lora_rank": None, "kv_lora_rank": None}, 16),
    ],
)
def test_the_block_size_is_ours_for_plain_attention_only(tmp_path, config, chosen):
    assert arguments(checkpoint(tmp_path, {"a": WORD}, **config)).get("block_size") == chosen


def test_what_a_branch_needs_of_the_cache_is_said(tmp_path):
    """Blocks are kept wherever a branch may leave, in one table for all layers; no eye is loaded."""
    folder = checkpoint(tmp_path, {"a": WORD}, layer_types=["full_attention", "sliding_attention"])
    for on_cpu in (True, False):
        said = arguments(folder, on_cpu=on_cpu, tensor_parallel=2)
        assert said["enable_prefix_caching"] and said["prefix_cache_retention_interval"] is None
        assert said["language_model_only"] and said["tensor_parallel_size"] == 2
        assert not arguments(folder, on_cpu=on_cpu, depth=0, sample_tokens=0)["enable_prefix_caching"]
    assert arguments(folder)["disable_hybrid_kv_cache_manager"]


@pytest.mark.parametrize(
    ("on_cpu", "words", "others"),
    [(True, "kv_cache_gib", "gpu_memory"), (False, "gpu_memory_utilization = 0.85", "kv_cache_gib")],
)
def test_what_does_not_start_has_a_remedy_of_its_device(on_cpu, words, others):
    said = _remedy(st.Teacher(context=64).resolved(), MemoryError("no room"), on_cpu=on_cpu)
    assert words in said and others not in said and "backend" not in said


def test_the_name_of_the_gpu_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert device_kind() == "NVIDIA H100"


def test_the_torchvision_of_the_gpu_lock_belongs_to_its_torch():
    """torch 2.n.p goes with torchvision 0.(n + 15).p."""
    lines = (ROOT / "lock/gpu.txt").read_text().splitlines()
    version = dict(
        line.partition(" ")[0].split("==") for line in lines if line.startswith(("torch==", "torchvision=="))
    )
    _, minor, patch = map(int, version["torch"].partition("+")[0].split("."))
    assert version["torchvision"] == f"0.{minor + 15}.{patch}"
