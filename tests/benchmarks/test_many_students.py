"""One cache for many students: both ways are the same training, and totals are sums of what was measured."""

import json

import numpy as np
import pytest

from benchmarks import many_students, many_students_tables
from bytecache.schemas.shard.reader import read_shard
from tests.support.student_data import document, make_dataset
from tests.support.tiny_models import make_checkpoint


def step(cache: float, live: float, engine: float) -> dict:
    return {
        "cache": {"read": 0.5, "train": cache}, "live": {"read": 0.5, "train": live, "engine": engine, "lattice": 1.0,
                                                        "codec": 99.0},
    }  # fmt: skip


def test_totals_are_sums_of_what_was_measured():
    found = {
        "passages": 1, "epochs": 2,
        "captures": [{"teacher": 10.0, "convert": 1.0}, {"teacher": 30.0, "convert": 3.0},
                     {"teacher": 12.0, "convert": 2.0}],
        "students": {
            "a": {"load": 0.5, "steps": [step(2, 3, 5), step(4, 4, 6)]},
            "b": {"load": 1.0, "steps": [step(8, 9, 7), step(8, 8, 8)]},
        },
    }  # fmt: skip
    once = 12 + 2
    assert many_students_tables.totals(found) == [
        {"students": 1, "epochs": 1, "cache": once + 0.5 + 2.5, "live": 3.5 + 6, "side by side": 3.5 + 6},
        {"students": 2, "epochs": 1, "cache": once + 0.5 + 2.5 + 1 + 8.5, "live": 3.5 + 6 + 9.5 + 8,
         "side by side": 3.5 + 9.5 + 7},
        {"students": 1, "epochs": 2, "cache": once + 0.5 + 7, "live": 8 + 13, "side by side": 8 + 13},
        {"students": 2, "epochs": 2, "cache": once + 0.5 + 7 + 1 + 17, "live": 8 + 13 + 18 + 17,
         "side by side": 8 + 18 + 15},
    ]  # fmt: skip
    found |= {"text_bytes": 1234, "coding": 0.002}
    for one in found["students"].values():
        one["distance"] = {"kl_per_byte": 0.001, "bits": 0.0001}
    made = many_students_tables.tables(found)
    assert made["once"].splitlines()[2:] == [
        "| the teacher, with its dump | 12.00 | 10.00 to 30.00 |",
        "| conversion | 2.00 | 1.00 to 3.00 |",
        "| KL of targets, all passages in one shard to each in its own | 2.0e-03 | |",
    ]
    assert made["parts"].splitlines()[-1] == "| `b` | 2 | 8.50 | 9.00 | 8.50 | 1.0e-03 | 0.00010 |"
    assert made["totals"].splitlines()[-1] == f"| 2 | 2 | {40:.0f} | 56 | {56 / 39.5:.2f} | 41 | {41 / 39.5:.2f} |"


def test_targets_are_compared_position_by_position(tmp_path):
    dataset = make_dataset(tmp_path / "targets", documents=2, per_shard=1)
    one, two = (read_shard(path) for path in sorted(dataset.glob("train-*.zarr.zip")))
    same = many_students.distance(one, one, 0)
    assert same == {"positions": len(one), "kl": 0.0, "largest": 0.0}
    size = min(len(one), len(two))
    longer = two if len(two) > size else one
    other = many_students.distance(one if longer is two else two, longer, 0)
    p, q = (np.asarray(shard.dense(0, size, spread_tail=True)) for shard in (longer, one if longer is two else two))
    assert other["largest"] == pytest.approx(np.abs(p - q).max()) and other["kl"] > 0.5 * size


@pytest.fixture
def options(tmp_path) -> list[str]:
    """A tiny teacher and student, and texts of two kinds."""
    make_checkpoint(tmp_path / "model")
    texts = {
        f"{kind} train {n} x": document(n, 3).replace("日本語", "it") for kind in ("code", "prose") for n in range(3)
    }
    lines = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    lines.append(json.dumps({"id": "prose test 0 y", "text": "not this one"}))
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return [
        "--texts", str(tmp_path / "corpus.jsonl"), "--gpt2", "", "--work", str(tmp_path / "work"), "--student",
        str(tmp_path / "model"), "--dtype", "float32", "--lora", "2", "--each", "1", "--out",
        str(tmp_path / "out.json"), "--tokenizers", "bytes",
    ]  # fmt: skip


def test_both_ways_are_the_same_training(options, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["many_students", *options])
    many_students.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["passages"], found["epochs"], len(found["captures"])) == (2, 2, 2)
    trained = found["students"]["bytes"]
    assert len(trained["steps"]) == 4
    assert [one["cache"]["bytes"] for one in trained["steps"]] == [one["live"]["bytes"] for one in trained["steps"]]
    # The dump's rounding, and what a shard of one passage lists in the place of one of two, are all that differs.
    assert trained["distance"]["bits"] < 1e-3
    assert 0 < found["coding"] < trained["distance"]["kl_per_byte"] < 0.02
    bits = [one["cache"]["bits"] for one in trained["steps"]]
    assert bits[2] < bits[0]  # the same passage a second time
    for one in trained["steps"]:
        assert one["cache"].keys() == {"read", "train", "bits", "bytes"}
        assert {"engine", "lattice", "codec"} < one["live"].keys()
    many_students.main()
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["students"] == found["students"], "what was measured is not measured again"
    monkeypatch.setattr("sys.argv", ["many_students", *options, "--epochs", "3"])
    with pytest.raises(SystemExit, match="of another epochs"):
        many_students.main()
