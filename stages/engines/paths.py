"""Path masses: one row of teacher logits reduced to what the text's own bytes can ask of it.

A row is the teacher's distribution p(. | h) after a history h that ends at byte s of the text. Walking the
vocabulary's byte trie along x[s:] gives one *level* per depth d: the trie node of w = x[s : s+d]. For each level

    entry  (d, b)  mass of ordinary tokens that start with w + b        sum over a contiguous range of the trie
    stop   (d, v)  mass of token v, for every v with bytes equal to w   (d >= 1)

and at depth 0 also the mass of END tokens and of control tokens. These are all that P(next byte | prefix) ever
needs of the row (Vieira et al., arXiv 2412.03719, section 3).

Masses are sums of exp(logit - max) in float64 over each range directly, not differences of a running sum, so a
mass of 1e-30 keeps its digits. They run where the logits are: numba on a CPU, the kernels of
stages.engines.paths_device on a device (float32, about 1e-6 of themselves off).
Entries below `floor` times their prefix's mass are left out and recovered by the lattice as unlisted mass; the
text's own next byte is always listed, with its exact mass. Price on one core: one pass over the vocabulary per row;
`benchmarks/teacher_throughput.py` measures it beside the forward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from bytecache.schemas.dump.rows import members, ragged
from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.stages.engines.paths_device import Sums, Tables, count_ranges, make_tables, sum_on_device, write_ranges
from bytecache.stages.engines.rows import RowMasses, concatenate
from bytecache.stages.tokens.byte_trie import find_child
from bytecache.stages.tokens.vocab import Vocabulary

Where = str | Callable[[int], str]
"""Name of a text for messages, of all rows or of one."""


class PathPlan(NamedTuple):
    """Where each row's path runs in the trie. R rows, L levels in all."""

    level_offset: np.ndarray
    """int64 [R+1]; row r owns levels [level_offset[r], level_offset[r+1])."""
    node: np.ndarray
    """int32 [L]; trie node of each level, the root first."""


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
    if len(plans) == 1:
        return plans[0]
    ends = np.cumsum([0, *(plan.level_offset[-1] for plan in plans)])
    offsets = [plan.level_offset[:-1] + begin for plan, begin in zip(plans, ends[:-1], strict=True)]
    return PathPlan(np.concatenate([*offsets, ends[-1:]]), np.concatenate([plan.node for plan in plans]))


def plan_between(plan: PathPlan, lo: int, hi: int) -> PathPlan:
    """The rows [lo, hi) of a plan."""
    offset = plan.level_offset[lo : hi + 1]
    return PathPlan(offset - offset[0], plan.node[offset[0] : offset[-1]])


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
def row_sums(e: np.ndarray) -> np.ndarray:
    """Sum of each row of `e` float32 [R, V], in float64: sixteen sums side by side, whatever the processor's width.

    torch's own sum of float32 in float64 takes seven times as long, longer than the exponentials.
    """
    lanes = np.zeros(16)
    out = np.zeros(len(e))
    whole = e.shape[1] // 16 * 16
    for r in range(len(e)):
        lanes[:] = 0.0
        for j in range(0, whole, 16):
            for k in range(16):
                lanes[k] += np.float64(e[r, j + k])
        for j in range(whole, e.shape[1]):
            lanes[0] += np.float64(e[r, j])
        for k in range(16):
            out[r] += lanes[k]
    return out


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


@njit(cache=True)
def _list_entries(
    level_offset: np.ndarray, node: np.ndarray, first_child: np.ndarray, byte: np.ndarray, mass: np.ndarray,
    floor: float, fanout: np.ndarray, entry_byte: np.ndarray, entry_mass: np.ndarray,
) -> int:  # fmt: skip
    """Keep each level's entries that reach the floor, and the text's own next byte; returns how many."""
    first_level = level_offset[0]
    child_at = 0
    n_listed = 0
    for r in range(len(level_offset) - 1):
        prefix = 1.0
        for level in range(level_offset[r], level_offset[r + 1]):
            v = node[level]
            follows = node[level + 1] if level + 1 < level_offset[r + 1] else -1
            before = n_listed
            next_prefix = 0.0
            for child in range(first_child[v], first_child[v + 1]):
                m = mass[child_at]
                child_at += 1
                if child == follows:
                    next_prefix = m
                elif m < floor * prefix or m == 0.0:
                    continue
                entry_byte[n_listed] = byte[child]
                entry_mass[n_listed] = m
                n_listed += 1
            fanout[level - first_level] = n_listed - before
            prefix = next_prefix
    return n_listed


class PathReducer:
    """Reduces rows of logits on the machine that holds them; one per engine, built from the teacher's vocabulary."""

    chunk = 64
    """Rows reduced at once on a CPU: bounds the float32 scratch to 64 x vocabulary x 4 bytes."""

    def __init__(self, vocabulary: Vocabulary, *, top_k: int, floor: float) -> None:
        if top_k > vocabulary.size:
            raise ConfigError(
                f"teacher.top_k = {top_k} exceeds the teacher's vocabulary of {vocabulary.size}: lower it"
            )
        self.vocabulary = vocabulary
        self.top_k = top_k
        self.floor = floor
        ordinary, is_end = np.zeros(vocabulary.size, bool), np.zeros(vocabulary.size, bool)
        ordinary[vocabulary.order] = True
        is_end[vocabulary.end_ids] = True
        self._end_ids = torch.from_numpy(np.flatnonzero(is_end))
        self._control_ids = torch.from_numpy(np.flatnonzero(~ordinary & ~is_end))
        self._tables: dict[tuple[torch.device, int], Tables] = {}

    def reduce(
        self,
        logits: torch.Tensor,
        plan: PathPlan,
        next_token: np.ndarray,
        *,
        where: Where,
        row: np.ndarray | None = None,
    ) -> RowMasses:
        """Reduce `logits` float [L, >= size] along a plan of R rows; `next_token` int64 [R], -1 for none.

        `row` int64 [R], ascending: which row of logits each is about; None: its own (R = L). Columns past the
        vocabulary (a head padded beyond it) count as control mass. `where` names the text of all rows, or of one, in
        errors. Raises EngineError when a row has NaN, +Inf or no mass at all.
        """
        return self.begin(logits, plan, next_token, where=where, row=row)()

    def begin(
        self,
        logits: torch.Tensor,
        plan: PathPlan,
        next_token: np.ndarray,
        *,
        where: Where,
        row: np.ndarray | None = None,
    ) -> Callable[[], RowMasses]:
        """`reduce` in two halves: sums, and what is listed of them, which any thread may do once.

        What is returned waits for a device, and raises; on a CPU the sums are there, and what is wrong with them is
        raised at once.
        """
        rows = np.arange(len(next_token)) if row is None else row
        if logits.device.type != "cpu":
            return self._begin_on_device(logits, plan, next_token, where, rows)
        parts = []
        for a in range(0, len(rows), self.chunk):
            b = min(a + self.chunk, len(rows))
            part = PathPlan(plan.level_offset[a : b + 1], plan.node)
            first, last = rows[a], rows[b - 1] + 1
            sums = self._sums_on_cpu(logits[first:last], part, next_token[a:b], rows[a:b] - first)
            _refuse_nan(sums, rows[a:b] - first, where, a)
            parts.append(partial(self._assemble, sums, part, next_token[a:b], rows[a:b] - first))
        return lambda: concatenate([part() for part in parts])

    def _sums_on_cpu(self, logits: torch.Tensor, plan: PathPlan, next_token: np.ndarray, row: np.ndarray) -> Sums:
        """Each mass a sum in float64 over its tokens."""
        logits = logits.to(torch.float32)
        peak = logits.amax(dim=-1, keepdim=True)
        e = (logits - peak).exp_()
        total = torch.from_numpy(row_sums(e.numpy()))
        end = e[:, self._end_ids].sum(dim=-1, dtype=torch.float64) / total
        control = e[:, self._control_ids].sum(dim=-1, dtype=torch.float64)
        control = (control + e[:, self.vocabulary.size :].sum(dim=-1, dtype=torch.float64)) / total
        topk_logit, topk_id = torch.topk(logits, self.top_k, dim=-1)
        wanted = logits[torch.from_numpy(row), torch.from_numpy(np.maximum(next_token, 0))]

        ranges, children = self._ranges(plan, row)
        mass = range_sums(e.numpy(), self.vocabulary.order, *ranges) / total.numpy()[ranges[0]]
        return Sums(
            mass[:children], mass[children:], end.numpy(), control.numpy(), (peak[:, 0].double() + total.log()).numpy(),
            topk_id.numpy(), topk_logit.numpy(), wanted.numpy(),
        )  # fmt: skip

    def _ranges(self, plan: PathPlan, row: np.ndarray) -> tuple[np.ndarray, int]:
        """Runs of `order` of all children and stops of some rows, int32 [3, C]; how many are children's."""
        trie = self.vocabulary.trie
        parts = (trie.first_child, trie.lo, trie.hi, trie.n_equal)
        children, stops = count_ranges(plan.level_offset, plan.node, trie.first_child, trie.n_equal)
        ranges = np.empty((3, children + stops), np.int32)
        write_ranges(plan.level_offset, plan.node, row, *parts, children, ranges)
        return ranges, children

    def _begin_on_device(
        self, logits: torch.Tensor, plan: PathPlan, next_token: np.ndarray, where: Where, row: np.ndarray
    ) -> Callable[[], RowMasses]:
        width, device, top_k = logits.shape[1], logits.device, self.top_k
        if (device, width) not in self._tables:
            ends = self._end_ids.numpy()
            self._tables[device, width] = make_tables(self.vocabulary.order, ends, width, device)
        ranges, children = self._ranges(plan, row)
        tables, token = self._tables[device, width], np.maximum(next_token, 0)
        wait = sum_on_device(logits, tables, ranges, children, row, token, top_k)

        def listed() -> RowMasses:
            sums = wait()
            _refuse_nan(sums, row, where, 0)
            return self._assemble(sums, plan, next_token, row)

        return listed

    def _assemble(self, sums: Sums, plan: PathPlan, next_token: np.ndarray, row: np.ndarray) -> RowMasses:
        """List what reaches the floor."""
        trie = self.vocabulary.trie
        n_levels = np.diff(plan.level_offset)
        span = plan.node[plan.level_offset[0] : plan.level_offset[-1]]
        depth = np.arange(len(span)) - np.repeat(plan.level_offset[:-1] - plan.level_offset[0], n_levels)
        fanout = np.zeros(len(span), np.uint16)
        entry_byte, entry_mass = np.zeros(len(sums.child), np.uint8), np.zeros(len(sums.child), np.float32)
        n_listed = _list_entries(
            plan.level_offset, plan.node, trie.first_child, trie.byte, sums.child, self.floor, fanout, entry_byte,
            entry_mass,
        )  # fmt: skip
        n_equal = trie.n_equal[span]
        ends = np.cumsum(np.append(0, n_equal))[plan.level_offset - plan.level_offset[0]]
        log_norm = sums.log_norm[row]
        return RowMasses(
            log_norm=log_norm.astype(np.float32),
            end=sums.end[row].astype(np.float32),
            control=sums.control[row].astype(np.float32),
            n_levels=n_levels.astype(np.int32),
            fanout=fanout,
            entry_byte=entry_byte[:n_listed],
            entry_mass=entry_mass[:n_listed],
            n_stops=np.diff(ends).astype(np.int32),
            stop_depth=np.repeat(depth, n_equal).astype(np.uint16),
            stop_token=self.vocabulary.order[ragged(trie.lo[span], n_equal)],
            stop_mass=sums.stop.astype(np.float32),
            topk_id=sums.topk_id[row].astype(np.int32),
            topk_logp=(sums.topk_logit - sums.log_norm[:, None]).astype(np.float32)[row],
            next_logp=np.where(next_token >= 0, sums.next_logit - log_norm, np.nan).astype(np.float32),
        )


def _refuse_nan(sums: Sums, row: np.ndarray, where: Where, first: int) -> None:
    """Raise EngineError for logits that are no numbers. `first`: number of the first row among all asked for."""
    if np.isfinite(sums.log_norm).all():
        return
    bad = first + int(np.flatnonzero(~np.isfinite(sums.log_norm[row]))[0])
    name = where if isinstance(where, str) else where(bad)
    raise EngineError(
        f"the teacher returned NaN or Inf logits ({name}, row {bad}); "
        'try teacher.dtype = "float32" or another checkpoint'
    )
