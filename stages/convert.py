"""The convert stage: dump parts in, one byte-target shard out. CPU only, one pass, one window in memory.

Deterministic: the same parts and settings give the same bytes. Measured price: see `benchmarks/`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from schemas import settings as st
from schemas.byte_shard import ShardBuilder
from schemas.errors import IntegrityError, Interrupted
from schemas.token_dump import read_meta, read_windows
from stages.lattice import Lattice


def convert_units(
    parts: Sequence[Path],
    out_path: Path,
    settings: st.Convert,
    attrs: dict[str, Any],
    stop: Callable[[], bool],
    tick: Callable[[dict], None],
) -> dict[str, Any]:
    """Convert dump parts of one teacher, in order, into one shard at `out_path`.

    Returns the shard's counts plus `teacher_nll` (marginal, nats over the text, END not included), `canonical_nll`
    and the means of the tail's parts. `tick` receives {"bytes"} per window. Raises IntegrityError for parts that are
    damaged, inconsistent or of different teachers, Interrupted when `stop()` says so; the output is then incomplete.
    """
    builder = ShardBuilder(prune=settings.prune)
    teacher: Any = None
    marginal = canonical = unaccounted = 0.0
    for part in parts:
        meta = read_meta(part)
        if teacher is not None and meta["teacher"] != teacher:
            raise IntegrityError(
                f"{part}: made by another teacher or other settings than {parts[0]}; convert them apart"
            )
        teacher = meta["teacher"]
        open_document = ""
        for window in read_windows(part, top_k=False):
            if stop():
                raise Interrupted("stopped while converting; rerun the same command to continue")
            if open_document and window.doc_id != open_document:
                raise IntegrityError(
                    f"{part}: document {open_document!r} breaks off; delete the part and dump it again"
                )
            lattice = Lattice(window)
            targets = lattice.targets()
            text = window.text[window.score_start :]
            builder.append(text, targets.probs, targets.tail)
            marginal += lattice.marginal_nll
            canonical += window.canonical_nll
            unaccounted += float(targets.unaccounted.sum(dtype=np.float64))
            open_document = window.doc_id
            if window.is_last:
                builder.end_document(window.doc_id)
                open_document = ""
            tick({"bytes": len(text)})
        if open_document:
            raise IntegrityError(f"{part}: document {open_document!r} breaks off; delete the part and dump it again")
    counts = dict(builder.write(out_path, {**attrs, "teacher": teacher}))
    counts |= {
        "teacher_nll": marginal,
        "canonical_nll": canonical,
        "unaccounted_mean": unaccounted / max(1, counts["n_positions"]),
    }
    return counts
