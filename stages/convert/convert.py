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
from bytecache.schemas.dump.window import Window, keep_rows
from bytecache.schemas.errors import IntegrityError, Interrupted
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.schemas.shard.reader import read_shard
from bytecache.stages.convert.coarser import coarsen
from bytecache.stages.convert.effort import Effort, coarser_effort
from bytecache.stages.convert.precision import precision_of
from bytecache.stages.fidelity.bound import Bound
from bytecache.stages.fidelity.certificate import Fidelity
from bytecache.stages.fidelity.measuring import measure_window
from bytecache.stages.lattice.lattice import Lattice


class Conversion:
    """A shard under way: the windows of dump parts of one teacher, in order, become one shard.

    For every part `begin_part`, `add` for each of its windows, `end_part`; then `write`.
    """

    def __init__(self, settings: st.Convert, stop: Callable[[], bool], tick: Callable[[dict[str, Any]], None]) -> None:
        self._settings, self._stop, self._tick = settings, stop, tick
        self._builder = ShardBuilder(settings.prune, precision_of(settings))
        self._first_part = self._part = ""
        self._meta: dict[str, Any] = {}
        self._reference: dict[str, Any] = {}
        self._noise: list[dict[str, Any]] = []
        self._effort: Effort | None = None
        self._open_document: str | None = None
        self._references: list[Window] = []
        self._bound = Bound()
        self._marginal = self._canonical = self._unaccounted = 0.0
        self._stand_ins = 0

    def begin_part(self, name: str, meta: dict[str, Any]) -> None:
        """`meta`: of the part `name`. Raises IntegrityError where it is damaged or another teacher's, ConfigError."""
        _check_meta(name, meta)
        if self._meta and meta["teacher"] != self._meta["teacher"]:
            raise IntegrityError(
                f"{name}: made by another teacher or other settings than {self._first_part}; convert them apart"
            )
        self._first_part = self._first_part or name
        self._part, self._meta = name, meta
        self._reference = meta.get("reference") or self._reference
        self._noise += [meta["noise"]] if meta.get("noise") else []
        self._effort = coarser_effort(self._settings, TeacherIdentity.of(meta["teacher"], name).settings)

    def add(self, window: Window) -> None:
        """The next window of the part. Raises IntegrityError, and Interrupted when `stop()` says so."""
        if self._stop():
            raise Interrupted("stopped while converting; rerun the same command to continue")
        if window.reference:
            self._references.append(window)
            return
        if self._effort is not None:
            window, stood_in = coarsen(window, self._effort)
            self._stand_ins += stood_in
        if self._open_document is not None and window.doc_id != self._open_document:
            raise self._broken_off()
        self._append(window)
        self._open_document = window.doc_id
        if window.is_last:
            self._builder.end_document(window.doc_id)
            self._open_document = None
        self._tick({"bytes": len(window.text) - window.score_start})

    def _append(self, window: Window) -> None:
        """Targets of a window, and what they add to the sums."""
        lattice = Lattice(window)
        targets = lattice.sparse_targets()
        if len(window.context):
            _append_context(self._builder, window.context)
        mask = np.ones(len(targets.tail), np.uint8)
        if not self._meta.get("ends", True) and window.is_last:
            mask[-1] = 0
        self._builder.append_sparse(window.text[window.score_start :], *targets[:4], mask)
        self._marginal += lattice.marginal_nll
        self._canonical += window.canonical_nll
        self._unaccounted += float(targets.unaccounted.sum(dtype=np.float64))
        self._bound.add(lattice)

    def end_part(self) -> None:
        """The part has no more windows. Raises IntegrityError where it ends inside a document."""
        if self._open_document is not None:
            raise self._broken_off()

    def _broken_off(self) -> IntegrityError:
        return IntegrityError(
            f"{self._part}: document {self._open_document!r} breaks off; delete the part and dump it again"
        )

    def write(self, out_path: Path, attrs: dict[str, Any]) -> dict[str, Any]:
        """Write the shard; returns its counts, see `convert_units`."""
        kind = self._meta.get("kind", "text")
        if kind != "text":
            attrs = {**attrs, "kind": kind}
        described = {**attrs, "teacher": self._meta.get("teacher"), "bound": self._bound.summary()}
        counts = dict(self._builder.write(out_path, described))
        counts |= {
            "teacher_nll": self._marginal,
            "canonical_nll": self._canonical,
            "unaccounted_mean": self._unaccounted / max(1, counts["n_supervised"]),
            "fidelity": self._fidelity(out_path).state(),
            "bound": self._bound.state(),
            "reference": self._reference,
            **({"noise": self._noise} if self._noise else {}),
        }
        return counts if self._effort is None else counts | {"stand_ins": self._stand_ins}

    def _fidelity(self, out_path: Path) -> Fidelity:
        """The finished shard beside the reference windows."""
        fidelity = Fidelity()
        if not self._references:
            return fidelity
        shard = read_shard(out_path)
        for window in self._references:
            asked = keep_rows(window, window.row_sampled == 1)
            known = asked if self._effort is None else coarsen(asked, self._effort)[0]
            measure_window(fidelity, window, known, shard)
        return fidelity


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
    conversion = Conversion(settings, stop, tick)
    for part in parts:
        conversion.begin_part(str(part), read_meta(part))
        for window in read_windows(part, top_k=False):
            conversion.add(window)
        conversion.end_part()
    return conversion.write(out_path, attrs)


def _check_meta(part: str, meta: dict[str, Any]) -> None:
    """Raises IntegrityError where what a conversion needs of a part's metadata is missing or damaged."""
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


def _append_context(builder: ShardBuilder, context: np.ndarray) -> None:
    """Bytes that are read and not learned: nothing listed, all of the mass unlisted."""
    rows = len(context)
    nothing = np.zeros(0, np.int16), np.zeros(0, np.float32)
    builder.append_sparse(
        context, np.zeros(rows, np.int64), *nothing, np.ones(rows, np.float32), np.zeros(rows, np.uint8)
    )
