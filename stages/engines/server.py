"""The teacher behind HTTP: any server with OpenAI's completions and log-probabilities of a prompt.

A window is one request, its prompt the token ids themselves; what comes back is the k likeliest tokens at every
position, which `stages.engines.listing` reduces to path masses. So this is top-k fidelity, said plainly: what is not
listed is tail, spread over nothing, and there is no certificate, for there is nothing exact to compare with
(`bytecache fidelity --teacher` measures against the model itself). The true token counts only where it is among the k
likeliest. Branches are requests of one sampled token; static rows there are none.

At most `teacher.server_requests` are under way, answers are taken in order. The same question need not be answered
with the same last digits (a server batches as it likes), so a unit made twice may differ in them: the first that is
committed counts.

Price: a JSON entry of about 60 bytes for each of k tokens at every position.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError, EngineError
from bytecache.stages.engines.answers import Bound, TruncatedError
from bytecache.stages.engines.engine import Branch, Engine, Prompt
from bytecache.stages.engines.listing import Listing, ListingReducer
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.engines.server_client import (
    Answer,
    Client,
    Item,
    Listed,
    Spoken,
    as_completion,
    in_order,
    listed_entries,
)
from bytecache.stages.engines.static import StaticJob
from bytecache.stages.tokens.vocab import Misfit, Vocabulary

PROBE = (
    "The ferry leaves at ten past eight and takes an hour and a half. Whoever wants to see the island before noon buys "
    "the ticket the day before, at the kiosk by the post office: def price(adults, children=0): return 4.5 * adults"
)
"""What every server is asked first: which protocol it knows, whether its tokens are ours, what it lists in general."""
SMOOTHING = 1e-3
"""Part of the prior that is spread evenly, so that no token is impossible."""
ATTEMPTS = 3
"""How often a request whose answer breaks off is sent."""
AGREE = 0.9
"""Share of decoded tokens that must be ours."""


class ServerEngine(Engine):
    """Rows from a completions server.

    Raises ConfigError where the server's model or tokenizer is not the configured one, or lists nothing of a prompt;
    EngineError where it does not answer.
    """

    def __init__(self, client: Client, vocabulary: Vocabulary, settings: st.Teacher) -> None:
        self.client, self.vocabulary, self.settings = client, vocabulary, settings
        self._pool = ThreadPoolExecutor(settings.server_requests, thread_name_prefix="server")
        self._spoken = Spoken(vocabulary.token_bytes)
        self.protocol = "prompt_logprobs"
        limit = client.served.max_tokens
        if limit and settings.context > limit:
            raise ConfigError(
                f"teacher.context = {settings.context} exceeds the {limit} tokens of {client.served.model!r} at "
                f"{client.address}; lower it"
            )
        self._reducer = ListingReducer(vocabulary, self._probe())

    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        for prompt, listed in self._in_order(lambda prompt: self._listed(prompt.tokens, prompt.first_row), prompts):
            following = prompt.tokens[prompt.first_row + 1 :].astype(np.int64)
            yield self._reducer.reduce(prompt.text, prompt.starts, following, _listing(listed))

    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        asked = [
            np.append(prompt.tokens[: branch.anchor + 1], np.array(branch.chain, np.int32))
            for prompt, branches in jobs
            for branch in branches
        ]
        answers = self._in_order(lambda tokens: self._listed(tokens, len(tokens) - 1), asked)
        for prompt, branches in jobs:
            rows = [next(answers)[1][0] for _ in branches]
            starts = np.array([branch.start for branch in branches], np.int64)
            none = np.full(max(0, len(branches) - 1), -1, np.int64)
            yield self._reducer.reduce(prompt.text, starts, none, _listing(rows))

    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        if jobs:
            raise ConfigError('teacher.static: a server makes no static rows; leave it at 0 with backend = "server"')
        return iter(())

    def load_static(self, folder: Path) -> None:
        """There are none."""

    def save_static(self, folder: Path) -> None:
        """There are none."""

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _in_order(self, function: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[tuple[Item, Answer]]:
        return in_order(self._pool, 2 * self.settings.server_requests, function, items)

    def _listed(self, tokens: np.ndarray, first: int) -> list[Listed]:
        """What is listed about the token after each history tokens[: j + 1], j >= first; the last one's included."""
        for attempt in range(ATTEMPTS):
            try:
                return self._answer(tokens, first)
            except TruncatedError as error:
                if attempt == ATTEMPTS - 1:
                    raise EngineError(
                        f"{self.client.address}: an answer about {len(tokens)} tokens is not whole ({error}), "
                        f"{ATTEMPTS} times; nothing of it is used, see the server's log"
                    ) from error
        raise AssertionError

    def _answer(self, tokens: np.ndarray, first: int) -> list[Listed]:
        k = min(self.settings.top_k, self.vocabulary.size)  # more would be an error inside the engine
        whole = first < len(tokens) - 1
        body: dict[str, Any] = {
            "model": self.client.served.model, "prompt": [int(token) for token in tokens], "max_tokens": 1,
            "temperature": 0.0, "logprobs": k, "return_tokens_as_token_ids": True, "add_special_tokens": False,
        }  # fmt: skip
        if whole:
            body |= {"prompt_logprobs": k} if self.protocol == "prompt_logprobs" else {"echo": True}
        answer = self.client.post("completions", body, Bound.of_listing(len(tokens) if whole else 1, k))
        if answer.get("model", self.client.served.model) != self.client.served.model:
            raise EngineError(
                f"{self.client.address} answers as {str(answer.get('model'))[:80]!r}, asked was "
                f"{self.client.served.model!r}: another model is served there now"
            )
        with as_completion(self.client.address):
            return self._read(answer, tokens, first, k, whole=whole)

    def _read(self, answer: dict[str, Any], tokens: np.ndarray, first: int, k: int, *, whole: bool) -> list[Listed]:
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        sampled = ((choice.get("logprobs") or {}).get("top_logprobs") or [])[-1:]
        if not sampled:
            raise TruncatedError("no logprobs of what comes after the prompt")
        last = self._spoken.listed(sampled[0], -1, k)
        if not whole:
            return [last]
        return [*self._of_prompt(choice, tokens, first, k), last]

    def _of_prompt(self, choice: dict[str, Any], tokens: np.ndarray, first: int, k: int) -> list[Listed]:
        true = [int(token) for token in tokens]
        if self.protocol == "prompt_logprobs":
            logprobs = choice.get("prompt_logprobs")
            if not isinstance(logprobs, list) or len(logprobs) != len(true):
                size = len(logprobs) if isinstance(logprobs, list) else "no"
                raise TruncatedError(f"{size} positions of prompt_logprobs for {len(true)} tokens")
            return [listed_entries(logprobs[at], true[at], k) for at in range(first + 1, len(true))]
        logprobs = (choice.get("logprobs") or {}).get("top_logprobs")
        if not isinstance(logprobs, list) or len(logprobs) != len(true) + 1:
            size = len(logprobs) if isinstance(logprobs, list) else "no"
            raise TruncatedError(f"{size} positions of logprobs for {len(true)} tokens and one more")
        return [self._spoken.listed(logprobs[at], true[at], k) for at in range(first + 1, len(true))]

    def _probe(self) -> np.ndarray:
        """float64 [size]: mean of what the server lists about `PROBE`, a little of it spread evenly.

        Finds the protocol on the way, and refuses a server whose tokens are not those of `teacher.model`.
        """
        (encoded,) = self.vocabulary.encode_batch([PROBE])
        ids = encoded.ids if not isinstance(encoded, Misfit) else self.vocabulary.order[:32]
        tokens = np.append(self.vocabulary.start_id, ids)[: max(2, self.settings.context - 1)].astype(np.int32)
        listed: list[Listed] = []
        for protocol in ("prompt_logprobs", "echo"):
            self.protocol = protocol
            try:
                listed = self._answer(tokens, 0)
                break
            except TruncatedError:
                continue
        if not listed:
            raise ConfigError(
                f"{self.client.address} says nothing about the tokens of a prompt: neither prompt_logprobs (vLLM) nor "
                "echo with logprobs; serve the model with a server that does"
            )
        self._refuse_other_tokens(tokens)
        weight = np.zeros(self.vocabulary.size)
        for position in listed:
            inside = position.ids < self.vocabulary.size
            np.add.at(weight, position.ids[inside], np.exp(position.logps[inside]))
        mean = weight / max(weight.sum(), 1e-300)
        prior: np.ndarray = (1 - SMOOTHING) * mean + SMOOTHING / self.vocabulary.size
        return prior

    def _refuse_other_tokens(self, tokens: np.ndarray) -> None:
        """What the server calls the prompt's tokens must be what `teacher.model` calls them, where it says."""
        body = {
            "model": self.client.served.model, "prompt": [int(token) for token in tokens], "max_tokens": 1,
            "temperature": 0.0, "logprobs": 1, "prompt_logprobs": 1, "echo": True, "add_special_tokens": False,
        }  # fmt: skip
        answer = self.client.post("completions", body, Bound.of_listing(len(tokens), 2))
        with as_completion(self.client.address):
            said = str(((answer.get("choices") or [{}])[0]).get("text", ""))
        pieces = [self.vocabulary.token_bytes[int(token)] or b"" for token in tokens]
        ours = b"".join(pieces).decode("utf-8", "replace").strip()
        same = sum(a == b for a, b in zip(said.strip(), ours, strict=False))
        echoed = len(said.strip()) > len(ours) / 2  # not every server writes the prompt back
        if echoed and same < AGREE * len(ours) and ours not in said:
            raise ConfigError(
                f"{self.client.served.model!r} at {self.client.address} spells the same token ids otherwise "
                f"({said.strip()[:40]!r}, here {ours[:40]!r}): teacher.model = {self.settings.model!r} is not its "
                "tokenizer; name the folder or hub id of the model that is served"
            )


def _listing(rows: Sequence[Listed]) -> Listing:
    empty = np.zeros(0)
    return Listing(
        np.array([len(row.ids) for row in rows], np.int64),
        np.concatenate([empty.astype(np.int64), *(row.ids for row in rows)]),
        np.concatenate([empty, *(np.exp(np.minimum(row.logps, 0.0)) for row in rows)]),
    )
