r"""Exact path masses out of `vllm serve`: what a fleet asks of one big teacher over HTTP.

    vllm serve MODEL --worker-extension-cls bytecache.stages.engines.vllm_serve.ServedPaths \
        --middleware bytecache.stages.engines.vllm_serve.Paths

Both are public arguments of vLLM. The extension is that of `vllm_worker`, with methods that take and give bytes, for
vLLM carries no objects of ours between its processes. The "middleware" adds three routes beside vLLM's own, under /v1,
so that the server's key guards them too:

    POST /v1/bytecache/open     start and end tokens, floor and top_k; the answer is the teacher's identity
    POST /v1/bytecache/rows     a window, or branches of one: tokens in, rows of path masses out
    POST /v1/bytecache/static   static rows of some windows

A window is announced to the workers, its requests ride with everybody else's through vLLM's scheduler, then the rows
are collected. Branches are requests whose prefix is in the server's prefix cache. Requests of several clients have
different names and share steps. All clients must agree on what is opened: another floor needs another server. What a
request leaves behind when it fails is dropped. Data parallel copies in one server are refused: a call reaches the
workers of the first alone; start a server for each copy.
"""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.errors import BytecacheError, InputError
from bytecache.stages.engines.paths import PathReducer
from bytecache.stages.engines.static import CONTEXTS, StaticJob, context_tokens
from bytecache.stages.engines.vllm_start import logit_rows
from bytecache.stages.engines.vllm_worker import PathExtension, Request, Want, WantState
from bytecache.stages.engines.wire import MAX_BYTES, pack_rows, unpack
from bytecache.stages.models.locate import resolve_model, weights_identity
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary

PREFIX = "/v1/bytecache"


class ServedPaths(PathExtension):
    """`PathExtension` for callers in another process: bytes and JSON in, bytes and JSON out."""

    _opened: str = ""
    _failed: dict[str, str]
    _vocabulary: Vocabulary

    def served_open(self, folder: str, asked: str) -> str:
        """JSON: `vocabulary`, its fingerprint, `size` and `contexts`; or `error`, in words."""
        if self._opened and self._opened != asked:
            return json.dumps({"error": f"this server was opened with {self._opened}, asked is {asked}"})
        try:
            if not self._opened:
                self._install(Path(folder), json.loads(asked))
                self._opened = asked
        except BytecacheError as error:
            return json.dumps({"error": str(error)})
        contexts = [tokens.tolist() for tokens in context_tokens(self._vocabulary)]
        told = {"vocabulary": self._vocabulary.fingerprint, "size": self._vocabulary.size, "contexts": contexts}
        return json.dumps(told)

    def _install(self, folder: Path, asked: dict[str, Any]) -> None:
        self._vocabulary = load_vocabulary(folder, start=asked["start"], end=asked["end"])
        reducer = PathReducer(self._vocabulary, top_k=asked["top_k"], floor=asked["floor"])
        on_cpu = self.model_runner.device.type == "cpu"
        contexts = len(context_tokens(self._vocabulary))
        self._failed = {}
        if not self.bytecache_install(reducer, contexts, logit_rows(reducer, on_cpu=on_cpu)):
            raise InputError("this vLLM's model runner has no hook for path masses; serve with the version in lock/")

    def served_want(self, name: str, raw: bytes) -> None:
        """Announce the rows of /rows under a name; its requests are called NAME-0, NAME-1, ..."""
        _, arrays = unpack(raw)
        prompts, firsts = _prompts(arrays)
        requests = {
            f"{name}-{number}": Request(first, len(prompt))
            for number, (prompt, first) in enumerate(zip(prompts, firsts, strict=True))
        }
        following = arrays["following"]
        self.bytecache_want({name: Want(name, arrays["text"], arrays["starts"], following, requests)})

    def served_collect(self, name: str) -> bytes | str | None:
        """The rows; words where they failed; None on ranks that do not answer."""
        wanted = self._wanted[name]
        if error := self._failed.pop(name, ""):
            self.served_drop(name)
            return error
        if not self._answers or (wanted.chunk >= 0).all():
            try:
                rows = self.bytecache_collect([name])
            except BytecacheError as error:  # a device says only now that its numbers are none
                return str(error)
            return pack_rows([rows[name]]) if rows else None
        self.served_drop(name)
        return "not all rows were computed; the server may have been stopped"

    def served_drop(self, name: str) -> None:
        """Forget a want that nobody will collect, with the rows that it has already."""
        wanted = self._wanted.pop(name, None)
        self._failed.pop(name, None)
        if wanted is None:
            return
        for request in [each for each in self._asked if each.rpartition("-")[0] == name]:
            del self._asked[request]
        numbers, counts = np.unique(wanted.chunk[wanted.chunk >= 0], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self._uncollected[number] -= count
            if not self._uncollected[number]:
                del self._chunks[number], self._uncollected[number]

    def served_want_states(self, names: list[str], tokens: list[int], number: int, length: int) -> None:
        """Announce requests for static states after one context."""
        wants = {name: WantState(token, number, length) for name, token in zip(names, tokens, strict=True)}
        self.bytecache_want_states(wants)

    def served_static_missing(self, raw: bytes) -> list[int]:
        """Tokens whose states must be asked for."""
        return self.bytecache_static_missing(unpack(raw)[1]["token"])

    def served_static_rows(self, raw: bytes) -> bytes | None:
        """Static rows of the jobs of /static."""
        rows = self.bytecache_static_rows(_static_jobs(unpack(raw)[1]))
        return None if rows is None else pack_rows(rows)

    def _reduce(self, hidden_states: Any, pieces: Any) -> None:
        # What one window lacks must not end the engine of all.
        try:
            super()._reduce(hidden_states, pieces)
        except BytecacheError as error:
            self._failed |= {piece.wanted.label: str(error) for piece in pieces}


def _prompts(arrays: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """The prompts of /rows, and the first history of each that a row is wanted of.

    Without `anchor` one prompt: `tokens`, rows from `first` on. With it branches: tokens[: anchor + 1], then as many
    tokens of `chain` as `length` says; a row of the last history of each.
    """
    tokens = arrays["tokens"]
    if "anchor" not in arrays:
        return [tokens], [int(arrays["first"][0])]
    chains = np.split(arrays["chain"], np.cumsum(arrays["length"])[:-1])
    prompts = [np.append(tokens[: a + 1], chain) for a, chain in zip(arrays["anchor"], chains, strict=True)]
    return prompts, [len(prompt) - 1 for prompt in prompts]


def _static_jobs(arrays: dict[str, np.ndarray]) -> list[StaticJob]:
    texts = np.split(arrays["text"], np.cumsum(arrays["size"])[:-1])
    cuts = np.cumsum(arrays["count"])[:-1]
    parts = zip(texts, np.split(arrays["token"], cuts), np.split(arrays["start"], cuts), strict=True)
    return [StaticJob(f"job {number}", *part) for number, part in enumerate(parts)]


_KINDS = {"text": "uint8", "tokens": "int32", "chain": "int32", "token": "int32"}
"""What arrays of a request are; int64 where nothing is said."""


def check_rows(arrays: dict[str, np.ndarray], size: int) -> None:
    """Raise ValueError for a request of /rows whose numbers point anywhere but into its text and `size` tokens.

    Compiled loops and the engine's step take them as they come: there one that is wrong would end all requests.
    """
    _check_kinds(arrays)
    _within(arrays, "tokens", 0, size - 1)
    _within(arrays, "following", -1, size - 1)
    _within(arrays, "starts", 0, len(arrays["text"]))
    if "anchor" in arrays:
        _within(arrays, "anchor", 0, len(arrays["tokens"]) - 1)
        _within(arrays, "length", 0, len(arrays["chain"]))
        _within(arrays, "chain", 0, size - 1)
        if len(arrays["length"]) != len(arrays["anchor"]) or int(arrays["length"].sum()) != len(arrays["chain"]):
            raise ValueError("chain, length and anchor of branches do not go together")


def check_static(arrays: dict[str, np.ndarray], size: int) -> None:
    """The same of /static."""
    _check_kinds(arrays)
    _within(arrays, "token", 0, size - 1)
    _within(arrays, "size", 0, len(arrays["text"]))
    _within(arrays, "count", 0, len(arrays["token"]))
    sums = int(arrays["size"].sum()), int(arrays["count"].sum()), len(arrays["start"])
    if len(arrays["size"]) != len(arrays["count"]) or sums != (len(arrays["text"]), *[len(arrays["token"])] * 2):
        raise ValueError("sizes and counts of static jobs do not go together")
    _within(arrays, "start", 0, np.repeat(arrays["size"], arrays["count"]))


def _check_kinds(arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.name != _KINDS.get(name, "int64"):
            raise ValueError(f"{name} is {array.dtype.name} of {array.ndim} dimensions")


def _within(arrays: dict[str, np.ndarray], name: str, low: int, high: int | np.ndarray) -> None:
    values = arrays[name]
    if len(values) and ((values < low).any() or (values > high).any()):
        raise ValueError(f"{name} points outside of what it is about")


# ---- the routes, in the process of the HTTP server


class Paths:
    """An ASGI "middleware" that hands everything on, and adds our routes to the application when it starts."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app, self._routed = app, False

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Hand on."""
        if not self._routed and "app" in scope:
            self._routed = True
            for name, handler in (("open", _open), ("rows", _rows), ("static", _static)):
                scope["app"].add_route(f"{PREFIX}/{name}", _refusing(handler), methods=["POST"])
        await self.app(scope, receive, send)


def _refusing(handler: Callable[["_Call", bytes], Awaitable[bytes]]) -> Callable[[Any], Awaitable[Any]]:
    """A route that answers what is refused with its words: 409, the settings or the model; 422, the body; 500, ours."""
    from starlette.responses import JSONResponse, Response

    async def route(request: Any) -> Any:
        size = request.headers.get("content-length", "")
        if not size.isdecimal() or int(size) > MAX_BYTES:
            return JSONResponse({"error": f"a body of known size, {MAX_BYTES} bytes at most"}, 413)
        try:
            answer = await handler(_Call(request.app.state), await request.body())
        except BytecacheError as error:
            return JSONResponse({"error": str(error)}, 409)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 422)
        except Exception as error:
            inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            return JSONResponse({"error": f"{type(inner).__name__}: {inner}"[:500]}, 500)
        return Response(answer, media_type="application/octet-stream")

    return route


class _Call:
    """What a handler asks of the engine."""

    def __init__(self, state: Any) -> None:
        self.state, self.engine, self.config = state, state.engine_client, state.vllm_config

    def held(self, name: str, make: Callable[[], Any]) -> Any:
        """What the server keeps between calls."""
        if not hasattr(self.state, name):
            setattr(self.state, name, make())
        return getattr(self.state, name)

    async def workers(self, method: str, *args: Any) -> list[Any]:
        """The answers of all workers that answer."""
        answers = await self.engine.collective_rpc(method, args=args)
        return [answer for answer in answers if answer is not None]

    async def finish(self, prompts: Sequence[np.ndarray], names: Sequence[str], *, reuse_prefix: bool) -> None:
        """Run prompts through the engine, one sampled token each."""
        from vllm import SamplingParams

        longest, size = max(map(len, prompts)), self.config.model_config.get_vocab_size()
        if longest >= self.config.model_config.max_model_len:
            raise ValueError(f"{longest} tokens, and {self.config.model_config.max_model_len} fit with a sampled one")
        if min(int(p.min()) for p in prompts) < 0 or max(int(p.max()) for p in prompts) >= size:
            raise ValueError(f"a token outside the model's {size}")

        async def one(prompt: np.ndarray, name: str) -> None:
            params = SamplingParams(
                max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True,
                skip_reading_prefix_cache=not reuse_prefix,
            )  # fmt: skip
            async for _ in self.engine.generate({"prompt_token_ids": prompt.tolist()}, params, name):
                pass

        async with asyncio.TaskGroup() as group:
            for prompt, name in zip(prompts, names, strict=True):
                group.create_task(one(prompt, name))


async def _open(call: _Call, body: bytes) -> bytes:
    return json.dumps(await _opened(call, json.loads(body))).encode()


async def _opened(call: _Call, header: dict[str, Any]) -> dict[str, Any]:
    """The identity of what is served, opened as `header["asked"]` says if nobody did before.

    Every request says what it counts on, so that a server that was restarted is opened again, and one that came back
    with another model is refused: `header["teacher"]` is the `sha256` of the identity that the client knows.
    """
    if call.config.parallel_config.data_parallel_size > 1:
        raise InputError("data parallel copies in one server are not known; start a server for each")
    asked = json.dumps({name: header["asked"][name] for name in ("start", "end", "top_k", "floor")}, sort_keys=True)
    known: dict[str, dict[str, Any]] = call.held("bytecache_opened", dict)
    if asked not in known:
        model = call.config.model_config
        settings = st.Teacher(model=model.model, revision=model.revision or "")
        folder = await asyncio.to_thread(resolve_model, settings)
        (told, *_) = map(json.loads, await call.workers("served_open", str(folder), asked))
        if "error" in told:
            raise InputError(told["error"])
        told |= _identity(call, await asyncio.to_thread(weights_identity, folder))
        sha256 = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        known[asked] = told | {"sha256": sha256}
    if header.get("teacher", known[asked]["sha256"]) != known[asked]["sha256"]:
        raise InputError("another model, or another version of vLLM, is served there now")
    return known[asked]


def _identity(call: _Call, weights: dict[str, str]) -> dict[str, Any]:
    """What the server knows of its model."""
    import torch
    import vllm

    model = call.config.model_config
    plain = {name: str(getattr(model, name)).removeprefix("torch.") for name in ("dtype", "head_dtype")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        **plain, "weights": weights, "revision": model.revision or "", "quantization": model.quantization or "",
        "device": str(device), "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
        "static_contexts": list(CONTEXTS), "max_tokens": model.max_model_len,
    }  # fmt: skip


async def _rows(call: _Call, body: bytes) -> bytes:
    name = uuid.uuid4().hex
    header, arrays = unpack(body)
    check_rows(arrays, (await _opened(call, header))["size"])
    prompts, firsts = _prompts(arrays)
    rows = sum(len(prompt) - first for prompt, first in zip(prompts, firsts, strict=True))
    if not rows or min(firsts) < 0 or len(arrays["starts"]) != rows or len(arrays["following"]) != rows:
        raise ValueError(f"{len(arrays['starts'])} starts and {len(arrays['following'])} tokens for {rows} rows")
    names = [f"{name}-{number}" for number in range(len(prompts))]
    await call.workers("served_want", name, body)
    try:
        await call.finish(prompts, names, reuse_prefix="anchor" in arrays)
        (answer, *_) = await call.workers("served_collect", name)
    finally:
        await call.workers("served_drop", name)
    if isinstance(answer, str):
        raise InputError(answer)
    return bytes(answer)


async def _static(call: _Call, body: bytes) -> bytes:
    header, arrays = unpack(body)
    opened = await _opened(call, header)
    check_static(arrays, opened["size"])
    contexts = opened["contexts"]
    async with call.held("bytecache_static", asyncio.Lock):  # another's question may drop states to make room
        (missing, *_) = await call.workers("served_static_missing", body)
        for number, context in enumerate(contexts if missing else []):
            name = uuid.uuid4().hex
            names = [f"{name}-{token}" for token in missing]
            await call.workers("served_want_states", names, missing, number, len(context) + 1)
            prompts = [np.array([*context, token], np.int32) for token in missing]
            await call.finish(prompts, names, reuse_prefix=False)
        (answer, *_) = await call.workers("served_static_rows", body)
    return bytes(answer)
