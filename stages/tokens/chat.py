"""Answers after a rendered context: the one place where chat templates meet token bytes.

An answer is what the model would write after `prompt` = the template applied to the messages before it, with its
generation prompt. The template applied to those messages and the answer must be

    prompt + lead + answer + trail        lead: nothing, or what the template puts before any answer (an empty
                                          <think> block, a space); trail: what it puts after, the end token first

which is checked for every document by rendering it a second time with a marker in the answer's place; a template that
changes the answer, or its prompt, gives a `Misfit` with the reason. `prompt + lead + answer` is then tokenised as the
model's own tokenizer does it, control tokens in the template included, and the bytes of the tokens at its end,
joined backwards, must be the text. A few tokens before the answer (`LEAD`, none across a control token) stay part of
the spelled bytes: the answer's first byte may share a token with the white space before it. Whatever is before them is
`Encoded.prefix`, ids without bytes. A message that spells a control token is set aside, never read as one.

The date that some templates print is fixed, since equal inputs must give equal bytes.
Price: three renderings of a document (0.1 ms each, and as much for the way to the child) and its tokenisation; 2 s for
the child's start.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas.errors import ConfigError, InputError
from bytecache.stages.tokens.cutters import HfCutter
from bytecache.stages.tokens.guard import MIB, Failure, Guard, Limits, UnopenedError
from bytecache.stages.tokens.library import Facts, opened
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary

LEAD = 16
"""Tokens before an answer that stay part of its spelled bytes."""
MARKER = "Qz7marker7zQ"
"""Stands in the answer's place when the template around it is sought; no white space to trim, no markup."""
RENDER_SECONDS, RENDER_MEMORY, LONGEST = 5.0, 256 * MIB, 1 << 20
"""What the renderings of one answer may take of the processor and of memory, and their length in characters; beside
what the length of its messages asks for. Templates that people use take a thousandth of it."""
_WHOLE, _SHORTENED = {"system", "user", "developer"}, {"assistant", "tool", "function"}
"""Roles whose messages a template must show as they are, and those whose messages it may shorten."""
DATE = datetime(2026, 1, 1)
"""What templates that print today's date are given."""


@dataclass(frozen=True)
class Template:
    """A tokenizer with its chat template, proven usable on a sample conversation; see `open`."""

    where: str
    renderer: Guard
    """Renders conversations in a child: a template is a stranger's program (`guard`)."""
    cutter: HfCutter
    control: dict[str, int]
    """Text of every control token that a template can contain."""
    end_id: int | None
    """The token right after an answer; None where the template puts text there."""

    @classmethod
    def open(cls, folder: Path | str, vocabulary: Vocabulary, *, setting: str) -> "Template":
        """The template of a checkpoint folder. `setting` names it in messages.

        Raises:
            ConfigError: there is none, or it cannot be aligned with the bytes of an answer; says why.
        """
        where = f"{setting} = {str(folder)!r}"
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{where}: chat data needs a tokenizer.json; choose another model, or corpus.kind")
        facts = _facts(folder, where)
        if facts.choices:
            names = ", ".join(repr(name[:40]) for name in facts.choices[:8])
            raise ConfigError(
                f"{where} has chat templates called {names}, and none called 'default', which is taken; "
                "save the one you mean as chat_template.jinja in that folder, or choose another model"
            )
        if facts.template is None:
            raise ConfigError(
                f"{where} has no chat template; choose a chat model, save one with the tokenizer, "
                'or set corpus.kind = "completion"'
            )
        spec = json.loads(file.read_text(encoding="utf-8"))
        cutter = HfCutter(spec | {"truncation": None, "padding": None}, f"the tokenizer of {where}", seal=False)
        renderer = _renderer(where, facts.template, json.dumps(facts.names, sort_keys=True))
        template = cls(where, renderer, cutter, vocabulary.control_names, None)
        sample = [{"role": "user", "content": "Hello"}]
        try:
            trail = template.around(sample, "World")[2]
        except Misfit as misfit:
            raise ConfigError(f"{where}: its chat template cannot be used ({misfit.reason}); choose another") from None
        end = next((i for text, i in template._longest_first() if trail.startswith(text)), None)
        template = cls(where, renderer, cutter, template.control, end)
        encoded = encode_answer(vocabulary, template, json.dumps(sample), "World")
        if isinstance(encoded, Misfit):
            raise ConfigError(
                f"{where}: tokens of its chat template do not spell its text ({encoded.reason}); choose another"
            )
        return template

    def require_end(self, vocabulary: Vocabulary) -> None:
        """ConfigError unless the template's end token is one of the vocabulary's END tokens."""
        if self.end_id not in vocabulary.end_ids.tolist():
            name = next(text for text, i in self.control.items() if i == self.end_id)
            raise ConfigError(
                f"{self.where}: answers end with {name!r}, which is not among the teacher's END tokens; "
                f"set teacher.end = {name!r}"
            )

    def around(self, messages: list[dict[str, Any]], answer: str) -> tuple[str, str, str]:
        """(prompt, lead, trail) of an answer to `messages`; raises Misfit with the reason where there is none."""
        answers = [[*messages, {"role": "assistant", "content": content}] for content in (answer, MARKER)]
        prompt, whole, marked = self._render([(messages, True), *((one, False) for one in answers)])
        if not whole.startswith(prompt) or not marked.startswith(prompt):
            raise Misfit("template: an answer does not follow the generation prompt")
        lead, marker, trail = marked[len(prompt) :].partition(MARKER)
        if not marker or MARKER in trail:
            raise Misfit("template: an answer is not repeated once as it is")
        rest = whole[len(prompt) :]
        for before in (lead, ""):
            if rest == before + answer + trail:
                _refuse_lost(messages, prompt)
                return prompt, before, trail
        raise Misfit("template: it changes the answer")

    def _render(self, renderings: list[tuple[list[dict[str, Any]], bool]]) -> list[str]:
        """The texts of conversations, each with a generation prompt behind it or without; raises Misfit."""
        size = sum(len(str(message)) for messages, _ in renderings for message in messages)
        limits = Limits(RENDER_SECONDS, RENDER_MEMORY + 64 * size)
        answer = self.renderer.call({"renderings": renderings, "longest": LONGEST + 16 * size}, limits)
        if isinstance(answer, Failure):
            raise Misfit(f"template: {answer}")
        rendered: list[str] = answer[0]
        return rendered

    def _longest_first(self) -> list[tuple[str, int]]:
        return sorted(self.control.items(), key=lambda item: -len(item[0]))


def _refuse_lost(messages: list[dict[str, Any]], prompt: str) -> None:
    """Raise Misfit where a template renders a conversation without one of its messages, as some do with `system`.

    What assistants and tools said may be shortened: many templates drop earlier reasoning.
    """
    for message in messages:
        role, content = message["role"], message["content"].strip()
        for kind in ("tools", "tool_calls"):
            for one in message.get(kind, []):
                if str(one.get("function", one).get("name", "")) not in prompt:
                    raise Misfit(f"template: it leaves out {'the tools' if kind == 'tools' else 'a call of a tool'}")
        if role in _WHOLE and content not in prompt:
            raise Misfit(f"template: it leaves out or changes a message of role {role}")
        if role not in _WHOLE | _SHORTENED and content not in prompt:
            raise Misfit("template: it leaves out a message of a role it does not know")


def _facts(folder: Path | str, where: str) -> Facts:
    try:
        with opened(Path(folder), f"the tokenizer of {where}") as tokenizer:
            return tokenizer.facts()
    except UnopenedError as error:
        raise InputError(f"{where}: its tokenizer cannot be opened ({error.reason}); fetch it again") from error


@lru_cache(maxsize=4)
def _renderer(where: str, template: str, names: str) -> Guard:
    """One child for all units of a template: its start costs two seconds."""
    setup = {"kind": "template", "template": template, "names": json.loads(names), "date": DATE.isoformat()}
    return Guard(f"the chat template of {where}", setup)


def template_sha256(folder: Path | str) -> str:
    """Hash of a checkpoint's chat template: part of what its words depend on."""
    facts = _facts(folder, f"teacher.model = {str(folder)!r}")
    return hashlib.sha256(facts.templates.encode()).hexdigest()


def encode_answer(vocabulary: Vocabulary, template: Template, context: str, answer: str) -> Encoded | Misfit:
    """An answer as tokens after the tokens of its rendered context.

    Args:
        context: JSON array of messages. answer: the assistant's words, non-empty.

    Returns:
        `Encoded` whose data, after `synthetic` bytes of template, is the answer; or the reason why not.
    """
    messages = json.loads(context)
    try:
        prompt, lead, _ = template.around(messages, answer)
    except Misfit as misfit:
        return misfit
    said = [answer, *(m["content"] for m in messages), *(str(m[k]) for m in messages for k in m if "tool" in k)]
    if any(name in text for text in said for name in template.control):
        return Misfit("control token in a message")
    before = (prompt + lead).encode()
    (ids,) = template.cutter.cut([prompt + lead + answer])
    if isinstance(ids, Failure):
        return Misfit(ids)
    spelt = _spell(vocabulary, template, np.asarray(ids, np.int32), before + answer.encode(), len(before))
    return spelt if isinstance(spelt, Misfit) else spelt._replace(context=context.encode())


def _spell(vocabulary: Vocabulary, template: Template, ids: np.ndarray, data: bytes, answer: int) -> Encoded | Misfit:
    """Walk the tokens backwards from the end of `data` until `LEAD` of them are before byte `answer`."""
    at, first, lead, synthetic = len(data), len(ids), 0, b""
    while first and lead < LEAD:
        i = int(ids[first - 1])
        token = vocabulary.token_bytes[i] if i < vocabulary.size else None
        if token is None:
            break
        if at < len(token) or data[at - len(token) : at] != token:
            # SentencePiece puts a space at the head of a run of text that has none.
            inside = token[1:]
            control = first == 1 or vocabulary.token_bytes[int(ids[first - 2])] is None
            if token[:1] != b" " or not control or data[at - len(inside) : at] != inside:
                return Misfit("tokens do not spell the rendered text")
            at, first, synthetic = at - len(inside), first - 1, b" "
            break
        at, first = at - len(token), first - 1
        lead += at < answer
    if at > answer:
        return Misfit("control token in the answer")
    if first and vocabulary.token_bytes[int(ids[first - 1])] is None and not synthetic:
        names = tuple(text.encode() for text, i in template.control.items() if i == int(ids[first - 1]))
        # A control token may swallow the white space after it.
        if not data[:at].rstrip().endswith(names):
            return Misfit("tokens do not spell the rendered text")
    kept = ids[first:]
    starts = np.zeros(len(kept) + 1, np.int64)
    np.cumsum([len(vocabulary.token_bytes[int(i)] or b"") for i in kept], out=starts[1:])
    prefix = ids[:first] if first else np.array([vocabulary.start_id], np.int32)
    return Encoded(kept, starts, synthetic + data[at:], len(synthetic) + answer - at, prefix)


def encode_completion(
    vocabulary: Vocabulary, prompts: Sequence[str], responses: Sequence[str]
) -> list[Encoded | Misfit]:
    """Responses after their prompts, joined as text and tokenised as one document."""
    answers: list[Encoded | Misfit] = []
    joined = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    for prompt, encoded in zip(prompts, vocabulary.encode_batch(joined), strict=True):
        if isinstance(encoded, Misfit):
            answers.append(encoded)
            continue
        head = encoded.synthetic + len(prompt.encode())
        # The last token that starts at or before the response, and LEAD before it.
        first = max(0, int(np.searchsorted(encoded.starts[:-1], head, side="right")) - 1 - LEAD)
        at = int(encoded.starts[first])
        answers.append(
            Encoded(
                encoded.ids[first:],
                encoded.starts[first:] - at,
                encoded.data[at:],
                head - at,
                np.concatenate([np.array([vocabulary.start_id], np.int32), encoded.ids[:first]]),
                prompt.encode(),
            )
        )
    return answers
