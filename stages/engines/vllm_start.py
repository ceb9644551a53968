"""How vLLM is started as a teacher: its environment, its arguments, and what to say when it does not start."""

import importlib.util
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError, EngineError, install
from bytecache.stages.engines.paths import PathReducer
from bytecache.stages.models.device import batched_tokens, head_is_quantised, trunk_dtype
from bytecache.stages.models.kernels import refuse_without_kernels

CPU_BLOCK = 32
"""Tokens per cache block on a CPU, the fewest it takes: a branch recomputes at most one block of its prefix."""
GPU_BLOCK = 16
"""The same on a GPU, for plain attention; for other kinds the engine knows what their kernels take."""
LOGIT_BYTES = {"cpu": 1 << 27, "gpu": 1 << 30}
"""Bytes of float32 logits reduced at once."""


def prepare_environment(settings: st.Teacher) -> None:
    """Before vLLM is imported. In-process: an engine process of its own survives a kill and keeps its GPU."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # vLLM warns about its platform before it configures its own logger.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    _quiet_llvmlite()
    warnings.filterwarnings("ignore", message=".*reduce_op.*", category=FutureWarning)


def _quiet_llvmlite() -> None:
    """Let vLLM start after numba was imported.

    vLLM 0.32 reads `__dict__` of every attribute of every module; llvmlite's library proxy answers any name with a
    function, and vLLM dies on it. The proxy has no `__dict__`, so it may say so.
    """
    from llvmlite.binding import ffi

    proxy: Any = type(ffi.lib)
    answer = proxy.__getattr__

    def guarded(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return answer(self, name)

    proxy.__getattr__ = guarded


def start_engine(folder: Path, settings: st.Teacher, longest: int) -> tuple[Any, bool]:
    """A `vllm.LLMEngine`, and whether it runs on a CPU. `longest`: tokens of the longest history.

    Raises ConfigError where vLLM is not installed, EngineError where it does not start.
    """
    prepare_environment(settings)
    try:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(f'teacher.backend = "vllm" but vLLM is not installed: {install("cpu", "gpu")}') from error
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        refuse_without_kernels(folder, settings)
    arguments = engine_arguments(folder, settings, longest, on_cpu=on_cpu)
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments)), on_cpu
    except Exception as error:
        raise EngineError(
            f"vLLM could not start with teacher.model = {settings.model!r}: {reason(error)}; "
            f"{_remedy(settings, error, on_cpu=on_cpu)}"
        ) from error


def engine_arguments(folder: Path, settings: st.Teacher, longest: int, *, on_cpu: bool) -> dict[str, Any]:
    """Arguments of `vllm.EngineArgs`."""
    config = json.loads((folder / "config.json").read_text())
    tokens = batched_tokens(settings, on_cpu=on_cpu)
    branches = settings.depth > 0 or settings.sample_tokens > 0  # reference windows branch where production does not
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": trunk_dtype(settings, on_cpu=on_cpu),
        # Two adjacent values of a half-precision head tie. A quantised head is its own arithmetic.
        "hf_overrides": {} if head_is_quantised(folder) else {"head_dtype": "float32"},
        "max_model_len": longest + 1,  # one token is sampled
        "max_num_batched_tokens": tokens,
        "max_num_seqs": min(128 if on_cpu else 1024, tokens),
        "enable_chunked_prefill": True,
        "enable_prefix_caching": branches,
        # Blocks of sliding-window and recurrent layers are kept wherever a branch may leave, not at the end alone.
        "prefix_cache_retention_interval": None,
        "language_model_only": True,
        "enforce_eager": on_cpu,
        "skip_tokenizer_init": True,
        # The next step begins while this one's results come back; a CPU has nothing to overlap.
        "async_scheduling": not on_cpu,
        "seed": 0,
        "tensor_parallel_size": settings.tensor_parallel,
        "trust_remote_code": settings.trust_remote_code,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "worker_extension_cls": "bytecache.stages.engines.vllm_worker.PathExtension",
        "disable_log_stats": True,
    }
    if on_cpu:
        arguments["block_size"] = CPU_BLOCK
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
        if has_plain_attention(config):
            arguments["block_size"] = GPU_BLOCK
            # One block table for all layers, so that branches can leave a window anywhere (vllm_branches). A sliding
            # layer then keeps a whole window, which is no longer than the context.
            arguments["disable_hybrid_kv_cache_manager"] = True
    return arguments


def has_plain_attention(config: dict[str, Any]) -> bool:
    """Whether all layers keep ordinary keys and values: no latent ones (MLA), no recurrent state."""
    text = {**config, **config.get("text_config", {})}
    kinds = set(text.get("layer_types") or [])
    latent = any(text.get(name) for name in ("kv_lora_rank", "q_lora_rank"))
    recurrent = any("mamba" in name or "ssm" in name or "linear_" in name for name in text)
    return not latent and not recurrent and kinds <= {"full_attention", "sliding_attention"}


def logit_rows(reducer: PathReducer, *, on_cpu: bool) -> int:
    """Rows of logits reduced at once, of all requests of a step."""
    row = 4 * reducer.vocabulary.size
    return max(16, min(2048, LOGIT_BYTES["cpu" if on_cpu else "gpu"] // row))


def _remedy(settings: st.Teacher, error: BaseException, *, on_cpu: bool) -> str:
    words = str(error)
    if importlib.util.find_spec("torchvision") is None and ("inspected" in words or "torchvision" in words):
        return "this architecture needs torchvision: install the build that matches your torch (see lock/gpu.txt)"
    if "is not supported for quantization method" in words:  # float32, which `auto` is on a CPU
        return 'set teacher.dtype = "bfloat16", which these weights are computed in'
    if "quant" in words.lower() or "kernel" in words.lower():
        return "this machine has no kernel for weights of this kind; take another machine, or the model's own weights"
    if on_cpu:
        return "lower teacher.context, or set teacher.kv_cache_gib to what this machine's memory allows"
    return (
        "free the GPU of other processes, lower teacher.context or teacher.max_batched_tokens, change "
        f"teacher.gpu_memory_utilization = {settings.gpu_memory_utilization:g}, or spread the teacher over more GPUs "
        f"than teacher.tensor_parallel = {settings.tensor_parallel}"
    )


def reason(error: BaseException) -> str:
    """The start of an error's message; pydantic's says what is wrong in its third line."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:3])
