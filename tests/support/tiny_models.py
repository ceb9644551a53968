"""Tiny checkpoints made on the spot: random weights, real tokenizers of two families. No downloads, a second each."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

PROSE = (
    "A cache is a promise kept in advance. The teacher reads the text once, and what it said of every byte is written "
    "down; the student reads the notes as often as it likes. Nothing is guessed twice, nothing is lost, and the notes "
    "can be read by a student who cuts words in other places. Naïve façade, größer, 日本語 too.\n"
)


def byte_level_tokenizer(vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE] * 4, trainer)
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama-2 style: byte fallback, U+2581 for spaces, a synthetic space in front of the text."""
    words = [
        "▁",
        "e",
        "t",
        "th",
        "he",
        "the",
        "▁the",
        "▁t",
        "a",
        "c",
        "ca",
        "s",
        "n",
        "o",
        "i",
        "in",
        "r",
        "er",
        "h",
        "d",
    ]
    vocabulary = {"<unk>": 0, "<|begin|>": 1, "<|end|>": 2}
    for value in range(256):
        vocabulary[f"<0x{value:02X}>"] = len(vocabulary)
    for word in words:
        vocabulary[word] = len(vocabulary)
    merges = [("t", "h"), ("h", "e"), ("th", "e"), ("▁", "the"), ("▁", "t"), ("c", "a"), ("i", "n"), ("e", "r")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<|begin|>", "<|end|>")])
    return tokenizer


def make_checkpoint(
    folder: Path, *, family: str = "bytelevel", vocabulary: int = 320, context: int = 256, seed: int = 0
) -> Path:
    """A random two-layer Llama whose head is padded past its tokenizer, saved as an ordinary checkpoint.

    Family `sliding`: a Gemma 3 with a window of four tokens and soft-capped logits instead, byte-level tokenizer.
    """
    tokenizer = sentencepiece_tokenizer() if family == "sentencepiece" else byte_level_tokenizer(vocabulary)
    size = tokenizer.get_vocab_size()
    bos, eos = tokenizer.token_to_id("<|begin|>"), tokenizer.token_to_id("<|end|>")
    torch.manual_seed(seed)
    shape = {
        "vocab_size": size + 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": context, "bos_token_id": bos,
        "eos_token_id": eos, "tie_word_embeddings": False,
    }  # fmt: skip
    model: PreTrainedModel
    if family == "sliding":
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **shape,
                head_dim=32,
                sliding_window=4,
                layer_types=layers,
                final_logit_softcapping=30.0,
                pad_token_id=eos,
            )
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        # Random heads are nearly uniform; spread the logits so that masses span many orders of magnitude.
        model.lm_head.weight.mul_(25.0)
        model.model.embed_tokens.weight.mul_(20.0)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"})
    )
    return folder
