"""A small data set of byte targets with an invented teacher, for tests of everything after `convert`."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bytecache.schemas.dataset.index import ShardEntry, write_dataset
from bytecache.schemas.shard.builder import ShardBuilder

SUBJECTS = ("the cache", "a teacher", "the student", "every byte", "naïve façade", "日本語", "one shard", "the token")
VERBS = ("reads", "keeps", "predicts", "forgets", "hashes", "cuts", "verifies", "writes")
COUNTS = ("n_documents", "n_bytes", "n_positions", "n_supervised", "n_entries", "tail_mean", "tail_max")


def document(seed: int, sentences: int) -> str:
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, 8, size=(sentences, 3))
    return " ".join(f"{SUBJECTS[a]} {VERBS[b]} {SUBJECTS[c]}." for a, b, c in pick)


def teacher(text: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n+1, 257] and tails: mostly right, four other symbols listed, the rest unlisted."""
    rng = np.random.default_rng(seed)
    probs = np.zeros((text.size + 1, 257), np.float32)
    true = np.append(text, 256).astype(np.int64)
    for i, symbol in enumerate(true):
        others = rng.choice(257, size=4, replace=False)
        probs[i, others] = rng.dirichlet(np.ones(4)) * 0.25
        probs[i, symbol] = 0
        probs[i, symbol] = 0.97 - probs[i].sum()
    return probs, (1 - probs.sum(axis=1)).astype(np.float32)


def write_split(
    folder: Path, split: str, documents: list[str], per_shard: int, mask: Callable[[int], np.ndarray] | None = None
) -> list[ShardEntry]:
    entries = []
    for number, first in enumerate(range(0, len(documents), per_shard)):
        builder = ShardBuilder()
        for index in range(first, min(first + per_shard, len(documents))):
            text = np.frombuffer(documents[index].encode(), np.uint8)
            probs, tail = teacher(text, index)
            builder.append(text, probs, tail, mask(text.size + 1) if mask else None)
            builder.end_document(f"{split}-{index}")
        path = folder / f"{split}-{number:05d}-abcdefabcdef.zarr.zip"
        counts = builder.write(path, {})
        known = {k: counts[k] for k in COUNTS}
        data = path.read_bytes()
        identity = {"file": path.name, "split": split, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        entries.append(ShardEntry(**{**known, **identity, "key": "ab" * 32}))
    return entries


def make_dataset(folder: Path, *, documents: int = 12, sentences: int = 12, per_shard: int = 5) -> Path:
    folder.mkdir(parents=True)
    train = [document(i, 1 + (i * 7) % sentences) for i in range(documents)]
    held = [document(1000 + i, sentences) for i in range(3)]
    entries = write_split(folder, "train", train, per_shard) + write_split(folder, "heldout", held, 8)
    write_dataset(folder, entries, {})
    return folder
