"""`push` to a hub that lies: whatever it answers, the push ends with a line, and what it says was sent lies there."""

import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.commands import share
from bytecache.pipeline.stores import hub_session
from bytecache.pipeline.stores.hub_session import asking
from bytecache.pipeline.stores.hub_session import hub_session as session
from bytecache.schemas.errors import StorageError
from tests.support.hub_server import hub_environment, serving
from tests.support.loopback import Loopback
from tests.support.places import ROOT
from tests.support.student_data import make_dataset

PLACE, TOKEN = "hf://datasets/me/set", "hf_thetokenofatest"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("lied_to") / "d", documents=6, per_shard=2)


def pushed(handler: Any, folder: Path, home: Path) -> tuple[int, str]:
    """Exit status and all words of a push to that hub."""
    with Loopback(handler) as server:
        environment = {**hub_environment(server.url, home), "HF_TOKEN": TOKEN, "BYTECACHE_CACHE": str(home / "cache")}
        command = [sys.executable, "-m", "bytecache", "push", PLACE, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=100)
    logs = "".join(path.read_text() for path in (home / "cache").rglob("*.log"))
    assert TOKEN not in done.stdout + done.stderr + logs and "Traceback" not in done.stderr + logs
    return done.returncode, done.stdout + done.stderr


def hub(tmp_path: Path, **methods: Callable[..., Any]) -> Any:
    """A hub some of whose methods are others."""
    repository = tmp_path / "repository"
    repository.mkdir()
    return type("LyingHub", (serving(repository),), methods)


def keeps_nothing(self: Any, lines: list[dict[str, Any]]) -> None:
    self._json({"commitUrl": f"{self._origin()}/datasets/me/set/commit/c", "commitOid": "c" * 40, "success": True})


def alters_text(self: Any, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        if line["key"] == "file":
            line["value"]["content"] = "AAAA"
    type(self).__mro__[1]._commit(self, lines)


def ignores(self: Any, file: dict[str, Any]) -> dict[str, Any]:
    return {"path": file["path"], "uploadMode": "lfs", "shouldIgnore": True}


@pytest.mark.parametrize(
    "lie",
    [{"_commit": keeps_nothing}, {"_commit": alters_text}, {"_mode": ignores}],
    ids=["lost", "altered", "ignored"],
)
def test_what_a_hub_accepts_and_does_not_keep_is_not_called_sent(
    folder: Path, tmp_path: Path, lie: dict[str, Any]
) -> None:
    code, said = pushed(hub(tmp_path, **lie), folder, tmp_path)
    assert code == 6 and "the hub accepted the commit, and lists" in said and "files sent" not in said
    # An index is never there before all of its shards.
    repository = tmp_path / "repository"
    assert not (repository / "dataset.json").exists() or len(list(repository.glob("*.zarr.zip"))) == len(
        list(folder.glob("*.zarr.zip"))
    )


@pytest.mark.parametrize("place", ["/repos/create", "/tree/", "/preupload/", "/objects/batch", "/commit/"])
@pytest.mark.parametrize("junk", [b"<html>log in</html>", b"[1]", b"[" * 100_000], ids=["page", "list", "deep"])
def test_what_is_no_answer_is_a_refusal(folder: Path, tmp_path: Path, place: str, junk: bytes) -> None:
    def lying(name: str) -> Callable[[Any], None]:
        def method(self: Any) -> None:
            if place in self.path:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._send(junk, 200, {"Content-Type": "application/json"})
            else:
                getattr(type(self).__mro__[1], name)(self)

        return method

    code, said = pushed(hub(tmp_path, do_GET=lying("do_GET"), do_POST=lying("do_POST")), folder, tmp_path)
    assert code == 6 and "no answer to this request" in said and "HF_ENDPOINT" in said, said


def test_answers_and_listings_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, numbers = ["bytes", "packed", "pages", "twice"], count()

    def endless(self: Any) -> None:
        if kinds[0] == "bytes":
            return self._send(b" " * 300_000, 200, {})
        if kinds[0] == "packed":
            return self._send(b"[]", 200, {"Content-Encoding": "gzip"})
        number = next(numbers)
        name = str(number) if kinds[0] == "pages" else "same"
        page = [{"type": "file", "path": name, "size": number, "oid": "a" * 40}]
        return self._json(page, 200, {"Link": f'<{self._origin()}{self.path}>; rel="next"'})

    monkeypatch.setattr(hub_session, "MAX_ANSWER", 200_000)
    monkeypatch.setattr(share, "MAX_LISTED", 5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    place = share.HubPlace.parse(PLACE)
    with Loopback(hub(tmp_path, do_GET=endless)) as server, session() as api:
        api.endpoint = server.url
        for words in ("is longer than", "is packed", "does not end", "twice"):
            with pytest.raises(StorageError, match=words):
                share._listing(api, place, PLACE)
            kinds.pop(0)


def test_a_file_that_goes_away_is_not_the_hub_s_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), asking(PLACE):
        (tmp_path / "gone").read_bytes()
