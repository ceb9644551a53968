"""`probe`: one text, one teacher, one .npz; the file appears whole or not at all."""

import math
from pathlib import Path

import numpy as np

from bytecache.pipeline.commands.teacher import start_line
from bytecache.pipeline.stores import disk_errors
from bytecache.schemas.errors import InputError
from bytecache.schemas.files import new_file, refuse_output
from bytecache.schemas.settings import Teacher

MOST = 1 << 24
"""Bytes of a text that is probed: a row of probabilities takes a thousand times as many."""


def probe(settings: Teacher, text_file: Path, out: Path) -> str:
    """Score `text_file` and write `out` (probs, tail, text; see `probe_text`); returns a line of figures.

    Raises InputError for a file that cannot be read or is not UTF-8, and what the teacher raises.
    """
    try:
        with text_file.open("rb") as stream:
            raw = stream.read(MOST + 1)
    except OSError as error:
        raise InputError(f"{text_file} cannot be read: {error.strerror}; name a UTF-8 text file") from None
    if len(raw) > MOST:
        raise InputError(f"{text_file} is longer than {MOST} bytes; a probe scores one text in memory: cut it")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{text_file} is not UTF-8 at byte {error.start}; re-encode it") from None
    if not text:
        raise InputError(f"{text_file} is empty; give at least one character")
    if not out.parent.is_dir():
        raise InputError(f"folder {out.parent} of --out does not exist; make it first")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file in it, such as {out / 'probe.npz'}")
    refuse_output(out, "--out", text_file)
    from bytecache.stages.teacher.probe import probe_text
    from bytecache.stages.teacher.start import with_start

    settings, record = with_start(settings)
    probs, tail, data = probe_text(settings, text)
    _write(out, probs, tail, data)
    listed = probs[np.arange(len(data)), data].astype(np.float64)
    # A byte left to the tail has at most the tail's mass; END is not counted, so this is per text byte.
    floor = np.maximum(listed, np.finfo(np.float32).tiny)
    bits = float(-np.log(floor).sum()) / math.log(2) / len(data)
    unlisted = int((listed <= 0).sum())
    started = f"; {start_line(record)}" if record else ""
    note = f", {unlisted} bytes lie in the tail" if unlisted else ""
    return f"{out}: {len(data)} bytes, {bits:.4f} bits/byte, mean tail {float(tail.mean()):.3e}{note}{started}"


def _write(out: Path, probs: np.ndarray, tail: np.ndarray, data: np.ndarray) -> None:
    with disk_errors(f"writing {out}"), new_file(out) as stream:
        np.savez(stream, probs=probs, tail=tail, text=data)
