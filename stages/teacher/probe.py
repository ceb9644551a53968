"""Score one text in memory: what a user looks at before paying for a corpus."""

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.errors import InputError
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.start import with_start
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.tokens.vocab import Misfit

CONTEXT = 2048
"""Tokens of context for one text where teacher.context is automatic and the model holds as many."""


def probe_text(settings: st.Teacher, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Next-symbol distributions of one text, from an engine started for it.

    Returns probs float32 [n+1, 257] (bytes, then END; row i is P(. | x[:i])), tail float32 [n+1] (probs and tail of a
    row sum to 1) and text uint8 [n]. `teacher.start` = "auto" is measured (`stages.teacher.start`). Raises InputError
    when the teacher's tokenizer cannot reproduce the text.
    """
    settings, _ = with_start(settings)
    teacher = open_teacher(settings, automatic_context=CONTEXT)
    try:
        return probe_with(teacher, text)
    finally:
        teacher.close()


def probe_with(teacher: Teacher, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`probe_text` with a running teacher."""
    (encoded,) = teacher.vocabulary.encode_batch([text])
    if isinstance(encoded, Misfit):
        raise InputError(
            f"the teacher's tokenizer cannot reproduce this text byte for byte ({encoded.reason}); change the text"
        )
    windows = [window for group in teacher.windows([("probe", 0, encoded)]) for window in group]
    targets = [Lattice(window).targets() for window in windows]
    data = np.frombuffer(encoded.data, np.uint8)[encoded.synthetic :]
    return np.concatenate([t.probs for t in targets]), np.concatenate([t.tail for t in targets]), data
