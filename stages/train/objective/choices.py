"""What a loss reads of token logits at nodes of the byte trie, in one compiled pass on a CPU, and its way back.

    log q(x) = log m(x) - log m(node),      d log q(x) / d z_v = e_v ([v in x] / m(x) - 1 / m(node))

with the masses m of `node_sums.py`, direct sums as well. One exponential and one gradient of the logits: a row is put
in byte order once, and then every range lies together. Nothing is [S, 260].
Price: a slot at the root reads the vocabulary once, a slot deeper the tokens that still fit: about two passes over
[tokens, vocabulary] forward and two backward; `benchmarks/objective_cost.py` measures it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional

from bytecache.schemas.arrays import END, F64, I64, U64
from bytecache.schemas.loops import inner_loop, row_loop
from bytecache.stages.train.objective.loss import LOWEST
from bytecache.stages.train.objective.node_sums import NodeTables
from bytecache.stages.train.objective.symbols import CONTROL, HEAD_SYMBOLS, STOP

Floats = npt.NDArray[np.floating[Any]]
"""float32 or float64, as the logits are."""


class TokenRows(NamedTuple):
    """P rows of token logits."""

    e: Floats
    """[P, V]: exp(z - peak of the row)"""
    label: I64
    """int64 [P]: the token that follows, negative where none is learned"""
    total: F64
    """float64 [P]: sum of `e`, where there is a label"""


class Asked(NamedTuple):
    """S slots, the node that each stands at, and what is asked there: the truth and E entries of the teacher's."""

    first_slot: I64
    """int64 [P + 1]: where the slots of each row begin in `slot`"""
    slot: I64
    """int64 [S]: slots by row"""
    node: I64
    true: I64
    """int64 [S]: the symbol that follows"""
    first_entry: I64
    """int64 [S + 1]: where the entries of each slot begin in `symbol`"""
    symbol: I64
    """int64 [E]"""
    first_mass: I64
    """int64 [S + 1]: where the masses of each slot's symbols begin: children, STOP, at the root END and CONTROL"""


class Ranges(NamedTuple):
    """The trie as ranges of the ids in byte order, see `NodeTables`."""

    lo: I64
    hi: I64
    first_child: I64
    byte: I64
    n_equal: I64
    order: U64
    """ids in byte order; unsigned, since an index that cannot be negative needs no check"""
    end: int
    control: int


class Answers(NamedTuple):
    """Log-probabilities at S slots, and the masses M that they come from."""

    true: Floats
    """[S]: of the truth"""
    listed: Floats
    """[E]: of the entries"""
    unlisted: Floats
    """[S]: of all other symbols together"""
    mass: F64
    """float64 [M]: of every symbol that a node offers, negative where it is an entry's"""


class Slopes(NamedTuple):
    """Derivatives of a loss by what `node_log_probs` returns."""

    token: float
    true: Floats
    listed: Floats
    unlisted: Floats


@njit(cache=True)
def _by_row(row: I64, rows: int) -> tuple[I64, I64]:
    """Slots in order of their row, as (first [rows + 1], slot [S])."""
    first = np.zeros(rows + 1, np.int64)
    for r in row:
        first[r + 1] += 1
    for r in range(rows):
        first[r + 1] += first[r]
    free = first[:-1].copy()
    slot = np.empty(len(row), np.int64)
    for s in range(len(row)):
        slot[free[row[s]]] = s
        free[row[s]] += 1
    return first, slot


@njit(cache=True, fastmath={"reassoc", "nsz"})
def _sum(values: Floats, lo: int, hi: int) -> float:
    total = 0.0
    for value in values[lo:hi]:  # a slice: its indices cannot be negative, so the loop is vectorised
        total += value
    return total


@inner_loop
def _share_log(mass: float, whole: float) -> float:
    """log(mass / whole), LOWEST where there is nothing."""
    share = mass / whole if whole > 0 else 0.0
    return np.log(share) if share > 0 else LOWEST


@njit(cache=True)
def _choose(rows: TokenRows, asked: Asked, ranges: Ranges, answers: Answers) -> None:
    """Per slot, the masses of what its node offers and what is asked of them; per row with a label, its sum."""
    place = np.zeros(HEAD_SYMBOLS, np.int64)
    _choose_rows(rows, asked, ranges, answers, place, np.empty(len(ranges.order), rows.e.dtype))


@row_loop
def _choose_rows(
    rows: TokenRows, asked: Asked, ranges: Ranges, answers: Answers, place: I64, sorted_row: Floats
) -> None:
    """`place`: of each symbol's mass; what a node does not offer is not asked of it."""
    e, label, total = rows
    order = ranges.order
    for r in range(len(e)):
        if label[r] >= 0:
            total[r] = _sum(e[r], 0, len(order))
        if asked.first_slot[r] == asked.first_slot[r + 1]:
            continue
        for j in range(len(order)):
            sorted_row[j] = e[r, order[j]]
        for i in range(asked.first_slot[r], asked.first_slot[r + 1]):
            s = asked.slot[i]
            whole = _offer(sorted_row, asked.node[s], asked.first_mass[s], ranges, answers.mass, place)
            _answer(s, whole, asked, answers, place)


@inner_loop
def _offer(sorted_row: Floats, node: int, first: int, ranges: Ranges, mass: F64, place: I64) -> float:
    """Write the masses of what a node offers, from `first` on, and where each symbol's is; returns their sum."""
    lo, hi, first_child, byte, n_equal, order, end, control = ranges
    at = first
    whole = 0.0
    for child in range(first_child[node], first_child[node + 1]):
        m = _sum(sorted_row, lo[child], hi[child])
        mass[at] = m
        place[byte[child]] = at
        whole += m
        at += 1
    for symbol, a, b in (
        (STOP, lo[node], lo[node] + n_equal[node]), (END, end, control), (CONTROL, control, len(order))
    ):  # fmt: skip
        if symbol != STOP and node != 0:
            continue
        m = _sum(sorted_row, a, b)
        mass[at] = m
        place[symbol] = at
        whole += m
        at += 1
    return whole


@inner_loop
def _answer(slot: int, whole: float, asked: Asked, answers: Answers, place: I64) -> None:
    """The log-probabilities asked at a slot whose masses sum to `whole`; those of its entries are marked as listed."""
    true, listed, unlisted, mass = answers
    true[slot] = _share_log(mass[place[asked.true[slot]]], whole)
    for k in range(asked.first_entry[slot], asked.first_entry[slot + 1]):
        at = place[asked.symbol[k]]
        listed[k] = _share_log(mass[at], whole)
        mass[at] *= -1
    rest = 0.0
    for k in range(asked.first_mass[slot], asked.first_mass[slot + 1]):
        if mass[k] > 0:
            rest += mass[k]
    unlisted[slot] = _share_log(rest, whole)


@njit(cache=True)
def _choose_back(slopes: Slopes, rows: TokenRows, asked: Asked, ranges: Ranges, mass: F64, out: Floats) -> None:
    """Gradient `out` [P, V] of the logits; of the token's cross-entropy: softmax - label."""
    size, dtype = len(ranges.order), rows.e.dtype
    room = _Room(np.zeros(HEAD_SYMBOLS), np.empty(size, dtype), np.empty(size, dtype))
    _rows_back(slopes, rows, asked, ranges, mass, room, out)


class _Room(NamedTuple):
    """For the row at hand."""

    slope: F64
    """by symbol, of one slot; 0 before and after it"""
    values: Floats
    """`e` in byte order"""
    gradient: Floats
    """the same"""


@row_loop
def _rows_back(
    slopes: Slopes, rows: TokenRows, asked: Asked, ranges: Ranges, mass: F64, room: _Room, out: Floats
) -> None:
    e, label, total = rows
    order, values, gradient = ranges.order, room.values, room.gradient
    for r in range(len(e)):
        share = slopes.token / total[r] if label[r] >= 0 else 0.0
        if asked.first_slot[r] == asked.first_slot[r + 1]:
            for v in range(len(order)):
                out[r, v] = share * e[r, v]
        else:
            for j in range(len(order)):
                values[j] = e[r, order[j]]
                gradient[j] = share * values[j]
            for i in range(asked.first_slot[r], asked.first_slot[r + 1]):
                _slot_back(asked.slot[i], slopes, asked, ranges, mass, room)
            for j in range(len(order)):
                out[r, order[j]] = gradient[j]
        if label[r] >= 0:
            out[r, label[r]] -= slopes.token


@inner_loop
def _slot_back(slot: int, slopes: Slopes, asked: Asked, ranges: Ranges, mass: F64, room: _Room) -> None:
    """Add to the gradient what a slot says; its unlisted symbols are one x."""
    slope, values, gradient = room
    node, at = asked.node[slot], asked.first_mass[slot]
    whole = rest = 0.0
    for k in range(at, asked.first_mass[slot + 1]):
        whole += abs(mass[k])
        if mass[k] > 0:
            rest += mass[k]
    if whole <= 0:
        return
    every = slopes.true[slot] + slopes.unlisted[slot]
    for k in range(asked.first_entry[slot], asked.first_entry[slot + 1]):
        slope[asked.symbol[k]] += slopes.listed[k]
        every += slopes.listed[k]
    slope[asked.true[slot]] += slopes.true[slot]
    every, shared = every / whole, slopes.unlisted[slot] / rest if rest > 0 else 0.0
    lo, hi, first_child, byte, n_equal, _, end, control = ranges
    for child in range(first_child[node], first_child[node + 1]):
        a, b = lo[child], hi[child]
        _add(slope[byte[child]], mass[at], every, shared, values[a:b], gradient[a:b])
        at += 1
    a, b = lo[node], lo[node] + n_equal[node]
    _add(slope[STOP], mass[at], every, shared, values[a:b], gradient[a:b])
    if node == 0:
        _add(slope[END], mass[at + 1], every, shared, values[end:control], gradient[end:control])
        _add(slope[CONTROL], mass[at + 2], every, shared, values[control:], gradient[control:])
    for k in range(asked.first_entry[slot], asked.first_entry[slot + 1]):
        slope[asked.symbol[k]] = 0.0
    slope[asked.true[slot]] = 0.0


@inner_loop
def _add(slope: float, mass: float, every: float, shared: float, values: Floats, gradient: Floats) -> None:
    """Add what one symbol says of the tokens that it covers; a negative mass is an entry's."""
    m = abs(mass)
    if m == 0:
        return
    value = slope / m - every + (shared if mass > 0 else 0.0)
    for j in range(len(values)):
        gradient[j] += value * values[j]


def compiled(device: torch.device) -> bool:
    """Whether `node_log_probs` runs here."""
    return device.type == "cpu"


def _ranges(tables: NodeTables) -> Ranges:
    lo, hi, first_child, byte, n_equal, order = (
        tables.table(name).numpy() for name in ("lo", "hi", "first_child", "byte", "n_equal", "order")
    )
    return Ranges(lo, hi, first_child, byte, n_equal, order.view(np.uint64), tables.end, tables.control)


class _Fused(torch.autograd.Function):
    """Token cross-entropy and what the loss reads of `node_logits`, in one pass; no [S, 260] array."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, label: Tensor, row: Tensor, node: Tensor, true: Tensor, slot: Tensor, symbol: Tensor,
        tables: NodeTables,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        peak = z.amax(dim=1, keepdim=True)
        rows = [(z - peak).exp_(), label, torch.ones(len(z), dtype=torch.float64)]
        first_child = tables.table("first_child")
        offered = first_child[node + 1] - first_child[node] + 1 + 2 * (node == 0)
        first_mass = functional.pad(offered.cumsum(0), (1, 0))
        first_entry = functional.pad(torch.bincount(slot, minlength=row.numel()).cumsum(0), (1, 0))
        by_row = [torch.from_numpy(column) for column in _by_row(row.numpy(), len(z))]
        asked = [*by_row, node, true, first_entry, symbol, first_mass]
        answers = [
            z.new_empty(row.numel()), z.new_empty(slot.numel()), z.new_empty(row.numel()),
            torch.empty(int(first_mass[-1]), dtype=torch.float64),
        ]  # fmt: skip
        _choose(TokenRows(*_arrays(rows)), Asked(*_arrays(asked)), _ranges(tables), Answers(*_arrays(answers)))
        true_log, listed_log, unlisted_log, mass = answers
        of_label = (z.gather(1, label.clamp_min(0)[:, None]) - peak)[:, 0]
        token = torch.where(label >= 0, rows[2].log() - of_label.double(), 0.0).sum().to(z.dtype)
        ctx.tables = tables
        ctx.save_for_backward(*rows, *asked, mass)
        return token, true_log, listed_log, unlisted_log

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks them but one time
        arrays = _arrays(saved)
        rows, asked, mass = TokenRows(*arrays[:3]), Asked(*arrays[3:-1]), arrays[-1]
        slopes = Slopes(float(grads[0]), *_arrays([g.contiguous() for g in grads[1:]]))
        out = torch.empty_like(saved[0])
        _choose_back(slopes, rows, asked, _ranges(ctx.tables), mass, out.numpy())
        return out, *[None] * 7


def _arrays(tensors: Sequence[Tensor]) -> list[Any]:
    return [tensor.numpy() for tensor in tensors]


def node_log_probs(
    z: Tensor, label: Tensor, row: Tensor, node: Tensor, true: Tensor, slot: Tensor, symbol: Tensor, tables: NodeTables
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of token NLL, and log-probabilities of each slot's truth [S], the entries [E], the unlisted symbols [S].

    As cross-entropy and `node_logits`, on the CPU. label int64 [P], negative where nothing is learned. slot int64 [E]
    ascending, symbol int64 [E]: the teacher's entries, each on something that its node offers.
    """
    log_probs = _Fused.apply(z, label, row, node, true, slot, symbol, tables)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], log_probs)
