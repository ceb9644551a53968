"""Real services on loopback: an S3 server, and the protocol of a model hub (only what reading needs)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlparse

import fsspec
import pytest

from bytecache.schemas.dataset.index import Dataset, read_dataset
from bytecache.schemas.errors import IntegrityError
from bytecache.stages.targets import source
from bytecache.stages.targets.dataset import ByteTargets
from bytecache.stages.targets.source import load_shard, open_dataset
from tests.support.loopback import Loopback, Quiet
from tests.support.places import ROOT
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
    monkeypatch.setattr(source, "BACKOFF", 0.0)
    with pytest.raises(IntegrityError, match=r"s3://bucket/none/dataset\.json: missing at the source"):
        open_dataset("s3://bucket/none", cache_dir=tmp_path)


class Hub(Quiet, BaseHTTPRequestHandler):
    """The three kinds of request that the hub's file system makes to read a data set."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        wanted = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = json.loads(wanted).get("paths", []) if wanted.startswith("{") else []
        self._json([self._entry(name) for name in names if (self.folder / name).exists()])

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(path)
        if "/resolve/" in path:
            file = self.folder / path.split("/resolve/")[1].split("/", 1)[1]
            if not file.is_file():
                return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            data = file.read_bytes()
            if "Range" in self.headers:
                a, b = self.headers["Range"].removeprefix("bytes=").split("-")
                data = data[int(a) : int(b) + 1 if b else None]
            self._send(data, 206 if "Range" in self.headers else 200, {"X-Repo-Commit": "c" * 40, "ETag": '"e"'})
            return None
        if "/tree/" in path:
            inside = path.split("/tree/")[1].partition("/")[2]
            recursive = "recursive=true" in self.path.lower()
            if not (self.folder / inside).is_dir():
                return self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            below = sorted((self.folder / inside).rglob("*") if recursive else (self.folder / inside).iterdir())
            return self._json([self._entry(p.relative_to(self.folder).as_posix()) for p in below])
        return self._json({"id": "me/set", "sha": "c" * 40, "siblings": [], "tags": []})

    def _entry(self, name: str) -> dict[str, object]:
        path = self.folder / name
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def on_hub(folder: Path, code: str, *arguments: str) -> str:
    """What `code` prints in a process of its own: the hub's client reads its address when it is imported."""
    handler = type("ThisHub", (Hub,), {"folder": folder, "asked": []})
    with Loopback(handler) as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": arguments[0] + "/hf",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, env=environment, timeout=100, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 0, (done.stderr[-2000:], handler.asked[-5:])  # type: ignore[attr-defined]
    return done.stdout


def test_a_data_set_on_the_hub(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom bytecache.stages.targets.dataset import ByteTargets\n"
        "data = ByteTargets('hf://datasets/me/set', window=64, epochs=1, cache_dir=sys.argv[1])\n"
        "print(sum(len(w.text) for w in data), data.dataset.manifest_hash)"
    )
    dataset = read_dataset(folder)
    said = on_hub(folder, code, str(tmp_path))
    assert said.split() == [str(sum(e.n_positions for e in dataset.split("train"))), dataset.manifest_hash]


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
