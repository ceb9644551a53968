"""Settings and corpus of a whole run that takes seconds: a tiny random teacher, a tiny student."""

import json
from pathlib import Path

from bytecache.schemas.settings import Settings
from tests.support.tiny_models import make_checkpoint


def small_settings(folder: Path, *, documents: int = 160) -> Settings:
    """A corpus and a teacher in `folder`, and settings for a run in `folder/run`: a unit per 8 documents or so."""
    texts = [f"{i}: " + "the student reads the notes as often as it likes, " * (1 + i % 3) for i in range(documents)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    teacher = make_checkpoint(folder / "teacher")
    return Settings.model_validate({
        "run": {"dir": str(folder / "run")},
        "corpus": {"source": str(corpus), "unit_bytes": 1000, "heldout_fraction": 0.1},
        "teacher": {
            "model": str(teacher), "backend": "hf", "context": 128, "overlap": 32, "depth": 1, "tau": 0.01,
        },
        "convert": {"shard_bytes": 2000},
        "student": {"model": "", "tokenizer": "bpe:300", "hidden_size": 32, "layers": 1, "heads": 2},
        "train": {
            "steps": 12, "batch": 2, "window_bytes": 128, "warmup": 2, "checkpoint_every": 2, "control": False,
        },
    })  # fmt: skip
