"""Static states: on the host whatever the device, bounded, saved as they come, and the same after a restart."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from bytecache.stages.engines.paths import PathReducer
from bytecache.stages.engines.rows import COLUMNS, RowMasses
from bytecache.stages.engines.static import StaticJob, StaticStates
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.pretend_device import DEVICE, PretendDevice

WIDTH = 8
TEXT = np.frombuffer(b"the cache is a promise", np.uint8)


@pytest.fixture
def reducer(tiny_checkpoint):
    vocabulary = load_vocabulary(tiny_checkpoint("bytelevel"), start="auto", end="auto", trust_remote_code=False)
    return PathReducer(vocabulary, top_k=2, floor=0.0)


def state_of(token: int, context: int) -> torch.Tensor:
    """What a model would say: the same in every run."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(100 * token + context))


def ask(states: StaticStates, tokens: list[int], put=lambda tensor: tensor) -> list[int]:
    """Answer what is missing for some tokens; returns that."""
    missing = states.missing(np.array(tokens, np.int32))
    for token in missing:
        for context in range(states.contexts):
            states.put(token, context, put(state_of(token, context)))
    return missing


def job(tokens: list[int]) -> StaticJob:
    return StaticJob("d", TEXT, np.array(tokens, np.int32), np.arange(len(tokens), dtype=np.int64))


def rows_of(states: StaticStates, head: torch.Tensor, tokens: list[int]) -> RowMasses:
    rows = states.rows([job(tokens)], lambda hidden: hidden @ head)
    assert rows is not None
    return rows[0]


def head_of(reducer: PathReducer) -> torch.Tensor:
    return torch.randn(WIDTH, reducer.vocabulary.size, generator=torch.Generator().manual_seed(1))


def same(a: RowMasses, b: RowMasses) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("linear", [True, False])
def test_states_of_an_earlier_run_meet_new_ones_on_a_device(reducer, tmp_path, linear):
    """The first run saves what a device computed; the second loads it, adds to it, and multiplies all on the device."""
    with PretendDevice() as gpu:
        head = gpu.put(head_of(reducer))
        first = StaticStates(reducer, 2, linear=linear, device=DEVICE)
        assert ask(first, [40, 41], gpu.put) == [40, 41]
        once = rows_of(first, head, [40, 41])
        first.save(tmp_path)
        second = StaticStates(reducer, 2, linear=linear, device=DEVICE)
        second.load(tmp_path)
        assert ask(second, [40, 41, 50], gpu.put) == [50]
        same(rows_of(second, head, [40, 41]), once)
        mixed = rows_of(second, head, [40, 50, 41])
        second.save(tmp_path)
    fresh = StaticStates(reducer, 2, linear=linear, device=torch.device("cpu"))
    fresh.load(tmp_path)
    assert not ask(fresh, [40, 41, 50])
    assert len(mixed.log_norm) == 3


def test_each_save_writes_the_new_states_alone(reducer, tmp_path):
    states = StaticStates(reducer, 2, linear=True, device=torch.device("cpu"))
    ask(states, list(range(20, 60)))
    states.save(tmp_path)
    (first,) = tmp_path.iterdir()
    content = hashlib.sha256(first.read_bytes()).digest()
    states.save(tmp_path)
    assert list(tmp_path.iterdir()) == [first]  # nothing new
    ask(states, [60])
    states.save(tmp_path)
    assert list(tmp_path.iterdir()) == [first]  # one in forty is not worth a file
    ask(states, list(range(60, 80)))
    states.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert hashlib.sha256(first.read_bytes()).digest() == content
    after = StaticStates(reducer, 2, linear=True, device=torch.device("cpu"))
    after.load(tmp_path)
    assert not ask(after, list(range(20, 80)))


def test_memory_is_bounded_and_counted(reducer):
    """Forty tokens with room for ten: the oldest go, are counted, and come back the same."""
    room = 10 * WIDTH * 4
    states = StaticStates(reducer, 2, linear=True, device=torch.device("cpu"), limit=room)
    head = head_of(reducer)
    ask(states, [20, 21])
    once = rows_of(states, head, [20, 21])
    for token in range(30, 60):
        ask(states, [token])
        states.missing(np.zeros(0, np.int32))
        assert states.held_bytes <= room
    assert states.dropped >= 22
    assert ask(states, [20, 21]) == [20, 21]
    same(rows_of(states, head, [20, 21]), once)


def test_what_is_needed_now_is_never_dropped(reducer):
    states = StaticStates(reducer, 2, linear=True, device=torch.device("cpu"), limit=WIDTH * 4)
    head = head_of(reducer)
    ask(states, [20])
    wanted = [20, 21, 22]
    ask(states, wanted)
    assert len(rows_of(states, head, wanted).log_norm) == 3


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-4] + b"\0\0\0\0", lambda raw: b""])
def test_a_damaged_file_is_named_and_computed_again(reducer, tmp_path: Path, caplog, damage):
    states = StaticStates(reducer, 2, linear=True, device=torch.device("cpu"))
    ask(states, [20, 21])
    states.save(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = StaticStates(reducer, 2, linear=True, device=torch.device("cpu"))
    with caplog.at_level(logging.WARNING, "bytecache"):
        again.load(tmp_path)
    assert file.name in caplog.text
    assert ask(again, [20, 21]) == [20, 21]


def test_a_cache_that_cannot_be_written_is_said_and_ends_nothing(reducer, tmp_path, caplog):
    """The states cost time the next time; the unit that was just made is whole."""
    states = StaticStates(reducer, 2, linear=True, device=torch.device("cpu"))
    ask(states, [3, 5])
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "bytecache"):
        states.save(tmp_path / "file" / "static")
    assert "not kept for later runs" in caplog.text and "file" in caplog.text
