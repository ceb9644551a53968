"""The teacher behind HTTP, exactly: rows of path masses from a `vllm serve` that carries our extension.

What is sent is a window's tokens and text, what comes back its reduced rows, as the engine inside the server made them
(stages.engines.vllm_serve): nothing is lost against `teacher.backend = "vllm"`, and a fleet of machines without a GPU
shares one big teacher. At most `teacher.server_requests` are under way; a server that restarts is waited for. As with
any server the same question need not be answered with the same last digits.

Price: about 5 bytes of text and tokens up and some hundred bytes down for each row; branches are requests of the
server, which compute at most one block of its prefix cache again.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.stages.engines.answers import Bound
from bytecache.stages.engines.engine import Branch, Engine, Prompt, refuse_long_branches
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.engines.server_client import Client, in_order
from bytecache.stages.engines.static import StaticJob, together, tokens_of
from bytecache.stages.engines.wire import pack, unpack_rows
from bytecache.stages.tokens.vocab import Vocabulary

HOW = (
    "start it with --worker-extension-cls bytecache.stages.engines.vllm_serve.ServedPaths "
    "--middleware bytecache.stages.engines.vllm_serve.Paths, where bytecache is installed"
)
WORST = 1e-2
"""Nats by which our rows and the server's own log-probabilities may differ: another head precision."""


class Opened:
    """What a server says of its teacher, opened for these settings. Raises ConfigError, EngineError."""

    def __init__(self, client: Client, settings: st.Teacher) -> None:
        self.client = client
        self.asked = settings.model_dump(include={"start", "end", "top_k", "floor"})
        try:
            self.told = client.post("bytecache/open", {"asked": self.asked}, Bound())
        except EngineError as error:
            if "HTTP 404" in str(error) or "HTTP 405" in str(error):
                raise ConfigError(f"{client.address} answers no path masses: {HOW}") from None
            raise
        kinds = {"vocabulary": str, "weights": dict, "versions": dict, "sha256": str, "max_tokens": int}
        for name, kind in kinds.items():
            if type(self.told.get(name)) is not kind:
                raise EngineError(f"{client.address} does not say its {name}; serve with this version of bytecache")

    def ask(self, path: str, n_rows: int, arrays: dict[str, np.ndarray]) -> list[RowMasses]:
        """`n_rows` rows. Raises ConfigError where another teacher is served by now, EngineError."""
        body = pack({"asked": self.asked, "teacher": self.told["sha256"]}, **arrays)
        raw = self.client.post_bytes(f"bytecache/{path}", body, Bound.of_rows(n_rows))
        try:
            return unpack_rows(raw)
        except ValueError as error:
            raise EngineError(f"{self.client.address}: an answer that is no rows ({error}); see its log") from None


class ServedEngine(Engine):
    """Rows from the extension in a vLLM server.

    Raises ConfigError where the server has no extension or another tokenizer than `teacher.model`, EngineError where it
    does not answer or fails the self-test.
    """

    def __init__(self, opened: Opened, vocabulary: Vocabulary, settings: st.Teacher, longest: int) -> None:
        self.opened, self.settings, self.vocabulary = opened, settings, vocabulary
        address, told = opened.client.address, opened.told
        if told["vocabulary"] != vocabulary.fingerprint:
            raise ConfigError(
                f"{address} serves a model with another tokenizer, start or end tokens than teacher.model = "
                f"{settings.model!r}; name the folder or hub id of the model that is served"
            )
        self.longest = min(longest, int(told["max_tokens"]) - 1)
        if settings.context > self.longest + 1:
            raise ConfigError(
                f"teacher.context = {settings.context} exceeds the {told['max_tokens']} tokens of {address}, one of "
                "which is sampled; lower it, or serve with a larger --max-model-len"
            )
        self._pool = ThreadPoolExecutor(settings.server_requests, thread_name_prefix="served")
        self._self_test()

    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        most = 2 * self.settings.server_requests
        yield from (rows for _, rows in in_order(self._pool, most, self._window, prompts))

    def _window(self, prompt: Prompt) -> RowMasses:
        following = np.append(prompt.tokens[prompt.first_row + 1 :], -1).astype(np.int64)
        first = np.array([prompt.first_row], np.int64)
        return self._rows(prompt, prompt.starts, following, {"first": first}, len(prompt.tokens) - prompt.first_row)

    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        for prompt, branches in jobs:
            refuse_long_branches(prompt.name, branches, self.longest)
        most = 2 * self.settings.server_requests
        yield from (rows for _, rows in in_order(self._pool, most, self._branches, jobs))

    def _branches(self, job: tuple[Prompt, Sequence[Branch]]) -> RowMasses:
        prompt, branches = job
        arrays: dict[str, np.ndarray] = {
            "anchor": np.array([branch.anchor for branch in branches], np.int64),
            "length": np.array([len(branch.chain) for branch in branches], np.int64),
            "chain": np.array([token for branch in branches for token in branch.chain], np.int32),
        }  # fmt: skip
        starts = np.array([branch.start for branch in branches], np.int64)
        return self._rows(prompt, starts, np.full(len(branches), -1, np.int64), arrays, len(branches))

    def _rows(
        self, prompt: Prompt, starts: np.ndarray, following: np.ndarray, which: dict[str, np.ndarray], count: int
    ) -> RowMasses:
        arrays = {
            "tokens": prompt.tokens.astype(np.int32), "text": prompt.text, "starts": starts.astype(np.int64),
            "following": following, **which,
        }  # fmt: skip
        jobs = self.opened.ask("rows", count, arrays)
        if [len(rows.log_norm) for rows in jobs] != [count]:
            came = sum(len(rows.log_norm) for rows in jobs)
            raise EngineError(f"{prompt.name}: {came} rows came for {count}; see the server's log")
        return jobs[0]

    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        for some in together(jobs):
            arrays = {
                "text": np.concatenate([job.text for job in some]),
                "size": np.array([len(job.text) for job in some], np.int64),
                "token": tokens_of(some),
                "start": np.concatenate([job.start for job in some]).astype(np.int64),
                "count": np.array([len(job.token) for job in some], np.int64),
            }  # fmt: skip
            rows = self.opened.ask("static", len(arrays["token"]), arrays)
            if [len(each.log_norm) for each in rows] != [len(job.token) for job in some]:
                raise EngineError(f"{some[0].name}: static rows came for other histories; see the server's log")
            yield from rows

    def load_static(self, folder: Path) -> None:
        """The server keeps its own."""

    def save_static(self, folder: Path) -> None:
        """The server keeps its own."""

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _self_test(self) -> None:
        """Our rows must say of a short prompt what the server's own log-probabilities say."""
        some = np.resize(self.vocabulary.order[:: max(1, len(self.vocabulary.order) // 7)], 7)
        tokens = np.append(self.vocabulary.start_id, some).astype(np.int32)
        pieces = [self.vocabulary.token_bytes[token] or b"" for token in some]
        starts = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        prompt = Prompt("self-test", tokens, 0, np.frombuffer(b"".join(pieces), np.uint8), starts)
        rows = self._window(prompt)
        theirs = np.array(self._told_of(tokens), np.float64)
        worst = float(np.abs(theirs - rows.next_logp[:-1]).max())
        if not worst < WORST:
            raise EngineError(
                f"{self.opened.client.address}: path masses and the server's own log-probabilities differ by "
                f"{worst:.2g} nats; serve with the version of vLLM in lock/ and --logprobs-mode raw_logprobs"
            )

    def _told_of(self, tokens: np.ndarray) -> list[float]:
        """The server's log-probability of each token after those before it, from the second on."""
        body: dict[str, Any] = {
            "model": self.opened.client.served.model, "prompt": tokens.tolist(), "max_tokens": 1, "temperature": 0.0,
            "prompt_logprobs": 1, "add_special_tokens": False,
        }  # fmt: skip
        answer = self.opened.client.post("completions", body, Bound.of_listing(len(tokens), 1))
        try:
            listed = answer["choices"][0]["prompt_logprobs"]
            return [float(listed[at][str(int(token))]["logprob"]) for at, token in enumerate(tokens) if at]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            told = json.dumps(answer)[:200]
            raise EngineError(f"{self.opened.client.address}: no log-probabilities of a prompt ({told})") from None
