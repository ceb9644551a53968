"""A teacher that writes: white space in runs, numbers, contractions, and what follows depends on how the text was cut.

Its distributions are functions of the history, so that two cuts of one text say different things: for what depends on
cuts the hardest case, and one whose truth is known (tests.support.oracle). It writes as it predicts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bytecache.schemas import settings as st
from bytecache.stages.lattice.lattice import Deviations, Lattice
from bytecache.stages.teacher.teacher import Teacher
from bytecache.stages.tokens.vocab import Vocabulary
from tests.support.function_model import FunctionEngine
from tests.support.vocab_models import checkpoint

PIECES = (
    ["\n" * n for n in range(1, 5)] + [" " * n for n in range(1, 6)] + ["\t", "\t\t", "\n\n  ", " \n", "  \n"]
    + [str(n) for n in (0, 1, 2, 7, 12, 20, 21, 120, 201, 712)] + [" 1", " 12", " 2"]
    + ["a", "b", "ab", " a", " ab", "the", " the", "don", " don", "'", "'t", "'s", "s", "t", ".", "..", "...", ",", ")"]
)  # fmt: skip
"""What it writes, as far as a vocabulary has them."""


_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt2": None,
    "llama3": _WORDS,
    "qwen": _WORDS.replace("{1,3}", ""),
}
"""How three families cut a text before their merges; None: as GPT-2."""


def write_tokenizer(folder: Path, cut: str) -> Path:
    """A byte-level BPE cut as `CUTS[cut]` that has `PIECES` among its tokens where such a cut leaves them whole."""
    tokenizer = Tokenizer(models.BPE())
    whole, regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), CUTS[cut]
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if regex is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), whole])
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([f"{piece}{after}" for piece in PIECES for after in PIECES], trainer)
    checkpoint(folder, tokenizer, tokenizer_config={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    return folder


class WritingEngine(FunctionEngine):
    """Nearly all of the mass is on `PIECES`, shared out by a hash of the last tokens."""

    memory = 3
    """Tokens that a distribution depends on."""

    def __init__(self, vocabulary: Vocabulary, *, floor: float, spread: float):
        super().__init__(vocabulary, floor=floor, spread=spread)
        wanted = {piece.encode() for piece in PIECES}
        self.pool = np.array([i for i, piece in enumerate(vocabulary.token_bytes) if piece in wanted])
        self.seen: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, history: Sequence[int]) -> np.ndarray:
        """float32 [size]"""
        key = tuple(int(token) for token in history[-self.memory :])
        if key not in self.seen:
            draw = np.random.default_rng(abs(hash(key)))
            logits = np.full(self.vocabulary.size, -30.0, np.float32)
            logits[self.pool] = draw.standard_normal(len(self.pool)) * self.spread
            logits[self.vocabulary.end_ids] = -3.0
            self.seen[key] = logits
        return self.seen[key]

    def write(self, tokens: int, seed: int) -> bytes:
        """Text of so many tokens, drawn token by token."""
        draw = np.random.default_rng(seed)
        history, out = [self.vocabulary.start_id], b""
        for _ in range(tokens):
            p = self.next_token(tuple(history))[self.pool]
            history.append(int(draw.choice(self.pool, p=p / p.sum())))
            out += self.vocabulary.token_bytes[history[-1]] or b""
        return out


def writing_teacher(vocabulary: Vocabulary, *, spread: float = 2.0, **effort: float) -> Teacher:
    """A teacher of that kind at an effort: tau, depth, static."""
    chosen: dict[str, Any] = {"tau": 0.01, "depth": 2, "static": 0.0, **effort}
    settings = st.Teacher(model="writing", backend="hf", context=512, overlap=32, top_k=2, floor=0.0, **chosen)
    engine = WritingEngine(vocabulary, floor=0.0, spread=spread)
    return Teacher(engine, vocabulary, settings, {"model": "writing", "vocabulary": vocabulary.fingerprint})


def joining_where_tokens_break(deviations: Any, *, spared: float = -1.0) -> Any:
    """`Lattice.deviations` by the rule that is no more: what ends where the canonical tokens break joins unasked.

    `spared`: a tau at which it asks all the same.
    """

    def by_the_old_rule(self: Lattice, *, tau: float, depth: int) -> Deviations:
        found = deviations(self, tau=tau, depth=depth)
        if tau in (0.0, spared):
            return found
        window = self.window
        elsewhere = ~np.isin(found.position, window.row_start[window.row_depth == 0])
        return Deviations(*(values[elsewhere] for values in found))

    return by_the_old_rule
