"""Rows that stand alone, joined to batches, are what our own trainer makes of the same rows."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from bytecache.schemas.dataset.index import describe_shard, write_dataset
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.stages.loop.batches import collate_rows, join_rows
from bytecache.stages.loop.rows import MixedRows, StudentRows
from bytecache.stages.targets.order import sequential
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import IGNORE, MicroBatch
from bytecache.stages.train.objective.marginal import MarginalTerm
from tests.support.conversations import PLAIN, say
from tests.support.student_data import make_dataset, teacher
from tests.support.tiny_models import byte_level_tokenizer, make_checkpoint


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("loop") / "targets")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(320), bos_token="<|begin|>", eos_token="<|end|>"
    )


@pytest.fixture(scope="module")
def rows(targets: Path, tokenizer) -> StudentRows:
    return StudentRows(targets, tokenizer, len(tokenizer), window=300, max_tokens=64, epochs=1)


def same(one: MicroBatch, other: MicroBatch) -> None:
    for name in ("input_ids", "labels", "slot_token", "slot_symbol", "slot_weight"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.slot_counts == other.slot_counts
    assert (one.n_tokens, one.n_byte_tokens, one.n_bytes) == (other.n_tokens, other.n_byte_tokens, other.n_bytes)
    assert one.lengths == other.lengths
    assert one.targets is not None and other.targets is not None
    for name, mine, theirs in zip(one.targets._fields, one.targets, other.targets, strict=True):
        assert torch.equal(mine, theirs), name


def test_joined_rows_are_the_trainers_batch(rows: StudentRows) -> None:
    reader = rows.reader
    cut = [
        row
        for window in sequential(reader.positions, 300)
        for row in stream.cut(reader[window.shard], window.lo, window.hi, 64)
    ]
    assert len(cut) > 20
    options = {"with_targets": True, "byte_reduction": "sum", "limit": MarginalTerm.slots}
    for first in range(0, len(cut), 7):
        some = cut[first : first + 7]
        same(join_rows([stream.collate([row], **options) for row in some]), stream.collate(some, **options))


def test_padding_on_the_left_moves_every_index(rows: StudentRows) -> None:
    some = list(islice(rows, 5))
    right, left = (collate_rows(some, padding_side=side, multiple_of=8) for side in ("right", "left"))
    assert right["input_ids"].shape[1] % 8 == 0
    for r in range(5):
        for name in ("input_ids", "position_ids"):
            a, b = (batch[name][r][batch["attention_mask"][r] == 1] for batch in (right, left))
            assert torch.equal(a, b), name
    assert (left["attention_mask"][:, -1] == 1).all()
    for batch in (right, left):
        labels, ids = batch["labels"]["tokens"], batch["input_ids"]
        learned = (labels[:, :-1] != IGNORE) & (batch["attention_mask"][:, 1:] == 1)
        # What is learned at a position is the next input.
        assert torch.equal(labels[:, :-1][learned], ids[:, 1:][learned])
        flat = labels.flatten()[batch["labels"]["slot_token"][0]]
        assert (flat != IGNORE).all()
    assert torch.equal(
        right["labels"]["tokens"].flatten()[right["labels"]["slot_token"][0]],
        left["labels"]["tokens"].flatten()[left["labels"]["slot_token"][0]],
    )


def test_ranks_share_the_rows(targets: Path, tokenizer) -> None:
    def texts(**layout: int) -> list[tuple[int, ...]]:
        one = StudentRows(targets, tokenizer, len(tokenizer), window=300, max_tokens=64, epochs=1, **layout)
        return [tuple(row.input_ids[0].tolist()) for row in one]

    assert sorted(row for rank in range(3) for row in texts(rank=rank, ranks=3)) == sorted(texts())


@pytest.mark.slow
def test_workers_share_the_rows(targets: Path, tokenizer) -> None:
    whole = [
        tuple(row.input_ids[0].tolist())
        for row in StudentRows(targets, tokenizer, len(tokenizer), window=300, max_tokens=64, epochs=1)
    ]
    spread = StudentRows(targets, tokenizer, len(tokenizer), window=300, max_tokens=64, epochs=1)
    loader = DataLoader(spread, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert sorted(tuple(row.input_ids[0].tolist()) for row in loader) == sorted(whole)


def test_refusals(targets: Path, tokenizer) -> None:
    with pytest.raises(InputError, match="fast tokenizer"):
        StudentRows(targets, object(), 320)
    with pytest.raises(ConfigError, match="window 0"):
        StudentRows(targets, tokenizer, 320, window=0)
    with pytest.raises(ConfigError, match="padding_side"):
        collate_rows([], padding_side="middle")
    with pytest.raises(ConfigError, match="have no padding"):
        collate_rows([], padding_side="left", packed=True)


def ids(rows, count: int) -> list[list[int]]:
    return [row.input_ids[0].tolist() for row in islice(rows, count)]


def test_rows_go_on_where_a_state_was_taken(targets: Path, tokenizer) -> None:
    def fresh(**layout: int) -> StudentRows:
        return StudentRows(targets, tokenizer, len(tokenizer), window=300, max_tokens=16, epochs=2, **layout)

    for layout in ({}, {"rank": 1, "ranks": 3}):
        whole = ids(fresh(**layout), 10_000)
        assert len(whole) > 30
        for taken in (0, 1, 7, 23):
            rows = fresh(**layout)
            reading = iter(rows)
            head = [next(reading).input_ids[0].tolist() for _ in range(taken)]
            again = fresh(**layout)
            again.load_state_dict(rows.state_dict())
            assert head + ids(again, 10_000) == whole
            assert ids(again, 10_000) == whole  # a second reading begins anew
    again.load_state_dict(fresh(rank=1, ranks=3).state_dict())
    assert len(ids(again, 10_000)) == len(whole)
    other = StudentRows(targets, tokenizer, len(tokenizer), window=301, epochs=2)
    with pytest.raises(ConfigError, match="another data set, split, window"):
        other.load_state_dict(fresh().state_dict())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stateful_loader_goes_on_after_any_batch(targets: Path, tokenizer, workers: int) -> None:
    def loader() -> StatefulDataLoader:
        rows = StudentRows(targets, tokenizer, len(tokenizer), window=300, epochs=1)
        return StatefulDataLoader(rows, batch_size=3, collate_fn=collate_rows, num_workers=workers)

    whole = [batch["input_ids"].tolist() for batch in loader()]
    one = loader()
    reading = iter(one)
    head = [next(reading)["input_ids"].tolist() for _ in range(4)]
    state = one.state_dict()
    del reading
    again = loader()
    again.load_state_dict(state)
    assert head + [batch["input_ids"].tolist() for batch in again] == whole


def test_a_state_of_many_processes_is_a_window_of_one(targets: Path, tokenizer) -> None:
    def fresh(**layout: int) -> StudentRows:
        return StudentRows(targets, tokenizer, len(tokenizer), window=200, epochs=1, **layout)

    ranks = [fresh(rank=rank, ranks=2) for rank in range(2)]
    seen = []
    for rows in ranks:
        reading = iter(rows)
        while rows.state_dict()["finished"] < 4:
            seen.append(next(reading).input_ids[0].tolist())
    position = StudentRows.position(ranks[0].state_dict())
    assert position == StudentRows.position(ranks[1].state_dict()) == 8
    rest = fresh()
    rest.load_state_dict({"position": position})
    all_rows = ids(fresh(), 10_000)
    left = ids(rest, 10_000)
    assert left == all_rows[len(all_rows) - len(left) :]
    assert {tuple(row) for row in seen} | {tuple(row) for row in left} == {tuple(row) for row in all_rows}
    stuck = fresh()
    stuck.load_state_dict(ranks[0].state_dict())
    with pytest.raises(ConfigError, match="to change the layout"):
        next(iter(stuck))


def test_a_mixture_takes_turns_and_goes_on(tmp_path: Path, targets: Path, tokenizer) -> None:
    other = make_dataset(tmp_path / "other", documents=7, sentences=30)

    def sources() -> list[StudentRows]:
        return [StudentRows(place, tokenizer, len(tokenizer), window=200) for place in (targets, other)]

    def mixed(**options: int) -> MixedRows:
        return MixedRows(sources(), [0.75, 0.25], windows=80, **options)

    whole = ids(mixed(), 10_000)
    alone = [
        {tuple(row) for row in ids(StudentRows(p, tokenizer, len(tokenizer), window=200), 3000)}
        for p in (targets, other)
    ]
    share = sum(tuple(row) in alone[0] for row in whole) / len(whole)
    assert 0.6 < share < 0.9, share
    assert ids(mixed(), 10_000) == whole
    # Ranks deal the same windows.
    dealt = [row for rank in range(3) for row in ids(mixed(rank=rank, ranks=3), 10_000)]
    assert sorted(dealt) == sorted(whole)
    rows = mixed()
    reading = iter(rows)
    head = [next(reading).input_ids[0].tolist() for _ in range(33)]
    again = mixed()
    again.load_state_dict(rows.state_dict())
    assert head + ids(again, 10_000) == whole
    with pytest.raises(ConfigError, match="another data set"):
        MixedRows(sources(), [0.5, 0.5], windows=80).load_state_dict(rows.state_dict())


def test_mixtures_that_do_not_go_together_are_refused(targets: Path, tokenizer) -> None:
    def one(**options: int) -> StudentRows:
        return StudentRows(targets, tokenizer, len(tokenizer), **options)

    for sources, weights, why in (
        ([one()], [0.5, 0.5], "2 weights for 1"),
        ([one(), one()], [1.0, 0.0], "above 0"),
        ([one(), one(window=100)], [1, 1], "windows of 100 bytes beside 2048"),
        ([one(epochs=1), one()], [1, 1], "epochs = 1"),
    ):
        with pytest.raises(ConfigError, match=why):
            MixedRows(sources, weights)
    with pytest.raises(ConfigError, match="other tokens"):
        MixedRows([one(), StudentRows(targets, tokenizer, len(tokenizer) + 8)], [1, 1])


@pytest.mark.slow
def test_answers_of_conversations_are_rows_with_what_comes_before(tmp_path: Path) -> None:
    """From a folder and from a tokenizer in hand alike; only the answer and its end are learned."""
    from transformers import AutoTokenizer

    make_checkpoint(tmp_path / "model")
    path = tmp_path / "model/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": PLAIN}))
    folder = tmp_path / "chats"
    folder.mkdir()
    builder = ShardBuilder()
    answers = ["Mare.", "The sky is blue, mostly."]
    for number, answer in enumerate(answers):
        context = json.dumps(say("Name the sea." if number == 0 else "And the sky?"), separators=(",", ":"))
        text = np.frombuffer((context + answer).encode(), np.uint8)
        mask = (np.arange(text.size + 1) >= len(context)).astype(np.uint8)
        builder.append(text, *teacher(text, number), mask)
        builder.end_document(f"c/{number + 1}")
    shard = folder / "train-00000-abcdefabcdef.zarr.zip"
    counts = builder.write(shard, {"kind": "chat"})
    write_dataset(folder, [describe_shard(shard, "train", "ab" * 32, counts)], {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    found = []
    for given in (tmp_path / "model", tokenizer):
        rows = sorted(StudentRows(folder, given, len(tokenizer), epochs=1), key=lambda row: row.n_tokens)
        assert [row.n_bytes for row in rows] == [len(answer) for answer in answers]
        for row, answer in zip(rows, answers, strict=True):
            learned = row.labels[row.labels != IGNORE]
            assert tokenizer.decode(learned.tolist()).startswith(answer)
            assert "assistant" in tokenizer.decode(row.input_ids[0].tolist())
        found.append([row.input_ids.tolist() for row in rows])
    assert found[0] == found[1]
    plain = AutoTokenizer.from_pretrained(tmp_path / "model")
    plain.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        next(iter(StudentRows(folder, plain, len(tokenizer), epochs=1)))
