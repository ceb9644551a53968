"""Settings and corpus of a whole run that takes seconds: a tiny random teacher, a tiny student."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.schemas.dataset.index import read_dataset
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


def certified(folder: Path, *more: str, code: int = 0) -> dict[str, Any]:
    """The certificate of a small run, planned, taught and converted in `folder`; `refused` where that ends with `code`.

    more: further settings, as `--set` takes them.
    """
    settings = small_settings(folder, documents=12)
    teacher, corpus = settings.teacher, settings.corpus
    arguments = [
        f"run.dir={folder / 'run'}", f"corpus.source={corpus.source}", "corpus.unit_bytes=1000",
        f"teacher.model={teacher.model}", "teacher.backend=hf", "teacher.context=128", "teacher.overlap=32",
        "teacher.sample_tokens=24", "teacher.start=<|begin|>", *more,
    ]  # fmt: skip
    for command in ("plan", "teacher", "convert"):
        done = CliRunner().invoke(app, [command, *(part for each in arguments for part in ("--set", each))])
        if done.exit_code != 0:
            assert done.exit_code == code, done.output
            return {"refused": done.stderr}
    assert code == 0
    fidelity = read_dataset(folder / "run" / "targets").fidelity
    assert fidelity is not None
    return fidelity
