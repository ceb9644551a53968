"""A window as columns of codes: rows put breadth first, levels and shares that are not worth their bytes left out."""

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F32, F64, I32, I64, SYMBOLS, U8, U16
from bytecache.schemas.dump.orders import Orders, context_of, in_sequence, learn, new_orders, own_place
from bytecache.schemas.dump.packed import BRANCH, CANONICAL, NEW_TOKEN, STATIC, Packed, Weights
from bytecache.schemas.dump.pooling import Cells, pooled
from bytecache.schemas.dump.rows import members
from bytecache.schemas.dump.shares import (
    END_IMPLIED,
    GOES_ON,
    HAS_ROW,
    IMPLIED,
    LEAST_ROOT,
    LISTED,
    Level,
    code_level,
    scale_of,
    scales,
)
from bytecache.schemas.dump.spellings import Spellings, is_empty, new_spellings, note, slot_of, token_at
from bytecache.schemas.dump.window import Window, take_rows
from bytecache.schemas.loops import inner_loop, row_loop


def breadth_first(window: Window) -> tuple[I64, U8]:
    """The order of rows that the format wants, int64 [R], and the mark of every stop in its present order, uint8 [S].

    Raises ValueError where two rows of one kind go on from one stop, or the canonical ones are no chain.
    """
    kind = np.where(window.row_depth == 0, CANONICAL, np.where(window.row_static == 1, STATIC, BRANCH))
    stop = _stops_of_rows(
        window.row_start, window.row_parent, window.row_token, window.n_stops, window.stop_depth, window.stop_token
    )
    marks = np.zeros(len(window.stop_token), np.int64)
    np.add.at(marks, stop[1:], kind[1:])
    chain = np.flatnonzero(kind == CANONICAL)
    twice = len(np.unique(stop[1:] * 8 + kind[1:])) < len(stop) - 1
    if twice or (window.row_parent[chain[1:]] != chain[:-1]).any() or window.row_static[chain].any():
        raise ValueError("two rows go on from one stop")
    return _order(window.n_stops, chain, stop, kind), marks.astype(np.uint8)


@njit(cache=True, nogil=True)
def _stops_of_rows(
    row_start: I32, row_parent: I32, row_token: I32, n_stops: I32, stop_depth: U16, stop_token: I32
) -> I64:
    """The stop that each row goes on from, int64 [R]; -1 for the first."""
    first = np.zeros(len(n_stops) + 1, np.int64)
    first[1:] = np.cumsum(n_stops)
    out = np.full(len(row_start), -1, np.int64)
    for r in range(1, len(row_start)):
        p = row_parent[r]
        for s in range(first[p], first[p + 1]):
            if stop_token[s] == row_token[r] and row_start[p] + stop_depth[s] == row_start[r]:
                out[r] = s
                break
    return out


@njit(cache=True, nogil=True)
def _order(n_stops: I32, chain: I64, stop: I64, kind: I64) -> I64:
    """The canonical rows `chain`, then row after row, stop after stop, the branch and the static row of each."""
    first = np.zeros(len(n_stops) + 1, np.int64)
    first[1:] = np.cumsum(n_stops)
    going_on = np.full((first[-1], 2), -1, np.int64)
    for r in range(1, len(stop)):
        if kind[r] != CANONICAL:
            going_on[stop[r], 0 if kind[r] == BRANCH else 1] = r
    order = np.empty(len(n_stops), np.int64)
    order[: len(chain)] = chain
    count = len(chain)
    k = 0
    while k < count:
        for s in range(first[order[k]], first[order[k] + 1]):
            for r in going_on[s]:
                if r >= 0:
                    order[count] = r
                    count += 1
        k += 1
    return order


def in_order(window: Window, weights: Weights | None) -> tuple[Window, Weights, U8]:
    """The window with its rows breadth first, its weights likewise (1 where there are none), and its stops' marks."""
    order, marks = breadth_first(window)
    if weights is None:
        weights = Weights(np.ones(len(window.fanout)), np.ones(len(window.stop_token)))
    if (np.diff(order) == 1).all():
        return window, weights, marks
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    parent = window.row_parent[order]
    stops = members(window.n_stops, order)
    weights = Weights(weights.level[members(window.n_levels, order)], weights.stop[stops])
    moved = take_rows(window, order, np.where(parent < 0, -1, number[parent]), window.row_depth[order])
    moved.reference, moved.doc_position = window.reference, window.doc_position
    moved.row_sampled = window.row_sampled[order] if window.reference else window.row_sampled
    return moved, weights, marks[stops]


STOPS_LISTED = 0.25
"""Of the floor: what a token hands on may grow where the text goes on as it said and others did not."""
POOLED = 1.0 + 1e-4
"""Times the floor: what is put together must exceed it whatever is rounded on the way."""


class _Source(NamedTuple):
    """The members of a window that are coded, by their names there, and the weights of its levels and stops."""

    text: U8
    row_start: I32
    n_levels: I32
    end: F32
    fanout: U16
    entry_byte: U8
    entry_mass: F32
    n_stops: I32
    stop_depth: U16
    stop_token: I32
    stop_mass: F32
    level_weight: F64
    stop_weight: F64
    marks: U8


def pack(window: Window, weights: Weights, marks: U8, step: int) -> Packed:
    """The columns of a window whose rows are in order; `step`: codes from a share of 0 to one of 1."""
    first = np.cumsum(np.append(0, window.n_levels), dtype=np.int64)
    scale = scales(np.maximum.reduceat(weights.level, first[:-1]), step)
    members_of = {name: getattr(window, name) for name in _Source._fields[:-3]}
    source = _Source(**members_of, level_weight=weights.level, stop_weight=weights.stop, marks=marks)
    floor = LISTED / step**2
    cells = Cells(**{name: getattr(source, name) for name in Cells._fields})
    source = source._replace(entry_mass=pooled(cells, floor * POOLED))
    rows, n_levels, n_entries, n_stops = len(scale), len(window.fanout), len(window.entry_byte), len(marks)
    control = np.sqrt(window.control.astype(np.float64)) * (step * 2.0 ** (scale / -2.0))
    out = Packed(
        scale, _levels_listed(source, floor), np.zeros(rows, np.uint16), np.rint(control).astype(np.uint16),
        np.zeros(n_levels, np.uint16), np.zeros(n_levels, np.uint8), np.zeros(n_levels, np.uint16),
        np.zeros(n_levels, np.uint16), np.zeros(n_entries, np.uint8), np.zeros(n_entries, np.uint16),
        np.zeros(n_stops, np.uint16), np.zeros(n_stops, np.uint8), np.zeros(n_stops, np.int32),
        np.zeros(n_entries + n_stops + rows, np.uint16),
    )  # fmt: skip
    counts = _pack(source, step, floor, window.is_last, new_orders(window.text), new_spellings(n_stops), out)
    if min(counts) < 0:
        raise ValueError("the entries of a level do not ascend")
    length = dict(zip(("level", "entry", "stop", "token", "rare", "row"), (*counts, rows), strict=True))
    return Packed(**{name: values[: length[name.partition("_")[0]]] for name, values in out._asdict().items()})


@njit(cache=True, nogil=True)
def _levels_listed(source: _Source, floor: float) -> U16:
    """How many levels of each row are worth their place, uint16 [R]: to the last that holds enough or has a row."""
    out = np.zeros(len(source.row_start), np.uint16)
    level = stop = 0
    for r in range(len(out)):
        last = 0
        for d in range(source.n_levels[r]):
            if source.level_weight[level + d] >= floor:
                last = d
        for s in range(stop, stop + source.n_stops[r]):
            if source.marks[s]:
                last = max(last, int(source.stop_depth[s]))
        out[r] = last + 1
        level += source.n_levels[r]
        stop += source.n_stops[r]
    return out


class _Listed(NamedTuple):
    """Scratch of one level, share by share."""

    item: I64
    """int64; which stop or entry it is"""
    place: I64
    """int64; an entry's place in the sequence"""


@njit(cache=True, nogil=True)
def _pack(
    source: _Source, step: int, floor: float, ends: bool, orders: Orders, spellings: Spellings, out: Packed
) -> tuple[int, int, int, int, int]:
    """Fill the columns; returns how many levels, entries, stops, tokens and rare shares were written.

    They are -1 where the entries of a level do not ascend.
    """
    room = 1 + SYMBOLS + int(source.n_stops.max())
    level = Level(np.zeros(room), np.zeros(room, np.uint8), np.zeros(room, np.uint16), np.zeros(room, np.uint16))
    listed = _Listed(np.zeros(room, np.int64), np.zeros(room, np.int64))
    written: tuple[int, int, int, int, int] = _pack_rows(
        source, step, floor, ends, orders, spellings, level, listed, out
    )
    return written


@row_loop
def _pack_rows(
    source: _Source, step: int, floor: float, ends: bool, orders: Orders, spellings: Spellings, level: Level,
    listed: _Listed, out: Packed,
) -> tuple[int, int, int, int, int]:  # fmt: skip
    lev = ent = stp = tok = rar = 0
    l_in = e_in = s_in = 0
    for r in range(len(source.row_start)):
        scale = scale_of(out.row_scale[r], step)
        unit = scale.unit
        prefix = 1.0
        s_end = s_in + source.n_stops[r]
        for d in range(source.n_levels[r]):
            i = source.row_start[r] + d
            e_end = e_in + int(source.fanout[l_in])
            if d >= out.row_levels[r]:
                l_in, e_in = l_in + 1, e_end
                continue
            weight = source.level_weight[l_in]
            n_end = _list_end(source, r, d, i, ends, weight, floor, unit, level)
            s_in, n_stop = _list_stops(source, s_in, s_end, d, prefix, floor, unit, level, listed.item, n_end)
            following = i < len(source.text) and d + 1 < out.row_levels[r]
            n, after = _list_entries(
                source, e_in, e_end, prefix, i if following else -1, floor, weight, unit, level, listed.item, n_stop
            )
            context = context_of(orders, source.text, i, d)
            if not _put_in_sequence(source, orders, context, i, n_stop, n, level, listed):
                return -1, -1, -1, -1, -1
            rares, out.level_rest[lev] = code_level(level, n, scale)
            if n_end:
                out.row_end[r] = END_IMPLIED if level.code[0] == IMPLIED else level.code[0]
            tok = _write_stops(source, r, n_end, n_stop, level, listed, spellings, stp, tok, out)
            out.level_top[lev], ent_end = _write_entries(source, context, n_stop, n, level, listed, orders, ent, out)
            out.level_entries[lev], out.level_stops[lev] = ent_end - ent, n_stop - n_end
            for k in range(rares):
                out.rare[rar + k] = level.rare[k]
            rar, lev, ent, stp = rar + rares, lev + 1, ent_end, stp + n_stop - n_end
            l_in, e_in, prefix = l_in + 1, e_end, after
        s_in = s_end
    return lev, ent, stp, tok, rar


@inner_loop
def _put_in_sequence(
    source: _Source, orders: Orders, context: int, i: int, first: int, end: int, level: Level, listed: _Listed
) -> bool:
    """Sort a level's entries, the shares from `first` on, by their places; returns whether their bytes ascended."""
    own = own_place(orders, context, source.text, i)
    before = -1
    for k in range(first, end):
        item, share, kind = listed.item[k], level.share[k], level.kind[k]
        byte = int(source.entry_byte[item])
        if byte <= before:
            return False
        before = byte
        place = in_sequence(orders, context, own, byte)
        j = k
        while j > first and listed.place[j - 1] > place:
            listed.place[j], listed.item[j] = listed.place[j - 1], listed.item[j - 1]
            level.share[j], level.kind[j] = level.share[j - 1], level.kind[j - 1]
            j -= 1
        listed.place[j], listed.item[j], level.share[j], level.kind[j] = place, item, share, kind
    return True


@inner_loop
def _write_stops(
    source: _Source, r: int, first: int, end: int, level: Level, listed: _Listed, spellings: Spellings, stp: int,
    tok: int, out: Packed,
) -> int:  # fmt: skip
    """Write a level's stops, the shares from `first` on; returns how many tokens are listed by now."""
    for k in range(first, end):
        s = listed.item[k]
        start, length, token = int(source.row_start[r]), int(source.stop_depth[s]), source.stop_token[s]
        mark = source.marks[s]
        slot = slot_of(spellings, source.text, start, length)
        if is_empty(spellings, slot) or token_at(spellings, slot) != token:
            note(spellings, slot, start, length, token)
            out.token[tok] = token
            mark |= np.uint8(NEW_TOKEN)
            tok += 1
        out.stop_code[stp], out.stop_rows[stp] = level.code[k], mark
        stp += 1
    return tok


@inner_loop
def _write_entries(
    source: _Source, context: int, first: int, end: int, level: Level, listed: _Listed, orders: Orders, ent: int,
    out: Packed,
) -> tuple[int, int]:  # fmt: skip
    """Write a level's entries, the shares from `first` on; returns the code of the implied one, and the new end."""
    top, count = SYMBOLS, 0
    for k in range(first, end):
        if level.code[k] == IMPLIED:
            top = listed.place[k]
            orders.listed[0], count = source.entry_byte[listed.item[k]], 1
    before = -1
    for k in range(first, end):
        place = listed.place[k]
        if place == top:
            continue
        place -= 1 if place > top else 0
        out.entry_gap[ent], out.entry_code[ent] = place - before - 1, level.code[k]
        before = place
        orders.listed[count] = source.entry_byte[listed.item[k]]
        count += 1
        ent += 1
    learn(orders, context, count)
    return 0 if top == SYMBOLS else top + 1, ent


@inner_loop
def _list_end(
    source: _Source, r: int, d: int, i: int, ends: bool, weight: float, floor: float, unit: float, level: Level
) -> int:
    """END as the first share of a row's first level, where it is worth listing; returns how many shares there are."""
    if d:
        return 0
    share = np.float64(source.end[r])
    due = ends and i == len(source.text)
    if not due and (weight * share < floor or share < LEAST_ROOT**2 * unit):
        return 0
    level.share[0], level.kind[0] = share, GOES_ON if due else 0
    return 1


@inner_loop
def _list_stops(
    source: _Source, s: int, end: int, d: int, prefix: float, floor: float, unit: float, level: Level, item: I64, n: int
) -> tuple[int, int]:
    """The stops at depth d that are worth listing; returns the first one behind them, and how many shares there are."""
    while s < end and source.stop_depth[s] == d:
        share = np.float64(source.stop_mass[s]) / prefix if prefix > 0.0 else 0.0
        if source.marks[s] or (source.stop_weight[s] >= STOPS_LISTED * floor and share >= LEAST_ROOT**2 * unit):
            level.share[n], level.kind[n], item[n] = min(share, 1.0), HAS_ROW if source.marks[s] else 0, s
            n += 1
        s += 1
    return s, n


@inner_loop
def _list_entries(
    source: _Source, e: int, end: int, prefix: float, i: int, floor: float, weight: float, unit: float, level: Level,
    item: I64, n: int,
) -> tuple[int, float]:  # fmt: skip
    """The entries that are worth listing; returns how many shares there are, and the mass of the text's own next byte.

    `i`: place of that byte, -1 where the row has no further level.
    """
    after = 0.0
    for k in range(e, end):
        mass = np.float64(source.entry_mass[k])
        share = min(mass / prefix, 1.0) if prefix > 0.0 else 0.0
        goes_on = i >= 0 and source.entry_byte[k] == source.text[i]
        if goes_on:
            after = mass
        elif weight * share < floor or share < LEAST_ROOT**2 * unit:
            continue
        level.share[n], level.kind[n], item[n] = share, GOES_ON if goes_on else 0, k
        n += 1
    return n, after
