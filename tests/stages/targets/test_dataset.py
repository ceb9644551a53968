"""ByteTargets: one global sequence, whatever the number of ranks and workers, wherever it was stopped."""

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from bytecache.schemas.dataset.index import describe_shard, read_dataset, write_dataset
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.stages.targets.dataset import ByteTargets
from bytecache.stages.targets.mixed import MixedTargets
from bytecache.stages.targets.source import load_shard
from tests.support.student_data import make_dataset, teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "d", documents=12, per_shard=3)


def targets(folder: Path, **options: Any) -> ByteTargets:
    return ByteTargets(folder, **{"window": 64, "seed": 3, "pool": 2, **options})


def place(window: Any) -> tuple[int, ...]:
    return (int(window.number), int(window.epoch), int(window.shard), int(window.start))


def alone(folder: Path, n: int) -> list[tuple[int, ...]]:
    return [place(window) for window in islice(targets(folder), n)]


def test_an_epoch_holds_every_position_once_with_its_targets(folder: Path) -> None:
    dataset = read_dataset(folder)
    shards = [load_shard(dataset, entry) for entry in dataset.split("train")]
    seen = [np.zeros(len(shard), int) for shard in shards]
    for n, window in enumerate(targets(folder, epochs=1)):
        assert window.number == n and window.epoch == 0
        shard, lo, hi = shards[window.shard], window.start, window.start + len(window.text)
        seen[window.shard][lo:hi] += 1
        dense = np.zeros((hi - lo, 257), np.float32)
        dense[window.row, window.symbol] = window.prob
        np.testing.assert_array_equal(dense, shard.dense(lo, hi))
        np.testing.assert_allclose(dense.sum(1) + window.tail, 1, atol=1e-5)
        np.testing.assert_array_equal(window.mask, shard.mask[lo:hi])
        ends = np.isin(np.arange(lo, hi), shard.doc_start[1:] - 1)
        np.testing.assert_array_equal(window.true, np.where(ends, 256, window.text.astype(int)))
        assert window.text.base is None, "a view would keep the shard in memory"
    assert all((count == 1).all() for count in seen)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (1, 2), (2, 0), (3, 2)])
def test_ranks_and_workers_share_one_sequence(folder: Path, ranks: int, workers: int) -> None:
    want = alone(folder, 36)
    got: list[Any] = []
    for rank in range(ranks):
        loader = DataLoader(targets(folder, rank=rank, ranks=ranks), batch_size=None, num_workers=workers)
        got.append([place(window) for window in islice(loader, 36 // ranks)])
    assert [got[n % ranks][n // ranks] for n in range(36)] == want


@pytest.mark.parametrize("workers", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_stateful_loader_resumes_by_itself_and_in_any_other_layout(folder: Path, workers: int) -> None:
    want = alone(folder, 40)
    loader = StatefulDataLoader(targets(folder), batch_size=None, num_workers=workers)
    stream = iter(loader)
    assert [place(next(stream)) for _ in range(7)] == want[:7]
    state = json.loads(json.dumps(loader.state_dict())) if workers == 0 else loader.state_dict()
    again = StatefulDataLoader(targets(folder), batch_size=None, num_workers=workers)
    again.load_state_dict(state)
    assert [place(window) for window in islice(again, 9)] == want[7:16]
    assert ByteTargets.position(state) == 7
    for ranks, others in ((1, 0), (2, 0), (2, 2), (1, 2)):
        parts = []
        for rank in range(ranks):
            part = targets(folder, rank=rank, ranks=ranks)
            part.load_state_dict({"position": 7})
            parts.append([place(w) for w in islice(DataLoader(part, batch_size=None, num_workers=others), 12)])
        steps = [sorted(step) for step in zip(*parts, strict=True)]
        assert steps == [want[7 + k * ranks : 7 + (k + 1) * ranks] for k in range(12)]


def test_state_follows_what_was_handed_out_not_what_was_read_ahead(folder: Path) -> None:
    want = alone(folder, 30)
    for depth in (0, 1, 8):
        data = targets(folder, depth=depth)
        stream = iter(data)
        got = [place(next(stream)) for _ in range(5)]
        state = data.state_dict()
        assert state["position"] == 5 and got == want[:5]
        for ranks in (1, 2):
            part = targets(folder, rank=1 % ranks, ranks=ranks)
            part.load_state_dict(state)
            taken = [place(window) for window in islice(part, 4)]
            assert taken == [w for w in want[5:] if w[0] % ranks == 1 % ranks][:4]
            assert part.state_dict()["position"] == 5 + 4 * ranks
        assert [place(window) for window in islice(data, 3)] == want[:3], "a second reading starts again"


def test_a_state_of_something_else_is_refused(folder: Path) -> None:
    state = targets(folder).state_dict()
    for options in ({"seed": 4}, {"window": 65}, {"split": "heldout"}, {"pool": 3}):
        with pytest.raises(ConfigError, match="another data set, split, window, seed or pool"):
            targets(folder, **options).load_state_dict(state)
    with pytest.raises(ConfigError, match="version 9"):
        targets(folder).load_state_dict({"version": 9})
    loader = StatefulDataLoader(targets(folder), batch_size=None, num_workers=2)
    list(islice(loader, 3))
    state = loader.state_dict()
    one = next(iter(state["_snapshot"]["_worker_snapshots"].values()))["dataset_state"]
    data = targets(folder)
    data.load_state_dict(one)
    with pytest.raises(ConfigError, match=r"worker 0 of 2, now rank 0 of 1, worker 0 of 1"):
        next(iter(data))
    for broken in ({}, {"x": 1}, one):
        with pytest.raises(ConfigError, match="no state of ByteTargets"):
            ByteTargets.position(broken)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_shard_stops_the_reader_by_name(folder: Path, tmp_path: Path, workers: int) -> None:
    copy = make_dataset(tmp_path / "d", documents=12, per_shard=3)
    entry = read_dataset(copy).split("train")[2]
    raw = bytearray((copy / entry.file).read_bytes())
    raw[len(raw) // 2] ^= 4
    (copy / entry.file).write_bytes(raw)
    data = DataLoader(targets(copy, epochs=1), batch_size=None, num_workers=workers)
    with pytest.raises(IntegrityError, match=entry.file):
        list(data)


def test_arguments_that_cannot_be_honoured(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no shards of split 'x'; it has heldout, train"):
        targets(folder, split="x")
    for options in ({"rank": 1}, {"rank": 2, "ranks": 2}, {"window": 0}, {"pool": 0}, {"depth": -1}):
        with pytest.raises(ConfigError):
            targets(folder, **options)
    with pytest.raises(ConfigError, match="content is"):
        targets(folder, content_sha256="0" * 64)
    assert targets(folder, content_sha256=read_dataset(folder).content_sha256)


def test_memory_holds_two_pools_at_most(folder: Path) -> None:
    data = targets(folder, depth=0)
    most = max(len(data._shelf) for _ in islice(data, 200))
    assert 2 < most <= 4


def test_windows_become_tensors(folder: Path) -> None:
    window = next(iter(DataLoader(targets(folder), batch_size=None)))
    assert window.text.dtype == torch.uint8 and window.prob.dtype == torch.float32
    assert window.row.dtype == torch.int32 and int(window.row.max()) == len(window.text) - 1


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True])
def test_workers_that_are_spawned_read_the_same_sequence(folder: Path, tmp_path: Path, remote: bool) -> None:
    """A spawned worker gets its data set pickled; so does one handed over amid a reading, shards in memory or not."""
    place_of: Any = folder.as_uri() if remote else folder
    begun = targets(place_of, cache_dir=tmp_path)
    assert len(list(islice(begun, 7))) == 7 and len(begun._shelf)
    for data in (targets(place_of, cache_dir=tmp_path), begun):
        loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="spawn")
        assert [place(window) for window in islice(loader, 20)] == alone(folder, 20)


def test_a_pickled_loader_goes_on_where_it_was(folder: Path) -> None:
    data = targets(folder, depth=0)
    assert [place(window) for window in islice(data, 5)] == alone(folder, 5)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.state_dict() == data.state_dict()
    again = targets(folder)
    again.load_state_dict(copy.state_dict())
    assert place(next(iter(again))) == alone(folder, 6)[5]


def test_by_documents_every_document_is_a_window(folder: Path) -> None:
    dataset = read_dataset(folder)
    shards = [load_shard(dataset, entry) for entry in dataset.split("train")]
    seen = []
    for window in targets(folder, window=1024, by="documents", epochs=1):
        shard = shards[window.shard]
        number = shard.doc_id.index(window.doc_id[0])
        assert window.doc_id == (shard.doc_id[number],)
        assert window.text[:-1].tobytes() == shard.document(number) and window.true[-1] == 256
        seen.append(window.doc_id[0])
    assert sorted(seen) == sorted(name for shard in shards for name in shard.doc_id)
    whole = [w.doc_id for w in islice(targets(folder, window=1024, by="documents"), 30)]
    data = targets(folder, window=1024, by="documents")
    head = [w.doc_id for w in islice(data, 7)]
    again = targets(folder, window=1024, by="documents")
    again.load_state_dict(data.state_dict())
    assert head + [w.doc_id for w in islice(again, 23)] == whole
    with pytest.raises(ConfigError, match="by = 'sentences'"):
        targets(folder, by="sentences")
    with pytest.raises(ConfigError, match="window = 64"):
        targets(folder, by="documents")
    with pytest.raises(InputError, match="no conversations"):
        next(iter(targets(folder, window=1024, by="conversations")))


def test_windows_name_their_documents(folder: Path) -> None:
    dataset = read_dataset(folder)
    shards = [load_shard(dataset, entry) for entry in dataset.split("train")]
    several = 0
    for window in targets(folder, epochs=1):
        shard, lo, hi = shards[window.shard], window.start, window.start + len(window.text)
        inside = [d for d in range(len(shard.doc_id)) if shard.doc_start[d] < hi and shard.doc_start[d + 1] > lo]
        assert window.doc_id == tuple(shard.doc_id[d] for d in inside)
        several += len(inside) > 1
    assert several


@pytest.mark.parametrize("ranks", [1, 3])
def test_by_conversations_all_answers_of_one_come_together(tmp_path: Path, ranks: int) -> None:
    ids = ["a/1", "a/2", "a/3", "b", "c/1", "c/2", "d/1", "e/2", "e/3"]
    builder = ShardBuilder()
    for number, name in enumerate(ids):
        text = np.frombuffer(f"question {name} and the answer {number}".encode(), np.uint8)
        mask = (np.arange(text.size + 1) > 10).astype(np.uint8)
        probs, tail = teacher(text, number)
        builder.append(text, probs, tail, mask)
        builder.end_document(name)
    path = tmp_path / "train-00000-abcdefabcdef.zarr.zip"
    counts = builder.write(path, {"kind": "chat"})
    write_dataset(tmp_path, [describe_shard(path, "train", "ab" * 32, counts)], {})
    options = {"by": "conversations", "epochs": 1}
    found = [w for rank in range(ranks) for w in ByteTargets(tmp_path, rank=rank, ranks=ranks, **options)]
    want = [("a/1", "a/2", "a/3"), ("b",), ("c/1", "c/2"), ("d/1",), ("e/2", "e/3")]
    assert sorted(w.doc_id for w in found) == want
    for window in found:
        assert (window.true == 256).sum() == len(window.doc_id)
    data = ByteTargets(tmp_path, by="conversations")
    whole = [w.doc_id for w in islice(data, 12)]
    data = ByteTargets(tmp_path, by="conversations")
    head = [w.doc_id for w in islice(data, 3)]
    again = ByteTargets(tmp_path, by="conversations")
    again.load_state_dict(data.state_dict())
    assert head + [w.doc_id for w in islice(again, 9)] == whole


def test_a_mixture_of_targets(folder: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", documents=5)

    def mixed(**options: Any) -> MixedTargets:
        sources = [targets(folder), targets(other, window=32)]
        return MixedTargets(sources, [2, 1], windows=60, **options)

    def key(window: Any) -> tuple[int, ...]:
        return (int(window.number), int(window.source), *place(window)[1:])

    whole = [key(window) for window in mixed()]
    assert [number for number, *_ in whole] == list(range(60))
    assert [source for _, source, *_ in whole].count(0) == 40
    # Each source's windows come in its own order.
    first = [place(window)[1:] for window in islice(targets(folder), 40)]
    assert [tuple(rest) for _, source, *rest in whole if source == 0] == first
    dealt = [key(window) for rank in range(3) for window in mixed(rank=rank, ranks=3)]
    assert sorted(dealt) == whole
    data = mixed()
    head = [key(window) for window in islice(data, 17)]
    again = mixed()
    again.load_state_dict(data.state_dict())
    assert head + [key(window) for window in again] == whole
    loader = DataLoader(mixed(), batch_size=None, num_workers=1)
    assert [key(window) for window in loader] == whole
    with pytest.raises(ConfigError, match="epochs = 1"):
        MixedTargets([targets(folder, epochs=1)], [1.0])
