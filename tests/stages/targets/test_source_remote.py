"""Real services on loopback: an S3 server, and the protocol of a model hub."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from bytecache.schemas.dataset.index import Dataset, read_dataset
from bytecache.schemas.errors import IntegrityError
from bytecache.stages.targets import source
from bytecache.stages.targets.dataset import ByteTargets
from bytecache.stages.targets.source import load_shard, open_dataset
from tests.support.hub_server import on_hub
from tests.support.student_data import make_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("remote") / "d", documents=6, per_shard=3)


@pytest.fixture
def s3_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    pytest.importorskip("s3fs")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_EC2_METADATA_DISABLED", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("bucket")
    fs.put(f"{folder}/", "bucket/sets/one/", recursive=True)
    yield "s3://bucket/sets/one"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def same(one: Dataset, other: Dataset) -> None:
    assert one.entries == other.entries and one.info == other.info
    for entry in one.entries:
        a, b = load_shard(one, entry), load_shard(other, entry)
        assert a.doc_id == b.doc_id and (a.dense(0, len(a)) == b.dense(0, len(b))).all()


def test_s3(folder: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same(open_dataset(s3_url, cache_dir=tmp_path), read_dataset(folder))
    local = [w.number for w in ByteTargets(folder, window=64, epochs=1)]
    assert [w.number for w in ByteTargets(s3_url, window=64, epochs=1, cache_dir=tmp_path)] == local
    monkeypatch.setattr(source, "PATIENCE", 1.0)
    with pytest.raises(IntegrityError, match=r"s3://bucket/none/dataset\.json: missing at the source"):
        open_dataset("s3://bucket/none", cache_dir=tmp_path)


def test_a_data_set_on_the_hub(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom bytecache.stages.targets.dataset import ByteTargets\n"
        "data = ByteTargets('hf://datasets/me/set', window=64, epochs=1, cache_dir=sys.argv[1])\n"
        "print(sum(len(w.text) for w in data), data.dataset.content_sha256)"
    )
    dataset = read_dataset(folder)
    said = on_hub(folder, code, str(tmp_path))
    assert said.split() == [str(sum(e.n_positions for e in dataset.split("train"))), dataset.content_sha256]


def test_a_run_on_the_hub_is_read_and_verified_and_not_written(folder: Path, tmp_path: Path) -> None:
    """A published run: the store's own methods, then `verify` over the network."""
    run = tmp_path / "run"
    shutil.copytree(folder, run / "targets")
    code = (
        "import sys\nfrom pathlib import Path\nfrom bytecache.pipeline.stores import open_store\n"
        "from bytecache.schemas.errors import StorageError\n"
        "store = open_store('hf://datasets/me/run', sys.argv[1] + '/scratch')\n"
        "keys = list(store.list(''))\n"
        "assert keys == list(store.list('targets')) == sorted(sys.argv[2].split()), keys\n"
        "assert not store.exists('targets/none') and store.size('targets') is None\n"
        "first = Path(sys.argv[1], 'run', keys[0]).read_bytes()\n"
        "assert store.read_bytes(keys[0]) == first and store.size(keys[0]) == len(first)\n"
        "assert sorted(p.name for p in store.folder('targets').iterdir()) == [k.split('/')[1] for k in keys]\n"
        "for refused in (lambda: store.temp_path('x'), lambda: store.read_bytes('targets/none')):\n"
        "    try: refused()\n"
        "    except StorageError as error: print(error)\n"
        "    else: raise SystemExit('no refusal')\n"
        "from typer.testing import CliRunner\nfrom bytecache.pipeline.cli import app\n"
        "done = CliRunner().invoke(app, ['verify', 'hf://datasets/me/run/targets'])\n"
        "print(done.exit_code, done.output)\n"
    )
    keys = " ".join(f"targets/{path.name}" for path in (run / "targets").iterdir())
    said = on_hub(run, code, str(tmp_path), keys)
    assert "only read here" in said and "does not exist" in said
    assert "0 hf://datasets/me/run/targets: 5 files match their hashes" in said
