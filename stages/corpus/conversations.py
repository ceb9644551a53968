"""Records with roles: what is learned (a response) and what is only read before it (its context).

`corpus.kind = "chat"`: every assistant message of a conversation becomes a document of its own. Its text is the
message's content without surrounding white space, which many templates trim; its context is a JSON array of the
messages before it. Teacher and student each render that context with their own template (`stages.tokens.chat`), exactly
what they would be given to write the message themselves. A conversation's turns share its opening, by which they
are split into train and held out together.
`corpus.kind = "completion"`: text is the response, context the prompt, both as they are; nothing is rendered.
Price: a context is repeated for every turn of its conversation.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from bytecache.schemas.errors import InputError

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Names under which prompts and responses are found, in this order."""
KIND_KEY = b"bytecache-kind"
"""Key of the schema metadata of a slice of the corpus; the value is its `corpus.kind`."""
FIELDS = ("messages", *dict.fromkeys(name for pair in PAIRS for name in pair))


class Turn(NamedTuple):
    """A response and what comes before it; `suffix` tells the turns of one conversation apart."""

    suffix: str
    text: str
    context: str


def turns(record: dict[str, Any], kind: str, where: str) -> Iterator[Turn]:
    """The documents of one record.

    Args:
        record: with `messages`, or a pair of `PAIRS`. kind: "chat" or "completion". where: for messages.

    Raises:
        InputError: naming place, field and remedy, for a record without them or with others than text.
    """
    if kind == "chat" and record.get("messages") is not None:
        yield from _conversation(_messages(record["messages"], where))
        return
    prompt, response = _pair(record, kind, where)
    if kind == "completion":
        yield Turn("", response, prompt)
    else:
        yield from _conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])


def opening(context: str, kind: str) -> str:
    """What the turns of one conversation have in common: its messages up to the first answer."""
    if kind != "chat":
        return context
    messages = json.loads(context)
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return _json(messages[:first])


def _conversation(messages: list[dict[str, str]]) -> Iterator[Turn]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(answers, 1):
        suffix = f"/{number}" if len(answers) > 1 else ""
        yield Turn(suffix, messages[i]["content"].strip(), _json(messages[:i]))


def _json(messages: list[dict[str, str]]) -> str:
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `messages` is no list of messages; correct or remove the record")
    messages = []
    for number, message in enumerate(value):
        here = f"{where}, message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{here}: no object with `role` and `content`; correct or remove the record")
        others = sorted(k for k, v in message.items() if k not in ("role", "content") and v not in (None, [], ""))
        if others:
            raise InputError(
                f"{here}: field {others[0]!r} would be lost, only `role` and `content` are read; remove it"
            )
        content = message.get("content")
        if isinstance(content, list):
            content = _joined(content, here)
        if not isinstance(content, str):
            raise InputError(f"{here}: `content` is {type(content).__name__}, expected text; correct the record")
        messages.append({"role": message["role"], "content": content})
    return messages


def _joined(parts: list[Any], here: str) -> str:
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise InputError(f"{here}: `content` has parts that are not text; remove the record")
    return "".join(part["text"] for part in parts)


def _pair(record: dict[str, Any], kind: str, where: str) -> tuple[str, str]:
    for names in PAIRS:
        if all(name in record for name in names):
            values = [record[name] for name in names]
            if not all(isinstance(value, str) for value in values):
                raise InputError(f"{where}: fields {names[0]!r} and {names[1]!r} must be text; correct the record")
            return values[0], values[1]
    known = ", ".join(f"{a} and {b}" for a, b in PAIRS)
    also = "`messages`, or " if kind == "chat" else ""
    present = ", ".join(list(record)[:8]) or "nothing"
    raise InputError(
        f"{where}: corpus.kind = {kind!r} needs {also}one of the pairs {known} (present: {present}); "
        "rename the fields, or set corpus.kind"
    )
