"""One small tokenizer of every family of teachers, built here with the real one's normaliser, pre-tokeniser, decoder,
byte fallback and kinds of special tokens; and the texts that such tokenizers stumble over."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.vocab_models import LINES, added, byte_level, checkpoint, sentencepiece

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PIECES = [*(bytes([b]) for b in range(256)), b"he", b"th", b"the", b" t", b" the", b"\xe4\xbd", b"\xf0\x9f\x98"]


class Family(NamedTuple):
    """A folder that `load_vocabulary` reads, and what it must say."""

    write: Callable[[Path], object]
    start: str | int
    ends: tuple[str | int, ...]
    aside: frozenset[str] = frozenset()
    """Reasons for which a text may be set aside; empty: every text is spelled."""


def _trained(tokenizer: Tokenizer, special: list[str], *, size: int = 420, alphabet: bool = True) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _bytes_after(*cuts: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(folder: Path) -> None:
    checkpoint(folder, byte_level(), tokenizer_config={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def _llama3(folder: Path) -> None:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = _bytes_after(pre_tokenizers.Split(Regex(_WORDS), "isolated"))
    _trained(tokenizer, special)
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    checkpoint(folder, tokenizer, config={"bos_token_id": 0, "eos_token_id": [1, 2]})


def _qwen(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _bytes_after(pre_tokenizers.Split(Regex(_WORDS.replace("{1,3}", "")), "isolated"))
    _trained(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([added("<think>", normalized=False), added("</think>", normalized=False)])
    padded = {"vocab_size": tokenizer.get_vocab_size() + 64, "bos_token_id": None, "eos_token_id": 2}
    checkpoint(folder, tokenizer, config=padded, tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>"})


def _deepseek(folder: Path) -> None:
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    cuts = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _WORDS)
    tokenizer.pre_tokenizer = _bytes_after(*(pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts))
    _trained(tokenizer, special)
    tokenizer.add_tokens([added("<｜place▁holder▁no▁0｜>", normalized=False)])
    checkpoint(folder, tokenizer, tokenizer_config={"bos_token": special[0], "eos_token": special[1]})


def _neox(folder: Path) -> None:
    tokenizer = byte_level(unicode_form=normalizers.NFC())
    tokenizer.add_tokens([added(" " * n, normalized=True) for n in (2, 3, 8, 24, 1024)])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    checkpoint(folder, tokenizer, tokenizer_config=names)


def _smollm2(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    _trained(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], alphabet=False)
    checkpoint(folder, tokenizer, tokenizer_config={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})


def _llama2(folder: Path) -> None:
    checkpoint(folder, sentencepiece(), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})


def _mistral(folder: Path) -> None:
    tokenizer = sentencepiece(style="metaspace")
    tokenizer.add_special_tokens(["[INST]", "[/INST]", "[control_8]"])
    checkpoint(folder, tokenizer, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})


def _gemma(folder: Path) -> None:
    tokenizer = sentencepiece(style="none")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_tokens([added(text, normalized=False) for text in ("\n\n", "<table>", "<unused3>", "\t\t\t")])
    tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    turn = tokenizer.token_to_id("<end_of_turn>")
    checkpoint(
        folder,
        tokenizer,
        config={"text_config": {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 2}, "bos_token_id": 1},
        generation_config={"eos_token_id": [2, turn]},
    )


def _unigram(folder: Path) -> None:
    """SentencePiece's other model. The tokenizers library matches control and byte pieces in text: set aside."""
    rows: list[tuple[str, float]] = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    rows += [(f"<0x{b:02X}>", -30.0) for b in range(256)]
    rows += [(piece, -3.0 - 0.1 * i) for i, piece in enumerate(["▁", "▁the", "the", "▁c", "a", "t", "e", "▁a", "he"])]
    tokenizer = Tokenizer(models.Unigram(rows, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    checkpoint(folder, tokenizer, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})


def _no_byte_fallback(folder: Path) -> None:
    checkpoint(folder, sentencepiece(byte_fallback=False), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})


def _ranks(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        rows = b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(_PIECES))
        (folder / f"{name}.tiktoken").write_bytes(rows)

    return write


def _tekken(folder: Path) -> None:
    """Ten special tokens come before rank 0; the last two ranks lie beyond the model's rows."""
    folder.mkdir(parents=True)
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate([*_PIECES, b"dead one", b"dead two"])
    ]
    config = {"pattern": _WORDS, "default_num_special_tokens": 10, "default_vocab_size": len(_PIECES) + 10}
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": rows, "special_tokens": special}))


def _rwkv(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = "".join(f"{i} {piece!r} {len(piece)}\n" for i, piece in enumerate(_PIECES, 1))
    (folder / "rwkv_vocab_v20230424.txt").write_text(rows, encoding="utf-8")


FAMILIES = {
    "gpt2": Family(_gpt2, "<|endoftext|>", ("<|endoftext|>",)),
    "llama3": Family(_llama3, "<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>")),
    "qwen": Family(_qwen, "<|im_end|>", ("<|im_end|>",)),
    "qwen_ranks": Family(_ranks("qwen"), "<|endoftext|>", ("<|endoftext|>",)),
    "cl100k_ranks": Family(_ranks("cl100k_base"), "<|endoftext|>", ("<|endoftext|>",)),
    "o200k_ranks": Family(_ranks("o200k_base"), "<|endoftext|>", ("<|endoftext|>",)),
    "deepseek": Family(_deepseek, "<｜begin▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",)),
    "neox": Family(_neox, "<|endoftext|>", ("<|endoftext|>",)),
    "smollm2": Family(_smollm2, "<|im_start|>", ("<|im_end|>",), frozenset({"missing-byte"})),
    "llama2": Family(_llama2, "<s>", ("</s>",)),
    "mistral": Family(_mistral, "<s>", ("</s>",)),
    "tekken": Family(_tekken, "<s>", ("</s>",)),
    "gemma": Family(_gemma, "<s>", ("</s>", "<end_of_turn>")),
    "unigram": Family(_unigram, "<s>", ("</s>",), frozenset({"control token", "unk", "mismatch"})),
    "no_byte_fallback": Family(_no_byte_fallback, "<s>", ("</s>",), frozenset({"unk", "mismatch", "missing-byte"})),
    "rwkv": Family(_rwkv, 0, (0,)),
}

FRAGMENTS = [
    "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<unk>", "<pad>", "<bos>", "<0x0A>", "[UNK]", "[INST]",
    "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<think>", "<table>", "<unused3>", "▁",
    "▁the", "Ġthe", " the", "the ", " ", "  ", " " * 25, " " * 1030, "\n\n", "\r\n", "\t\t\t", "\x00",
    "\x1b", "\x85", "\u00a0", "\u2028", "\ufeff", "\ufffd", "\ufffe", "e\u0301", "\u1100\u1161\u11a8",
    "\u0644\u0651\u064e", "\u212b", "\ufb01", "\u2126", "\U0001f469\u200d\U0001f52c", "\U000e0067",
    "\U0010ffff", "1234567", "\u0663\u0664",
]  # fmt: skip
TEXT = st.lists(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.characters(categories=["Mn", "Mc", "Cc", "Cf", "Zs", "Co"]),
        st.sampled_from("the cat"),
        st.sampled_from(FRAGMENTS),
    ),
    max_size=16,
).map("".join)
"""Any text: all planes, combining marks, control characters, private use, look-alikes of control tokens."""
