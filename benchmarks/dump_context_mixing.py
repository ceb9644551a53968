"""What an arithmetic coder that mixes contexts would spare of a dump's entries: an estimate, nothing is written.

    python -m benchmarks.dump_context_mixing captures --out benchmarks/results/dump_context_mixing.json

Codes and gaps of every entry, as `balanced` writes them (their values are those of the dump, so the divergence is too),
become binary decisions: how many binary digits, then the digits. Each context remembers how its decisions went; what
they say is mixed in the domain of logits with weights that are learned on the way (Mahoney, "Adaptive weighing of
context models for lossless data compression", 2005). One pass over a window, nothing known before. Bytes per byte of
text, beside zstd 16 over the same column:

    alone     no context
    level     what the level says: codes, gaps and places before, how many entries, which bytes
    rows      besides, what other rows said of the same byte at the same place of the text, the canonical row among them

`decisions`: binary ones per byte of text, each of which looks up every context.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from numba import njit

from benchmarks.convert_throughput import windows_of
from bytecache.schemas import settings as st
from bytecache.schemas.dump.orders import byte_at, context_of, learn, new_orders, own_place
from bytecache.schemas.dump.packed import Packed
from bytecache.schemas.dump.packing import in_order, pack
from bytecache.schemas.dump.parquet import LEVEL
from bytecache.schemas.dump.planes import to_planes
from bytecache.schemas.dump.shares import step_of
from bytecache.schemas.dump.window import Window
from bytecache.stages.lattice.lattice import Lattice

_SLOTS = 1 << 20
"""Of a context's table."""
_NAMES = ("level", "at", "inside", "order", "entries", "place", "gap", "byte", "code", "scale", "kind", "before", "own")


def entries_of(window: Window) -> tuple[dict[str, np.ndarray], Packed]:
    """What there is to know of every entry of the file, int64 [E] by `_NAMES`; and the columns."""
    window, weights, marks = in_order(window, Lattice(window).weights())
    packed = pack(window, weights, marks, step_of(st.ROUNDING["balanced"]))
    text, orders = window.text, new_orders(window.text)
    kinds = np.where(window.row_depth == 0, 0, np.where(window.row_static == 1, 2, 1))
    found: list[tuple[int, ...]] = []
    level = entry = 0
    for r, start in enumerate(window.row_start.tolist()):
        for d in range(int(packed.row_levels[r])):
            i, count, top = start + d, int(packed.level_entries[level]), int(packed.level_top[level])
            context = context_of(orders, text, i, d)
            own = own_place(orders, context, text, i)
            places = np.cumsum(packed.entry_gap[entry : entry + count].astype(np.int64) + 1) - 1
            places += (places >= top - 1) & (top > 0)
            every = [*([top - 1] if top else []), *places.tolist()]
            names = [byte_at(orders, context, own, place) for place in every]
            orders.listed[: len(names)] = names
            learn(orders, context, len(names))
            before = int(text[i - 1]) if i else 0
            for k, name in enumerate(names[len(names) - count :]):
                gap, code = int(packed.entry_gap[entry + k]), int(packed.entry_code[entry + k])
                found.append((
                    level, i, int(d > 0), k, count, int(places[k]), gap, name, code, int(packed.row_scale[r]),
                    int(kinds[r]), before, int(i < len(text) and name == text[i]),
                ))  # fmt: skip
            level, entry = level + 1, entry + count
    return dict(zip(_NAMES, np.array(found, np.int64).T, strict=True)), packed


def halves(values: np.ndarray) -> np.ndarray:
    """Numbers in steps of half an octave, int64."""
    steps: np.ndarray = np.where(values < 1, 0, 1 + np.floor(2 * np.log2(np.maximum(values, 1)))).astype(np.int64)
    return steps


def hashed(*parts: Any) -> np.ndarray:
    """One number for several, int64."""
    code = np.zeros(1, np.int64)
    for part in parts:
        code = code * 1_000_003 + np.asarray(part, np.int64) + 7
    return code


def said_before(e: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Roots of the share that other rows gave the same byte at the same place, in steps of the row: float64 [E].

    `last`: the row before in the file that lists it; `canonical`: the canonical one; `context`: the level before after
    the same byte of text.
    """
    root = np.where(e["code"] > 1, (e["code"] - 1) * 2.0 ** (e["scale"] / 2), 0.0)
    said = {name: np.zeros(len(root)) for name in ("last", "canonical", "context")}
    known: dict[tuple[Any, ...], float] = {}
    columns = (e[name].tolist() for name in ("at", "byte", "before", "inside", "kind"))
    for k, (at, byte, before, inside, kind) in enumerate(zip(*columns, strict=True)):
        keys = {"last": (at, byte), "canonical": (at, byte, 0), "context": (before, inside, byte, 0, 0)}
        for name, key in keys.items():
            said[name][k] = known.get(key, 0.0)
        for key in (keys["last"], keys["context"], *([keys["canonical"]] if kind == 0 else [])):
            known[key] = float(root[k])
    return {name: values * 2.0 ** (e["scale"] / -2) for name, values in said.items()}


def contexts_of(e: dict[str, np.ndarray]) -> dict[str, dict[str, list[np.ndarray]]]:
    """Contexts of codes and of gaps by group, each int64 [E]."""
    first = e["order"] == 0
    previous = {name: np.where(first, 0, np.append(0, e[name][:-1])) for name in ("code", "gap", "place")}
    code, gap, place = halves(previous["code"]), previous["gap"], previous["place"]
    older = np.where(e["order"] < 2, 0, np.append([0, 0], halves(e["code"])[:-2]))
    said = {name: halves(values) for name, values in said_before(e).items()}
    left = e["entries"] - e["order"]
    none = [np.zeros(len(first), np.int64)]
    of_codes = [
        hashed(code, older), hashed(code, e["entries"]), hashed(e["order"], e["entries"]),
        hashed(e["byte"], e["before"]), hashed(e["byte"], e["before"], e["inside"]), hashed(said["context"], code),
        hashed(e["scale"], e["kind"], code), hashed(e["own"], np.minimum(e["place"], 20), e["kind"]),
    ]  # fmt: skip
    of_gaps = [
        hashed(place, e["inside"]), hashed(left, np.minimum(place, 30)), hashed(e["entries"], e["order"]),
        hashed(e["before"], place), hashed(e["before"], e["inside"], place), hashed(code, older),
        hashed(gap, e["kind"]), hashed(left, e["kind"], halves(place)),
    ]  # fmt: skip
    rows_of_codes = [
        hashed(said["last"], e["kind"]), hashed(said["last"], said["context"]), hashed(said["canonical"], e["kind"]),
        hashed(e["byte"], e["at"]),
    ]  # fmt: skip
    rows_of_gaps = [hashed(e["at"], place), hashed(e["at"], e["inside"], place)]
    return {
        "code": {"alone": none, "level": none + of_codes, "rows": none + of_codes + rows_of_codes},
        "gap": {"alone": none, "level": none + of_gaps, "rows": none + of_gaps + rows_of_gaps},
    }


@njit(cache=True)
def _slot(context: int, node: int) -> int:
    code = np.uint64(context) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(node) * np.uint64(0xC2B2AE3D27D4EB4F)
    code = (code ^ (code >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((code ^ (code >> np.uint64(32))) & np.uint64(_SLOTS - 1))


@njit(cache=True)
def mixed_bits(numbers: np.ndarray, contexts: np.ndarray) -> tuple[float, int]:
    """Bits that `numbers` int64 [E], 0 or more, take under `contexts` [E, C]; and how many decisions they are."""
    n_contexts = contexts.shape[1]
    chance, times = np.full((n_contexts, _SLOTS), 0.5), np.zeros((n_contexts, _SLOTS), np.int32)
    weight = np.full((32, 2 * n_contexts), 0.25)
    slot, said = np.zeros(n_contexts, np.int64), np.zeros(2 * n_contexts)
    bits, decisions = 0.0, 0
    for n in range(len(numbers)):
        number, length = numbers[n] + 1, 0
        while number >> (length + 1):
            length += 1
        for q in range(2 * length + 1):
            digit = q - length - 1
            if digit < 0:
                bit, node, mixer = int(q < length), q, min(q, 15)
            else:
                rest = number >> (length - digit - 1)
                bit, node, mixer = rest & 1, 64 * (length + 1) + digit, 16 + min(digit, 15)
                if digit < 4:
                    node = 8192 + (length << 8) + (rest >> 1)
            total = 0.0
            for c in range(n_contexts):
                slot[c] = _slot(contexts[n, c], node)
                p, seen = chance[c, slot[c]], times[c, slot[c]]
                logit = np.log(p / (1.0 - p)) if seen else 0.0
                said[2 * c], said[2 * c + 1] = logit, logit * min(seen, 30) / 30.0
                total += weight[mixer, 2 * c] * said[2 * c] + weight[mixer, 2 * c + 1] * said[2 * c + 1]
            p = min(max(1.0 / (1.0 + np.exp(-total)), 1e-5), 1.0 - 1e-5)
            bits -= np.log2(p if bit else 1.0 - p)
            decisions += 1
            for c in range(n_contexts):
                weight[mixer, 2 * c] += 0.02 * (bit - p) * said[2 * c]
                weight[mixer, 2 * c + 1] += 0.02 * (bit - p) * said[2 * c + 1]
                old, seen = chance[c, slot[c]], times[c, slot[c]]
                new = old + (bit - old) * max(1.0 / (seen + 1.6), 1.0 / 250.0)
                chance[c, slot[c]], times[c, slot[c]] = min(max(new, 1e-4), 1.0 - 1e-4), seen + 1
    return bits, decisions


def measure(windows: list[Window]) -> dict[str, Any]:
    """Bytes per byte of scored text of each column, by what it is coded with."""
    n_bytes = sum(len(w.text) - w.score_start for w in windows)
    result: dict[str, Any] = {"n_bytes": n_bytes, "entries": 0}
    for window in windows:
        e, packed = entries_of(window)
        result["entries"] += len(e["code"])
        for column, groups in contexts_of(e).items():
            sizes = result.setdefault(column, {"zstd": 0.0, "decisions": 0})
            sizes["zstd"] += len(numcodecs.Zstd(LEVEL).encode(to_planes(getattr(packed, f"entry_{column}")).tobytes()))
            for name, contexts in groups.items():
                bits, decisions = mixed_bits(e[column], np.stack([c + 0 * e["at"] for c in contexts], axis=1))
                sizes[name] = sizes.get(name, 0.0) + bits / 8
            sizes["decisions"] += decisions
    result["entries"] = round(result["entries"] / n_bytes, 1)
    for column in ("code", "gap"):
        result[column] = {name: round(size / n_bytes, 2) for name, size in result[column].items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captures", type=Path, help="a folder that benchmarks.dump_rate_distortion kept")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    by_name: dict[str, list[Window]] = {}
    for window in windows_of(args.captures, 0):
        by_name.setdefault(window.doc_id, []).append(window)
    results = {name: measure(windows) for name, windows in by_name.items()}
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
