"""Rows that stand alone, joined to batches, are what our own trainer makes of the same rows."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from bytecache.schemas.errors import ConfigError, InputError
from bytecache.stages.loop.rows import StudentRows, collate_rows, join_rows
from bytecache.stages.targets.order import sequential
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import IGNORE, MicroBatch
from bytecache.stages.train.objective.marginal import MarginalTerm
from tests.support.student_data import make_dataset
from tests.support.tiny_models import byte_level_tokenizer


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
        flat = labels.flatten()[batch["labels"]["slot_token"]]
        assert (flat != IGNORE).all()
    assert torch.equal(
        right["labels"]["tokens"].flatten()[right["labels"]["slot_token"]],
        left["labels"]["tokens"].flatten()[left["labels"]["slot_token"]],
    )


def test_workers_and_ranks_share_the_rows(targets: Path, tokenizer) -> None:
    def texts(**layout: int) -> list[tuple[int, ...]]:
        one = StudentRows(targets, tokenizer, len(tokenizer), window=300, max_tokens=64, epochs=1, **layout)
        return [tuple(row.input_ids[0].tolist()) for row in one]

    whole = texts()
    assert sorted(row for rank in range(3) for row in texts(rank=rank, ranks=3)) == sorted(whole)
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
