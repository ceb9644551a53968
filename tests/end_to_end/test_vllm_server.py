"""A real vLLM server on loopback: lists of tokens and exact path masses over HTTP, and a server that is killed."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
from bytecache.pipeline.commands.convert import convert
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.teacher import teacher
from bytecache.pipeline.context import open_context
from bytecache.pipeline.units.receipts import list_receipts
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.errors import ConfigError
from bytecache.stages.engines.server_client import Client
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import open_teacher
from tests.support.tiny_models import PROSE, make_checkpoint
from tests.support.vllm_server import VllmServer

pytestmark = pytest.mark.slow
BASE = {"context": 64, "overlap": 16, "tau": 0.01, "depth": 1, "sample_tokens": 0, "floor": 1e-7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with VllmServer(folder, tmp_path_factory.mktemp("log") / "log", key="sesame") as server:
        yield server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYTECACHE_SERVER_KEY", "sesame")


def targets(folder: Path, **settings: Any) -> list[Any]:
    opened = open_teacher(st.Teacher.model_validate({**BASE, "model": str(folder), **settings}))
    try:
        encoded = opened.vocabulary.encode(PROSE[:200])
        return [Lattice(window).targets() for group in opened.windows([("d", 0, encoded)]) for window in group]
    finally:
        opened.close()


def test_lists_and_path_masses_are_our_own_engines(folder: Path, server: VllmServer) -> None:
    wanted = targets(folder, backend="hf", static=0.001, top_k=4)
    exact = targets(folder, backend="vllm-server", server=server.api, static=0.001, top_k=4)
    assert len(wanted) > 1
    for one, other in zip(exact, wanted, strict=True):
        np.testing.assert_allclose(one.probs, other.probs, atol=2e-5)
        np.testing.assert_allclose(one.tail, other.tail, atol=2e-5)
    whole = targets(folder, backend="hf", static=0.0, top_k=0)
    listed = targets(folder, backend="server", server=server.api, top_k=400)
    for one, other in zip(listed, whole, strict=True):
        np.testing.assert_allclose(one.probs, other.probs, atol=2e-5)
    assert any(np.abs(one.probs - other.probs).max() > 1e-3 for one, other in zip(exact, whole, strict=True))


def test_another_floor_another_key_another_tokenizer_are_refused(
    folder: Path, server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"backend": "vllm-server", "server": server.api, "static": 0.001, "top_k": 4}
    targets(folder, **ours)
    with pytest.raises(ConfigError, match=r"this server was opened with .*1e-07.*asked is .*0\.001"):
        targets(folder, **ours, floor=1e-3)
    with pytest.raises(ConfigError, match="serves a model with another tokenizer"):
        targets(make_checkpoint(tmp_path / "other", vocabulary=300), **ours)
    monkeypatch.setenv("BYTECACHE_SERVER_KEY", "wrong")
    with pytest.raises(ConfigError, match="access refused"):
        targets(folder, **ours)


@pytest.mark.parametrize("backend", ["server", "vllm-server"])
def test_a_run_against_a_server_that_is_killed(
    folder: Path, server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    lines = [json.dumps({"text": f"{number}: {PROSE}"}) for number in range(8)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    effort = {"depth": 0, "top_k": 64} if backend == "server" else {"static": 0.001, "top_k": 4, "sample_tokens": 16}
    settings = st.Settings.model_validate({
        "run": {"dir": str(tmp_path / "run")},
        "corpus": {"source": str(tmp_path / "corpus.jsonl"), "unit_bytes": 1000},
        "teacher": {**BASE, **effort, "model": str(folder), "backend": backend, "server": server.api},
        "convert": {"shard_bytes": 2000},
    })  # fmt: skip
    context = open_context(settings)
    plan(context)
    before: dict[Path, bytes] = {}
    kills = 1 if backend == "vllm-server" else 0  # a start is dear, so only the run that must open again meets one
    send, one_kills = Client._raw, threading.Lock()

    def dying(self: Client, url: str, *asked: Any) -> Any:
        nonlocal kills
        self.patience = 400.0
        with one_kills:
            if kills and len(list(list_receipts(context.store, "teacher"))) == 2:
                kills -= 1
                before.update({path: path.read_bytes() for path in (tmp_path / "run" / "teacher").rglob("*.parquet")})
                server.kill()
                server.start()
        return send(self, url, *asked)

    monkeypatch.setattr(Client, "_raw", dying)
    outcome = teacher(context)
    convert(context)
    assert len(before) == (2 if backend == "vllm-server" else 0) and len(outcome.receipts) > 2 and not kills
    assert all(path.read_bytes() == raw for path, raw in before.items())
    dataset = read_dataset(tmp_path / "run" / "targets")
    told = dataset.info["teacher"]
    assert told["served"] == "tiny" and server.api not in json.dumps(dataset.info)
    if backend == "vllm-server":
        assert any(name.endswith(".safetensors") for name in told["weights"]) and told["head_dtype"] == "float32"
        # An untrained teacher finds all text absurd: a light history may turn out to be the one that foresaw it.
        assert dataset.fidelity is not None and dataset.fidelity["kl"]["mean"] < 0.2
