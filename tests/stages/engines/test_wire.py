"""Arrays over HTTP: what is packed comes back, and nothing else is taken."""

import json

import numpy as np
import pytest

from bytecache.stages.engines.paths import COLUMNS, RowMasses
from bytecache.stages.engines.wire import pack, pack_rows, unpack, unpack_rows


def rows(seed: int) -> RowMasses:
    draw = np.random.default_rng(seed)
    kinds = dict.fromkeys(COLUMNS, np.float32)
    kinds |= {"n_levels": np.int32, "fanout": np.uint16, "entry_byte": np.uint8, "stop_depth": np.uint16}
    return RowMasses(**{n: draw.integers(0, 9, (seed, 2) if "topk" in n else seed).astype(kinds[n]) for n in kinds})


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
