"""Tokenizers made here: a byte-level BPE trained on the corpus, and one that has a token for every byte.

Every text can be encoded, and every token maps to bytes. Price: BPE training takes about 1 s per 3 MB.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bytecache.schemas.errors import ConfigError
from bytecache.stages.student.tokenizer_files import write_new
from bytecache.stages.tokens.token_bytes import byte_alphabet

BOS, EOS = "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + '\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
"""Of a new student: plain words for roles, its end token after an answer."""


def train_bpe(texts: Iterator[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens (256 bytes and two control tokens included); deterministic.

    Raises:
        ConfigError: `size` leaves no room for the 256 bytes and two control tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet) + 2:
        raise ConfigError(f"student.tokenizer = 'bpe:{size}': at least {len(alphabet) + 2} tokens are needed; raise N")
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer)


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token: id 2 + byte, after the start and the end token."""
    letters = {BOS: 0, EOS: 1, **{letter: 2 + byte for letter, byte in byte_alphabet().items()}}
    tokenizer = _byte_level(models.BPE(vocab=letters, merges=[]), use_regex=False)
    tokenizer.add_special_tokens([BOS, EOS])
    return _finished(tokenizer)


def _byte_level(model: Any, *, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    """The start token in front of every text."""
    start = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, start)]),
        ]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer that was made here, with its start and end token and our chat template."""
    write_new(tokenizer, folder, {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE})
