"""Worlds small enough to know: a Markov source is text and teacher in one, a BPE of few merges cuts it."""

from typing import Any, ClassVar, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from bytecache.schemas.arrays import END
from bytecache.schemas.shard.reader import TAIL_MASS, Triples
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.batches.token_shard import TokenShard, tokenise

DOCUMENT = 2000
"""Bytes of a document; its end is certain, and so is that it goes on until then."""


class ExactShard:
    """What training asks of a shard, with every probability as it is: a real one would round and prune them."""

    path = "a tiny world"
    attrs: ClassVar[dict[str, Any]] = {}

    def __init__(self, text: np.ndarray, alphabet: np.ndarray, probs: np.ndarray, documents: int) -> None:
        """text uint8 [documents * DOCUMENT] over `alphabet`; probs float [n, letters]."""
        size = DOCUMENT + 1
        self.text = np.zeros((documents, size), np.uint8)
        self.text[:, :-1] = text.reshape(documents, DOCUMENT)
        self.text = self.text.reshape(-1)
        self.mask = np.ones(documents * size, np.uint8)
        self.codes = {"tail": np.full(documents * size, int(np.argmin(TAIL_MASS)), np.uint8)}
        self.doc_start = np.arange(documents + 1) * size
        self.doc_id = [str(d) for d in range(documents)]
        self._alphabet = np.sort(alphabet)
        table = np.zeros((documents, size, len(alphabet)))
        table[:, :-1] = probs.reshape(documents, DOCUMENT, -1)[:, :, np.argsort(alphabet)]
        self._table = table.reshape(documents * size, -1)

    def __len__(self) -> int:
        return len(self.text)

    def symbols(self, lo: int, hi: int) -> np.ndarray:
        symbols = self.text.astype(np.int64)
        symbols[DOCUMENT :: DOCUMENT + 1] = END
        return symbols[lo:hi]

    def tails(self, lo: int, hi: int) -> np.ndarray:
        return np.zeros(hi - lo, np.float32)

    def triples(self, lo: int, hi: int) -> Triples:
        part = self._table[lo:hi]
        row, letter = np.nonzero(part)
        ends = np.flatnonzero(part.sum(1) == 0)
        rows = np.concatenate([row, ends])
        order = np.argsort(rows, kind="stable")
        symbol = np.concatenate([self._alphabet[letter], np.full(len(ends), 256)])[order]
        prob = np.concatenate([part[row, letter], np.ones(len(ends))])[order]
        return Triples(rows[order].astype(np.int32), symbol.astype(np.int16), prob.astype(np.float32))


class OneShard:
    """A `ShardReader` of one shard."""

    def __init__(self, shard: ExactShard, vocabulary: Vocabulary, end_id: int) -> None:
        self.vocabulary, self.end_id = vocabulary, end_id
        self.positions = [len(shard)]
        self._shard = tokenise(shard, vocabulary, end_id)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> TokenShard:
        return self._shard


class Encoder:
    """What a vocabulary asks of its tokenizer."""

    rewrites = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def canonical(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def plain(self, text):
        return None


class World(NamedTuple):
    """`bits`: of the source on the held-out text, per byte: what no student can beat."""

    train: Any
    heldout: Any
    vocabulary: Vocabulary
    bits: float


def sample(source: np.ndarray, order: int, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(letters [n], states [n] they were drawn in) of a source [letters ** order, letters]."""
    cumulative, draws = source.cumsum(1), rng.random(n)
    letters, states = np.empty(n, np.int64), np.empty(n, np.int64)
    state, size = 0, source.shape[1]
    for i in range(n):
        states[i] = state
        letters[i] = min(int(np.searchsorted(cumulative[state], draws[i])), size - 1)
        state = (state * size + letters[i]) % len(source)
    return letters, states


def bpe(text: str, merges: int, words: bool) -> Tokenizer:
    """`words`: a space begins a word, and no token crosses into one."""
    tokenizer = Tokenizer(models.BPE())
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=merges + len(set(text)), show_progress=False, min_frequency=1, max_token_length=12
    )
    tokenizer.train_from_iterator([text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)], trainer)
    return tokenizer


def make_world(order: int, letters: str, merges: int, *, n: int, seed: int = 0) -> World:
    """A source of that order over `letters`; a space among them makes words. n: bytes of each split, about."""
    rng = np.random.default_rng(seed)
    alphabet = np.frombuffer(letters.encode(), np.uint8)
    source = rng.dirichlet(np.ones(len(letters)), size=len(letters) ** order)
    documents = n // DOCUMENT
    shards, texts, bits = [], [], 0.0
    for _ in ("train", "heldout"):
        drawn, states = sample(source, order, documents * DOCUMENT, rng)
        shards.append(ExactShard(alphabet[drawn], alphabet, source[states], documents))
        texts.append(alphabet[drawn].tobytes().decode())
        bits = -float(np.log2(source[states, drawn]).mean())
    tokenizer = bpe(texts[0][:40_000], merges, " " in letters)
    end = tokenizer.get_vocab_size()
    spelled: list[bytes | None] = [None] * (end + 1)
    for text, token in tokenizer.get_vocab().items():
        spelled[token] = text.encode()
    vocabulary = Vocabulary(spelled, start_id=end, end_ids=[end], encoder=Encoder(tokenizer))
    train, heldout = (OneShard(shard, vocabulary, end) for shard in shards)
    return World(train, heldout, vocabulary, bits)
