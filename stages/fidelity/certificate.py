"""The fidelity certificate: stored targets against a reference of the same teacher, measured while converting.

A dump part holds *reference windows* (schemas.dump.parquet): short stretches whose histories were evaluated far deeper
than production asks. All rows of such a window but the static ones give the reference, the rows marked `row_sampled`
give what production knew (less, where the conversion asked for less). The reference has no static rows, and what it did
not evaluate is dropped: it is what the evaluated histories say, and how much of the mass they lack is measured beside
it. (For the leak alone it joins as in production: a byte may be foreseen by histories below 2e-4 only.) Once the
shard is written it is read back, and for the very positions of the stretch

    kl, kl_bucket, jsd, leak   reference against what the shard says (stages.fidelity.divergence has the formulas)
    branch_kl                  reference against the production targets before they are stored
    storing_kl                 production targets against what the shard says: pruning and quantisation alone
    tail                       what the shard stores as unlisted, and of that: `unevaluated` histories, `pruned`
                               symbols, and `other`: control tokens and entries below teacher.floor
    missed                     share of the reference's mass that ends at the position in a history which it did not
                               evaluate either: large where a reference is none (one that let histories join did)

Beside it `bound` says, for every position and without a reference, what the targets can be wrong by
(stages.fidelity.bound). Sums, maxima and histograms merge across shards in any grouping (stages.fidelity.measure).
Price: reading the shard back (docs/results.md) and two lattices per reference window.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from bytecache.schemas.arrays import END
from bytecache.schemas.dump.window import Window, keep_rows
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.shard.reader import ByteShard
from bytecache.schemas.whole import is_number, same
from bytecache.stages.fidelity.divergence import divergence, kl_spread
from bytecache.stages.fidelity.measure import Measure, rounded
from bytecache.stages.lattice.effort import DROPPED
from bytecache.stages.lattice.lattice import Lattice

VERSION = 2
"""Of the accumulator and the certificate; states of different versions do not merge."""
MEASURES = ("kl", "kl_bucket", "jsd", "leak", "branch_kl", "storing_kl", "tail", "missed")
OF_PRODUCTION = ("branch_kl", "storing_kl")
"""Measures that need the rows which production had."""
TAIL_PARTS = ("unevaluated", "pruned", "other")
COUNTS = ("positions", "windows", "documents", "canonical_rows", "production_rows", "reference_rows")


def true_symbols(window: Window) -> np.ndarray:
    """int64 [m]; the symbol that follows at each scored position: bytes, and END after a document's last window."""
    text = window.text[window.score_start :].astype(np.int64)
    return np.append(text, END) if window.is_last else text


def locate(window: Window, shard: ByteShard) -> int:
    """Position in the shard of a reference window's first target. Raises IntegrityError where its text is not there."""
    text = window.text[window.score_start :]
    for document, name in enumerate(shard.doc_id):
        lo = int(shard.doc_start[document]) + window.doc_position
        hi = lo + len(text) + window.is_last
        fits = name == window.doc_id and hi <= shard.doc_start[document + 1]
        if fits and np.array_equal(shard.text[lo : lo + len(text)], text):
            return lo
    raise IntegrityError(
        f"{shard.path}: document {window.doc_id!r} does not hold the reference window at {window.doc_position}; "
        "delete the part and dump it again"
    )


class Fidelity:
    """What was measured so far; `state()` is JSON that `merge` takes back, `certificate()` is for people."""

    def __init__(self, states: Iterable[dict[str, Any] | None] = ()) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self.squared_positions = 0.0
        self.measures = {name: Measure() for name in MEASURES}
        self.tail_parts = dict.fromkeys(TAIL_PARTS, 0.0)
        self._last_document: tuple[str, str] | None = None
        for state in states:
            if state is not None:
                self.merge(state)

    def add_window(self, window: Window, asked: Window, shard: ByteShard) -> None:
        """Measure a reference window against the shard that holds its document. Raises IntegrityError if none does.

        `asked`: of its rows, what the shard was made from.
        """
        lo = locate(window, shard)
        deep = keep_rows(window, window.row_static == 0)
        reference = Lattice(deep, drop=DROPPED)
        whole, known = reference.targets(), Lattice(asked).targets()
        hi = lo + len(known.tail)
        stored, tail, weights = shard.dense(lo, hi), shard.tail[lo:hi], shard.tail_weights(lo, hi)
        self.add_positions(reference, shard, lo)
        self._add("branch_kl", kl_spread(whole.probs, whole.tail, known.probs, known.tail))
        self._add("storing_kl", kl_spread(known.probs, known.tail, stored, tail, weights))
        pruned = np.where(stored > 0, 0.0, known.probs).sum(dtype=np.float64)
        unevaluated = known.unaccounted.sum(dtype=np.float64)
        self.tail_parts["unevaluated"] += float(unevaluated)
        self.tail_parts["pruned"] += float(pruned)
        self.tail_parts["other"] += max(0.0, float(known.tail.sum(dtype=np.float64) - unevaluated))
        self.counts["canonical_rows"] += int((window.row_depth == 0).sum())
        self.counts["production_rows"] += int((asked.row_static == 0).sum())
        self.counts["reference_rows"] += len(deep.row_depth)

    def add_positions(self, reference: Lattice, shard: ByteShard, lo: int) -> None:
        """Measure one stretch: the shard's positions from `lo` on against `reference`; a document's stretches in a row.

        Tails are spread as the shard's prior says.
        """
        window, targets = reference.window, reference.targets()
        symbol = true_symbols(window)
        hi = lo + len(symbol)
        stored, tail, weights = shard.dense(lo, hi), shard.tail[lo:hi], shard.tail_weights(lo, hi)
        divergences = divergence(targets.probs, targets.tail, stored, tail, symbol, weights)
        # A history too light for the reference may be the one that foresaw a rare byte: for the leak it is not dropped.
        joined = Lattice(window).targets()
        leak = divergence(joined.probs, joined.tail, stored, tail, symbol, weights).leak
        for name, values in divergences._replace(leak=leak)._asdict().items():
            self._add(name, values)
        self._add("tail", tail.astype(np.float64))
        self._add("missed", reference.handed().total[window.score_start :][: len(symbol)])
        self.counts["positions"] += len(symbol)
        self.counts["windows"] += 1
        document = (shard.path, window.doc_id)
        self.counts["documents"] += document != self._last_document
        self._last_document = document
        self.squared_positions += float(len(symbol)) ** 2

    def _add(self, name: str, values: np.ndarray) -> None:
        self.measures[name].add(values)

    def state(self) -> dict[str, Any] | None:
        """JSON for `merge`; None if nothing was measured."""
        if not self.counts["windows"]:
            return None
        return {
            "version": VERSION,
            "counts": dict(self.counts),
            "squared_positions": self.squared_positions,
            "measures": {name: measure.state() for name, measure in self.measures.items()},
            "tail_parts": dict(self.tail_parts),
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Add what another accumulator measured. Raises ValueError for a state of another version."""
        if not same(state.get("version"), VERSION):
            raise ValueError(f"fidelity state of version {state.get('version')}, this software merges {VERSION}")
        for name in COUNTS:
            self.counts[name] += state["counts"][name]
        self.squared_positions += state["squared_positions"]
        for name, measure in self.measures.items():
            measure.merge(state["measures"][name])
        for name in TAIL_PARTS:
            self.tail_parts[name] += state["tail_parts"][name]

    def certificate(self, teacher: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any] | None:
        """The measured figures, six digits; None if nothing was measured.

        `teacher`: the identity in the dump's metadata; `reference`: how the reference windows were made.
        """
        positions, windows = self.counts["positions"], self.counts["windows"]
        if not positions:
            return None
        whole = bool(self.counts["production_rows"])
        figures = {
            name: measure.summary(positions, windows, self.squared_positions)
            for name, measure in self.measures.items()
            if whole or name not in OF_PRODUCTION
        }
        out: dict[str, Any] = {
            "version": VERSION,
            "unit": "nats per position; leak: bits per position; tail, missed: probability",
            "reference": reference,
            "teacher_sha256": TeacherIdentity.of(teacher, "the teacher").sha256,
            "sample": {name: self.counts[name] for name in ("positions", "windows", "documents")},
            **figures,
        }
        if whole:
            out["tail"] |= {name: rounded(mass / positions) for name, mass in self.tail_parts.items()}
            rows = self.counts["canonical_rows"]
            out["rows_per_token"] = {
                name: rounded(self.counts[f"{name}_rows"] / rows) for name in ("production", "reference")
            }
        return out


def figure(certificate: dict[str, Any], name: str, which: str = "mean") -> float:
    """One number of a certificate that somebody else may have written; NaN where it has none."""
    entry = certificate.get(name)
    value = entry.get(which) if isinstance(entry, dict) else None
    return float(value) if is_number(value) else math.nan


def summary_line(certificate: dict[str, Any] | None) -> str:
    """A certificate in one line."""
    if certificate is None or "kl" not in certificate:
        return "fidelity: not measured (no reference windows in the dump)"
    kl, leak = figure(certificate, "kl"), figure(certificate, "leak")
    sample, reference = (partial(figure, certificate, name) for name in ("sample", "reference"))
    return (
        f"fidelity: KL {kl:.3g} nats/byte (p99 {figure(certificate, 'kl', 'p99'):.2g}, "
        f"max {figure(certificate, 'kl', 'max'):.2g}), JSD {figure(certificate, 'jsd'):.2g}, "
        f"leak {leak:+.2g} bits/byte, tail {figure(certificate, 'tail'):.2g}, "
        f"over {sample('positions'):g} positions, against tau {reference('tau'):g}, depth {reference('depth'):g}"
        + _noise_words(certificate.get("noise"))
    )


def _noise_words(noise: Any) -> str:
    """The teacher's own noise, where it was measured (`stages.fidelity.noise`)."""
    if not isinstance(noise, dict) or not isinstance(noise.get("against"), dict):
        return ""
    return f"; the teacher's own noise: KL {figure(noise, 'kl'):.3g} from {noise['against'].get('model')} in float32"
