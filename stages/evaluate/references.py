"""What a student's figures are read against where it is an existing model under another tokenizer.

`before`: the student as `prepare` made it, before any training. `original`: the model that it came from, under its own
tokenizer. Both are measured as students are, on the same text in the same windows; which of their choices the teacher
alone decides is counted on the training text, as training counts it. Retention is the part of the way from the one to
the other that training went, in bits per byte.
Price: one forward pass over the split each, and the training text cut into tokens.
"""

from pathlib import Path
from typing import Any

import torch

from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import Dataset
from bytecache.stages.evaluate.evaluate import measure, read_split
from bytecache.stages.student import student
from bytecache.stages.targets.source import open_dataset
from bytecache.stages.train.run import start_run


def evaluate_untrained(
    settings: st.Train, folder: Path, targets: Path | Dataset, *, name: str, split: str = "heldout"
) -> dict[str, Any]:
    """Figures of the model in a folder as it is there; its bytes are the choices of its own tokens.

    Args:
        settings: the `[train]` section, of which the windows count. folder: prepared student, or any checkpoint.

    Raises:
        InputError: the split is empty, or no document of it can be aligned. IntegrityError: a damaged folder or shard.
    """
    opened, dataset = student.load(folder), open_dataset(targets)
    plain = settings.model_copy(update={"lora_rank": 0, "head": "marginal", "dtype": "float32", "chunk": 0})
    with torch.random.fork_rng(devices=[]):
        run = start_run(opened, plain, 0, torch.device("cpu"), reader=read_split(opened, dataset, "train"))
    opened.model.eval()
    figures = measure(run, settings, dataset, split).figures
    parameters = sum(p.numel() for p in opened.model.parameters())
    return {"name": name, "split": split, **figures, "model_parameters": parameters, "head_parameters": 0}
