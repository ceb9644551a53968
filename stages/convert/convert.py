"""The convert stage: dump parts in, one byte-target shard out. CPU only, one pass, one window in memory.

Deterministic: the same parts and settings give the same bytes. With `tau`, `depth` or `static` set, windows are first
reduced to what a capture at that effort would hold (`coarser`). Reference windows of the parts give no targets:
they are kept aside and compared with the finished shard (stages.fidelity.certificate).
Price: about a second a MB of text on one core, a third of it encoding; `benchmarks/convert_throughput.py` measures it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.dump.parquet import read_meta, read_windows
from bytecache.schemas.dump.rows import keep_rows
from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import IntegrityError, Interrupted
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.shard.reader import ShardBuilder, read_shard
from bytecache.stages.convert.coarser import Effort, coarsen, coarser_effort
from bytecache.stages.convert.precision import precision_of
from bytecache.stages.fidelity.bound import Bound
from bytecache.stages.fidelity.certificate import Fidelity
from bytecache.stages.lattice.lattice import Lattice


def convert_units(
    parts: Sequence[Path],
    out_path: Path,
    settings: st.Convert,
    attrs: dict[str, Any],
    stop: Callable[[], bool],
    tick: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Convert dump parts of one teacher, in order, into one shard at `out_path`.

    Returns the shard's counts plus `teacher_nll` (marginal, nats over the text, END not included), `canonical_nll`
    and `unaccounted_mean`, the tail's part that no evaluated history explains; at a coarser effort than the dump's
    `stand_ins`, branches in the place of static rows; `fidelity` is the state of a `Fidelity` over the
    parts' reference windows (None without any), `reference` how these were made, `noise` the states of
    the parts' `Noise` where it was measured, `bound` the state of a
    `Bound` over all positions, whose summary the shard's attributes hold. `tick` receives {"bytes"} per window.
    Raises IntegrityError for parts that are damaged, inconsistent or of different teachers, ConfigError for a
    rate that is too low, and for a tau, depth or static that asks for more than the dump holds, Interrupted when
    `stop()` says so; the output is then incomplete.
    """
    builder = ShardBuilder(settings.prune, precision_of(settings))
    references: list[Window] = []
    teacher: Any = None
    kind, ends = "text", True
    reference: dict[str, Any] = {}
    noise: list[dict[str, Any]] = []
    marginal = canonical = unaccounted = 0.0
    bound = Bound()
    effort: Effort | None = None
    stand_ins = 0
    for part in parts:
        meta = _meta(part)
        if teacher is not None and meta["teacher"] != teacher:
            raise IntegrityError(
                f"{part}: made by another teacher or other settings than {parts[0]}; convert them apart"
            )
        teacher, kind, ends = meta["teacher"], meta.get("kind", "text"), meta.get("ends", True)
        reference = meta.get("reference") or reference
        noise += [meta["noise"]] if meta.get("noise") else []
        effort = coarser_effort(settings, TeacherIdentity.of(meta["teacher"], part).settings)
        open_document: str | None = None
        for window in read_windows(part, top_k=False):
            if stop():
                raise Interrupted("stopped while converting; rerun the same command to continue")
            if window.reference:
                references.append(window)
                continue
            if effort is not None:
                window, stood_in = coarsen(window, effort)
                stand_ins += stood_in
            if open_document is not None and window.doc_id != open_document:
                raise IntegrityError(
                    f"{part}: document {open_document!r} breaks off; delete the part and dump it again"
                )
            lattice = Lattice(window)
            targets = lattice.sparse_targets()
            text = window.text[window.score_start :]
            if len(window.context):
                _append_context(builder, window.context)
            mask = np.ones(len(targets.tail), np.uint8)
            if not ends and window.is_last:
                mask[-1] = 0
            builder.append_sparse(text, *targets[:4], mask)
            marginal += lattice.marginal_nll
            canonical += window.canonical_nll
            unaccounted += float(targets.unaccounted.sum(dtype=np.float64))
            bound.add(lattice)
            open_document = window.doc_id
            if window.is_last:
                builder.end_document(window.doc_id)
                open_document = None
            tick({"bytes": len(text)})
        if open_document is not None:
            raise IntegrityError(f"{part}: document {open_document!r} breaks off; delete the part and dump it again")
    if kind != "text":
        attrs = {**attrs, "kind": kind}
    counts = dict(builder.write(out_path, {**attrs, "teacher": teacher, "bound": bound.summary()}))
    fidelity = Fidelity()
    if references:
        shard = read_shard(out_path)
        for window in references:
            asked = keep_rows(window, window.row_sampled == 1)
            fidelity.add_window(window, asked if effort is None else coarsen(asked, effort)[0], shard)
    counts |= {
        "teacher_nll": marginal,
        "canonical_nll": canonical,
        "unaccounted_mean": unaccounted / max(1, counts["n_supervised"]),
        "fidelity": fidelity.state(),
        "bound": bound.state(),
        "reference": reference,
        **({"noise": noise} if noise else {}),
    }
    return counts if effort is None else counts | {"stand_ins": stand_ins}


def _meta(part: Path) -> dict[str, Any]:
    """The metadata of a part. Raises IntegrityError where what a conversion needs of them is missing or damaged."""
    meta = read_meta(part)
    sound = {
        "teacher": isinstance(meta.get("teacher"), dict),
        "kind": meta.get("kind", "text") in ("text", "chat", "completion"),
        "ends": isinstance(meta.get("ends", True), bool),
        "reference": isinstance(meta.get("reference", {}), dict),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise IntegrityError(
                f"{part}: {name} = {str(meta.get(name))[:60]!r} in its metadata is no dump's; "
                "delete the part and rerun `bytecache teacher`"
            )
    return meta


def _append_context(builder: ShardBuilder, context: np.ndarray) -> None:
    """Bytes that are read and not learned: nothing listed, all of the mass unlisted."""
    rows = len(context)
    nothing = np.zeros(0, np.int16), np.zeros(0, np.float32)
    builder.append_sparse(
        context, np.zeros(rows, np.int64), *nothing, np.ones(rows, np.float32), np.zeros(rows, np.uint8)
    )
