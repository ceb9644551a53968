"""A completions server on loopback that answers from a tiny model, and fails as servers fail.

It speaks as vLLM does: `prompt_logprobs` (the true token listed whatever its rank), `logprobs` of what it samples,
`return_tokens_as_token_ids`, `echo`. With `vllm=False` it knows `echo` alone, and tokens are text.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.loopback import Loopback, Quiet

Choose = Callable[[int], str]
"""Number of a completion request, from 0 on -> its fault, or "" for none."""


class CompletionsServer(Loopback):
    """Serves `folder` as `name`. Faults: see `_Handler`; `seen` counts what was done, `most` the requests at once."""

    def __init__(
        self, folder: Path, *, name: str = "tiny", vllm: bool = True, max_logprobs: int = 1000,
        choose: Choose = lambda number: "", slow: float = 0.0, key: str = "",
    ) -> None:  # fmt: skip
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.token_bytes = load_vocabulary(folder).token_bytes
        self.name, self.vllm, self.max_logprobs, self.choose, self.slow = name, vllm, max_logprobs, choose, slow
        self.key = key
        self.seen: Counter[str] = Counter()
        self.requests = self.most = self._now = 0
        self.lock = threading.Lock()
        server = self

        class Handler(Quiet):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:  # noqa: N802
                if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                    return self.answer(401, {"error": "no key"})
                if self.path == "/v1/models":
                    return self.answer(200, {"data": [{"id": server.name, "max_model_len": 256}]})
                if self.path == "/version" and server.vllm:
                    return self.answer(200, {"version": "0.0-test"})
                return self.answer(404, {"error": "unknown"})

            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/completions":
                    return self.answer(404, {"error": "unknown"})
                with server.lock:
                    fault, server.requests = server.choose(server.requests), server.requests + 1
                    server.seen[fault or "none"] += 1
                    server._now += 1
                    server.most = max(server.most, server._now)
                time.sleep(server.slow)
                with server.lock:  # before the answer: who has it may ask again at once
                    server._now -= 1
                return self.completion(body, fault)

            def completion(self, body: dict[str, Any], fault: str) -> None:
                if fault in ("429", "500"):
                    return self.answer(int(fault), {"error": "busy"}, {"Retry-After": "0"})
                most = max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0)
                if most > server.max_logprobs:
                    words = f"Requested logprobs of {most}, which is greater than max allowed: {server.max_logprobs}"
                    return self.answer(400, {"error": {"message": words}})
                found = server.complete(body)
                if fault == "truncated":
                    choice = found["choices"][0]
                    if choice.get("prompt_logprobs"):
                        choice["prompt_logprobs"] = choice["prompt_logprobs"][:-1]
                    choice["logprobs"]["top_logprobs"] = choice["logprobs"]["top_logprobs"][:-1]
                if fault == "other":
                    found["model"] = "another"
                if fault == "nan":
                    found["choices"][0]["logprobs"]["top_logprobs"][-1] = {"token_id:5": float("nan")}
                if fault == "logits":
                    for position in (found["choices"][0].get("prompt_logprobs") or [])[1:]:
                        for entry in position.values():
                            entry["logprob"] += 9.0
                raw = json.dumps(found).encode()
                if fault == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw[: len(raw) // 2])
                    self.close_connection = True
                    self.connection.close()
                    return None
                return self.send_raw(200, raw, {})

            def answer(self, code: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
                self.send_raw(code, json.dumps(value).encode(), headers or {})

            def send_raw(self, code: int, raw: bytes, headers: dict[str, str]) -> None:
                self.send_response(code)
                for each in {**headers, "Content-Length": str(len(raw))}.items():
                    self.send_header(*each)
                self.end_headers()
                self.wfile.write(raw)

        super().__init__(Handler)
        self.api = f"{self.url}/v1"

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of one token."""
        tokens = body["prompt"]
        with self.lock:
            logps = torch.log_softmax(self.model(torch.tensor([tokens])).logits[0].double(), -1)
        k = body.get("logprobs") or 0
        as_ids = bool(self.vllm and body.get("return_tokens_as_token_ids"))
        tops = [self._top(row, k, as_ids) for row in logps]
        choice: dict[str, Any] = {"text": "", "logprobs": {"top_logprobs": tops[-1:]}}
        asked = body.get("prompt_logprobs") if self.vllm else None
        if asked:
            choice["prompt_logprobs"] = [None, *(
                self._ranked(row, asked, true) for row, true in zip(logps[:-1], tokens[1:], strict=True)
            )]  # fmt: skip
        if body.get("echo"):
            choice["text"] = b"".join(self.token_bytes[token] or b"" for token in tokens).decode("utf-8", "replace")
            choice["logprobs"]["top_logprobs"] = [None, *tops]
        return {"model": self.name, "choices": [choice]}

    def _top(self, row: torch.Tensor, k: int, as_ids: bool) -> dict[str, float]:
        values, ids = row.topk(min(k, len(row)))
        found: dict[str, float] = {}
        for value, token in zip(values.tolist(), ids.tolist(), strict=True):
            piece = self.token_bytes[token] if token < len(self.token_bytes) else None
            text = (piece or b"").decode("utf-8", "replace")
            found.setdefault(f"token_id:{token}" if as_ids else text, value)
        return found

    def _ranked(self, row: torch.Tensor, k: int, true: int) -> dict[str, dict[str, Any]]:
        values, ids = row.topk(min(k, len(row)))
        found = {
            str(token): {"logprob": value, "rank": rank}
            for rank, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), 1)
        }
        rank = int((row > row[true]).sum()) + 1
        found.setdefault(str(true), {"logprob": float(row[true]), "rank": rank})
        return found
