"""Path masses: one row of teacher logits reduced to what the text's own bytes can ask of it.

A row is the teacher's distribution p(. | h) after a history h that ends at byte s of the text. Walking the
vocabulary's byte trie along x[s:] gives one *level* per depth d: the trie node of w = x[s : s+d]. For each level

    entry  (d, b)  mass of ordinary tokens that start with w + b        sum over a contiguous range of the trie
    stop   (d, v)  mass of token v, for every v with bytes equal to w   (d >= 1)

and at depth 0 also the mass of END tokens and of control tokens. These are all that P(next byte | prefix) ever
needs of the row (Vieira et al., arXiv 2412.03719, section 3).

Masses are sums of exp(logit - max) in float64 over each range directly, not differences of a running sum, so a
mass of 1e-30 keeps its digits. They run where the logits are: numba on a CPU, segment sums of torch on a device.
Entries below `floor` times their prefix's mass are left out and recovered by the lattice as unlisted mass; the
text's own next byte is always listed, with its exact mass. Price on one core: one pass over the vocabulary per row;
`benchmarks/teacher_throughput.py` measures it beside the forward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from bytecache.schemas.dump.rows import members, ragged
from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.stages.tokens.byte_trie import find_child
from bytecache.stages.tokens.vocab import Vocabulary


class PathPlan(NamedTuple):
    """Where each row's path runs in the trie. R rows, L levels in all."""

    level_offset: np.ndarray
    """int64 [R+1]; row r owns levels [level_offset[r], level_offset[r+1])."""
    node: np.ndarray
    """int32 [L]; trie node of each level, the root first."""


class RowMasses(NamedTuple):
    """Reduced rows; R rows, L levels, E entries, S stops, K of top-k."""

    log_norm: np.ndarray
    """float32 [R]; log of the sum of exp(logits), nats."""
    next_logp: np.ndarray
    """float32 [R]; log p(next token | h), nats; NaN where no next token was asked for."""
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
    """int32 [R, K]"""
    topk_logp: np.ndarray
    """float32 [R, K]; nats, descending."""


def concatenate(parts: list[RowMasses]) -> RowMasses:
    """Rows of several reductions, in order."""
    return RowMasses(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def take(rows: RowMasses, index: np.ndarray) -> RowMasses:
    """The rows `index` int [K], in that order."""
    levels = members(rows.n_levels, index)
    entries = members(rows.fanout, levels)
    stops = members(rows.n_stops, index)
    groups = {"fanout": levels, "entry_byte": entries, "entry_mass": entries}
    groups |= dict.fromkeys(("stop_depth", "stop_token", "stop_mass"), stops)
    return RowMasses(*(values[groups.get(name, index)] for name, values in zip(rows._fields, rows, strict=True)))


@njit(cache=True)
def _walk(
    text: np.ndarray,
    starts: np.ndarray,
    first_child: np.ndarray,
    byte: np.ndarray,
    level_offset: np.ndarray,
    node: np.ndarray,
) -> int:
    """Trie nodes of every row's path; counts them all, writes as many as `node` holds."""
    count = 0
    for r in range(len(starts)):
        level_offset[r] = count
        v = 0
        i = starts[r]
        while True:
            if count < len(node):
                node[count] = v
            count += 1
            if i >= len(text):
                break
            v = find_child(first_child, byte, v, text[i])
            if v < 0:
                break
            i += 1
    level_offset[len(starts)] = count
    return count


def join_plans(plans: list[PathPlan]) -> PathPlan:
    """The rows of several plans, in order."""
    ends = np.cumsum([0, *(plan.level_offset[-1] for plan in plans)])
    offsets = [plan.level_offset[:-1] + begin for plan, begin in zip(plans, ends[:-1], strict=True)]
    return PathPlan(np.concatenate([*offsets, ends[-1:]]), np.concatenate([plan.node for plan in plans]))


def take_plan(plan: PathPlan, index: np.ndarray) -> PathPlan:
    """The rows `index` int [K] of a plan, in that order."""
    count = np.diff(plan.level_offset)
    return PathPlan(np.append(0, np.cumsum(count[index])), plan.node[members(count, index)])


def plan_paths(vocabulary: Vocabulary, text: np.ndarray, starts: np.ndarray) -> PathPlan:
    """Trie path of each row: `text` uint8 [n], `starts` int64 [R] byte positions where the rows' histories end."""
    trie = vocabulary.trie
    level_offset = np.zeros(len(starts) + 1, np.int64)
    count = _walk(text, starts, trie.first_child, trie.byte, level_offset, np.zeros(0, np.int32))
    node = np.zeros(count, np.int32)
    _walk(text, starts, trie.first_child, trie.byte, level_offset, node)
    return PathPlan(level_offset, node)


@njit(cache=True)
def range_sums(e: np.ndarray, order: np.ndarray, row: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Sum of e[row[c], order[lo[c] : hi[c]]] for every range c, in float64; `e` float32 [R, V]."""
    out = np.zeros(len(row))
    for c in range(len(row)):
        r = row[c]
        mass = 0.0
        for j in range(lo[c], hi[c]):
            mass += np.float64(e[r, order[j]])
        out[c] = mass
    return out


def range_sums_on_device(
    e: torch.Tensor, order: torch.Tensor, row: np.ndarray, lo: np.ndarray, hi: np.ndarray
) -> np.ndarray:
    """`range_sums` where `e` lives: gathers the ranges end to end and reduces them by segment, in float64."""
    columns = len(order)
    width = torch.from_numpy(hi - lo).to(e.device, torch.int64)
    begin = torch.from_numpy(row * np.int64(columns) + lo).to(e.device)
    shift = begin - (width.cumsum(0) - width)
    index = torch.arange(int(width.sum()), device=e.device) + torch.repeat_interleave(shift, width)
    values = e[:, order].reshape(-1)[index].double()
    return torch.segment_reduce(values, "sum", lengths=width).cpu().numpy()


@njit(cache=True)
def _list_entries(
    level_offset: np.ndarray, node: np.ndarray, first_child: np.ndarray, byte: np.ndarray, mass: np.ndarray,
    floor: float, fanout: np.ndarray, entry_byte: np.ndarray, entry_mass: np.ndarray,
) -> int:  # fmt: skip
    """Keep each level's entries that reach the floor, and the text's own next byte; returns how many."""
    first_level = level_offset[0]
    child_at = 0
    kept = 0
    for r in range(len(level_offset) - 1):
        prefix = 1.0
        for level in range(level_offset[r], level_offset[r + 1]):
            v = node[level]
            follows = node[level + 1] if level + 1 < level_offset[r + 1] else -1
            before = kept
            next_prefix = 0.0
            for child in range(first_child[v], first_child[v + 1]):
                m = mass[child_at]
                child_at += 1
                if child == follows:
                    next_prefix = m
                elif m < floor * prefix or m == 0.0:
                    continue
                entry_byte[kept] = byte[child]
                entry_mass[kept] = m
                kept += 1
            fanout[level - first_level] = kept - before
            prefix = next_prefix
    return kept


class PathReducer:
    """Reduces rows of logits on the machine that holds them; one per engine, built from the teacher's vocabulary."""

    chunk = 64
    """Rows reduced at once: bounds the float32 scratch to 64 x vocabulary x 4 bytes."""

    def __init__(self, vocabulary: Vocabulary, *, top_k: int, floor: float) -> None:
        if top_k > vocabulary.size:
            raise ConfigError(
                f"teacher.top_k = {top_k} exceeds the teacher's vocabulary of {vocabulary.size}: lower it"
            )
        self.vocabulary = vocabulary
        self.top_k = top_k
        self.floor = floor
        trie = vocabulary.trie
        self._children = np.diff(trie.first_child)
        self._ordinary = np.zeros(vocabulary.size, bool)
        self._ordinary[vocabulary.order] = True
        is_end = np.zeros(vocabulary.size, bool)
        is_end[vocabulary.end_ids] = True
        self._end_ids = torch.from_numpy(np.flatnonzero(is_end))
        self._control_ids = torch.from_numpy(np.flatnonzero(~self._ordinary & ~is_end))

    def reduce(
        self, logits: torch.Tensor, plan: PathPlan, next_token: np.ndarray, *, where: str | Callable[[int], str]
    ) -> RowMasses:
        """Reduce `logits` float [R, >= size]; `next_token` int64 [R], -1 for none.

        Columns past the vocabulary (a head padded beyond it) count as control mass. `where` names the text of all rows,
        or of one, in errors.
        Raises EngineError when a row has NaN, +Inf or no mass at all.
        """
        rows = logits.shape[0]
        parts = []
        for a in range(0, rows, self.chunk):
            b = min(a + self.chunk, rows)
            offsets = plan.level_offset[a : b + 1]
            parts.append(self._chunk(logits[a:b], offsets, plan.node, next_token[a:b], (where, a)))
        return concatenate(parts)

    def _chunk(
        self, logits: torch.Tensor, level_offset: np.ndarray, node: np.ndarray, next_token: np.ndarray, where: Any
    ) -> RowMasses:
        rows = logits.shape[0]
        logits = logits.to(torch.float32)
        peak = logits.amax(dim=-1, keepdim=True)
        e = torch.exp(logits - peak)
        total = e.sum(dim=-1, dtype=torch.float64)
        if not bool(torch.isfinite(total).all()):
            row = where[1] + int(torch.isfinite(total).int().argmin())
            name = where[0] if isinstance(where[0], str) else where[0](row)
            raise EngineError(
                f"the teacher returned NaN or Inf logits ({name}, row {row}); "
                'try teacher.dtype = "float32" or another checkpoint'
            )
        log_norm = peak[:, 0].double() + total.log()
        end = e[:, self._end_ids].sum(dim=-1, dtype=torch.float64) / total
        control = e[:, self._control_ids].sum(dim=-1, dtype=torch.float64)
        if logits.shape[1] > self.vocabulary.size:
            control = control + e[:, self.vocabulary.size :].sum(dim=-1, dtype=torch.float64)
        control = control / total
        wanted = torch.from_numpy(np.maximum(next_token, 0)).to(logits.device)
        wanted_logp = logits.gather(1, wanted[:, None])[:, 0].double() - log_norm
        next_logp = np.where(next_token >= 0, wanted_logp.cpu().numpy(), np.nan)
        if self.top_k:
            value, index = torch.topk(logits, self.top_k, dim=-1)
            topk_id, topk_logp = index.int().cpu().numpy(), (value.double() - log_norm[:, None]).float().cpu().numpy()
        else:
            topk_id, topk_logp = np.zeros((rows, 0), np.int32), np.zeros((rows, 0), np.float32)

        trie = self.vocabulary.trie
        n_levels = np.diff(level_offset)
        span = node[level_offset[0] : level_offset[-1]]
        level_row = np.repeat(np.arange(rows), n_levels)
        depth = np.arange(len(span)) - np.repeat(level_offset[:-1] - level_offset[0], n_levels)

        child = ragged(trie.first_child[span], self._children[span])
        child_row = np.repeat(level_row, self._children[span])
        lo, hi = trie.lo[child], trie.hi[child]
        if e.device.type == "cpu":
            mass = range_sums(e.numpy(), self.vocabulary.order, child_row, lo, hi)
        else:
            mass = range_sums_on_device(e, torch.from_numpy(self.vocabulary.order).to(e.device), child_row, lo, hi)
        mass /= total.cpu().numpy()[child_row]
        fanout = np.zeros(len(span), np.uint16)
        entry_byte, entry_mass = np.zeros(len(child), np.uint8), np.zeros(len(child), np.float32)
        kept = _list_entries(
            level_offset, node, trie.first_child, trie.byte, mass, self.floor, fanout, entry_byte, entry_mass
        )

        n_equal = trie.n_equal[span]
        stop_token = self.vocabulary.order[ragged(trie.lo[span], n_equal)]
        stop_row = torch.from_numpy(np.repeat(level_row, n_equal)).to(e.device)
        stop_value = e[stop_row, torch.from_numpy(stop_token.astype(np.int64)).to(e.device)].double()
        return RowMasses(
            log_norm.float().cpu().numpy(),
            next_logp.astype(np.float32),
            end.float().cpu().numpy(),
            control.float().cpu().numpy(),
            n_levels.astype(np.int32),
            fanout,
            entry_byte[:kept],
            entry_mass[:kept],
            np.bincount(level_row, weights=n_equal, minlength=rows).astype(np.int32),
            np.repeat(depth, n_equal).astype(np.uint16),
            stop_token,
            (stop_value / total[stop_row]).float().cpu().numpy(),
            topk_id,
            topk_logp,
        )
