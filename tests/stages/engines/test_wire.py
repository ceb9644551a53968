"""Arrays over HTTP: what is packed comes back, and nothing else is taken."""

import json

import numpy as np
import pytest

from bytecache.stages.engines.rows import COLUMNS, RowMasses
from bytecache.stages.engines.wire import pack, pack_rows, unpack, unpack_rows


def rows(count: int) -> RowMasses:
    """Rows whose columns go together, of other numbers each."""
    draw = np.random.default_rng(count)
    levels, stops = draw.integers(1, 4, count), draw.integers(0, 3, count)
    fanout = draw.integers(0, 5, levels.sum())
    sizes = dict.fromkeys(COLUMNS, count) | {"fanout": len(fanout)}
    sizes |= dict.fromkeys(("entry_byte", "entry_mass"), int(fanout.sum()))
    sizes |= dict.fromkeys(("stop_depth", "stop_token", "stop_mass"), int(stops.sum()))
    kinds = dict.fromkeys(COLUMNS, np.float32)
    kinds |= {"n_levels": np.int32, "fanout": np.uint16, "entry_byte": np.uint8, "n_stops": np.int32}
    kinds |= {"stop_depth": np.uint16, "stop_token": np.int32, "topk_id": np.int32}
    columns = {n: draw.integers(0, 9, (sizes[n], 2) if "topk" in n else sizes[n]).astype(kinds[n]) for n in COLUMNS}
    columns |= {"n_levels": levels.astype(np.int32), "n_stops": stops.astype(np.int32)}
    return RowMasses(**columns | {"fanout": fanout.astype(np.uint16)})


def test_what_is_packed_comes_back() -> None:
    jobs = [rows(3), rows(0), rows(5)]
    for one, other in zip(jobs, unpack_rows(pack_rows(jobs)), strict=True):
        for name in COLUMNS:
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)
    header, arrays = unpack(pack({"asked": {"floor": 1e-5}}, text=np.frombuffer(b"ab", np.uint8)))
    assert header == {"asked": {"floor": 1e-5}} and arrays["text"].tobytes() == b"ab"
    arrays["text"][0] = 7  # compiled loops want arrays that can be written to


@pytest.mark.parametrize("end", range(0, 100, 7))
def test_what_breaks_off_is_refused(end: int) -> None:
    raw = pack({}, a=np.arange(9), b=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"no header|breaks off|JSON|Expecting|Extra"):
        unpack(raw[:end])
    with pytest.raises(ValueError, match="1 bytes too many"):
        unpack(raw + b"x")


@pytest.mark.parametrize(
    "told", [[["a", "object", [1]]], [["a", "uint8", [-1]]], [["a", "uint8", [1 << 40]]], [["a", "<U4", [1]]]]
)
def test_nothing_but_numbers(told: object) -> None:
    with pytest.raises(ValueError, match="array 'a'"):
        unpack(json.dumps({"header": {}, "arrays": told}).encode() + b"\n" + b"x" * 8)


def test_rows_without_a_column_are_refused() -> None:
    header, arrays = unpack(pack_rows([rows(2)]))
    del arrays["0 stop_mass"]
    with pytest.raises(ValueError, match="without all of their columns"):
        unpack_rows(pack(header, **arrays))


@pytest.mark.parametrize("told", [
    5, [5], [["a"]], [["a", "uint8", 1]], [["a", ["uint8"], [1]]], [["a", "uint8", [True]]], [["a", "uint8", ["1"]]],
    [["a", "uint8", [1] * 40]], [["a", "uint8", [1.0]]], [[None, None, None]],
])  # fmt: skip
def test_a_header_of_other_shapes_is_refused(told: object) -> None:
    with pytest.raises(ValueError, match=r"array|no header"):
        unpack(json.dumps({"header": {}, "arrays": told}).encode() + b"\n" + b"x" * 8)
    with pytest.raises(ValueError, match="too deep"):
        unpack(b"[" * 60_000 + b"\n")


@pytest.mark.parametrize("jobs", [-1, True, "1", 1.0, None, 10**9, [1]])
def test_a_count_of_jobs_is_one(jobs: object) -> None:
    _, arrays = unpack(pack_rows([rows(2)]))
    with pytest.raises(ValueError, match="without all of their columns"):
        unpack_rows(pack({"jobs": jobs}, **arrays))


@pytest.mark.parametrize(("name", "change"), [
    *((name, change) for name in COLUMNS for change in ("longer", "shorter", "kind", "dimensions")),
    ("n_levels", "negative"), ("n_stops", "negative"),
])  # fmt: skip
def test_columns_that_do_not_go_together_are_refused(name: str, change: str) -> None:
    """Compiled loops take them as they come: a length that is wrong reads beyond the end."""
    header, arrays = unpack(pack_rows([rows(6)]))
    key = f"0 {name}"
    column = arrays[key]
    if change == "longer":
        column = np.concatenate([column, column[:1]])
    elif change == "shorter":
        column = column[:-1]
    elif change == "kind":
        column = column.astype(np.int64)
    elif change == "dimensions":
        column = column[None, None] if column.ndim == 2 else column[None]
    else:
        column = column.copy()
        column[0] = -1
    with pytest.raises(ValueError, match=rf"{name}|are said|topk|array|dimensions"):
        unpack_rows(pack(header, **arrays | {key: column}))
