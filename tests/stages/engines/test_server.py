"""A teacher behind HTTP: with every token listed the rows of the model itself, with a few an honest part of them."""

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytecache.schemas import settings as st
from bytecache.schemas import web
from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.stages.engines.answers import CHUNK, Bound
from bytecache.stages.engines.server import ServerEngine
from bytecache.stages.engines.server_client import Client, Spoken, as_completion, listed_entries
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.identity import teacher_identity
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from tests.support.completions_server import CompletionsServer
from tests.support.loopback import Loopback, Quiet
from tests.support.tiny_models import PROSE, make_checkpoint

TEXT = PROSE[:150]
BASE = {"context": 64, "overlap": 24, "tau": 0.01, "depth": 1, "static": 0.0, "sample_tokens": 0, "floor": 1e-7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[CompletionsServer]:
    with CompletionsServer(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(server: CompletionsServer) -> Iterator[None]:
    server.seen.clear()
    server.requests = server.most = 0
    yield
    server.choose, server.vllm, server.slow, server.max_logprobs = (lambda number: ""), True, 0.0, 1000
    server.key, server.name = "", "tiny"


def settings(folder: Path, there: CompletionsServer, **changes: Any) -> st.Teacher:
    asked = {"model": str(folder), "backend": "server", "server": there.api, "top_k": 400, **BASE, **changes}
    return st.Teacher.model_validate(asked)


def targets(teacher: Teacher, text: str = TEXT) -> list[Any]:
    encoded = teacher.vocabulary.encode(text)
    return [Lattice(window).targets() for group in teacher.windows([("d", 0, encoded)]) for window in group]


def opened(folder: Path, server: CompletionsServer, patience: float = 5.0, **changes: Any) -> Teacher:
    teacher = open_teacher(settings(folder, server, **changes))
    assert isinstance(teacher.engine, ServerEngine)
    teacher.engine.client.patience = patience
    return teacher


@pytest.mark.parametrize("depth", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_with_every_token_listed_the_rows_are_the_models(folder: Path, server: CompletionsServer, depth: int) -> None:
    teacher = opened(folder, server, depth=depth)
    local = {**BASE, "depth": depth, "model": str(folder), "backend": "hf", "top_k": 0}
    reference = open_teacher(st.Teacher.model_validate(local))
    for found, wanted in zip(targets(teacher), targets(reference), strict=True):
        np.testing.assert_allclose(found.probs, wanted.probs, atol=2e-5)
        np.testing.assert_allclose(found.tail, wanted.tail, atol=2e-5)
    teacher.close()


def test_a_short_list_leaves_a_tail_and_does_not_tell_the_label(folder: Path, server: CompletionsServer) -> None:
    short, exact = opened(folder, server, top_k=8, depth=0), opened(folder, server, depth=0)
    few, whole = targets(short), targets(exact)
    for each in few:
        np.testing.assert_allclose(each.probs.sum(1) + each.tail, 1.0, atol=1e-4)
    assert few[0].tail.mean() > 2 * whole[0].tail.mean()
    # Were the true token listed where it is not among the 8, its byte would be likelier than it is.
    entry = {"7": {"logprob": -1.0, "rank": 1}, "9": {"logprob": -9.0, "rank": 200}}
    assert listed_entries(entry, 9, 8).ids.tolist() == [7, 9], "no more than k are there"
    assert listed_entries(entry, 9, 1).ids.tolist() == [7]


def test_a_server_without_prompt_logprobs_echoes(folder: Path, server: CompletionsServer) -> None:
    server.vllm = False
    teacher = opened(folder, server, depth=0)
    assert isinstance(teacher.engine, ServerEngine) and teacher.engine.protocol == "echo"
    found, wanted = targets(teacher), targets(opened_reference(folder))
    for each in found:
        np.testing.assert_allclose(each.probs.sum(1) + each.tail, 1.0, atol=1e-4)
    # Pieces of characters look alike in text and stay unlisted; the rest is as the model says.
    np.testing.assert_allclose(found[0].probs[0, :128], wanted[0].probs[0, :128], atol=0.01)
    assert wanted[0].probs[0, 128:].sum() > 1e-3 > found[0].probs[0, 128:].sum()
    assert teacher.engine._spoken.unknown > 0


def opened_reference(folder: Path) -> Teacher:
    return open_teacher(
        st.Teacher.model_validate({**BASE, "depth": 0, "model": str(folder), "backend": "hf", "top_k": 0})
    )


@pytest.mark.parametrize(
    "fault", ["429", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("500", "cut", "truncated"))]
)
def test_what_may_pass_is_asked_again(folder: Path, server: CompletionsServer, fault: str) -> None:
    expected = targets(opened(folder, server))
    teacher = opened(folder, server)
    server.requests, server.choose = 0, lambda number: fault if number in (0, 2) else ""
    found = targets(teacher)
    assert server.seen[fault] == 2
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.probs, other.probs)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("truncated", "is not whole .* 3 times; nothing of it is used"),
        ("other", "answers as 'another', asked was 'tiny'"),
        ("nan", "NaN, or above 0"),
        ("logits", "NaN, or above 0"),
        ("500", r"no answer for 1 s \(.*HTTP 500.*rerun the same command"),
        ("cut", r"no answer for 1 s"),
    ],
)
def test_what_does_not_pass_is_refused(folder: Path, server: CompletionsServer, fault: str, words: str) -> None:
    teacher = opened(folder, server, patience=1.0)
    server.choose = lambda number: fault
    with pytest.raises(EngineError, match=words):
        targets(teacher)


def test_requests_under_way_are_bounded(folder: Path) -> None:
    # A server of its own: what an earlier test had asked for may still be under way at the shared one.
    with CompletionsServer(folder, slow=0.02) as server:
        targets(opened(folder, server, server_requests=3, top_k=4), PROSE)
        assert 1 < server.most <= 3


def test_the_identity_names_what_is_served(folder: Path, server: CompletionsServer) -> None:
    asked = settings(folder, server)
    identity = teacher_identity(asked)
    assert identity["served"] == "tiny" and identity["versions"] == {"server": "0.0-test"}
    assert server.api not in str(identity) and str(folder) not in str(identity)
    assert not any(name.endswith(".safetensors") for name in identity["weights"])
    server.name = "tiny-2"
    assert teacher_identity(asked) != identity


@pytest.mark.slow
def test_no_weights_are_needed(folder: Path, server: CompletionsServer, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    teacher = open_teacher(settings(tmp_path, server))
    assert len(targets(teacher)) > 1


def test_settings_that_a_server_cannot_answer_are_refused(
    folder: Path, server: CompletionsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"needs teacher.server"):
        open_teacher(settings(folder, server, server=""))
    with pytest.raises(
        ConfigError, match=r"answers no path masses: start it with --worker-extension-cls .*ServedPaths"
    ):
        open_teacher(settings(folder, server, backend="vllm-server"))
    with pytest.raises(ConfigError, match=r"'other' is not served by .* which has: tiny"):
        open_teacher(settings(folder, server, server_model="other"))
    with pytest.raises(ConfigError, match=r"BYTECACHE_SERVER_KEY"):
        open_teacher(settings(folder, server, server="http://user:secret@127.0.0.1/v1"))
    server.max_logprobs = 20
    with pytest.raises(ConfigError, match=r"greater than max allowed: 20.*lower teacher.top_k.*--max-logprobs"):
        open_teacher(settings(folder, server, top_k=64))
    server.max_logprobs, server.key = 1000, "sesame"
    monkeypatch.setenv("BYTECACHE_SERVER_KEY", "wrong")
    with pytest.raises(ConfigError, match="access refused"):
        open_teacher(settings(folder, server))
    monkeypatch.setenv("BYTECACHE_SERVER_KEY", "sesame")
    open_teacher(settings(folder, server)).close()


def test_another_tokenizer_is_refused(folder: Path, server: CompletionsServer, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", family="sentencepiece")
    with pytest.raises(ConfigError, match=r"spells the same token ids otherwise|no log-probability"):
        open_teacher(settings(other, server))


def test_effort_that_needs_whole_distributions_is_off() -> None:
    asked = st.Teacher(backend="server", preset="exact").resolved()
    assert (asked.depth, asked.static, asked.sample_tokens) == (0, 0.0, 0)
    assert st.Teacher(backend="server", depth=2).resolved().depth == 2


def test_tokens_that_look_alike_are_neither() -> None:
    spoken = Spoken([b"a", b"b", b"a", b"\xe2", None])
    found = spoken.listed({"a": -1.0, "b": -2.0, "\ufffd": -3.0, "token_id:2": -4.0}, -1, 8)
    assert found.ids.tolist() == [1, 2]
    assert spoken.unknown == 2


def test_a_server_that_is_not_there(folder: Path) -> None:
    client = Client.__new__(Client)
    client.address, client.patience = "http://127.0.0.1:9/v1", 0.2
    with pytest.raises(EngineError, match=r"no answer for 0 s .*see that the server runs"):
        client.get("models")


@pytest.mark.parametrize("entry", ["-5", "x", "\u0663", "1e3", "9" * 12])
def test_an_id_is_a_plain_number(entry: str) -> None:
    """-5 would count from the end of the vocabulary."""
    for ask in (
        lambda: listed_entries({"7": {"logprob": -0.1}, entry: {"logprob": -9.0}}, 7, 4),
        lambda: Spoken([b"a"]).listed({f"token_id:{entry}": -9.0}, -1, 4),
    ):
        with pytest.raises(EngineError, match=r"no completion.*no token id"), as_completion("x"):
            ask()


@pytest.mark.parametrize("value", ["-1", True, None, [1], {}])
def test_a_log_probability_is_a_number(value: object) -> None:
    with pytest.raises(EngineError, match="no completion"), as_completion("x"):
        listed_entries({"7": {"logprob": value}}, 7, 4)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_key_goes_where_a_server_sends_it(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would follow, the key in a header."""
    monkeypatch.setenv("BYTECACHE_SERVER_KEY", "sesame-open")
    came: list[str] = []

    class Elsewhere(Quiet):
        def do_GET(self) -> None:  # noqa: N802
            came.append(str(self.headers.get("Authorization")))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET  # noqa: N815

    with Loopback(Elsewhere) as elsewhere:

        class Sends(Quiet):
            def do_GET(self) -> None:  # noqa: N802
                self.send_response(code)
                self.send_header("Location", f"{elsewhere.url}/v1/models")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_GET  # noqa: N815

        with Loopback(Sends) as there:
            client = Client.__new__(Client)
            client.address, client.patience = f"{there.url}/v1", 0.2
            with pytest.raises(ConfigError, match=r"leads to .* where no key and no text is sent"):
                client.get("models")
            with pytest.raises(ConfigError, match="leads to"):
                client.post("completions", {"prompt": [1]}, Bound())
    assert came == []


class Answers(Quiet):
    """Sends `pieces` to whoever asks, `headers` before them."""

    protocol_version = "HTTP/1.1"
    headers_sent: dict[str, str]
    pieces: list[bytes]
    asked = sent = 0

    def do_GET(self) -> None:  # noqa: N802
        kind = type(self)
        kind.asked += 1
        self.send_response(200)
        for each in self.headers_sent.items():
            self.send_header(*each)
        self.end_headers()
        self.close_connection = True
        for piece in self.pieces:
            try:
                self.wfile.write(piece)
            except OSError:
                return
            kind.sent += len(piece)


def answering(pieces: list[bytes], **headers: str) -> type[Answers]:
    return type("Answering", (Answers,), {"pieces": pieces, "headers_sent": headers})


def asking(kind: type[Answers], bound: Bound = Bound(), patience: float = 0.3) -> Any:  # noqa: B008
    with Loopback(kind) as there:
        client = Client.__new__(Client)
        client.address, client.patience = f"{there.url}/v1", patience
        return client._ask("models", None, bound)


@pytest.mark.parametrize("begin", [
    b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", b"",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", b"HTTP/1.1 400 No\r\n\r\n",
])  # fmt: skip
def test_an_answer_that_drips_is_given_up(begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no silence, and would never end."""
    monkeypatch.setattr(web, "TRICKLE_S", 0.2)
    stop = threading.Event()

    class Drips(Quiet):
        def do_GET(self) -> None:  # noqa: N802
            with suppress(OSError):
                self.wfile.write(begin)
                while not stop.wait(0.02):
                    self.wfile.write(b" ")
                    self.wfile.flush()

    with pytest.raises(EngineError, match=r"no answer for 0 s .*bytes in \d s, at least 16384 must come.* rerun"):
        asking(Drips, patience=0.0)  # type: ignore[arg-type]
    stop.set()


SMALL = Bound(3 * CHUNK, 1000)


@pytest.mark.parametrize("announced", ["", "chunked", str(1 << 40)])
def test_an_answer_is_no_longer_than_what_was_asked(announced: str) -> None:
    """One that never ends, and one that says how long it is: refused when that is known, not asked for again."""
    piece = b" " * CHUNK
    framed = f"{CHUNK:x}\r\n".encode() + piece + b"\r\n"
    headers = {"Transfer-Encoding": "chunked"} if announced == "chunked" else {"Content-Length": announced}
    kind = answering([framed if announced == "chunked" else piece] * 300, **(headers if announced else {}))
    with pytest.raises(EngineError, match=rf"longer than {SMALL.size} bytes, more than was asked for"):
        asking(kind, SMALL)
    # What is under way when the connection closes is in buffers of the system.
    assert kind.asked == 1 and kind.sent < 100 * CHUNK
    raw = b'{"data": []}' + piece * 2
    assert asking(answering([raw], **{"Content-Length": str(len(raw))}), SMALL) == {"data": []}


@pytest.mark.parametrize("content", [b"[" * 2000, b"{}" + b",{}" * 2000, b'{"a":[' + b"1," * 2000])
def test_an_answer_has_no_more_values_than_what_was_asked(content: bytes) -> None:
    """Three bytes of JSON may be a list of their own."""
    with pytest.raises(EngineError, match="more than 1000 values"):
        asking(answering([content], **{"Content-Length": str(len(content))}), SMALL)


@pytest.mark.parametrize(("content", "headers", "said"), [
    (b"<html><title>Log in</title></html>", {"Content-Type": "text/html; charset=utf-8"}, "text/html .'Log in'"),
    (b"<html>x", {"Content-Type": "text/html", "Content-Length": "7"}, "text/html .'<html>x'"),
    (b"upstream \x1b[2J", {"Content-Type": "text/plain", "Content-Length": "13"}, r"text/plain .'upstream \\\\x1b"),
    (b"", {"Content-Length": "0"}, "answers nothing, not JSON"),
    (b"\x00\xff", {"Content-Length": "2"}, "bytes of no type"),
    (b"[" * 100_000, {"Content-Length": "100000"}, "not JSON"),
    (b"2\r\n{,\r\n0\r\n\r\n", {"Transfer-Encoding": "chunked"}, "not JSON"),
])  # fmt: skip
def test_what_is_whole_and_no_json_is_refused_at_once(content: bytes, headers: dict[str, str], said: str) -> None:
    kind = answering([content], **headers)
    with pytest.raises(EngineError, match=rf"{said}.*is it the address of a completions API"):
        asking(kind, patience=60.0)
    assert kind.asked == 1


@pytest.mark.parametrize(("content", "headers"), [
    (b'{"data": [', {}), (b'{"data": [', {"Content-Length": "100"}), (b"", {}),
    (b'9\r\n{"data": ', {"Transfer-Encoding": "chunked"}),
])  # fmt: skip
def test_what_broke_off_is_asked_for_again(content: bytes, headers: dict[str, str]) -> None:
    class Recovers(answering([content], **headers)):  # type: ignore[misc]
        def do_GET(self) -> None:  # noqa: N802
            if type(self).asked:
                type(self).pieces, type(self).headers_sent = [b'{"data": []}'], {"Content-Length": "12"}
            super().do_GET()

    assert asking(Recovers, patience=60.0) == {"data": []}
    assert Recovers.asked == 2


def test_room_for_what_was_asked(folder: Path, server: CompletionsServer) -> None:
    """The longest honest answer: every character escaped, every field there."""
    entry = {"logprob": -12.345678901234567, "rank": 151_936, "decoded_token": "\U0001f600" * 2}
    one = len(json.dumps({"151935": entry})) + 1
    bound = Bound.of_listing(1000, 20)
    assert bound.size > 1000 * 21 * one and bound.values > 1000 * 21 * 5
    listed = json.dumps({"151935": entry})
    assert listed.count(",") + listed.count("{") < 5
