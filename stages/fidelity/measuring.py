"""Measuring windows and shards for a certificate: what compiled loops are needed for (`certificate` has the words)."""

import numpy as np

from bytecache.schemas.arrays import END
from bytecache.schemas.dump.window import Window, keep_rows
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.shard.reader import ByteShard
from bytecache.stages.fidelity.certificate import Fidelity
from bytecache.stages.fidelity.divergence import divergence, kl_spread
from bytecache.stages.lattice.effort import DROPPED
from bytecache.stages.lattice.lattice import Lattice


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


def measure_window(fidelity: Fidelity, window: Window, asked: Window, shard: ByteShard) -> None:
    """Measure a reference window against the shard that holds its document. Raises IntegrityError if none does.

    `asked`: of its rows, what the shard was made from.
    """
    lo = locate(window, shard)
    deep = keep_rows(window, window.row_static == 0)
    reference = Lattice(deep, drop=DROPPED)
    whole, known = reference.targets(), Lattice(asked).targets()
    hi = lo + len(known.tail)
    stored, tail, weights = shard.dense(lo, hi), shard.tail[lo:hi], shard.tail_weights(lo, hi)
    measure_stretch(fidelity, reference, shard, lo)
    fidelity.add("branch_kl", kl_spread(whole.probs, whole.tail, known.probs, known.tail))
    fidelity.add("storing_kl", kl_spread(known.probs, known.tail, stored, tail, weights))
    pruned = np.where(stored > 0, 0.0, known.probs).sum(dtype=np.float64)
    unevaluated = known.unaccounted.sum(dtype=np.float64)
    fidelity.tail_parts["unevaluated"] += float(unevaluated)
    fidelity.tail_parts["pruned"] += float(pruned)
    fidelity.tail_parts["other"] += max(0.0, float(known.tail.sum(dtype=np.float64) - unevaluated))
    fidelity.counts["canonical_rows"] += int((window.row_depth == 0).sum())
    fidelity.counts["production_rows"] += int((asked.row_static == 0).sum())
    fidelity.counts["reference_rows"] += len(deep.row_depth)


def measure_stretch(fidelity: Fidelity, reference: Lattice, shard: ByteShard, lo: int) -> None:
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
        fidelity.add(name, values)
    fidelity.add("tail", tail.astype(np.float64))
    fidelity.add("missed", reference.handed().total[window.score_start :][: len(symbol)])
    fidelity.add_stretch((shard.path, window.doc_id), len(symbol))


def noise_between(exact: Window, teacher: Window) -> np.ndarray:
    """KL of the float32 model's targets from the teacher's over one stretch as both see it, nats, float64 [m]."""
    p, q = Lattice(exact, drop=DROPPED).targets(), Lattice(teacher, drop=DROPPED).targets()
    return kl_spread(p.probs, p.tail, q.probs, q.tail, np.full(p.probs.shape, 1 / p.probs.shape[1]))
