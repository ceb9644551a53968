"""A manifest that lies about its shards, its hash chain whole: whoever loads a shard refuses it."""

from pathlib import Path

import pytest

from bytecache.schemas.dataset.index import read_dataset, write_dataset
from bytecache.schemas.dataset.verification import verify_dataset
from bytecache.schemas.errors import IntegrityError
from bytecache.stages.targets.dataset import ByteTargets
from bytecache.stages.targets.source import load_shard, open_dataset
from tests.support.student_data import make_dataset


def rewrite(folder: Path, **change: float) -> None:
    """The first training shard's entry with other numbers, all hashes made to fit."""
    dataset = read_dataset(folder)
    first = dataset.split("train")[0]
    entries = [entry.model_copy(update=change) if entry == first else entry for entry in dataset.entries]
    write_dataset(folder, entries, dataset.info)


@pytest.mark.parametrize(
    "lie",
    [
        {"n_positions": 6, "n_bytes": 6}, {"n_documents": 1, "n_bytes": -1}, {"n_supervised": -1}, {"n_entries": -1},
        {"tail_mean": 1e-4}, {"tail_max": 0.01},
    ],
)  # fmt: skip
def test_a_false_entry_is_refused_by_every_reader(tmp_path: Path, lie: dict[str, float]) -> None:
    """The totals agree and so do the hashes; only whoever opens the shard can tell."""
    folder = make_dataset(tmp_path / "d")
    entry = read_dataset(folder).split("train")[0]
    assert verify_dataset(folder, deep=True) == []
    rewrite(folder, **{name: getattr(entry, name) + change for name, change in lie.items()})
    assert verify_dataset(folder) == [], "the chain of hashes is whole"
    (problem,) = verify_dataset(folder, deep=True)
    assert (problem.file, problem.kind) == (entry.file, "inconsistent") and all(name in problem.detail for name in lie)
    with pytest.raises(IntegrityError, match=f"{next(iter(lie))} is .*the manifest says"):
        load_shard(open_dataset(folder), read_dataset(folder).split("train")[0])
    with pytest.raises(IntegrityError, match="the manifest says"):
        list(ByteTargets(folder, window=64, epochs=1))


def test_a_shard_that_lies_about_its_own_tails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader compares counts with columns; the mean of the tails only `deep` computes again."""
    from bytecache.schemas.shard import builder

    monkeypatch.setattr(builder, "_rounded", lambda value: 0.125)
    folder = make_dataset(tmp_path / "d")
    assert verify_dataset(folder) == []
    problems = verify_dataset(folder, deep=True)
    assert {problem.kind for problem in problems} == {"inconsistent"}
    assert all("tail_mean is 0.125 in its statistics" in problem.detail for problem in problems)
