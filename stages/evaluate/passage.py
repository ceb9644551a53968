"""One held-out passage, byte by byte: how sure of the next byte the teacher is there, and how sure students are.

The passage is the beginning of a held-out document, so that all have read the same before each byte. The teacher's
distributions are the targets'. A student's are computed as a teacher's are, by an engine and the lattice, from the
student as a plain checkpoint: its tokens summed over the ways to cut the text (preset `fast`).
Price: a checkpoint of each student for a moment, its engine's start, and about 600 bytes of text.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import BytecacheError
from bytecache.schemas.files import scratch_folder
from bytecache.schemas.settings import Teacher
from bytecache.stages.evaluate.evaluate import load_trained
from bytecache.stages.student.student import save_plain
from bytecache.stages.targets.source import load_shard
from bytecache.stages.teacher.probe import probe_with
from bytecache.stages.teacher.teacher import open_teacher

LENGTH = 600
"""Bytes of the passage, at most."""


def show_passage(
    dataset: Dataset, students: dict[str, tuple[Path, Path]], place: Path, split: str = "heldout"
) -> dict[str, Any]:
    """The passage with everybody's entropies, as JSON.

    Args:
        students: name to the folder that the training began from, and its last checkpoint. place: for checkpoints that
            are needed for a moment.

    Returns:
        "document", "text" (str), "entropy": name ("teacher" first) to bits at each byte of the text in UTF-8, and
        "refused": name to the reason, of students that no engine here can read. Empty without a document of plain text.
    """
    chosen = _choose(dataset, split)
    if chosen is None:
        return {}
    document, text, teacher = chosen
    entropy, refused = {"teacher": teacher}, {}
    for name, (folder, checkpoint) in students.items():
        try:
            entropy[name] = _of_student(folder, checkpoint, text, place)
        except BytecacheError as error:
            refused[name] = str(error)
    rounded = {name: [round(float(bits), 3) for bits in values] for name, values in entropy.items()}
    return {"document": document, "text": text, "entropy": rounded, "refused": refused}


def _choose(dataset: Dataset, split: str) -> tuple[str, str, npt.NDArray[np.float64]] | None:
    """Id, text and the teacher's entropies: of the split's first document of `LENGTH` bytes, else of its longest."""
    best: tuple[str, str, npt.NDArray[np.float64]] | None = None
    for entry in dataset.split(split):
        shard = load_shard(dataset, entry)
        for number, name in enumerate(shard.doc_id):
            lo, end = (int(place) for place in shard.doc_start[number : number + 2])
            raw = np.asarray(shard.text[lo : min(end - 1, lo + LENGTH)]).tobytes()
            text = raw.decode("utf-8", errors="ignore")  # of a character that is cut in two, nothing
            size = len(text.encode())
            if size <= (len(best[2]) if best else 0) or not np.asarray(shard.mask[lo : lo + size]).all():
                continue
            best = name, text, entropy_of(shard.dense(lo, lo + size, spread_tail=True))
            if end - 1 - lo >= LENGTH:
                return best
    return best


def entropy_of(probs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Bits of each row of [n, symbols]."""
    p = np.asarray(probs, np.float64)
    bits: npt.NDArray[np.float64] = np.maximum(-(p * np.log2(np.maximum(p, 1e-300))).sum(axis=1), 0.0)
    return bits


def _of_student(folder: Path, checkpoint: Path, text: str, place: Path) -> npt.NDArray[np.float64]:
    """Bits at each byte. Raises what an engine raises of a model that it cannot read."""
    model = load_trained(folder, checkpoint).student.model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    with scratch_folder(place) as scratch:
        save_plain(model, folder, scratch)
        del model
        effort = Teacher(model=str(scratch), backend="hf", preset="fast", dtype="float32", top_k=0, sample_tokens=0)
        engine = open_teacher(effort)
        try:
            probs, tail, data = probe_with(engine, text)
        finally:
            engine.close()
    # What was not evaluated is anybody's, as far as this passage's colours go.
    bits = entropy_of(probs + tail[:, None] / probs.shape[1])
    return bits[: len(data)]
