"""Choosing rows of a dump window, with all that belongs to them: levels, entries, stops."""

from dataclasses import fields

import numpy as np

from bytecache.schemas.dump.window import Window

_PER_ROW = ("row_start", "row_token", "row_logp", "row_static", "log_norm", "end", "control", "n_levels", "n_stops")


def keep_rows(window: Window, kept: np.ndarray) -> Window:
    """An ordinary window of the rows where `kept` (bool [R]) is true, parents (kept as well) numbered anew."""
    number = np.cumsum(kept) - 1
    row = np.flatnonzero(kept)
    parent = window.row_parent[row]
    return take_rows(window, row, np.where(parent < 0, -1, number[parent]), window.row_depth[row])


def take_rows(window: Window, row: np.ndarray, parent: np.ndarray, depth: np.ndarray) -> Window:
    """An ordinary window of the rows `row` int [K], in that order, extending the rows `parent` of the new window."""
    levels = members(window.n_levels, row)
    entries = members(window.fanout, levels)
    stops = members(window.n_stops, row)
    k = len(window.topk_id) // len(window.row_start)
    top = (row[:, None] * k + np.arange(k)).ravel()
    chosen: dict[str, np.ndarray] = {name: getattr(window, name)[row] for name in _PER_ROW}
    chosen["row_parent"] = parent.astype(window.row_parent.dtype)
    chosen["row_depth"] = depth.astype(window.row_depth.dtype)
    chosen["fanout"] = window.fanout[levels]
    chosen |= {name: getattr(window, name)[entries] for name in ("entry_byte", "entry_mass")}
    chosen |= {name: getattr(window, name)[stops] for name in ("stop_depth", "stop_token", "stop_mass")}
    chosen |= {name: getattr(window, name)[top] for name in ("topk_id", "topk_logp")}
    rest = {f.name: getattr(window, f.name) for f in fields(Window) if f.name not in chosen}
    return Window(**(rest | {"reference": False, "doc_position": -1, "row_sampled": np.zeros(0, np.uint8)} | chosen))


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
