"""Byte targets: quantiser bounds, round trips, determinism, the golden files, SPEC's own reader."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecache.schemas.arrays import END, SYMBOLS
from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.shard import prior as priors
from bytecache.schemas.shard.builder import PRECISIONS, Precision, ShardBuilder
from bytecache.schemas.shard.codes import TAIL, VALUE
from bytecache.schemas.shard.reader import read_shard
from bytecache.schemas.shard.sorting import LANES
from tests.support.places import ROOT
from tests.support.shard_cases import (
    GOLDEN,
    GOLDEN_CONTEXTS,
    contexts,
    golden_builder,
    golden_columns,
    golden_digest,
    golden_values,
    make,
    natural_rows,
    random_rows,
    rows,
)  # fmt: skip

SPEC = ROOT / "schemas" / "SPEC.md"


@given(
    seed=st.integers(0, 2**32),
    sharpness=st.sampled_from([0.0, 0.3, 1.0, 3.0, 8.0, 30.0]),
    prune=st.sampled_from([0.0, 1e-6, 1e-3, 0.03, 0.1]),
    precision=st.sampled_from([*PRECISIONS.values(), Precision(1e-7, 1, 1), Precision(0.1, 64, 64)]),
    tail_exponent=st.sampled_from([-0.01, -1.0, -5.0, -12.0]),
    zeros=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_decoded_rows_stay_within_the_promised_bounds(
    seed: int,
    sharpness: float,
    prune: float,
    precision: Precision,
    tail_exponent: float,
    zeros: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """SPEC 4.5, 4.6, 4.7 and 4.8."""
    n = 40
    probs, tail = random_rows(seed, n, sharpness, tail_exponent, zeros)
    builder = ShardBuilder(prune, precision)
    builder.append(np.arange(n - 1, dtype=np.uint8), probs, tail)
    builder.end_document("d")
    path = tmp_path_factory.mktemp("shard") / "s.zarr.zip"
    statistics = builder.write(path, {})
    shard = read_shard(path)
    dense, unlisted = shard.dense(0, n).astype(np.float64), shard.tail.astype(np.float64)
    spread = shard.dense(0, n, spread_tail=True).astype(np.float64)
    assert np.abs(dense.sum(1) + unlisted - 1).max() < 1e-6 and np.abs(spread.sum(1) - 1).max() < 1e-5
    quantised = whole = 0.0
    for i in range(n):
        p = probs[i].astype(np.float64)
        top = int(p.argmax())
        p[top] += 1 - p.sum() - float(tail[i])
        listed = dense[i] > 0
        missing = float(tail[i]) + p[~listed].sum()
        if not listed.any():
            assert unlisted[i] == 1 and (p[top] < 1e-6 or missing > 0.9)
            continue
        others = listed.copy()
        others[top] = False
        assert listed[top] and others.sum() <= 127 and (p[others] >= prune * 0.999).all()
        codes = 256 * np.sqrt(dense[i][others])
        assert np.abs(codes - np.round(codes)).max(initial=0) < 1e-3
        assert (np.round(codes) % precision.value_step == 0).all()
        assert (np.abs(codes - 256 * np.sqrt(p[others])) < precision.value_step * 1.001).all()
        assert dense[i][top] > p[top] / 2 - 1e-6
        assert (unlisted[i] > 0) == (missing > 1e-12) or missing < 1e-7
        # The tail is within a step too, save for symbols that no code could have listed.
        late = others.sum() and missing > 1e-3
        assert late or abs(unlisted[i] ** 0.25 - missing**0.25) * 256 < max(precision.tail_step, 16) * 1.01
        there = others & (p > 0)
        quantised += p[top] * np.log(p[top] / dense[i][top])
        quantised += float((p[there] * np.log(p[there] / dense[i][there])).sum())
        quantised += missing * np.log(missing / unlisted[i]) if missing > 1e-9 else 0
    assert statistics["quantisation_kl_mean"] == pytest.approx(max(0, quantised) / n, rel=0.02, abs=2e-5)
    known = probs > 0
    with np.errstate(divide="ignore"):
        whole = float((probs[known] * np.log(probs[known] / spread[known])).sum()) / n
    if tail.max() < 1e-5 and not (dense.max(1) == 0).any():
        assert statistics["kl_mean"] == pytest.approx(whole, rel=0.05, abs=1e-3)


def test_codes_are_the_formulas_of_the_specification() -> None:
    assert VALUE.tolist() == [c * c / 65536 for c in range(256)]
    assert TAIL.tolist() == [c**4 / 2**32 for c in range(255)] + [1.0]


def test_presets_trade_bytes_for_divergence_and_the_prior_pays(tmp_path: Path) -> None:
    text, probs, tail = natural_rows(3000)
    sizes, losses = [], []
    for name in ("small", "default", "precise"):
        builder = ShardBuilder(precision=name)
        builder.append(text, probs, tail)
        builder.end_document("d")
        statistics = builder.write(tmp_path / name, {})
        shard = read_shard(tmp_path / name)
        spread = np.maximum(shard.dense(0, len(shard), spread_tail=True), 1e-30)
        kl = float((probs * np.log(np.maximum(probs, 1e-30) / spread)).sum(1).mean())
        assert statistics["kl_mean"] == pytest.approx(kl, rel=0.1)
        assert len(shard.prior.parent) > 8
        even = shard.dense(0, len(shard)) + shard.tail[:, None] / 257
        assert kl < 0.7 * float((probs * np.log(np.maximum(probs, 1e-30) / even)).sum(1).mean())
        sizes.append(statistics["n_entries"])
        losses.append(kl)
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and losses[-1] < 0.02


def test_prompts_are_no_part_of_the_prior_nor_of_the_statistics(tmp_path: Path) -> None:
    """SPEC 1.3 and 2.7."""
    prompt = np.frombuffer(b'[{"role": "user", "content": "?"}]' * 40, np.uint8)
    nothing = np.zeros((len(prompt), 257), np.float32), np.ones(len(prompt), np.float32)
    builders = {"text": ShardBuilder(), "chat": ShardBuilder()}
    for k in range(4):
        text, probs, tail = natural_rows(800)
        tail = tail + np.float32(0.01)
        probs = probs / (probs.sum(1, keepdims=True) / (1 - tail[:, None]))
        builders["chat"].append(prompt, *nothing, np.zeros(len(prompt), np.uint8))
        for builder in builders.values():
            builder.append(text, probs, tail)
            builder.end_document(str(k))
    made = {name: builder.write(tmp_path / f"{name}.zarr.zip", {}) for name, builder in builders.items()}
    shards = {name: read_shard(tmp_path / f"{name}.zarr.zip") for name in builders}
    chat = shards["chat"]
    supervised = chat.mask == 1
    assert made["chat"]["n_supervised"] == supervised.sum() == made["text"]["n_positions"] < made["chat"]["n_positions"]
    for name in ("tail_mean", "tail_max", "kl_mean", "quantisation_kl_mean"):
        assert made["chat"][name] == pytest.approx(made["text"][name], rel=0.05), name
    assert made["chat"]["tail_mean"] == pytest.approx(chat.tail[supervised].mean(), rel=1e-4)
    # Every context is frequent before what the teacher said, and none is the prompt's alone.
    before = [chat.text[max(0, i - 3) : i].tobytes() for i in np.flatnonzero(supervised)]
    found = contexts(chat)[1:]
    assert len(found) >= 8 and abs(len(found) - len(contexts(shards["text"])[1:])) < 5
    assert all(sum(b.endswith(c) for b in before) >= priors.MINIMUM[len(c)] for c in found)


def test_uniform_rows_keep_an_implied_symbol_close_to_its_share(tmp_path: Path) -> None:
    """All rounding errors have the same sign here: together they must not eat the implied symbol, nor feed it."""
    for name in PRECISIONS:
        builder = ShardBuilder(precision=name)
        builder.append(np.zeros(0, np.uint8), np.full((1, 257), 1 / 257, np.float32), np.zeros(1, np.float32))
        builder.end_document("flat")
        builder.write(tmp_path / "s.zarr.zip", {})
        row = read_shard(tmp_path / "s.zarr.zip").dense(0, 1, spread_tail=True)[0]
        assert 0.5 / 257 < row[0] < 3 / 257 and (row > 0.2 / 257).all()


@given(cuts=st.lists(st.integers(0, 40), max_size=5), lo=st.integers(0, 120), span=st.integers(0, 120))
@settings(max_examples=10, deadline=None)
def test_pieces_do_not_matter_and_ranges_agree(
    cuts: list[int], lo: int, span: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    text = np.random.default_rng(0).integers(0, 256, 40).astype(np.uint8)
    whole, pieces = ShardBuilder(), ShardBuilder()
    for k in range(3):
        probs, tail = random_rows(k, 41, 3.0, -5.0, False)
        mask = np.random.default_rng(k).integers(0, 2, 41).astype(np.uint8)
        whole.append(text, probs, tail, mask)
        edges = [0, *sorted(cuts), 40]
        for k_piece, (a, b) in enumerate(itertools.pairwise(edges)):
            rows_to = 41 if k_piece == len(cuts) else b
            pieces.append(text[a:b], probs[a:rows_to], tail[a:rows_to], mask[a:rows_to])
        for builder in (whole, pieces):
            builder.end_document(f"π{k}")
    for builder, name in ((whole, "a"), (pieces, "b")):
        builder.write(folder / name, {"z": 1, "a": [None, "é"]})
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    shard = read_shard(folder / "a")
    assert shard.doc_id == ["π0", "π1", "π2"] and shard.document(1) == text.tobytes()
    assert shard.attrs == {"a": [None, "é"], "z": 1} and shard.doc_start.tolist() == [0, 41, 82, 123]
    hi = min(123, lo + span)
    part = shard.triples(lo, hi)
    order = part.row.astype(np.int64) * 257 + part.symbol
    assert (np.diff(order) > 0).all() and (part.prob > 0).all()
    assert (shard.dense(0, 123)[lo:hi] == shard.dense(lo, hi)).all()


def test_pieces_do_not_matter_once_the_prior_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priors, "SAMPLE", 500)
    monkeypatch.setattr(priors, "MINIMUM", (0, 8, 8, 8))
    text, probs, tail = natural_rows(1200)
    for name, cuts in (("a", [1200]), ("b", [499, 500, 501, 777, 1200]), ("c", [*range(50, 1201, 50)])):
        builder = ShardBuilder()
        for lo, hi in itertools.pairwise([0, *cuts]):
            builder.append(text[lo:hi], probs[lo : hi + (hi == 1200)], tail[lo : hi + (hi == 1200)])
        builder.end_document("d")
        builder.write(tmp_path / name, {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    shard = read_shard(tmp_path / "a")
    assert 8 < len(shard.prior.parent) < 200
    builder = ShardBuilder()
    builder.append(text[:500], probs[:500], tail[:500])
    builder.append(text[:0], probs[:1], tail[:1])
    builder.end_document("d")
    builder.write(tmp_path / "sample", {})
    assert (read_shard(tmp_path / "sample").prior.code == shard.prior.code).all()


def test_sparse_index_finds_rows_beyond_its_stride(tmp_path: Path) -> None:
    path, _ = make(tmp_path / "s.zarr.zip", n=1500)
    shard = read_shard(path)
    whole = shard.dense(0, len(shard))
    for lo, hi in ((0, 0), (1023, 1025), (1024, 1024), (2048, 4000), (len(shard), len(shard))):
        assert (shard.dense(lo, hi) == whole[lo:hi]).all()
    for lo, hi in ((-1, 2), (5, 4), (0, len(shard) + 1)):
        with pytest.raises(IndexError):
            shard.triples(lo, hi)


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    """SPEC 2.2."""
    digests = {hashlib.sha256(make(tmp_path / str(k))[0].read_bytes()).hexdigest() for k in range(2)}
    assert len(digests) == 1
    assert hashlib.sha256(make(tmp_path / "c", seed=9)[0].read_bytes()).hexdigest() not in digests
    with zipfile.ZipFile(tmp_path / "0") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.namelist() == sorted(archive.namelist())


def test_end_as_most_likely_symbol_and_the_longest_list(tmp_path: Path) -> None:
    probs = np.full((1, 257), 0.5 / 256, np.float32)
    probs[0, END] = 0.5
    probs[0, :130] += np.float32(1e-4)
    probs[0, 130:256] -= np.float32(1e-4 * 130 / 126)
    builder = ShardBuilder(precision=Precision(1e-7, 1, 1))
    builder.append(np.zeros(0, np.uint8), probs, np.zeros(1, np.float32))
    builder.end_document("d")
    builder.write(tmp_path / "s.zarr.zip", {})
    shard = read_shard(tmp_path / "s.zarr.zip")
    row = shard.dense(0, 1)[0]
    assert golden_columns(shard)["count"][0] <= 127 and row[END] == pytest.approx(0.5, abs=0.01)
    assert shard.dense(0, 1, spread_tail=True)[0].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("true", [0, 97, 255, END])
@pytest.mark.parametrize("likely", [0, 97, 255, END])
def test_any_symbol_can_be_implied_and_listed_whatever_is_true(true: int, likely: int, tmp_path: Path) -> None:
    probs = np.zeros((2 if true < END else 1, 257), np.float32)
    probs[:, likely] = 0.75
    second = 255 if likely == END else END
    probs[:, second] = 0.25
    builder = ShardBuilder(precision=Precision(1e-7, 1, 1))
    builder.append(np.full(len(probs) - 1, true % 256, np.uint8), probs, np.zeros(len(probs), np.float32))
    builder.end_document("d")
    builder.write(tmp_path / "s.zarr.zip", {})
    shard = read_shard(tmp_path / "s.zarr.zip")
    assert np.abs(shard.dense(0, len(shard)) - probs).max() < 1e-6


def test_empty_shard_and_empty_columns(tmp_path: Path) -> None:
    statistics = ShardBuilder().write(tmp_path / "s.zarr.zip", {})
    shard = read_shard(tmp_path / "s.zarr.zip")
    assert len(shard) == 0 and shard.doc_id == [] and statistics["n_positions"] == 0
    assert shard.dense(0, 0).shape == (0, 257)


def test_golden_files_read_as_recorded() -> None:
    assert golden_values(read_shard(GOLDEN)) == json.loads(GOLDEN.with_name("golden-shard.json").read_text())
    digest = golden_digest(read_shard(GOLDEN_CONTEXTS))
    assert digest == json.loads(GOLDEN_CONTEXTS.with_name("golden-contexts.json").read_text())


def test_writer_still_makes_the_golden_columns(tmp_path: Path) -> None:
    golden_builder().write(
        tmp_path / "s.zarr.zip", json.loads(GOLDEN.with_name("golden-shard.json").read_text())["attrs"]
    )
    new, golden = golden_values(read_shard(tmp_path / "s.zarr.zip")), golden_values(read_shard(GOLDEN))
    # Its statistics were over all positions, one of them unsupervised.
    assert new.pop("statistics")["n_supervised"] == 8 and golden.pop("statistics")["n_positions"] == 9
    assert new == golden


@pytest.mark.parametrize("case", ["golden", "contexts", "new"])
def test_reader_of_the_specification_agrees_and_needs_nothing_of_ours(case: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", SPEC.read_text(), re.S)
    assert len(blocks) == 2
    path = {"golden": GOLDEN, "contexts": GOLDEN_CONTEXTS}.get(case, tmp_path / "new.zarr.zip")
    if case == "new":
        builder = ShardBuilder(precision="precise")
        for k in range(2):
            builder.append(*natural_rows(1000))
            builder.end_document(f"{k}")
        builder.write(path, {})
    ban = "import sys\nfor name in ('schemas', 'stages', 'pipeline', 'numba'): sys.modules[name] = None\n"
    out = tmp_path / "p.npz"
    readers = "\n".join(blocks)
    code = f"""{ban}{readers}
text, mask, tail, top, right = skim({str(path)!r})
a, p = read({str(path)!r})
assert (a["text"] == text).all() and (a["mask"] == mask).all()
np.savez({str(out)!r}, p=p, tail=tail, top=top, right=right)
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path, timeout=60)
    shard = read_shard(path)
    found = np.load(out)
    p = found["p"]
    _, symbol, prob = shard.triples(0, len(shard))
    known = np.flatnonzero(shard.tail < 1)
    implied = shard.codes["place"][known] & 127
    first = (np.cumsum(shard.codes["count"].astype(np.int64)) - shard.codes["count"])[known]
    true = shard.text.astype(int)
    true[shard.doc_start[1:] - 1] = END
    assert np.allclose(found["top"][known], prob[first + implied], atol=1e-6) and np.allclose(found["tail"], shard.tail)
    assert (found["right"][known] == (symbol[first + implied] == true[known])).all()
    assert np.allclose(p, shard.dense(0, len(shard), spread_tail=True), atol=1e-6, rtol=1e-5)
    assert len(p) == len(shard) and (case == "golden" or len(shard.prior.parent) > 8)


@pytest.mark.parametrize("precision", [Precision(1e-7, 1, 1), Precision(1e-5, 8, 8), PRECISIONS["default"]])
def test_rows_of_every_length_agree_with_the_reader_of_the_specification(precision: Precision, tmp_path: Path) -> None:
    builder = ShardBuilder(precision=precision)
    rng = np.random.default_rng(7)
    for k, sharpness in enumerate((0.3, 2.0, 4.0, 30.0, 8.0, 1.0)):  # lists from 0 to 127 symbols, all in one block
        for piece in range(5):
            n = int(rng.integers(0, 120))
            probs, tail = random_rows(100 * k + piece, n + 1, sharpness, (-0.01, -5.0)[piece % 2], piece == 3)
            builder.append(rng.integers(97, 101, n).astype(np.uint8), probs, tail)
            builder.end_document(f"{k} {piece}")
    builder.write(tmp_path / "s.zarr.zip", {})
    shard = read_shard(tmp_path / "s.zarr.zip")
    space: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", SPEC.read_text(), re.S):
        exec(block, space)
    _, expected = space["read"](tmp_path / "s.zarr.zip")
    assert np.allclose(shard.dense(0, len(shard), spread_tail=True), expected, atol=1e-7, rtol=1e-5)
    row, symbol, prob = shard.triples(0, len(shard))
    assert (np.diff(row.astype(np.int64) * SYMBOLS + symbol) > 0).all() and (prob > 0).all()
    lengths = np.bincount(row, minlength=len(shard))
    assert len(shard) > 2 * LANES and lengths.min() == 0 and lengths.max() > (100 if precision.value_step == 1 else 12)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [(5, np.nan, "nan"), (256, np.inf, "inf"), (7, -0.1, "-0.1"), (9, 0.9, "sum to"), (9, 2.0, "2.0")],
)
def test_bad_rows_are_named_and_leave_the_builder_unchanged(
    column: int, value: float, words: str, tmp_path: Path
) -> None:
    """SPEC 4.9."""
    text = np.zeros(40, np.uint8)
    probs, tail = random_rows(0, 41, 3.0, -5.0, False)
    bad = probs.copy()
    bad[23, column] = value
    clean, tried = ShardBuilder(), ShardBuilder()
    clean.append(text[:10], probs[:10], tail[:10])
    tried.append(text[:10], probs[:10], tail[:10])
    with pytest.raises(IntegrityError, match=rf"row 13 .*position 23.*{re.escape(words)}"):
        tried.append(text[10:], bad[10:], tail[10:])
    for k, builder in enumerate((clean, tried)):
        builder.append(text[10:], probs[10:], tail[10:])
        builder.end_document("d")
        builder.write(tmp_path / str(k), {})
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


@pytest.mark.parametrize("value", [np.nan, -1e-3, 0.5, np.inf])
def test_bad_tails_are_refused(value: float) -> None:
    with pytest.raises(IntegrityError, match="row 1 "):
        ShardBuilder().append(np.zeros(2, np.uint8), rows({"a": 1.0}, {"a": 1.0}), np.array([0, value], np.float32))


def test_negative_zero_is_zero() -> None:
    probs = rows({"a": 1.0})
    probs[0, 3] = -0.0
    builder = ShardBuilder()
    builder.append(np.zeros(0, np.uint8), probs, np.zeros(1, np.float32))
    assert builder.n_positions == 1 and builder.n_bytes == 0


def test_misuse_is_refused(tmp_path: Path) -> None:
    text, one = np.zeros(1, np.uint8), rows({"a": 1.0})
    zero = np.zeros(1, np.float32)
    builder = ShardBuilder()
    with pytest.raises(ValueError, match="prune"):
        ShardBuilder(prune=0.5)
    with pytest.raises(ValueError, match="'tiny' is unknown, must be one of small, default, precise"):
        ShardBuilder(precision="tiny")
    with pytest.raises(ValueError, match="powers of two"):
        ShardBuilder(precision=Precision(1e-3, 3, 16))
    for bad in ((np.zeros(2, np.uint8), one, zero), (text, one[:, :256], zero), (text, one, np.zeros(2, np.float32))):
        with pytest.raises(ValueError, match="expected"):
            builder.append(*bad)
    with pytest.raises(ValueError, match="mask"):
        builder.append(text, one, zero, np.array([2], np.uint8))
    builder.append(text, one, zero)
    with pytest.raises(ValueError, match="one more row"):
        builder.end_document("d")
    with pytest.raises(ValueError, match="open"):
        builder.write(tmp_path / "s", {})
    builder.append(text[:0], one, zero)
    with pytest.raises(ValueError, match="end_document"):
        builder.append(text, one, zero)
    builder.end_document("d")
    with pytest.raises(ValueError, match="JSON"):
        builder.write(tmp_path / "s", {"x": float("nan")})
    with pytest.raises(StorageError, match="no/such"):
        builder.write(tmp_path / "no/such", {})
    with pytest.raises(StorageError):
        read_shard(tmp_path / "absent.zarr.zip")
