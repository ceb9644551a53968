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

Here are the sums and what is said of them, which asks for no compiled loop; stages.fidelity.measuring measures.
Beside it `bound` says, for every position and without a reference, what the targets can be wrong by
(stages.fidelity.bound). Sums, maxima and histograms merge across shards in any grouping (stages.fidelity.measure).
Price: reading the shard back (docs/results.md) and two lattices per reference window.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.whole import is_number, same
from bytecache.stages.fidelity.measure import Measure, rounded

VERSION = 2
"""Of the accumulator and the certificate; states of different versions do not merge."""
MEASURES = ("kl", "kl_bucket", "jsd", "leak", "branch_kl", "storing_kl", "tail", "missed")
OF_PRODUCTION = ("branch_kl", "storing_kl")
"""Measures that need the rows which production had."""
TAIL_PARTS = ("unevaluated", "pruned", "other")
COUNTS = ("positions", "windows", "documents", "canonical_rows", "production_rows", "reference_rows")


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

    def add(self, name: str, values: np.ndarray) -> None:
        """Count in what one of MEASURES says of some positions, float [m]."""
        self.measures[name].add(values)

    def add_stretch(self, document: tuple[str, str], positions: int) -> None:
        """Count in a stretch of `document` (shard, name) of so many positions; a document's stretches in a row."""
        self.counts["positions"] += positions
        self.counts["windows"] += 1
        self.counts["documents"] += document != self._last_document
        self._last_document = document
        self.squared_positions += float(positions) ** 2

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
