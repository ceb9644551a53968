"""Evaluated rows: what a teacher said after some histories, as far as a text can ask; choosing some of them."""

from dataclasses import dataclass

import numpy as np

PER_ROW = ("log_norm", "end", "control", "n_levels", "n_stops")
"""Columns of `Rows` with one value a row."""


@dataclass
class Rows:
    """R rows of path masses (`stages.engines.paths` has the terms): L levels, E entries, S stops, K of top-k."""

    log_norm: np.ndarray
    """float32 [R]; log of the sum of exp(logits), nats; NaN of rows that were read from a dump of version 3."""
    end: np.ndarray
    """float32 [R]; mass of the END tokens."""
    control: np.ndarray
    """float32 [R]; mass of ids that carry no bytes and are not END."""
    n_levels: np.ndarray
    """int32 [R]"""
    fanout: np.ndarray
    """uint16 [L]; listed entries per level."""
    entry_byte: np.ndarray
    """uint8 [E]"""
    entry_mass: np.ndarray
    """float32 [E]"""
    n_stops: np.ndarray
    """int32 [R]"""
    stop_depth: np.ndarray
    """uint16 [S]; 1..; ascending within a row."""
    stop_token: np.ndarray
    """int32 [S]"""
    stop_mass: np.ndarray
    """float32 [S]"""
    topk_id: np.ndarray
    """int32 [R * K]; of an engine's rows [R, K]."""
    topk_logp: np.ndarray
    """float32 [R * K] or [R, K]; nats, descending within a row."""


def columns_of(rows: Rows, index: np.ndarray) -> dict[str, np.ndarray]:
    """The columns that every `Rows` has, of the rows `index` int [N] in that order."""
    levels = members(rows.n_levels, index)
    entries = members(rows.fanout, levels)
    stops = members(rows.n_stops, index)
    k = len(rows.topk_id) // max(len(rows.n_levels), 1)
    top = (index[:, None] * k + np.arange(k)).ravel()
    places = dict.fromkeys(PER_ROW, index) | {"fanout": levels}
    places |= dict.fromkeys(("entry_byte", "entry_mass"), entries)
    places |= dict.fromkeys(("stop_depth", "stop_token", "stop_mass"), stops)
    places |= dict.fromkeys(("topk_id", "topk_logp"), top)
    return {name: getattr(rows, name)[place] for name, place in places.items()}


def members(counts: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """Places of the items of the groups `picked`, where groups of `counts` items lie one after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    count = counts[picked].astype(np.int64)
    return ragged(ends[picked] - count, count)


def ragged(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """first[0], first[0]+1, ... (count[0] of them), first[1], ...: int64."""
    ends = np.cumsum(count, dtype=np.int64)
    indices: np.ndarray = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)
    return indices
