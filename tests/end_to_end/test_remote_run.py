"""A whole run whose folder is a bucket: the same bytes as in a local folder, from machines that share nothing else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.pipeline.stores import open_store
from tests.support.faulty_proxy import FaultyProxy, sometimes
from tests.support.run_outputs import outputs
from tests.support.s3_server import BUCKET, S3Server, environment
from tests.support.tiny_models import make_checkpoint

TEXTS = [f"{i}: " + "the student reads the notes as often as it likes, " * (1 + i % 3) for i in range(40)]
SHAPE = [
    "corpus.unit_bytes=1500", "teacher.backend=hf", "teacher.context=128", "teacher.overlap=32", "teacher.depth=1",
    "teacher.tau=0.01", "convert.shard_bytes=3000", "student.model=", "student.tokenizer=bpe:300",
    "student.hidden_size=32", "student.layers=1", "student.heads=2", "train.steps=6", "train.batch=2",
    "train.window_bytes=128", "train.warmup=2", "train.checkpoint_every=2", "train.control=false",
]  # fmt: skip


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    server = S3Server()
    made = FaultyProxy(server.port, sometimes(0.05, 7, ("refuse", "lost", "torn_down", "torn_up")))
    for name, value in environment(made.port).items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()
    server.close()


def command(folder: Path, name: str, place: str, scratch: str) -> str:
    settings = [f"corpus.source={folder / 'corpus.jsonl'}", f"teacher.model={folder / 'teacher'}", *SHAPE]
    settings += [f"run.scratch={folder / scratch}", f"run.dir={place}"]
    result = CliRunner().invoke(app, [name, *[part for setting in settings for part in ("--set", setting)]])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_in_a_bucket_equals_one_in_a_folder(proxy: FaultyProxy, tmp_path: Path) -> None:
    """Every stage on a machine of its own, one request in twenty failing."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    make_checkpoint(tmp_path / "teacher")
    command(tmp_path, "run", str(tmp_path / "here"), "unused")
    assert not (tmp_path / "unused").exists()
    url = f"s3://{BUCKET}/runs/one"
    for stage in ("plan", "teacher", "convert", "train", "evaluate", "export"):
        command(tmp_path, stage, url, f"machine-{stage}")
    assert "export" in command(tmp_path, "status", url, "machine-last")
    assert "match their hashes" in command(tmp_path, "verify", url, "machine-verify")
    assert sum(count for fault, count in proxy.seen.items() if fault != "none") > 10
    store = open_store(url, str(tmp_path / "reader"))
    copy = tmp_path / "copy"
    for key in store.list(""):
        target = copy / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(store.get_path(key), target)
    assert outputs(copy) == outputs(tmp_path / "here")
    # What the teacher and the converter fetched is released again: a spot machine's disk stays small.
    left = [
        path.name for stage in ("teacher", "convert") for path in (tmp_path / f"machine-{stage}").rglob("*.parquet")
    ]
    assert [name for name in left if name != "manifest.parquet"] == []
    (shard,) = [key for key in store.list("targets") if "heldout" in key][:1]
    raw = bytearray(store.read_bytes(shard))
    raw[len(raw) // 2] ^= 1
    # A fault of the service itself: the recorded hash stays, the bytes do not.
    import obstore

    obstore.put(store._bucket.backend, shard, bytes(raw), attributes={"sha256": store.sha256(shard)})  # type: ignore[attr-defined]
    result = CliRunner().invoke(app, ["verify", "--set", f"run.dir={url}", "--set", f"run.scratch={tmp_path / 'v'}"])
    assert result.exit_code == 4
    assert Path(shard).name in result.output
