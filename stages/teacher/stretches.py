"""Stretches: short runs of a document evaluated alone, in the context that the document's own windows would give.

The targets of a stretch depend only on the text before them, so a stretch needs its window's tokens up to its own end,
and rows from `LEAD` tokens before its start, where tokens that straddle it begin (as at a window's start). That makes
a reference affordable: a few hundred tokens branch, not a whole document.
"""

from collections.abc import Callable, Sequence

import numpy as np

from bytecache.schemas.arrays import END
from bytecache.schemas.errors import InputError, IntegrityError
from bytecache.schemas.shard.reader import ByteShard
from bytecache.stages.fidelity.certificate import Fidelity
from bytecache.stages.fidelity.measuring import measure_stretch, true_symbols
from bytecache.stages.lattice.effort import DROPPED
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import Teacher
from bytecache.stages.teacher.windows import plan_stretch
from bytecache.stages.tokens.vocab import Misfit


def measure_stored(
    teacher: Teacher,
    shard: ByteShard,
    positions: Sequence[int],
    tokens: int,
    fidelity: Fidelity,
    stop: Callable[[], bool],
) -> None:
    """Compare what `shard` says from each of `positions` on, for `tokens` tokens, with this teacher, in `fidelity`.

    Raises InputError where the teacher's tokenizer cannot spell a document, IntegrityError where the shard's text is
    not the text that was evaluated, Interrupted when `stop()` says so.
    """
    context, overlap = teacher.settings.context, teacher.settings.overlap
    kind = shard.attrs.get("kind", "text")
    if kind != "text":
        raise InputError(
            f"{shard.path}: answers to prompts ({kind}) are measured while they are converted, and only then; "
            "see fidelity in dataset.json"
        )
    for position in positions:
        document = int(np.searchsorted(shard.doc_start, position, side="right")) - 1
        name, base = shard.doc_id[document], int(shard.doc_start[document])
        where = f"{shard.path}: document {name!r}"
        try:
            (encoded,) = teacher.vocabulary.encode_batch([shard.document(document).decode()])
        except UnicodeDecodeError as error:
            raise IntegrityError(
                f"{where} is not UTF-8 at byte {error.start}; fetch or make this shard again"
            ) from None
        if isinstance(encoded, Misfit):
            raise InputError(f"{where}: this teacher's tokenizer cannot reproduce it ({encoded.reason})")
        stretch = plan_stretch(
            name, encoded, position - base, tokens,
            start_id=teacher.vocabulary.start_id, context=context, overlap=overlap,
        )  # fmt: skip
        (window,) = teacher.evaluate([stretch.plan], stop)
        lo = base + stretch.first
        symbol, text = true_symbols(window), shard.text[lo : lo + stretch.n_targets]
        if not np.array_equal(symbol[symbol != END], text[: len(symbol)][symbol != END]):
            raise IntegrityError(f"{where}: its text changed at byte {stretch.first}; fetch or make this shard again")
        measure_stretch(fidelity, Lattice(window, drop=DROPPED), shard, lo)
