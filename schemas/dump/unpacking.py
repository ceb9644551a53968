"""Columns of codes as a window again. What no window can have written is refused, and nothing is read out of bounds."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F32, I32, PLACE, SYMBOLS, U8, U16
from bytecache.schemas.dump.likely import TopK, unpack_top_k
from bytecache.schemas.dump.orders import Orders, byte_at, context_of, learn, new_orders, own_place, rank_of, sort
from bytecache.schemas.dump.packed import BRANCH, CANONICAL, NEW_TOKEN, STATIC, Packed
from bytecache.schemas.dump.shares import (
    END_IMPLIED,
    IMPLIED,
    LEAST_STEP,
    MOST_SCALE,
    MOST_STEP,
    RARE,
    Scale,
    rare_share,
    rest_share,
    scale_of,
)
from bytecache.schemas.dump.spellings import Spellings, is_empty, new_spellings, note, slot_of, token_at
from bytecache.schemas.dump.window import Window
from bytecache.schemas.loops import inner_loop, row_loop


class Rows(NamedTuple):
    """What a packed window spells: a window's members of these names, and where each row comes from."""

    row_start: I32
    row_parent: I32
    row_token: I32
    row_depth: U8
    row_static: U8
    end: F32
    control: F32
    entry_byte: U8
    entry_mass: F32
    fanout: U16
    stop_depth: U16
    stop_token: I32
    stop_mass: F32
    n_stops: I32
    row_stop: I32
    """int32 [R]; the stop that each row goes on from"""


def unpack(text: U8, first_token: int, packed: Packed, step: int) -> Rows:
    """The members of a window. Raises ValueError where the columns are not those of one."""
    rows, n_stops, n_entries = len(packed.row_scale), len(packed.stop_code), len(packed.entry_gap)
    lengths = {"row": rows, "level": len(packed.level_entries), "entry": n_entries, "stop": n_stops}
    for name, values in packed._asdict().items():
        if len(values) != lengths.get(name.partition("_")[0], len(values)):
            raise ValueError(f"{name} holds {len(values)} items")
    if not rows or not LEAST_STEP <= step <= MOST_STEP or packed.row_scale.max() > MOST_SCALE:
        raise ValueError("no rows, or codes of no known step")
    n_listed = n_entries + int(np.count_nonzero(packed.level_top))
    out = Rows(
        np.zeros(rows, np.int32), np.full(rows, -1, np.int32), np.full(rows, first_token, np.int32),
        np.zeros(rows, np.uint8), np.zeros(rows, np.uint8), np.zeros(rows, np.float32),
        _control(packed, step),
        np.zeros(n_listed, np.uint8), np.zeros(n_listed, np.float32),
        packed.level_entries + (packed.level_top > 0).astype(np.uint16),
        np.zeros(n_stops, np.uint16), np.zeros(n_stops, np.int32), np.zeros(n_stops, np.float32),
        np.zeros(rows, np.int32), np.zeros(rows, np.int32),
    )  # fmt: skip
    fault = _unpack(text, packed, step, new_orders(text), new_spellings(len(packed.token)), out)
    if fault:
        raise ValueError(FAULTS[fault])
    return out


FAULTS = ("", "its counts do not add up", "its rows do not go on from its stops", "a level is no distribution")


def _control(packed: Packed, step: int) -> F32:
    root: F32 = (packed.row_control.astype(np.float64) / step) ** 2 * 2.0**packed.row_scale
    return root.astype(np.float32)


@inner_loop
def _count_rows(marks: U8) -> tuple[int, int]:
    """How many rows go on from stops, and how many of them are canonical."""
    rows = canonical = 0
    for mark in marks:
        bits = int(mark)
        rows += (bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1)
        canonical += bits & 1
    return rows, canonical


@njit(cache=True, nogil=True)
def _unpack(text: U8, packed: Packed, step: int, orders: Orders, spellings: Spellings, out: Rows) -> int:
    """Fill the rows; returns the number of what is wrong, 0 for nothing."""
    fault: int = _unpack_rows(text, packed, step, orders, spellings, out)
    return fault


@row_loop
def _unpack_rows(text: U8, packed: Packed, step: int, orders: Orders, spellings: Spellings, out: Rows) -> int:
    rows, canonical = _count_rows(packed.stop_rows)
    if rows + 1 != len(packed.row_scale):
        return 2
    next_row = canonical + 1
    lev = ent = stp = tok = rar = written = 0
    for r in range(rows + 1):
        if r and out.row_parent[r] < 0:
            return 2
        scale = scale_of(packed.row_scale[r], step)
        prefix = 1.0
        before = stp
        for d in range(packed.row_levels[r]):
            i = out.row_start[r] + d
            if lev == len(packed.level_entries) or i > len(text):
                return 1
            s_end, e_end = stp + int(packed.level_stops[lev]), ent + int(packed.level_entries[lev])
            if s_end > len(packed.stop_code) or e_end > len(packed.entry_gap):
                return 1
            tok = _name_stops(packed, text, out.row_start[r], d, stp, s_end, tok, spellings, out)
            next_row = _mark_rows(packed, r, d, stp, s_end, next_row, canonical, out)
            if tok < 0 or next_row < 0:
                return 2
            context = context_of(orders, text, i, d)
            if not _name_entries(packed, text, i, context, lev, ent, e_end, orders):
                return 3
            places = stp, s_end, ent, e_end, written
            byte = int(text[i]) if i < len(text) else -1
            rar, prefix = _decode_level(packed, r, d, lev, places, scale, prefix, byte, rar, orders, out)
            if rar < 0:
                return 3
            written += int(out.fanout[lev])
            lev, ent, stp = lev + 1, e_end, s_end
        out.n_stops[r] = stp - before
    if lev != len(packed.level_entries) or ent != len(packed.entry_gap) or stp != len(packed.stop_code):
        return 1
    return 0 if rar == len(packed.rare) and tok == len(packed.token) and next_row == rows + 1 else 1


@inner_loop
def _name_stops(
    packed: Packed, text: U8, start: int, d: int, first: int, end: int, tok: int, spellings: Spellings, out: Rows
) -> int:
    """Depths and tokens of a level's stops; returns how many tokens were read, -1 where one is of no known spelling."""
    if first == end:
        return tok
    slot = slot_of(spellings, text, start, d)
    for s in range(first, end):
        if packed.stop_rows[s] & NEW_TOKEN:
            if tok == len(packed.token):
                return -1
            note(spellings, slot, start, d, packed.token[tok])
            tok += 1
        elif is_empty(spellings, slot):
            return -1
        out.stop_depth[s], out.stop_token[s] = d, token_at(spellings, slot)
    return tok


@inner_loop
def _name_entries(
    packed: Packed, text: U8, i: int, context: int, lev: int, first: int, end: int, orders: Orders
) -> bool:
    """Bytes of a level's entries into `orders.listed`, the implied one first, then in the order of the file.

    Returns whether they are bytes.
    """
    k: Any
    own = own_place(orders, context, text, i)
    top = int(packed.level_top[lev]) - 1
    if top > 255:
        return False
    listed, gaps = orders.listed, packed.entry_gap
    k = PLACE(0)
    if top >= 0:
        listed[k] = byte_at(orders, context, own, top)
        k += PLACE(1)
    else:
        top = SYMBOLS
    place = -1
    for e in range(PLACE(first), PLACE(end)):
        place += 1 + int(gaps[e])
        at = place + (1 if place >= top else 0)
        if at > 255:
            return False
        listed[k] = byte_at(orders, context, own, at)
        k += PLACE(1)
    learn(orders, context, k)
    sort(orders, k)
    return True


@inner_loop
def _mark_rows(packed: Packed, r: int, d: int, first: int, end: int, next_row: int, canonical: int, out: Rows) -> int:
    """Place the rows that go on from a level's stops; returns the number of the next one, -1 if they cannot be."""
    for s in range(first, end):
        mark = packed.stop_rows[s] & ~NEW_TOKEN
        if mark > 7 or (mark and out.row_depth[r] == 255):
            return -1
        for bit in (CANONICAL, BRANCH, STATIC):
            if not mark & bit:
                continue
            child = next_row
            if bit == CANONICAL:
                child = r + 1
                if child > canonical or out.row_parent[child] >= 0:
                    return -1
            else:
                out.row_depth[child] = out.row_depth[r] + 1
                next_row += 1
            out.row_static[child] = bit == STATIC
            out.row_parent[child], out.row_token[child] = r, out.stop_token[s]
            out.row_start[child] = out.row_start[r] + d
            out.row_stop[child] = s
    return next_row


@inner_loop
def _decode_level(
    packed: Packed, r: int, d: int, lev: int, places: tuple[int, int, int, int, int], scale: Scale, prefix: float,
    byte: int, rar: int, orders: Orders, out: Rows,
) -> tuple[int, float]:  # fmt: skip
    """Masses of a level of the mass `prefix`; returns how many rare shares were read, -1 for a fault, and what follows.

    `places`: first stop, the one behind its last, first entry, the one behind its last, where they go in the rows.
    `byte`: the text's own, or -1.
    """
    stp, s_end, ent, e_end, written = places
    total = rest_share(packed.level_rest[lev], scale.unit)
    has_top = packed.level_top[lev] > 0
    n_implied, stop, after = 1 if has_top else 0, -1, 0.0
    end = int(packed.row_end[r]) if d == 0 else 0
    if end and end != END_IMPLIED:
        rar, share = _share(end, scale, packed.rare, rar)
        out.end[r] = share
        total += share
    for s in range(stp, s_end):
        rar, share = _share(packed.stop_code[s], scale, packed.rare, rar)
        out.stop_mass[s] = share * prefix
        total += share
        if packed.stop_code[s] == IMPLIED:
            n_implied, stop = n_implied + 1, s
    count: Any
    listed, codes, bytes_, masses, unit = orders.listed, packed.entry_code, out.entry_byte, out.entry_mass, scale.unit
    bits, lower = orders.bits, orders.lower
    count = PLACE(1 if has_top else 0)
    for e in range(PLACE(ent), PLACE(e_end)):
        code = int(codes[e])
        root = float(code - 1)
        share = root * root * unit
        if code < 2:
            if code == IMPLIED:
                return -1, 0.0
            rar, share = _share(code, scale, packed.rare, rar)
        name = int(listed[count])
        at = PLACE(written + rank_of(bits, lower, name))
        bytes_[at], masses[at] = name, share * prefix
        total += share
        if name == byte:
            after = share * prefix
        count += PLACE(1)
    left = 1.0 - total
    n_implied += end == END_IMPLIED
    if n_implied > 1 or left < (0.0 if n_implied else -0.5) or rar > len(packed.rare):
        return -1, 0.0
    if end == END_IMPLIED:
        out.end[r] = left
    if stop >= 0:
        out.stop_mass[stop] = left * prefix
    if has_top:
        name = int(listed[0])
        at = PLACE(written + rank_of(bits, lower, name))
        bytes_[at], masses[at] = name, left * prefix
        after = left * prefix if name == byte else after
    return rar, after


@inner_loop
def _share(code: int, scale: Scale, rare: U16, at: int) -> tuple[int, float]:
    """The share of a code that is not implied; returns where the next rare share lies, too."""
    if code == RARE:
        return at + 1, rare_share(rare[at], scale.per_nat) if at < len(rare) else 0.0
    root = np.float64(code) - 1.0 if code != IMPLIED else 0.0
    return at, root * root * scale.unit


def window_of(plain: dict[str, Any], first_token: int, packed: Packed, step: int, top_k: TopK | None) -> Window:
    """The window of `packed` and of its `plain` members. Raises ValueError where they are not those of one."""
    rows = unpack(plain["text"], first_token, packed, step)
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    topk_id, topk_logp = none if top_k is None else unpack_top_k(rows.row_depth, top_k)
    members_of_rows = rows._asdict()
    logp = np.zeros(len(rows.row_start), np.float32)
    with np.errstate(divide="ignore"):
        logp[1:] = np.log(rows.stop_mass[members_of_rows.pop("row_stop")[1:]])
    return Window(
        **plain, **members_of_rows, row_logp=logp, log_norm=np.full(len(logp), np.nan, np.float32),
        n_levels=packed.row_levels.astype(np.int32),
        topk_id=topk_id, topk_logp=topk_logp,
    )  # fmt: skip
