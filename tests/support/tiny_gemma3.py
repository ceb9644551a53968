"""A tiny Gemma 3 that could see, and what a teacher says with it; a program for a process with torchvision, or for two.

python -m tests.support.tiny_gemma3 CHECKPOINT BACKEND [TENSOR_PARALLEL]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_models import byte_level_tokenizer

TEXT = "A cache is a promise kept in advance. " * 6


def make_gemma3(folder: Path) -> Path:
    """A random `Gemma3ForConditionalGeneration` with an eye, saved as an ordinary checkpoint."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = byte_level_tokenizer(320)
    size = tokenizer.get_vocab_size()
    begin, end = tokenizer.token_to_id("<|begin|>"), tokenizer.token_to_id("<|end|>")
    ends = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    text = {
        "vocab_size": size + 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"], **ends,
    }  # fmt: skip
    eye = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=eye,
            mm_tokens_per_image=4,
            image_token_index=size + 1,
            boi_token_index=size + 2,
            eoi_token_index=size + 3,
            **ends,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8.0)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def rows(folder: Path, backend: str, tensor_parallel: int = 1) -> list[dict[str, Any]]:
    """Tokens and numbers of every row of every window."""
    from bytecache.schemas import settings as st
    from bytecache.stages.teacher.teacher import open_teacher

    settings = {"model": str(folder), "backend": backend, "tensor_parallel": tensor_parallel}
    effort = {"context": 128, "overlap": 32, "tau": 0.01, "depth": 2, "static": 0.002}
    teacher = open_teacher(st.Teacher.model_validate(settings | effort))
    (windows,) = teacher.windows([("d", 0, teacher.vocabulary.encode(TEXT))])
    teacher.close()
    return [{"tokens": w.row_token.tolist(), "log_norm": w.log_norm.tolist()} for w in windows]


if __name__ == "__main__":
    print(json.dumps(rows(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))))
